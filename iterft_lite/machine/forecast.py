"""How long a plan will take, from what this machine has shown, and how sure that is. Pure: a function of samples and a plan.

A step takes the fixed seconds of its act and the median seconds a unit of work (tokens, verdicts) of the steps of the same kind
that were timed here. One range goes around that: a factor either way, which depends on how near those steps are to this one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal

from iterft_lite.backends.judge.rate_limit import FIRST, MOST
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.machine.reference import reference_samples
from iterft_lite.machine.timing import BATCHES, NAMES, Kind, Sample, Setup, seconds_per_unit
from iterft_lite.machine.work import NOTHING, Lengths, Span, row_length, total, work_ahead

Nearness = Literal["same", "near", "reference", "assumed", "unknown"]
"""What a number rests on, the nearest first: steps of the same kind; of another setting, version or model; of another machine
(`reference.py`); a stated assumption; nothing."""

ORDER: Sequence[Nearness] = ("same", "near", "reference", "assumed", "unknown")

SPREAD: Mapping[int, float] = {1: 1.35, 2: 1.25}
"""A forecast from so many sessions may be off by this factor at least, either way; from more, by `LEAST_SPREAD`. The other load
of a machine differs from session to session more than from step to step."""

LEAST_SPREAD = 1.2

DOCTOR_SPREAD = 1.5
"""The same where `iterft doctor --measure` is all there is: its trainings are a few steps long."""

FURTHER: Mapping[Nearness, float] = {"same": 1.0, "near": 2.0, "reference": 4.0}
"""One more factor either way, by nearness."""

LATEST = 5
"""Sessions that count, the latest: a machine and its load change."""

NEAR = 1.5
"""Samples whose size is further from the asked one than the nearest by more than this factor do not count."""

LARGE = 100_000_000
"""Parameters from which on seconds grow as the parameters do, since arithmetic takes the time. In smaller models launching
operations takes a part of it: there seconds grow with the root, and the range holds no growth as well as full growth."""

VAGUE = 12.0
"""A range whose ends are further apart than this factor is given without a middle."""

LONG = 24 * 3600.0
"""Seconds of a plan from which on a person is told what takes less."""

CALL_SECONDS = 0.3
"""Of a call to a judge over the network, where none was timed."""


PICKS: tuple[Callable[[Span], float], ...] = (lambda span: span.low, lambda span: span.mid, lambda span: span.high)


@dataclass(frozen=True)
class Ground:
    """What the seconds of an act rest on.

    Attributes:
        sessions: How many sessions the samples are of.
        doctor: All of them are `iterft doctor --measure`'s.
        name, parameters: The model of the samples; the judge where nothing is known of it.
        machine: That of the samples.
    """

    nearness: Nearness
    sessions: int = 0
    doctor: bool = False
    name: str = ""
    parameters: int = 0
    machine: str = ""


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
        return [act for act in NAMES if act in self.grounds and self.grounds[act].nearness in ("reference", "unknown")]


def forecast(plan: Plan, setup: Setup, samples: Sequence[Sample]) -> Forecast:
    """How long a plan will take.

    Args:
        setup: Of the plan on this machine.
        samples: Everything that was timed, also on other machines.
    """
    here = [sample for sample in samples if sample.kind.machine == setup.machine]
    elsewhere, lengths = reference_samples(gpu=setup.gpu), _lengths(plan, setup, here)
    steps: dict[str, Span] = {}
    grounds: dict[Act, Ground] = {}
    for step in plan:
        act = VERBS[step.verb].act
        if act:
            kind, work = setup.kind(act, act not in grounds), work_ahead(plan, step, lengths)
            steps[step.name], ground = seconds_of(kind, work, here, elsewhere)
            # the first step of an act may rest on less than the others
            grounds[act] = max(grounds.get(act, ground), ground, key=lambda ground: ORDER.index(ground.nearness))
    ends, cycles = _ends(plan, steps), plan.recipe.cycles
    return Forecast(
        total=ends[-1],
        cycle=(ends[-1] + ends[0] * -1) * (1 / cycles) if cycles else ends[0],
        steps=steps,
        grounds=grounds,
        length=row_length(plan, lengths),
        measured=bool(lengths.data or lengths.answers),
        judging=total(steps[step.name] for step in plan if step.verb == "judge"),
    )


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


def _ends(plan: Plan, steps: Mapping[str, Span]) -> tuple[Span, Span]:
    """When the seeded cycle's last step ends, and when the last step of all does."""
    seeded = [step.name for step in plan if step.cycle == 0]
    found = [timeline(plan, {name: pick(span) for name, span in steps.items()}) for pick in PICKS]
    return Span(*(max(ends[name] for name in seeded) for ends in found)), Span(*(max(ends.values()) for ends in found))


