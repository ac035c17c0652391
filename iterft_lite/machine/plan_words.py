"""What a plan will take, in sentences for people: time, work, dollars, GPU memory, disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from iterft_lite.backends.judge.prices import prices_date
from iterft_lite.backends.judge.rate_limit import FIRST, MOST
from iterft_lite.experiment.plan import EVERYDAY, Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.machine.estimate import disk_left, disk_meanwhile, judging_usd
from iterft_lite.machine.forecast import CALL_SECONDS, FURTHER, ORDER, Forecast, Ground, Nearness
from iterft_lite.machine.memory import shape_of, vram_needed
from iterft_lite.machine.resolve import Machine, Resolved, this_machine
from iterft_lite.machine.timing import BATCHES
from iterft_lite.machine.work import ACTS, Span, rows_asked, verdicts

LONG = 24 * 3600.0
"""Seconds of a plan from which on the sentence adds what takes less."""


def estimates(plan: Plan, resolved: Resolved, machine: Machine | None = None) -> dict[str, str]:
    """Sentences by name.

    Args:
        machine: Where it would run; this one if None.
    """
    writing = [step for step in plan if VERBS[step.verb].act == "write"]
    answers = sum(rows_asked(step) for step in writing if step.verb == "evaluate_samples" and step.part != EVERYDAY)
    everyday = sum(rows_asked(step) for step in writing if step.part == EVERYDAY)
    own = f", {everyday:,} everyday answers for the judge to be fitted on" if everyday else ""
    written = sum(rows_asked(step) for step in writing) - answers - everyday
    most = sum(rows_asked(step) * step.params["sampling"]["max_tokens"] for step in writing)
    return {
        "steps": str(len(plan.steps)),
        "writing": f"{written:,} rows and {answers:,} answers{own}, at most {most:,} tokens",
        "judging": judging_sentence(plan, resolved.inputs.judge.name),
        "GPU memory": vram_sentence(resolved, machine or this_machine()),
        "disk": _disk_sentence(plan, resolved),
    }


def judging_sentence(plan: Plan, name: str) -> str:
    """How many verdicts by whom, and for how many dollars at most."""
    steps = [step for step in plan if step.verb == "judge"]
    usd = judging_usd(plan)
    cost = ", whose price is not known" if usd is None else ", no dollars"
    if usd:
        cost = f", at most ${usd:.2f} (prices of {prices_date()})"
    batched = _batches_sentence(steps) if plan.recipe.judge_batch else ""
    return f"{sum(verdicts(plan, step) for step in steps):,} verdicts by {name}{cost}{batched}"


def _batches_sentence(steps: Sequence[Step]) -> str:
    waits = sum(step.part == "rows" for step in steps)  # their verdicts decide what is trained on
    goes_on = (
        f"{waits} of them decide what is trained on, and the run waits for these" if waits else "the GPU does not wait for them"
    )
    return f"; in {len(steps)} batches at half the price, each within 24 hours: {goes_on}"


def vram_sentence(resolved: Resolved, machine: Machine) -> str:
    """The GPU memory that the run takes, and whether this machine has it; without a GPU, what one would have to have."""
    recipe = resolved.recipe
    if not machine.gpu:  # as a machine with a GPU would resolve it
        recipe = recipe.model_copy(update={"trainer": "unsloth", "train": recipe.train.model_copy(update={"base": "nf4"})})
    need, none = vram_needed(recipe, resolved.model), "none: there is no GPU here"
    if need is None:
        return "not known before the model is downloaded" if machine.gpu else none
    together, in_turns, free = (round(amount / 2**30) for amount in (need.together, need.in_turns, machine.vram_free))
    sizes = f"about {together} GiB with trainer and generator side by side, {in_turns} in turns"
    if not machine.gpu:
        return f"{none}; with one {sizes}"
    if need.in_turns > machine.vram_free:
        return f"{sizes}; {free} GiB are free: too little, take a smaller model, `quant`, or shorter rows"
    return f"{sizes}; {free} GiB are free: {'side by side' if need.together <= machine.vram_free else 'they take turns'}"


def _disk_sentence(plan: Plan, resolved: Resolved) -> str:
    """What the run takes on the disk at most, what stays of it, and what its base takes in the cache."""
    recipe, shape = plan.recipe, shape_of(resolved.model)
    if shape is None:
        return "not known before the model is downloaded"
    stays, merged = sum(disk_left(plan, resolved).values()), shape.stored(recipe.quant)
    beside = disk_meanwhile(plan, resolved)
    most = f"{size_words(stays + beside)} for the run" + (" at most" if recipe.export == "auto" else "")
    after = f", of which {size_words(stays)} stay" if beside else ""
    return f"{most}{after}, {size_words(shape.parameters * 2 + merged)} in the cache for the converted base"


def size_words(amount: float) -> str:
    """Bytes in words: `35 MB`, `8.1 GB`."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"


