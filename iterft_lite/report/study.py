"""A study as it stands: its experiments with curves over questions and trainings, and verdicts that know how many there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from iterft_lite.digests import Json, canonical, digest
from iterft_lite.engine.study import is_study
from iterft_lite.experiment.grid import cell_name
from iterft_lite.files import read_object
from iterft_lite.metrics.across_seeds import NOTHING, Estimate, change_over_seeds, difference, moves, score_over_seeds
from iterft_lite.metrics.agreement import read_calibrated
from iterft_lite.metrics.amplification import FEWEST_PROMPTS, FROM_CYCLE, Word, verdict_word
from iterft_lite.metrics.catalogue import METRICS
from iterft_lite.metrics.intervals import CONFIDENCE, Interval, Scores
from iterft_lite.metrics.many_cells import FalseAlarms, Training, false_alarms, holm, training_of
from iterft_lite.report.cells import SEED, CellReport, ReadRun, read_cells
from iterft_lite.report.report import Report, read_report

THRESHOLD, SEED_ROWS = "threshold", "seed_rows"
"""Where numbers of seed rows were found for scores, the score stands for them: of other traits and models they are others."""

Counted = Mapping[str, int]
"""How many trainings meet a rule, by the rule's name."""

RULES = ("any", "all", "last")
"""Readings of the paper's rule: any, all, or the last of the cycles from 4 on."""


