"""How long a plan will take, from what this machine has shown, and how sure that is. Pure: a function of samples and a plan.

A step takes the fixed seconds of its act and the median seconds a unit of work (tokens, verdicts) of the steps of the same kind
that were timed here. One range goes around that: a factor either way, which depends on how near those steps are to this one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal, get_args

from iterft_lite.backends.judge.rate_limit import FIRST, MOST
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.machine.reference import reference_samples
from iterft_lite.machine.timing import BATCHES, Kind, Sample, Setup, seconds_per_unit
from iterft_lite.machine.work import ACTS, NOTHING, Lengths, Span, row_length, total, work_ahead

Nearness = Literal["same", "near", "reference", "assumed", "unknown"]
"""What a number rests on, the nearest first: steps of the same kind; of another setting, version or model; of another machine
(`reference.py`); a stated assumption; nothing."""

ORDER: Sequence[Nearness] = get_args(Nearness)

SPREAD = (1.5, 1.35, 1.25, 1.2)
"""A forecast may be off by this factor at least, either way: from `iterft doctor --measure` alone, whose trainings are a few
steps long; from one run; from two; from more. A machine's other load differs between sessions more than between steps."""

FURTHER: Mapping[Nearness, float] = {"same": 1.0, "near": 2.0, "reference": 4.0}
"""One more factor either way, by nearness."""

SHORT = 1.0
"""Seconds below which steps do not differ in anything that matters: 0.02 s are not 400 times as fast as a first step's 8 s."""

LATEST = 5
"""Sessions that count, the latest: a machine and its load change."""

NEAR = 1.5
"""Samples whose size is further from the asked one than the nearest by more than this factor do not count."""

LARGE = 100_000_000
"""Parameters from which on seconds grow as the parameters do, since arithmetic takes the time. In smaller models launching
operations takes a part of it: there seconds grow with the root, and the range holds no growth as well as full growth."""

CALL_SECONDS = 0.3
"""Of a call to a judge over the network, where none was timed."""


@dataclass(frozen=True)
class Ground:
    """What the seconds of an act rest on.

    Attributes:
        samples: Steps of one model on one machine.
        judge: Its name, where nothing is known of it.
    """

    nearness: Nearness
    samples: tuple[Sample, ...] = ()
    judge: str = ""

    @property
    def runs(self) -> int:
        """How many sessions of runs the samples are of; 0 where all are `iterft doctor --measure`'s."""
        return len({sample.session for sample in self.samples if sample.origin == "run"})


@dataclass(frozen=True)
class Forecast:
    """How long a plan will take.

    Attributes:
        total: Seconds, with the judge's queue beside the device's.
        cycle: Seconds of a cycle after the seeded one, on the mean; of all there is where there is none.
        steps: Seconds of each step that takes time, by name.
        grounds: By act.
        length: Tokens of a row that a model writes.
        measured: Whether `length` was; else its `high` is the recipe's maximum.
        judging: Seconds of the judge's queue by itself.
    """

    total: Span
    cycle: Span
    steps: Mapping[str, Span]
    grounds: Mapping[Act, Ground]
    length: Span
    measured: bool
    judging: Span

    @property
    def missing(self) -> list[Act]:
        """Acts that were never timed on this machine."""
        return [act for act in ACTS if act in self.grounds and self.grounds[act].nearness in ("reference", "unknown")]


def forecast(plan: Plan, setup: Setup, samples: Sequence[Sample]) -> Forecast:
    """How long a plan will take.

    Args:
        setup: Of the plan on this machine.
        samples: Everything that was timed, also on other machines.
    """
    elsewhere, lengths = reference_samples(gpu=setup.gpu), _lengths(plan, setup.kinds["write"], samples)
    steps: dict[str, Span] = {}
    grounds: dict[Act, Ground] = {}
    for step in plan:
        act = VERBS[step.verb].act
        if act:
            kind, work = setup.kind(act, first=act not in grounds), work_ahead(plan, step, lengths)
            steps[step.name], ground = seconds_of(kind, work, samples, elsewhere)
            # the first step of an act may rest on less than the others
            grounds[act] = max(grounds.get(act, ground), ground, key=lambda ground: ORDER.index(ground.nearness))
    return Forecast(
        total=_ends(plan, steps, plan.recipe.cycles),
        cycle=_cycle(plan, steps),
        steps=steps,
        grounds=grounds,
        length=row_length(plan, lengths),
        measured=bool(lengths.data or lengths.answers),
        judging=total(steps[step.name] for step in plan if step.verb == "judge"),
    )


