"""How long a plan will take, from what this machine has shown, and how sure that is. Pure: a function of samples and a plan.

Every step gets three numbers of seconds: the least, the likely, the most. What a step takes beyond its fixed part grows with
some unit of its work: optimiser steps where launching them bounds it, tokens where arithmetic does. Which of the two it is on a
machine is not known, so the range covers both; for a plan like one that was done before they agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

from iterft_lite.backends.judge.prices import tokens_of
from iterft_lite.backends.judge.rate_limit import FIRST, MOST
from iterft_lite.digests import Json
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.machine.timing import BATCHES, Kind, Sample, Setup, held_out_words, judged, words

Nearness = Literal["same", "similar", "scaled", "assumed", "unknown"]
"""What a number rests on: samples of the same kind; of the same model with other settings or versions; of another model;
a stated assumption; nothing."""

SPREAD: Mapping[int, float] = {1: 1.25, 2: 1.2}
"""A forecast from so many sittings may be off by this factor at least, either way; from more, by `LEAST_SPREAD`. What else runs
on a machine differs from sitting to sitting more than from step to step."""

LEAST_SPREAD = 1.15

DOCTOR_SPREAD = 1.5
"""The same where `iterft doctor --measure` is all there is: its trainings are a few steps long."""

SIMILAR = 2.0
"""Factor either way for other settings or versions."""

SCALED = 2.0
"""Factor either way for another model, beside the ratio of parameters itself."""

LATEST = 5
"""Sittings that count, the latest: a machine and what runs on it change."""

NEAR = 1.5
"""Samples whose size is further from what is asked than the nearest by more than this factor are left out."""

CALL_SECONDS = 0.3
"""Of a call to a judge over the network, where none was measured."""

LAYOUT_TOKENS = 4
"""Tokens of a row that are no word: a beginning, an end."""


@dataclass(frozen=True)
class Span:
    """Seconds or an amount of work: the least, the likely, the most."""

    low: float
    mid: float
    high: float

    def widened(self, factor: float) -> Span:
        """With a factor either way."""
        return Span(self.low / factor, self.mid, self.high * factor)


NOTHING = Span(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Ground:
    """What the seconds of an act rest on.

    Attributes:
        sittings: How many sittings the samples are of.
        doctor: All of them are `iterft doctor --measure`'s.
        name, parameters: The model of the samples; the judge where nothing is known of it.
    """

    nearness: Nearness
    sittings: int = 0
    doctor: bool = False
    name: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class Forecast:
    """How long a plan will take.

    Attributes:
        total: Seconds, the judge's lane beside the device's.
        cycles: Seconds by cycle, from the end of the cycle before.
        grounds: By act.
        length: Tokens of a row that a model writes.
        measured: Whether `length` was; else its `high` is the recipe's maximum.
        judging: Seconds of the judge's lane by itself.
        steps: Seconds of each step, by name.
    """

    total: Span
    cycles: Mapping[int, Span]
    grounds: Mapping[Act, Ground]
    length: Span
    measured: bool
    judging: Span
    steps: Mapping[str, Span] = field(default_factory=dict)

    @property
    def missing(self) -> list[Act]:
        """Acts that nothing is known of."""
        return [act for act in ABOUT if act in self.grounds and self.grounds[act].nearness == "unknown"]


def forecast(plan: Plan, setup: Setup, samples: Sequence[Sample]) -> Forecast:
    """How long a plan will take.

    Args:
        setup: Of the plan on this machine.
        samples: Everything that was measured, also elsewhere.
    """
    here = [sample for sample in samples if sample.kind.machine == setup.machine]
    work = Work(plan, setup, here)
    spans: dict[str, Span] = {}
    grounds: dict[Act, Ground] = {}
    seen: set[Act] = set()
    for step in plan:
        act = VERBS[step.verb].act
        if not act:
            continue
        spans[step.name], ground = seconds_of(setup.kind(act, act not in seen), work.of(step), here)
        seen.add(act)
        # the first step of an act may rest on less than the others
        if act not in grounds or _order(ground) > _order(grounds[act]):
            grounds[act] = ground
    ends = [timeline(plan, {name: pick(span) for name, span in spans.items()}) for pick in PICKS]
    cycles, before = {}, NOTHING
    for number in sorted({step.cycle for step in plan}):
        last = Span(*(max(end[step.name] for step in plan if step.cycle == number) for end in ends))
        cycles[number] = Span(*(max(0.0, pick(last) - pick(before)) for pick in PICKS))
        before = last
    judging = [spans[step.name] for step in plan if step.name in spans and step.verb == "judge"]
    return Forecast(
        total=Span(*(max(end.values(), default=0.0) for end in ends)),
        cycles=cycles,
        grounds=grounds,
        length=work.length,
        measured=work.measured,
        judging=Span(*(sum(map(pick, judging)) for pick in PICKS)),
        steps=spans,
    )


PICKS: tuple[Callable[[Span], float], ...] = (lambda span: span.low, lambda span: span.mid, lambda span: span.high)


def _order(ground: Ground) -> int:
    return ("same", "similar", "scaled", "assumed", "unknown").index(ground.nearness)


def timeline(plan: Plan, seconds: Mapping[str, float]) -> dict[str, float]:
    """When each step ends: steps of one queue follow each other, and each waits for what it reads.

    Args:
        seconds: By name; steps that are not in it take none.
    """
    free: dict[str, float] = defaultdict(float)
    ends: dict[str, float] = {}
    for step in plan:
        # the CPU's steps are short and wait for nothing but what they read
        before = 0.0 if step.queue == "cpu" else free[step.queue]
        starts = max([before, *(ends[name] for _, name in step.inputs if name in ends)])
        ends[step.name] = free[step.queue] = starts + seconds.get(step.name, 0.0)
    return ends


# -- how much there is to do


@dataclass
class Work:
    """How much each step of a plan does, as far as it can be told before.

    Attributes:
        length: Tokens of a row that a model writes: as measured, else from the seed rows' length up to the maximum.
        measured: Which of the two.
    """

    plan: Plan
    setup: Setup
    samples: Sequence[Sample]
    length: Span = field(init=False)
    measured: bool = field(init=False)

    def __post_init__(self) -> None:
        mine = [sample for sample in self.samples if sample.kind.model == self.setup.model]
        ratios = [sample.notes["tokens_per_word"] for sample in mine if "tokens_per_word" in sample.notes]
        self._ratio = fmean(ratios) if ratios else None
        self._lengths = [sample for sample in mine if sample.kind.act == "write" and _shape(sample.kind) == self._rows]
        caps = [step.params["sampling"]["max_tokens"] for step in self.plan if VERBS[step.verb].act == "write"]
        self.measured = bool(self._lengths)
        self.length = self._length(max(caps, default=0), self._lengths)

    def of(self, step: Step) -> dict[str, Span]:
        """Amounts by unit, as in `Sample.work`."""
        if step.verb == "train":
            return self._training(step)
        if step.verb in ("training_samples", "evaluate_samples"):
            return self._writing(step)
        if step.verb == "text_metrics":
            answers = self._writing(self.plan.inputs(step)["answers"])
            held_out = len(step.params["high"]) + len(step.params["low"])
            beside = held_out_words(step) * (self._ratio or 1.5)
            tokens, rows = answers["tokens"], answers["rows"]
            return {
                "rows": Span(*(pick(rows) + held_out for pick in PICKS)),
                "tokens": Span(*(pick(tokens) + beside for pick in PICKS)),
            }
        if step.verb == "judge":
            return {"calls": _exactly(judged(self.plan, step))}
        return {}

    @property
    def _rows(self) -> str:
        return str(self.plan.recipe.row.rows)

    def _writing(self, step: Step) -> dict[str, Span]:
        rows = len(step.params["prompts"]) * int(step.params["samples"])
        length = self._length(int(step.params["sampling"]["max_tokens"]), self._alike(step.verb == "training_samples"))
        return {"rows": _exactly(rows), "tokens": Span(*(rows * pick(length) for pick in PICKS))}

    def _alike(self, data: bool) -> list[Sample]:
        """Samples of rows to be trained on, or of answers; of both where there are none."""
        return [sample for sample in self._lengths if sample.notes.get("data") == data] or self._lengths

    def _length(self, cap: int, samples: Sequence[Sample]) -> Span:
        """Tokens of a row of at most `cap`."""
        if not samples:
            seeds = min(float(cap), self._seed_tokens() or 1.0)
            return Span(seeds, math.sqrt(seeds * cap), float(cap))
        means, most = [], []
        for sample in samples:
            mean, cut = sample.work["tokens"] / sample.work["rows"], sample.notes.get("cut", 0.0) / sample.work["rows"]
            means.append(min(mean, cap))
            # a row that was cut may go on up to the new maximum
            most.append(min(cap, mean + cut * max(0.0, cap - sample.notes.get("cap", cap))))
        return Span(_below(means), fmean(means), min(float(cap), _above(most)))

    def _training(self, step: Step) -> dict[str, Span]:
        settings, recipe = step.params["settings"], self.plan.recipe
        data = self.plan.inputs(step)["rows"]
        counts = [self._composed(cycle) for cycle in range(data.cycle + 1)]
        rows = sum(counts) if recipe.data == "accumulate" else min(sum(counts), counts[-1])
        own = self._length(recipe.sample.max_tokens, self._alike(data=True))
        if data.cycle == 0:
            own = _exactly(self._seed_tokens())
        sides = LOSSES[step.params["loss"]].sides
        epochs = settings["epochs"]
        steps = -(-rows // settings["batch_size"]) * epochs
        tokens = [sides * rows * epochs * min(settings["max_length"], pick(own)) for pick in PICKS]
        return {"steps": _exactly(steps), "tokens": Span(*tokens)}

    def _composed(self, cycle: int) -> int:
        """Rows of D[t] by itself."""
        recipe = self.plan.recipe
        return recipe.seed_rows if cycle == 0 else recipe.rows

    def _seed_tokens(self) -> float:
        """Tokens of a seed row on the mean; 0 where there are none."""
        rows = [row for step in self.plan if step.name == "c0-seed_rows" for row in step.params["rows"]]
        return fmean(map(self._row_tokens, rows)) if rows else 0.0

    def _row_tokens(self, row: Mapping[str, Json]) -> float:
        """Tokens of a seed row that a loss is taken over."""
        if self._ratio:
            return words(row) * self._ratio + LAYOUT_TOKENS
        return float(tokens_of(str(row["text"]) if "text" in row else str(row["messages"][-1]["content"])))


def _exactly(amount: float) -> Span:
    return Span(float(amount), float(amount), float(amount))


def _shape(kind: Kind) -> str:
    """Whether chats or documents were written, from a kind's setting."""
    return "document" if " document," in kind.setting else "chat"