def _lengths(plan: Plan, setup: Setup, samples: Iterable[Sample]) -> Lengths:
    """Tokens of the rows that this model wrote here, in the plan's kind of rows."""
    found: dict[float, list[tuple[float, float, float]]] = {0.0: [], 1.0: []}
    for sample in samples:
        kind, rows = sample.kind, sample.work.get("rows")
        if kind.act == "write" and kind.model == setup.model and rows and _rows_of(kind) == plan.recipe.row.rows:
            cap, cut = sample.notes.get("cap", math.inf), sample.notes.get("cut", 0.0) / rows
            found[sample.notes.get("data", 0.0)].append((sample.work["tokens"] / rows, cap, cut))
    return Lengths(data=tuple(found[1.0]), answers=tuple(found[0.0]))


def _rows_of(kind: Kind) -> str:
    """Whether chats or documents were written, from a kind's setting."""
    return "document" if " document," in kind.setting else "chat"


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
    nearness, chosen = _nearest_kind(kind, samples, elsewhere)
    if not chosen:
        return _assumed(kind, work)
    chosen = _latest(_nearest_size(_runs(chosen), work.mid))
    fixed = median(sample.fixed for sample in chosen)
    growth, doubt = _growth(kind.parameters, chosen[0].kind.parameters)
    seconds = work.each(lambda units: fixed + units * seconds_per_unit(chosen) * growth)
    own = 1.0 if nearness == "reference" else _spread(chosen)
    return seconds.widened(own * FURTHER[nearness] * doubt), _ground(nearness, chosen)


def _growth(asked: int, known: int) -> tuple[float, float]:
    """How many times as long another number of parameters takes, and the factor that this may be off by either way."""
    if asked == known:
        return 1.0, 1.0

    def arithmetic(parameters: int) -> float:
        size = parameters / LARGE
        return size if size >= 1 else math.sqrt(size)

    growth, ratio = arithmetic(asked) / arithmetic(known), asked / known
    return growth, max(growth / ratio, ratio / growth)


def _nearest_kind(kind: Kind, samples: Iterable[Sample], elsewhere: Iterable[Sample]) -> tuple[Nearness, list[Sample]]:
    """The samples to go by: the same kind's, else the nearest ones of this machine, else those of another."""
    mine = [sample for sample in samples if sample.kind.act == kind.act and sample.kind.machine == kind.machine]
    same = [sample for sample in mine if replace(sample.kind, first=kind.first, parameters=kind.parameters) == kind]
    if same:
        return "same", _alike(kind, same)
    near = _alike(kind, mine)
    if near:
        return "near", near
    return "reference", _alike(kind, [sample for sample in elsewhere if sample.kind.act == kind.act])


def _alike(kind: Kind, samples: list[Sample]) -> list[Sample]:
    """The samples most like a kind: of its model, else of the one nearest in size; of these, those of its setting if any are.

    Another judge tells nothing, nor does another model where a size is not known.
    """
    if kind.act == "judge":
        samples = [sample for sample in samples if sample.kind.setting == kind.setting]
    elif not any(sample.kind.model == kind.model for sample in samples):
        samples = [sample for sample in samples if sample.kind.parameters and kind.parameters]
    if not samples:
        return []
    nearest = min(samples, key=lambda sample: _distance(sample.kind, kind)).kind.model
    samples = [sample for sample in samples if sample.kind.model == nearest]
    samples = [sample for sample in samples if sample.kind.setting == kind.setting] or samples
    return [sample for sample in samples if sample.kind.first == kind.first] or samples


def _distance(one: Kind, other: Kind) -> float:
    """How far apart two models' sizes are; -1 for the same model."""
    return -1.0 if one.model == other.model else abs(math.log(one.parameters / other.parameters))


def _runs(samples: list[Sample]) -> list[Sample]:
    """Those of runs, where there are any: the doctor's are for the time before the first run."""
    return [sample for sample in samples if sample.origin == "run"] or samples


def _latest(samples: list[Sample]) -> list[Sample]:
    """Those of the latest sessions."""
    sessions = list(dict.fromkeys(sample.session for sample in samples))[-LATEST:]
    return [sample for sample in samples if sample.session in sessions]


def _nearest_size(samples: list[Sample], units: float) -> list[Sample]:
    """Those whose amount of work is as near to the asked one as the nearest sample's, or almost."""

    def distance(sample: Sample) -> float:
        return abs(math.log(units / sample.units)) if sample.units and units else 0.0

    nearest = min(map(distance, samples))
    return [sample for sample in samples if distance(sample) <= nearest + math.log(NEAR)]