def timeline(plan: Plan, seconds: Mapping[str, float]) -> dict[str, float]:
    """When each step ends: steps of one queue follow each other, and each waits for what it reads; an export waits for the
    generator too, by which it is checked.

    Args:
        seconds: By name; steps that are not in it take none.
    """
    free: dict[str, float] = defaultdict(float)
    ends: dict[str, float] = {}
    for step in plan:
        # the CPU's steps are short and wait for nothing but what they read
        queues = {"device", "generator"} if step.verb == "export" else {step.queue} - {"cpu"}
        starts = max(
            [*(free[queue] for queue in queues), *(ends[name] for _, name in step.inputs if name in ends)], default=0.0
        )
        ends[step.name] = starts + seconds.get(step.name, 0.0)
        free.update(dict.fromkeys(queues, ends[step.name]))
    return ends


def _cycle(plan: Plan, steps: Mapping[str, Span]) -> Span:
    """Seconds of a cycle: what is done beside the next training ends later, so that they show between cycles, not within one.

    The last cycle has no next one, whose data would come before its answers: models follow each other evenly to the end.
    Verdicts may be slower than models.
    """
    cycles = plan.recipe.cycles
    if not cycles:
        return _ends(plan, steps, 0)
    apart = ((_ends(plan, steps, cycles, verb) + _ends(plan, steps, 0, verb) * -1) * (1 / cycles) for verb in ("", "export"))
    return max(apart, key=lambda span: span.mid)


def _ends(plan: Plan, steps: Mapping[str, Span], cycle: int, verb: str = "") -> Span:
    """When the last step of a cycle and of those before it ends; of a verb, where one is given."""

    def last(pick: Literal["low", "mid", "high"]) -> float:
        ends = timeline(plan, {name: getattr(span, pick) for name, span in steps.items()})
        return max(ends[step.name] for step in plan if step.cycle <= cycle and verb in ("", step.verb))

    return Span(last("low"), last("mid"), last("high"))


def _lengths(plan: Plan, asked: Kind, samples: Iterable[Sample]) -> Lengths:
    """Tokens of the rows that this model wrote here, in the plan's kind of rows."""
    found: dict[float, list[tuple[float, float, float]]] = {0.0: [], 1.0: []}
    for sample in samples:
        known, rows = sample.kind, sample.work.get("rows")
        is_same_model = (known.act, known.machine, known.model) == ("write", asked.machine, asked.model)
        if rows and is_same_model and (" document," in known.setting) == (plan.recipe.row.rows == "document"):
            cap, cut = sample.notes.get("cap", math.inf), sample.notes.get("cut", 0.0) / rows
            found[sample.notes.get("data", 0.0)].append((sample.work["tokens"] / rows, cap, cut))
    return Lengths(data=tuple(found[1.0]), answers=tuple(found[0.0]))


# -- how long a step takes