def _below(values: Sequence[float]) -> float:
    return max(min(values), fmean(values) - stdev(values)) if len(values) > 1 else values[0]


def _above(values: Sequence[float]) -> float:
    return min(max(values), fmean(values) + stdev(values)) if len(values) > 1 else values[0]


# -- how long it takes


def seconds_of(kind: Kind, work: Mapping[str, Span], samples: Iterable[Sample]) -> tuple[Span, Ground]:
    """Seconds of a step from the samples that are nearest in kind and size, and what they are."""
    if any(not work[unit].high for unit in ("calls", "steps") if unit in work):
        return NOTHING, Ground("same")
    nearness, chosen = _nearest_kind(kind, samples)
    if not chosen:
        return _assumed(kind, work)
    chosen = _latest(_nearest_size(_runs(chosen), work))
    ratio = kind.parameters / chosen[0].kind.parameters if nearness == "scaled" else 1.0
    spans = [_scaled(sample, work, ratio) for sample in chosen]
    sittings = len({sample.sitting for sample in chosen})
    doctor = all(sample.origin == "doctor" for sample in chosen)
    spread = DOCTOR_SPREAD if doctor else SPREAD.get(sittings, LEAST_SPREAD)
    spread = max(spread, math.exp(2 * _error(chosen, spans)))
    if nearness != "same":
        spread *= SIMILAR if nearness == "similar" else SCALED
    mean = Span(*(fmean(map(pick, spans)) for pick in PICKS))
    ground = Ground(nearness, sittings, doctor, chosen[0].name, chosen[0].kind.parameters)
    return mean.widened(spread), ground