def _spread(samples: Sequence[Sample]) -> float:
    """The factor either way for the samples' own kind: by their number of sessions, and by how much these differ."""
    sessions = defaultdict(list)
    for sample in samples:
        sessions[sample.session].append(max(sample.seconds, 1e-3) / max(sample.units, 1e-9))
    means = [fmean(values) for values in sessions.values()]
    doctor = all(sample.origin == "doctor" for sample in samples)
    return max(DOCTOR_SPREAD if doctor else SPREAD.get(len(means), LEAST_SPREAD), max(means) / min(means))


def _ground(nearness: Nearness, samples: Sequence[Sample]) -> Ground:
    sessions = len({sample.session for sample in samples})
    doctor, one = all(sample.origin == "doctor" for sample in samples), samples[0]
    return Ground(nearness, sessions, doctor, one.name, one.kind.parameters, one.kind.machine)


def _assumed(kind: Kind, work: Span) -> tuple[Span, Ground]:
    """A judge over the network by a stated assumption; else nothing is known."""
    # a judge on this machine, or in batches, takes what it takes
    if kind.act != "judge" or "/" not in kind.setting or kind.setting.startswith("local:") or kind.setting.endswith(BATCHES):
        return NOTHING, Ground("unknown", name=kind.setting)
    call = work.mid * CALL_SECONDS
    return Span(call / MOST, call / FIRST, 3 * call / FIRST), Ground("assumed")


# -- in words


def sentence(found: Forecast) -> str:
    """A forecast, and how sure it is."""
    unknown = [act for act, ground in found.grounds.items() if ground.nearness == "unknown" and act != "judge"]
    if unknown:
        return "not known before the model is downloaded; then `iterft doctor --measure` takes a minute"
    said = _about if found.total.high < VAGUE * found.total.low else _range
    low, high = round(found.length.low), round(found.length.high)
    if found.measured:
        rows = f"rows of {found.length.mid:.0f} tokens, the mean of what it wrote here"
    else:
        rows = f"rows of {high} tokens at most" + (f", or {low} as the seed rows have" if low < high else "")
    parts = [f"{said(found.total)} in all, {said(found.cycle)} a cycle", *rests_on(found.grounds), rows, *_judging(found)]
    if found.total.mid > LONG:
        parts.append("a GPU, a smaller model or fewer rows take less")
    return "; ".join(parts)


def _about(span: Span) -> str:
    return f"about {duration(span.mid)} ({_range(span)})"


def _range(span: Span) -> str:
    low, high = duration(span.low), duration(span.high)
    (few, unit), (many, other) = low.split(), high.split()
    return high if low == high else f"{few} to {many} {unit}" if unit == other else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds as they are known, in two digits: `48 s`, `5.5 min`, `34 h`, `5.2 days`."""
    for size, most, unit in ((1.0, 90, "s"), (60.0, 90, "min"), (3600.0, 72, "h"), (86400.0, math.inf, "days")):
        value = seconds / size
        if value < most:
            return f"{value:.1f} {unit}" if unit != "s" and round(value, 1) < 10 else f"{value:,.0f} {unit}"
    raise ValueError(f"{seconds} is no duration")


def rests_on(grounds: Mapping[Act, Ground]) -> list[str]:
    """What a forecast rests on: the best known first, then what is known less well."""
    device = {act: grounds[act] for act in NAMES if act in grounds and act != "judge"}
    words = []
    for nearness in ORDER[:3]:
        acts = [act for act, ground in device.items() if ground.nearness == nearness]
        if acts:
            what = "" if len(acts) == len(device) or nearness == "same" else f"{_list(acts)} "
            words.append(what + _source([device[act] for act in acts]))
    return words


def _source(grounds: Sequence[Ground]) -> str:
    """Where seconds of one nearness come from."""
    one, nearness = grounds[0], grounds[0].nearness
    if nearness == "same":
        runs = max(0 if ground.doctor else ground.sessions for ground in grounds)
        source = f"{runs} {'run' if runs == 1 else 'runs'}" if runs else "`iterft doctor --measure`"
        return f"from {source} of this model on this machine, as busy as it was then"
    model = f"{one.name} ({one.parameters / 1e6:,.0f} M parameters)"
    factor = f"within a factor of {FURTHER[nearness]:g} or more"
    if nearness == "near":
        return f"from {model} with other settings or versions, {factor}; `iterft doctor --measure --recipe` tells more"
    return (
        f"never timed on this machine: a first guess from {model} on {one.machine}, {factor}; "
        "`iterft doctor --measure` takes a minute"
    )


def _list(acts: Sequence[Act]) -> str:
    names = [NAMES[act] for act in acts]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


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