def seconds_of(kind: Kind, work: Span, samples: Iterable[Sample], elsewhere: Sequence[Sample] = ()) -> tuple[Span, Ground]:
    """Seconds of a step, from the samples that are nearest in kind and size, and what they are.

    Args:
        work: How much there is to do, in the act's unit.
        samples: Of this machine.
        elsewhere: Of other machines, for what was never timed here.
    """
    if not work.high:
        return NOTHING, Ground("same")
    # samples of other machines in the user's table are no guide; the reference figures are, and only where nothing nearer is
    # known
    here = (sample for sample in samples if sample.kind.machine == kind.machine)
    known = [sample for sample in (*here, *elsewhere) if _tells_of(sample.kind, kind)]
    if not known:
        return _assumed(kind, work)
    distances = [_distance(sample, kind) for sample in known]
    is_other_kind, is_elsewhere, *_ = nearest = min(distances)
    near = [sample for sample, distance in zip(known, distances, strict=True) if distance == nearest]
    # first the nearest in kind, then of these the nearest in size, then of these the latest
    chosen = _latest(_nearest_in_size(near, work.mid))
    ground = Ground("reference" if is_elsewhere else "near" if is_other_kind else "same", tuple(chosen))
    fixed = median(sample.fixed for sample in chosen)
    growth, doubt = _growth(kind.parameters, chosen[0].kind.parameters)
    # the fixed part (processes that start, kernels that compile) does not grow with the work, nor with the model
    seconds = work.each(lambda units: fixed + units * seconds_per_unit(chosen) * growth)
    own = 1.0 if is_elsewhere else max(SPREAD[min(ground.runs, 3)], _differs(chosen))
    return seconds.widened(own * FURTHER[ground.nearness] * doubt), ground


def _tells_of(known: Kind, asked: Kind) -> bool:
    """Whether one kind says anything of another: not another judge, nor another model where a size is not known."""
    if known.act != asked.act:
        return False
    if known.act == "judge":
        return known.setting == asked.setting
    return known.model == asked.model or bool(known.parameters and asked.parameters)


def _distance(sample: Sample, asked: Kind) -> tuple[bool | float | str, ...]:
    """How far a sample is from a kind.

    Tuples compare by their first difference, so what matters most stands first. The doctor's samples come last: they are for
    the time before the first run.
    """
    known = sample.kind
    other = {of: getattr(known, of) != getattr(asked, of) for of in ("machine", "model", "setting", "versions")}
    size = abs(math.log(known.parameters / asked.parameters)) if other["model"] else 0.0
    model = (other["model"], size, known.model)
    return (
        any(other.values()),
        other["machine"],
        *model,
        other["setting"],
        known.first != asked.first,
        sample.origin == "doctor",
    )


def _nearest_in_size(samples: Sequence[Sample], units: float) -> list[Sample]:
    """Those whose amount of work is as near to the asked one as the nearest sample's, or almost."""
    apart = [abs(math.log(units / sample.units)) if sample.units and units else 0.0 for sample in samples]
    return [sample for sample, size in zip(samples, apart, strict=True) if size <= min(apart) + math.log(NEAR)]


def _latest(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the latest sessions."""
    sessions = list(dict.fromkeys(sample.session for sample in samples))[-LATEST:]
    return [sample for sample in samples if sample.session in sessions]


def _differs(samples: Sequence[Sample]) -> float:
    """By which factor sessions differ in their mean seconds a unit."""
    sessions = defaultdict(list)
    for sample in samples:
        sessions[sample.session].append(max(sample.seconds, SHORT) / max(sample.units, 1e-9))
    means = [fmean(values) for values in sessions.values()]
    return max(means) / min(means)


def _growth(asked: int, known: int) -> tuple[float, float]:
    """How many times as long another number of parameters takes, and the factor that this may be off by either way."""
    if asked == known or not asked:  # of the same model, whose size is not known yet
        return 1.0, 1.0

    def arithmetic(parameters: int) -> float:
        size = parameters / LARGE
        return size if size >= 1 else math.sqrt(size)

    growth, ratio = arithmetic(asked) / arithmetic(known), asked / known
    return growth, max(growth / ratio, ratio / growth)


def _assumed(kind: Kind, work: Span) -> tuple[Span, Ground]:
    """A judge over the network by a stated assumption; else nothing is known."""
    # a judge on this machine, or in batches, takes what it takes
    if kind.act != "judge" or "/" not in kind.setting or kind.setting.startswith("local:") or kind.setting.endswith(BATCHES):
        return NOTHING, Ground("unknown", judge=kind.setting)
    call = work.mid * CALL_SECONDS
    return Span(call / MOST, call / FIRST, 3 * call / FIRST), Ground("assumed")