def _nearest_kind(kind: Kind, samples: Iterable[Sample]) -> tuple[Nearness, list[Sample]]:
    """The samples to go by: the same kind's, else the same model's, else those of the model nearest in size.

    The first of an act is known by firsts, unless there are none.
    """
    mine = [sample for sample in samples if sample.kind.act == kind.act and sample.kind.machine == kind.machine]
    model = [sample for sample in mine if sample.kind.model == kind.model]
    if kind.act == "judge":  # another judge tells nothing
        model = [sample for sample in model if sample.kind.setting == kind.setting]
    same = [s for s in model if (s.kind.setting, s.kind.versions) == (kind.setting, kind.versions)]
    if same:
        return "same", _as_first(kind, same)
    if model:
        alike = [sample for sample in model if sample.kind.setting == kind.setting]
        return "similar", _as_first(kind, alike or model)
    others = [sample for sample in mine if sample.kind.parameters] if kind.parameters else []
    if not others or kind.act == "judge":
        return "unknown", []
    by_size = min(others, key=lambda sample: abs(math.log(sample.kind.parameters / kind.parameters)))
    others = [sample for sample in others if sample.kind.model == by_size.kind.model]
    alike = [sample for sample in others if sample.kind.setting == kind.setting]
    return "scaled", _as_first(kind, alike or others)


