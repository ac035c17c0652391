"""What a plan will cost, step by step: seconds, disk, dollars; and in sentences, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iterft_lite.backends.judge.kinds import judge_price
from iterft_lite.backends.judge.prices import prices_date, tokens_of
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.machine.forecast import Forecast, forecast
from iterft_lite.machine.memory import BITS, Vram, shape_of, takes_turns, vram_needed
from iterft_lite.machine.resolve import Machine, Resolved, this_machine
from iterft_lite.machine.timing import Sample, setup_of
from iterft_lite.machine.work import NOTHING, Span, rows_asked, verdicts

LOGPROB_REPLY, SAMPLE_REPLY = 4, 400
"""Tokens that a judge writes where its probabilities are read, and where its text is (a reasoning model's thoughts
included)."""

ADAPTER_BITS = 32
"""Bits of a number in a trained adapter's file."""


@dataclass(frozen=True)
class StepCost:
    """What one step costs.

    Attributes:
        seconds: On this machine; zeros for a step that takes no time worth telling, or where nothing is known.
        disk: Bytes of the step's folder once the run is over, as the recipe's `keep` leaves it: exported models and adapters; 0
            where the model's size is not known.
        usd: Dollars at most; None where the judge's price is not known.
    """

    seconds: Span
    disk: int
    usd: float | None


def step_costs(
    plan: Plan, resolved: Resolved, samples: Sequence[Sample], machine: Machine | None = None
) -> dict[str, StepCost]:
    """What each step of a plan costs, by its key: plans that share steps are added up over distinct keys.

    Args:
        samples: What was timed (`timing.read_table`).
        machine: Where it would run; this one if None.
    """
    seconds = time_needed(plan, resolved, samples, machine).steps
    disk = _Disk(plan, resolved)
    return {step.key: StepCost(seconds.get(step.name, NOTHING), disk.of(step), _usd(plan, step)) for step in plan}


def time_needed(plan: Plan, resolved: Resolved, samples: Sequence[Sample], machine: Machine | None = None) -> Forecast:
    """How long a plan will take.

    Args:
        samples: What was timed (`timing.read_table`).
        machine: Where it would run; this one if None.
    """
    machine, shape = machine or this_machine(), shape_of(resolved.model)
    swap = takes_turns(resolved.recipe, resolved.model, machine)
    parameters = shape.parameters if shape else 0
    return forecast(plan, setup_of(resolved, machine, swap=swap, parameters=parameters), samples)


# -- disk


class _Disk:
    """Bytes that the steps of a plan leave."""

    def __init__(self, plan: Plan, resolved: Resolved) -> None:
        self._recipe, shape = plan.recipe, shape_of(resolved.model)
        rank = self._recipe.train.lora_rank
        self._merged = int(shape.parameters * BITS[self._recipe.quant] / 8) if shape else 0
        self._adapter = shape.layers * rank * sum(map(sum, shape.matrices)) * ADAPTER_BITS // 8 if shape else 0
        exports = [step.name for step in plan if step.verb == "export"]
        self._kept = {"all": exports, "last": exports[-1:]}.get(self._recipe.keep, [])
        trainings = [step.name for step in plan if step.verb == "train"]
        self._trained = [*trainings[:1], *trainings[-1:]] if self._recipe.keep == "ends" else trainings
        self._laid_over = exports[-1:] if self._recipe.keep == "ends" else exports

    def of(self, step: Step) -> int:
        """Bytes of a step. An untouched model that adapters are laid over lies in the cache, once for all runs."""
        if step.verb == "train":
            return self._adapter if step.name in self._trained else 0
        if step.verb != "export":
            return 0
        export, is_trained = self._recipe.export, "adapter" in dict(step.inputs)
        if step.name in self._kept and (export == "merged" or (export == "auto" and is_trained)):
            return self._merged
        return self._adapter if is_trained and export != "merged" and step.name in self._laid_over else 0


def _disk_sentence(plan: Plan, resolved: Resolved) -> str:
    """What the run takes on the disk at most, what stays of it, and what its base takes in the cache."""
    recipe, shape = plan.recipe, shape_of(resolved.model)
    if shape is None:
        return "not known before the model is downloaded"
    disk = _Disk(plan, resolved)
    stays, merged = sum(map(disk.of, plan)), shape.parameters * BITS[recipe.quant] / 8
    # while a cycle is measured, the untouched model and the cycle before are there too
    beside = {"adapter": 0, "auto": 1, "merged": 2}[recipe.export] if recipe.keep != "all" else 0
    most = f"{size_words(stays + beside * merged)} for the run" + (" at most" if recipe.export == "auto" else "")
    after = f", of which {size_words(stays)} stay" if beside else ""
    return f"{most}{after}, {size_words(shape.parameters * 2 + merged)} in the cache for the converted base"