# -- time


def time_sentence(found: Forecast) -> str:
    """A forecast, and how sure it is."""
    if any(ground.nearness == "unknown" and act != "judge" for act, ground in found.grounds.items()):
        return "not known before the model is downloaded; then `iterft doctor --measure` takes a minute"
    low, high = round(found.length.low), round(found.length.high)
    if found.measured:
        rows = f"rows of {found.length.mid:.0f} tokens, the mean of what it wrote here"
    else:
        rows = f"rows of {high} tokens at most" + (f", or {low} as the seed rows have" if low < high else "")
    parts = [f"{about(found.total)} in all, {about(found.cycle)} a cycle", *_rests_on(found.grounds), rows, *_judging(found)]
    if found.total.mid > LONG:
        parts.append("a GPU, a smaller model or fewer rows take less")
    return "; ".join(parts)


def about(span: Span) -> str:
    """Seconds in words: `about 5.5 min (4.4 to 6.9 min)`."""
    return f"about {duration(span.mid)} ({_range(span)})"


def _range(span: Span) -> str:
    low, high = duration(span.low), duration(span.high)
    (few, unit), (many, other) = low.split(), high.split()
    return f"{few} to {many} {unit}" if unit == other else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds as they are known, in two digits: `48 s`, `5.5 min`, `34 h`, `5.2 days`."""
    for size, most, unit in ((1.0, 90, "s"), (60.0, 90, "min"), (3600.0, 72, "h"), (86400.0, math.inf, "days")):
        value = seconds / size
        if value < most:
            return f"{value:.1f} {unit}" if unit != "s" and round(value, 1) < 10 else f"{value:,.0f} {unit}"
    raise ValueError(f"{seconds} is not a duration")


def _rests_on(grounds: Mapping[Act, Ground]) -> list[str]:
    """What a forecast rests on: the best known first, then what is known less well."""
    words, device = [], [act for act in ACTS if act in grounds and act != "judge"]
    for nearness in ORDER[:3]:
        acts = [act for act in device if grounds[act].nearness == nearness]
        if acts:
            names = " and ".join(", ".join(ACTS[act].words for act in acts).rsplit(", ", 1))
            what = "" if acts == device or nearness == "same" else f"{names} "
            words.append(what + _source(nearness, [grounds[act] for act in acts]))
    return words


def _source(nearness: Nearness, grounds: Sequence[Ground]) -> str:
    """Where seconds of one nearness come from."""
    if nearness == "same":
        runs = max(ground.runs for ground in grounds)
        source = f"{runs} {'run' if runs == 1 else 'runs'}" if runs else "`iterft doctor --measure`"
        return f"from {source} of this model on this machine, as busy as it was then"
    one = grounds[0].samples[0]
    model = f"from {one.name} ({one.kind.parameters / 1e6:,.0f} M parameters)"
    factor = f"within a factor of {FURTHER[nearness]:g} or more; `iterft doctor --measure"
    if nearness == "near":
        return f"{model} with other settings or versions, {factor} --recipe` tells more"
    return f"never timed on this machine: a first guess {model} on {one.kind.machine}, {factor}` takes a minute"


def _judging(found: Forecast) -> list[str]:
    """What is to be said of the judge by itself."""
    ground = found.grounds.get("judge", Ground("same"))
    if ground.nearness == "assumed":
        assumed = f"if a call takes {1000 * CALL_SECONDS:.0f} ms and {FIRST} to {MOST} go at once"
        return [f"the judge beside it {_range(found.judging)}, {assumed}"]
    if ground.nearness != "unknown":
        return []
    if ground.judge.endswith(BATCHES):
        return ["without the judge's batches, for each of which its provider takes up to a day"]
    return [f"without the time that {ground.judge} takes to judge, which was never measured here"]