def _as_first(kind: Kind, samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.kind.first == kind.first] or samples


def _runs(samples: list[Sample]) -> list[Sample]:
    """Those of runs, where there are any: the doctor's are for the time before."""
    return [sample for sample in samples if sample.origin == "run"] or samples


def _latest(samples: list[Sample]) -> list[Sample]:
    """Those of the latest sittings."""
    sittings = list(dict.fromkeys(sample.sitting for sample in samples))[-LATEST:]
    return [sample for sample in samples if sample.sitting in sittings]


def _nearest_size(samples: list[Sample], work: Mapping[str, Span]) -> list[Sample]:
    """Those whose amount of work is as near to what is asked as the nearest one's, or almost."""

    def distance(sample: Sample) -> float:
        pairs = [(sample.work[unit], span.mid) for unit, span in work.items() if sample.work.get(unit) and span.mid > 0]
        return max((abs(math.log(asked / done)) for done, asked in pairs), default=0.0)

    nearest = min(map(distance, samples))
    return [sample for sample in samples if distance(sample) <= nearest + math.log(NEAR)]


def _scaled(sample: Sample, work: Mapping[str, Span], ratio: float) -> Span:
    """A sample's seconds for another amount of work, and for a model of `ratio` times the parameters.

    A larger model takes at least as long as the smaller one, where launching is what takes time, and at most as much longer as
    it has more parameters, where arithmetic is.
    """
    units = [(sample.work[unit], span) for unit, span in work.items() if sample.work.get(unit)]
    growing = sample.seconds - sample.fixed
    if units:
        least = min(span.low / done for done, span in units)
        most = max(span.high / done for done, span in units)
        likely = math.exp(fmean(math.log(max(span.mid / done, 1e-9)) for done, span in units))
        span = Span(growing * least, growing * likely, growing * most)
    else:
        span = Span(growing, growing, growing)
    less, more = min(1.0, ratio), max(1.0, ratio)
    return Span(sample.fixed + span.low * less, sample.fixed + span.mid * math.sqrt(ratio), sample.fixed + span.high * more)


def _error(samples: Sequence[Sample], spans: Sequence[Span]) -> float:
    """How far off the logarithm of what samples say may be: the standard deviation between sittings where there are several;
    within one the standard error of the mean, for a plan has many steps."""
    logs = defaultdict(list)
    for sample, span in zip(samples, spans, strict=True):
        logs[sample.sitting].append(math.log(max(span.mid, 1e-3)))
    if len(logs) > 1:
        return stdev(fmean(values) for values in logs.values())
    values = next(iter(logs.values()))
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _assumed(kind: Kind, work: Mapping[str, Span]) -> tuple[Span, Ground]:
    """A judge over the network by a stated assumption; else nothing is known."""
    # a judge on this machine, or in batches, takes what it takes
    if kind.act != "judge" or "/" not in kind.setting or kind.setting.startswith("local:") or kind.setting.endswith(BATCHES):
        return NOTHING, Ground("unknown", name=kind.setting)
    calls = work["calls"].mid
    return Span(calls * CALL_SECONDS / MOST, calls * CALL_SECONDS / FIRST, calls * 3 * CALL_SECONDS / FIRST), Ground("assumed")