def size_words(amount: float) -> str:
    """Bytes in words: `35 MB`, `8.1 GB`."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"


# -- dollars


def judging_usd(plan: Plan) -> float | None:
    """Dollars for all verdicts if every answer is as long as it may be and none is cached; None if a price is not known."""
    dollars = [_usd(plan, step) for step in plan]
    return None if None in dollars else sum(filter(None, dollars))


def _usd(plan: Plan, step: Step) -> float | None:
    """Dollars of a step at most; None if the judge's price is not known."""
    if step.verb != "judge":
        return 0.0
    judge = step.params["judge"]
    price = judge_price(judge["name"], batch=plan.recipe.judge_batch)
    if price is None:
        return None
    source = plan.inputs(step)["answers"]
    answers, longest = rows_asked(source), source.params["sampling"]["max_tokens"]
    questions = sum(map(tokens_of, source.params["prompts"].values())) * int(source.params["samples"])
    reply = LOGPROB_REPLY if judge["method"] == "logprobs" else SAMPLE_REPLY
    asked = [questions + answers * (tokens_of(rubric) + longest) for rubric in step.params["rubrics"].values()]
    return float(sum(judge["samples"] * price.usd(sent, reply * answers) for sent in asked))


# -- in sentences


def estimates(plan: Plan, resolved: Resolved, machine: Machine | None = None) -> dict[str, str]:
    """Sentences by name.

    Args:
        machine: Where it would run; this one if None.
    """
    machine = machine or this_machine()
    writing = [step for step in plan if VERBS[step.verb].act == "write"]
    answers = sum(rows_asked(step) for step in writing if step.verb == "evaluate_samples")
    written = sum(rows_asked(step) for step in writing) - answers
    most = sum(rows_asked(step) * step.params["sampling"]["max_tokens"] for step in writing)
    return {
        "steps": str(len(plan.steps)),
        "writing": f"{written:,} rows and {answers:,} answers, at most {most:,} tokens",
        "judging": judging_sentence(plan, resolved.inputs.judge.name),
        "GPU memory": _vram_sentence(vram_needed(_on_gpu(resolved.recipe, machine), resolved.model), machine),
        "disk": _disk_sentence(plan, resolved),
    }


def judging_sentence(plan: Plan, name: str) -> str:
    """How many verdicts by whom, and for how many dollars at most."""
    steps = [step for step in plan if step.verb == "judge"]
    calls = sum(verdicts(plan, step) for step in steps)
    usd = judging_usd(plan)
    batched = _batches_sentence(steps) if plan.recipe.judge_batch else ""
    if usd is None:
        return f"{calls:,} verdicts by {name}, whose price is not known{batched}"
    cost = f", at most ${usd:.2f} (prices of {prices_date()})" if usd else ", no dollars"
    return f"{calls:,} verdicts by {name}{cost}{batched}"


def _batches_sentence(steps: Sequence[Step]) -> str:
    waits = sum(step.part == "rows" for step in steps)  # their verdicts decide what is trained on
    goes_on = (
        f"{waits} of them decide what is trained on, and the run waits for these" if waits else "the GPU does not wait for them"
    )
    return f"; in {len(steps)} batches at half the price, each within 24 hours: {goes_on}"


def _on_gpu(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe as a machine with a GPU would resolve it."""
    if machine.gpu:
        return recipe
    return recipe.model_copy(update={"trainer": "unsloth", "train": recipe.train.model_copy(update={"base": "nf4"})})


def _vram_sentence(need: Vram | None, machine: Machine) -> str:
    if need is None:
        return "not known before the model is downloaded" if machine.gpu else "none: there is no GPU here"
    sizes = (
        f"about {need.together / 2**30:.0f} GiB with trainer and generator side by side, {need.in_turns / 2**30:.0f} in turns"
    )
    if not machine.gpu:
        return f"none: there is no GPU here; with one {sizes}"
    free = f"{machine.vram_free / 2**30:.0f} GiB are free"
    if need.in_turns > machine.vram_free:
        return f"{sizes}; {free}: too little, take a smaller model, `quant`, or shorter rows"
    return f"{sizes}; {free}: {'side by side' if need.together <= machine.vram_free else 'they take turns'}"
