"""Runs beside each other: what their recipes differ in, which steps they share, and how far apart their scores are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from iterft_lite.digests import Json, canonical
from iterft_lite.errors import UserError
from iterft_lite.experiment.recipe_keys import flat
from iterft_lite.metrics.across_seeds import Estimate, difference, prompt_means
from iterft_lite.report.cells import NO_DIFFERENCE, SEED, CellReport, ReadRun, read_cells
from iterft_lite.report.report import Report, read_report
from iterft_lite.report.study import Experiment, StudyReport, moved, scores_of, study_report

ROUNDING = 1e-9
"""Points by which sums of the same scores may differ."""

MOST = 6
"""Sides that are compared at most: curves over each other are not told apart beyond."""

LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Apart:
    """How far a side lies above the first, points.

    Attributes:
        by_cycle: The score, at each cycle that both have.
        change: How much further it has moved from cycle 0 to the last cycle that both have.
        last: That cycle; -1 if there is none.
        shared: The last cycle up to which every step is the same one; -2 where none is.
    """

    by_cycle: Mapping[int, Estimate]
    change: Estimate
    last: int
    shared: int


@dataclass(frozen=True)
class Comparison:
    """Two to `MOST` sides, each a run or the trainings of one experiment.

    Attributes:
        study: All sides as one study, for figures and tables.
        sides: The first is what the others are held against.
        settings: By recipe key, what each side has, where they differ.
        apart: Of each side but the first.
        notes: What makes a comparison of their scores doubtful.
    """

    study: StudyReport
    sides: tuple[Experiment, ...]
    settings: Mapping[str, tuple[Json, ...]]
    apart: tuple[Apart, ...]
    notes: tuple[str, ...]


def compare(folders: Sequence[Path], only: Sequence[str] = (), read: ReadRun = read_report) -> Comparison:
    """Compare runs, cells, or studies of a few experiments. Runs that differ in their seed alone are one side, unless all do.

    Args:
        only, read: As of `report.cells.read_cells`.

    Raises:
        UserError: If there are too few or too many sides.
        IterftError: As `report.cells.read_cells`.
    """
    asked = read_cells(folders, only, read)
    cells = [cell for cell in asked if cell.report]
    study = study_report(cells, folders, " and ".join(folder.name for folder in folders))
    sides = _in_order(study, cells)
    if len(sides) == 1:
        # All runs differ in their seed alone: as one side there would be nothing to compare, so each is a side.
        sides = [study_report([cell]).everything[0] for cell in cells]
    if not 2 <= len(sides) <= MOST:
        waiting = len(asked) - len(cells)
        raise UserError(
            f"there {'is one side' if len(sides) == 1 else f'are {len(sides)} sides'} to compare: 2 to {MOST} can be"
            + (f"; {waiting} of {len(asked)} cells have not begun" if waiting else ""),
            hint="name runs or cells, or leave some out with `--only 'rows=50'`",
        )
    return Comparison(
        study=study,
        sides=tuple(sides),
        settings=_settings(sides),
        apart=tuple(_apart(sides[0], side) for side in sides[1:]),
        notes=tuple(_notes(sides)),
    )


def _in_order(study: StudyReport, cells: Sequence[CellReport]) -> list[Experiment]:
    """The experiments as they were named, not by their values."""
    places = {cell.folder: place for place, cell in enumerate(cells)}
    return sorted(study.everything, key=lambda each: places[each.cells[0].folder])


def _settings(sides: Sequence[Experiment]) -> dict[str, tuple[Json, ...]]:
    """What the recipes differ in; seeds of one side together."""
    recipes = [flat(side.reports[0].recipe) for side in sides]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in NO_DIFFERENCE - {"cycles"} and key != SEED)
    found = {key: tuple(recipe.get(key) for recipe in recipes) for key in keys}
    found[SEED] = tuple(_seeds(side) for side in sides)
    return {key: values for key, values in found.items() if len({canonical(value) for value in values}) > 1}


def _seeds(side: Experiment) -> Json:
    seeds = [report.recipe[SEED] for report in side.reports]
    return seeds[0] if len(seeds) == 1 else seeds


def _apart(first: Experiment, other: Experiment) -> Apart:
    cycles = sorted(set(first.points) & set(other.points))
    by_cycle = {cycle: _difference(first, other, cycle) for cycle in cycles}
    last = max((cycle for cycle in cycles if cycle >= 0 and by_cycle[cycle].mean is not None), default=-1)
    # Two comparisons: how far apart the ends are, and how much further one moved from its own start. Sides that start apart can
    # end alike, and the other way round.
    change = difference(moved(first, last), moved(other, last))
    return Apart(by_cycle, change, last, _shared(first.reports[0], other.reports[0]))


def _difference(first: Experiment, other: Experiment, cycle: int) -> Estimate:
    """Of the scores of a cycle. Sides whose models are the same there, as the untouched ones of equal seeds, differ by nothing,
    and no other training could have it otherwise."""
    found = difference(_means(first, cycle), _means(other, cycle))
    same = _answers(first, cycle) == _answers(other, cycle)
    if same and found.mean is not None and abs(found.mean) < ROUNDING:  # more: another judge's verdicts on the same answers
        return replace(found, mean=0.0, low=0.0, high=0.0, error=None, freedom=None)
    return found


def _answers(side: Experiment, cycle: int) -> list[str]:
    """Keys of the answers that a side's models gave."""
    return sorted(
        step.key for report in side.reports for step in report.steps if (step.cycle, step.verb) == (cycle, "evaluate_samples")
    )