@dataclass(frozen=True)
class Point:
    """One cycle of an experiment.

    Attributes:
        trait, coherence: Over questions and trainings.
        metrics: What needs no judge, by name: the mean over trainings.
    """

    cycle: int
    trait: Estimate
    coherence: Estimate
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Cells that are alike but for their random seed.

    Attributes:
        name: Without the seed.
        values: By recipe key, what experiments of the study differ in.
        arm: The null arm that it is; "" for the others.
        cells: Its trainings, in the order of the study.
        points: By cycle, from -1 (the untouched model) on.
        change, coherence: From cycle 0 to `last`, paired by training and question; of trainings that have both.
        last: The last cycle with a score of the trait in any training; -1 if there is none.
        word: The verdict of `change` alone.
        corrected: The verdict with the number of the study's experiments taken into account.
        p_value: Corrected (`metrics/many_cells.py`); None where it has no verdict.
        beside: By null arm, how much further the trait has moved here than there, points.
    """

    name: str
    values: Mapping[str, Json]
    arm: str
    cells: tuple[CellReport, ...]
    points: Mapping[int, Point] = field(default_factory=dict)
    change: Estimate = NOTHING
    coherence: Estimate = NOTHING
    last: int = -1
    word: Word = "too early"
    corrected: Word = "too early"
    p_value: float | None = None
    beside: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def reports(self) -> list[Report]:
        """Those of its trainings that have begun."""
        return [cell.report for cell in self.cells if cell.report]

    @property
    def late_rise(self) -> float | None:
        """Largest rise of the mean over cycle 0 among cycles from 4 on, points; None before them (the paper's measure)."""
        start = self.points[0].trait.mean if 0 in self.points else None
        late = [point.trait.mean for cycle, point in self.points.items() if cycle >= FROM_CYCLE]
        scored = [mean for mean in late if mean is not None]
        return max(scored) - start if scored and start is not None else None

    @property
    def failures(self) -> list[CellReport]:
        """Trainings that ended before their last cycle and are not continued: as a result, or for another reason."""
        return [cell for cell in self.cells if cell.state in ("result", "failed")]

    def rule(self, reading: str, anchor: int = 0) -> tuple[int, int]:
        """How many trainings meet a reading of the paper's rule, and of how many it can be said."""
        found = [
            getattr(rule, reading)
            for report in self.reports
            for rule in report.verdict.paper
            if rule.anchor == anchor and rule.any is not None
        ]
        return sum(map(bool, found)), len(found)


@dataclass(frozen=True)
class StudyReport:
    """A study, or several runs read as one.

    Attributes:
        name: For people.
        folders: What was read.
        cells: All of them, also those that have not begun.
        experiments: Those that are not null arms, in the order of their values.
        arms: The null arms.
        keys: Recipe keys that experiments differ in.
    """

    name: str
    folders: tuple[Path, ...]
    cells: tuple[CellReport, ...]
    experiments: tuple[Experiment, ...]
    arms: tuple[Experiment, ...]
    keys: tuple[str, ...]

    @property
    def everything(self) -> tuple[Experiment, ...]:
        """Experiments and null arms."""
        return (*self.experiments, *self.arms)

    @property
    def reports(self) -> list[Report]:
        """Of cells that have begun."""
        return [cell.report for cell in self.cells if cell.report]

    def values_of(self, key: str) -> list[Json]:
        """The values that experiments have of a key, in order."""
        found = {canonical(each.values[key]): each.values[key] for each in self.experiments if key in each.values}
        return sorted(found.values(), key=_order)

    @property
    def seeds(self) -> int:
        """Most trainings of one experiment."""
        return max((len(each.cells) for each in self.everything), default=0)

    def said(self, of: str) -> list[str]:
        """The different traits, models, regimes or judges of its runs."""
        return list(dict.fromkeys(_said(report, of) for report in self.reports))

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the judges, each clause once."""
        return list(dict.fromkeys(str(note) for report in self.reports for note in report.judge["notes"]))

    @property
    def mark(self) -> str:
        """A digest of the steps that it was computed from: equal marks, equal numbers."""
        keys = {step.key for report in self.reports for step in report.steps if step.verb == "aggregate"}
        return digest(sorted(keys))[:16]

    @cached_property
    def false_alarms(self) -> FalseAlarms | None:
        """How often a study of this shape shows amplification where there is none; None before it is known."""
        shapes = [_trainings(each) for each in self.experiments]
        return false_alarms([shape for shape in shapes if shape], seed=0)

    @cached_property
    def counts(self) -> dict[str, Counted]:
        """Like the paper's "12 of 270".

        By anchor cycle the trainings that meet each reading of its rule and `of` how many; under "experiments" those that our
        interval calls amplified or decayed, alone and corrected, and `of` how many.
        """
        found = {f"anchor {anchor}": self._by_rule(anchor) for anchor in (0, 1)}
        judged = [each for each in self.experiments if each.change.low is not None and each.change.prompts >= FEWEST_PROMPTS]
        words = [f"{word}{how}" for word in ("amplified", "decayed") for how in ("", " corrected")]
        counted = dict.fromkeys(words, 0)
        for each in judged:
            for word, how in ((each.word, ""), (each.corrected, " corrected")):
                if f"{word}{how}" in counted:
                    counted[f"{word}{how}"] += 1
        return {**found, "experiments": {**counted, "of": len(judged)}}

    def _by_rule(self, anchor: int) -> dict[str, int]:
        met = {reading: sum(each.rule(reading, anchor)[0] for each in self.experiments) for reading in RULES}
        return {**met, "of": sum(each.rule("any", anchor)[1] for each in self.experiments)}


def read_study_report(folders: Sequence[Path], only: Sequence[str] = (), read: ReadRun = read_report) -> StudyReport:
    """Read studies, runs, or folders of them as one.

    Args:
        only, read: As of `report.cells.read_cells`.

    Raises:
        IterftError: As `report.cells.read_cells`.
    """
    one = folders[0] if len(folders) == 1 else None
    name = str(read_object(one / "study.json").get("name") or "") if one and is_study(one) else ""
    return study_report(read_cells(folders, only, read), folders, name or ", ".join(folder.name for folder in folders))


def study_report(cells: Sequence[CellReport], folders: Sequence[Path] = (), name: str = "study") -> StudyReport:
    """The report of cells that were read."""
    grouped = _by_threshold([_experiment(group) for group in _groups(cells)])
    arms = [each for each in grouped if each.arm]
    found = sorted(
        (each for each in grouped if not each.arm), key=lambda each: [_order(value) for value in each.values.values()]
    )
    beside = [replace(each, beside=_beside(each, arms)) for each in _corrected(found)]
    keys = dict.fromkeys(key for each in beside for key in each.values)
    hidden = {SEED_ROWS} if THRESHOLD in keys else set()
    varied = [key for key in keys if key not in hidden and len({canonical(each.values.get(key)) for each in beside}) > 1]
    return StudyReport(name, tuple(folders), tuple(cells), tuple(beside), tuple(arms), tuple(varied))


def _by_threshold(experiments: Sequence[Experiment]) -> list[Experiment]:
    """The experiments; with the score that seed rows were found for as a value, where there are fewer of them than of rows."""
    found = [each for each in experiments if not each.arm]
    scores = {each.cells[0].threshold for each in found}
    rows = {canonical(each.values.get(SEED_ROWS)) for each in found}
    if None in scores or len(scores) >= len(rows):
        return list(experiments)
    return [
        each if each.arm else replace(each, values={THRESHOLD: each.cells[0].threshold, **each.values}) for each in experiments
    ]


def _said(report: Report, of: str) -> str:
    if of == "judge":
        return str(report.judge["model"] or report.judge["name"])
    return str(report.manifest["trait"] if of == "trait" else report.recipe[of])


def _order(value: Json) -> tuple[bool, float, str]:
    """Numbers by size, before texts."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not number, float(value) if number else 0.0, canonical(value)


def _groups(cells: Iterable[CellReport]) -> Iterator[list[CellReport]]:
    """Cells that differ in their seed alone; a seed that is there twice is the same training, and stands by itself."""
    groups: dict[tuple[str, int], list[CellReport]] = defaultdict(list)
    seen: dict[tuple[str, Json], int] = defaultdict(int)
    for cell in cells:
        # Two runs with one seed are the same training done twice. Counted as two they would make the interval too narrow, so
        # the second starts a group of its own.
        place = cell.experiment, canonical(cell.values.get(SEED))
        groups[cell.experiment, seen[place]].append(cell)
        seen[place] += 1
    yield from groups.values()


def _experiment(cells: Sequence[CellReport]) -> Experiment:
    values = {key: value for key, value in cells[0].values.items() if key != SEED}
    name = cells[0].name if len(cells) == 1 else cell_name(values, cells[0].arm)
    found = Experiment(name, values, cells[0].arm, tuple(cells))
    traits, coherences = ([scores_of(report, scale) for report in found.reports] for scale in ("trait", "coherence"))
    numbers = sorted({number for scores in traits for number in scores})
    points = {number: _point(number, found.reports, traits, coherences) for number in numbers}
    last = max((number for number, point in points.items() if number >= 0 and point.trait.mean is not None), default=-1)
    change, coherence = (_change(scores, last) for scores in (traits, coherences))
    word = _word(change, found.reports) if last > 0 else "too early"
    return replace(found, points=points, change=change, coherence=coherence, last=last, word=word, corrected=word)


def scores_of(report: Report, scale: str) -> dict[int, Scores]:
    """A training's scores on a scale, by cycle and prompt."""
    scored = ((cycle.cycle, getattr(cycle, scale)) for cycle in report.cycles)
    return {number: value["by_prompt"] for number, value in scored if value}


def _point(
    number: int, reports: Sequence[Report], traits: Sequence[Mapping[int, Scores]], coherences: Sequence[Mapping[int, Scores]]
) -> Point:
    measured = [cycle.metrics for report in reports for cycle in report.cycles if cycle.cycle == number]
    return Point(
        number,
        score_over_seeds([scores[number] for scores in traits if number in scores]),
        score_over_seeds([scores[number] for scores in coherences if number in scores]),
        {name: sum(values) / len(values) for name in METRICS if (values := _numbers(measured, name))},
    )


def _numbers(measured: Sequence[Mapping[str, Json]], name: str) -> list[float]:
    return [float(each[name]) for each in measured if each.get(name) is not None]


def _change(scores: Sequence[Mapping[int, Scores]], last: int) -> Estimate:
    # a training that ended early has no score in the last cycle: it takes no part in the change, and is listed as ended early
    both = [each for each in scores if any(each.get(0, {}).values()) and any(each.get(last, {}).values())]
    return change_over_seeds([each[0] for each in both], [each[last] for each in both]) if last > 0 else NOTHING


def _word(change: Estimate, reports: Sequence[Report]) -> Word:
    word = verdict_word(Interval(change.mean, change.low, change.high, change.prompts))
    doubted = any(read_calibrated(report.judge.get("calibration", {}).get("trait")).doubt for report in reports)
    return "judge not reliable here" if word == "amplified" and doubted else word


def _corrected(experiments: Sequence[Experiment]) -> list[Experiment]:
    """The experiments with verdicts that hold for all of them together."""
    # Null arms are not corrected for: they are the yardstick, not discoveries. Experiments without enough prompts have no
    # verdict to correct.
    tested = {
        str(number): each.change.p_value for number, each in enumerate(experiments) if each.change.prompts >= FEWEST_PROMPTS
    }
    corrected = holm({number: p for number, p in tested.items() if p is not None})
    return [_with_p(each, corrected.get(str(number))) for number, each in enumerate(experiments)]


def _with_p(experiment: Experiment, p_value: float | None) -> Experiment:
    if p_value is None:
        return experiment
    # the correction can only take a verdict back
    kept = p_value < 1 - CONFIDENCE or experiment.word not in ("amplified", "decayed")
    return replace(experiment, p_value=p_value, corrected=experiment.word if kept else "no change shown")


def _beside(experiment: Experiment, arms: Sequence[Experiment]) -> dict[str, Estimate]:
    """How much further the trait has moved than in each null arm that has the same trait, model and judge."""
    mine = moved(experiment)
    theirs = {arm.arm: moved(arm) for arm in arms if _like(arm) == _like(experiment)}
    return {name: difference(other, mine) for name, other in theirs.items() if mine and other}


def moved(experiment: Experiment, last: int | None = None) -> list[dict[str, float]]:
    """Of each training that has both, how far each question has moved from cycle 0 to `last`, the experiment's last if None."""
    last = experiment.last if last is None else last
    scored = [scores_of(report, "trait") for report in experiment.reports] if last > 0 else []
    return [found for scores in scored if (found := moves(scores.get(0, {}), scores.get(last, {})))]


def _like(experiment: Experiment) -> set[str]:
    return {
        canonical([report.manifest["trait"], report.manifest.get("model_identity"), report.judge["name"]])
        for report in experiment.reports
    }


def _trainings(experiment: Experiment) -> list[Training]:
    """What the noise of its trainings follows from."""
    found = [training_of(_start(report), scores_of(report, "trait")) for report in experiment.reports]
    return [training for training in found if training]


def _start(report: Report) -> str:
    """The key of the scores at cycle 0: cells of one column share them."""
    keys = [step.key for step in report.steps if step.verb == "aggregate" and step.cycle == 0 and not step.part]
    return keys[0] if keys else ""