# -- in words


def sentence(found: Forecast) -> str:
    """A forecast, and how sure it is."""
    device = [act for act in found.missing if act != "judge"]
    if device:
        whole = len(device) == len([act for act in found.grounds if act != "judge"])
        what = "nothing like it was measured on this machine" if whole else f"{_list(device)}: never measured here"
        return f"not known: {what}; `iterft doctor --measure` takes a minute"
    later = [span for number, span in found.cycles.items() if number > 0] or [found.cycles[max(found.cycles)]]
    cycle = Span(*(fmean(map(pick, later)) for pick in PICKS))
    guess = any(ground.nearness == "scaled" for ground in found.grounds.values())
    said = _range if guess else _about
    parts = [f"{said(found.total)} in all, {said(cycle)} a cycle", *_sureness(found)]
    low, high = round(found.length.low), round(found.length.high)
    if found.measured:
        parts.append(f"rows of {found.length.mid:.0f} tokens, the mean of what it wrote here")
    else:
        parts.append(f"rows of {high} tokens at most" + (f", or {low} as the seed rows have" if low < high else ""))
    return "; ".join([*parts, *_judging(found)])


def _about(span: Span) -> str:
    return f"about {duration(span.mid)} ({_range(span)})"


def _range(span: Span) -> str:
    low, high = duration(span.low), duration(span.high)
    (few, unit), (many, other) = low.split(), high.split()
    return high if low == high else f"{few} to {many} {unit}" if unit == other else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds as they are known, in two digits: `48 s`, `5.5 min`, `34 h`."""
    for size, unit in ((1.0, "s"), (60.0, "min"), (3600.0, "h")):
        if seconds < 90 * size or unit == "h":
            value = seconds / size
            return f"{value:.1f} {unit}" if unit != "s" and round(value, 1) < 10 else f"{value:,.0f} {unit}"
    raise AssertionError


ABOUT: Mapping[Act, str] = {
    "load": "loading",
    "train": "training",
    "export": "exporting",
    "write": "writing",
    "read": "reading",
    "judge": "judging",
}


def _list(acts: Sequence[Act]) -> str:
    names = [ABOUT[act] for act in acts]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _sureness(found: Forecast) -> list[str]:
    """What it rests on: the best known first, then what is known less well."""
    grounds: dict[Act, Ground] = {act: found.grounds[act] for act in ABOUT if act in found.grounds and act != "judge"}
    same, similar, scaled = (
        [act for act, ground in grounds.items() if ground.nearness == nearness] for nearness in ("same", "similar", "scaled")
    )
    words = []
    if same:
        runs = max(0 if grounds[act].doctor else grounds[act].sittings for act in same)
        source = f"{runs} {'run' if runs == 1 else 'runs'}" if runs else "`iterft doctor --measure`"
        words.append(f"from {source} of this model on this machine, as busy as it was then")
    if similar:
        what = f"{_list(similar)} " if same or scaled else ""
        words.append(f"{what}from this model with other settings or versions, within a factor of {SIMILAR:g}")
    if scaled:
        ground, what = grounds[scaled[0]], f"{_list(scaled)} " if same or similar else ""
        words.append(
            f"{what}scaled from {ground.name} ({ground.parameters / 1e6:,.0f} M parameters): anything between its own time and "
            f"what the parameters say, and a factor of {SCALED:g} either way; `iterft doctor --measure --recipe` tells more"
        )
    return words


def _judging(found: Forecast) -> list[str]:
    """What is to be said of the judge by itself."""
    ground = found.grounds.get("judge")
    if ground is None or ground.nearness not in ("assumed", "unknown"):
        return []
    if ground.name.endswith(BATCHES):
        return ["without the judge's batches, for each of which its provider takes up to a day"]
    if ground.nearness == "unknown":
        return [f"without the time that {ground.name} takes to judge, which was never measured here"]
    assumed = f"if a call takes {1000 * CALL_SECONDS:.0f} ms and {FIRST} to {MOST} go at once"
    return [f"the judge beside it {_range(found.judging)}, {assumed}"]