def _means(side: Experiment, cycle: int) -> list[dict[str, float]]:
    found = [prompt_means(scores_of(report, "trait").get(cycle, {})) for report in side.reports]
    return [means for means in found if means]


def _shared(one: Report, other: Report) -> int:
    """The last cycle up to which two runs have the same steps."""
    keys, others = ({(step.cycle, step.name): step.key for step in report.steps} for report in (one, other))
    # equal keys mean equal results, so the first cycle with a step of another key is where the runs part
    apart = [cycle for (cycle, name), key in keys.items() if others.get((cycle, name)) != key]
    apart += [cycle for cycle, name in others if (cycle, name) not in keys]
    return min(apart, default=max((cycle for cycle, _ in keys), default=-2) + 1) - 1


def _notes(sides: Sequence[Experiment]) -> list[str]:
    """What makes a comparison doubtful."""
    doubts: dict[str, Callable[[Report], Json]] = {
        "different judges: their scores are not on one scale": lambda report: report.judge["name"],
        "judges fitted on different answers of untouched models: their scores are not on one scale": lambda report: (
            report.judge.get("own")
        ),
        "different traits: their scores mean different things": lambda report: report.manifest["trait"],
        "different models": lambda report: report.manifest.get("model_identity"),
        "library versions differ between the runs": lambda report: report.manifest.get("versions"),
    }
    reports = [report for side in sides for report in side.reports]
    found = [words for words, of in doubts.items() if len({canonical(of(report)) for report in reports}) > 1]
    asked = [frozenset(prompt for row in _means(side, 0) for prompt in row) for side in sides]
    if len(set(asked)) > 1:
        found.append("they were not asked the same questions: only those that they share are paired")
    return found


# -- in words


def sentences(comparison: Comparison) -> list[str]:
    """How far each side ends above the first, and how much further it moved."""
    found = []
    for letter, apart in zip(LETTERS[1:], comparison.apart, strict=False):
        if apart.last < 0:
            found.append(f"{letter} and A have no cycle with scores in common")
            continue
        score = apart.by_cycle[apart.last]
        far = _far(score, "above", "below")
        found.append(f"{letter} ends {far} A at cycle {apart.last}{_unsure(score)} {interval_words(score)}")
        if apart.change.mean is not None:
            far = f"from cycle 0 on it moved up {_far(apart.change, 'more', 'less')} than A"
            found.append(f"{far}{_unsure(apart.change)} {interval_words(apart.change)}")
        if apart.shared >= 0:
            found.append(f"{letter} and A share every step up to cycle {apart.shared}")
    return found


def _far(estimate: Estimate, more: str, less: str) -> str:
    mean = estimate.mean or 0.0
    return f"{abs(mean):.1f} points {more if mean >= 0 else less}"


def _unsure(estimate: Estimate) -> str:
    sure = estimate.low is not None and estimate.high is not None and (estimate.low > 0 or estimate.high < 0)
    return "" if sure else ", no difference is shown"


def interval_words(estimate: Estimate) -> str:
    """`(95 % interval -3.1 to +8.0 over questions and trainings, 12 questions)`."""
    if estimate.low is None or estimate.high is None:
        return "(no interval)"
    return f"(95 % interval {estimate.low:+.1f} to {estimate.high:+.1f} over {estimate.covers}, {estimate.prompts} questions)"
