"""What came of a study, in sentences: how many cells did what, how many would without any effect, what to be careful of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from iterft_lite.engine.study import State
from iterft_lite.metrics.amplification import FROM_CYCLE, THRESHOLD
from iterft_lite.report.compare import interval_words
from iterft_lite.report.study import Experiment, StudyReport

STATES: dict[State, str] = {
    "done": "done",
    "result": "ended in a result of the model",
    "failed": "failed",
    "running": "running",
    "queued": "not finished",
    "lost": "lost on the way",
}
"""States of cells, in the order in which they are listed."""


def study_sentence(study: StudyReport) -> str:
    """`25 cells: 23 done, 2 ended in a result of the model; 25 experiments of one training each`."""
    states = Counter(cell.state for cell in study.cells)
    told = ", ".join(f"{states[state]} {words}" for state, words in STATES.items() if states[state])
    count = len(study.experiments)
    fewest = min((len(each.cells) for each in study.everything), default=study.seeds)
    of = "one training each" if study.seeds == 1 else f"{'up to ' * (fewest < study.seeds)}{study.seeds} trainings each"
    arms = f" and {len(study.arms)} null arm{'s' * (len(study.arms) != 1)}" if study.arms else ""
    return f"{len(study.cells)} cells: {told}; {count} experiment{'s' * (count != 1)} of {of}{arms}"


def verdict_words(experiment: Experiment) -> str:
    """The verdict among all; what it would be alone where that is another."""
    if experiment.arm or experiment.word == experiment.corrected:
        return experiment.word
    return f"{experiment.corrected} (alone: {experiment.word})"


def study_sentences(study: StudyReport) -> list[str]:
    """Counts, false alarms, arms, and how far the intervals reach."""
    return [*_counted(study), *_false_alarms(study), *_reach(study)]


def _counted(study: StudyReport) -> Iterator[str]:
    ours = study.counts["experiments"]
    if ours["of"]:
        yield (
            f"amplified: {ours['amplified corrected']} of {ours['of']} experiments, corrected for their number (Holm); "
            f"{ours['amplified']} if each stood alone. Decayed: {ours['decayed corrected']}; {ours['decayed']} if alone"
        )
    for anchor in (0, 1):
        paper = study.counts[f"anchor {anchor}"]
        rule = f"the paper's rule ({THRESHOLD:.0f} points above cycle {anchor} from cycle {max(FROM_CYCLE, anchor + 1)} on)"
        met = f"{paper['any']} of {paper['of']} trainings in any of these cycles"
        if paper["of"]:
            yield f"{rule}: {met}, {paper['all']} in all, {paper['last']} in the last"


def _false_alarms(study: StudyReport) -> Iterator[str]:
    found = study.false_alarms
    if found is None:
        return
    alone, corrected = (f"{100 * share:.0f} %" for share in (found.any_interval, found.any_corrected))
    yield (
        f"without any effect, {alone} of studies of this shape would show an amplified experiment if each stood alone "
        f"({found.expected_interval:.1f} expected), {corrected} once corrected (simulated with its spread of answers)"
    )
    if found.any_paper is not None and found.expected_paper is not None:
        yield (
            f"noise alone would meet the paper's rule in {found.expected_paper:.2g} of {found.trainings} trainings, and at "
            f"least once in {100 * found.any_paper:.0f} % of such studies"
        )


def _reach(study: StudyReport) -> Iterator[str]:
    scored = [each for each in study.experiments if each.change.low is not None]
    alone = sum(each.change.trainings == 1 for each in scored)
    few = sum(each.change.trainings == 2 for each in scored)
    left = sum(cell.state in ("queued", "running", "lost") for cell in study.cells)
    so_far = " so far" if left else ""
    if alone:
        which = "all experiments have" if alone == len(scored) else f"{alone} of {len(scored)} experiments have"
        yield f"{which} one training{so_far}: their intervals cover questions only, and another seed may come out otherwise"
    if few:
        have = "experiment has" if few == 1 else "experiments have"
        yield f"{few} {have} two trainings{so_far}: such intervals hold the truth in as few as 90 % of cases"
    early = sum(len(each.failures) for each in study.everything)
    if early:
        count = f"{early} training{'s' * (early != 1)}"
        yield f"{count} ended early: changes are over those that reached the last cycle; read why the others did not"
    if left:
        yield (
            f"{left} cell{'s are' if left > 1 else ' is'} not finished: verdicts are corrected for the experiments that have "
            "scores so far"
        )


def arm_sentences(study: StudyReport) -> list[str]:
    """How far the trait moved in each null arm."""
    return [
        f"null arm {arm.arm.replace('_', ' ')}: {arm.change.mean:+.1f} points {interval_words(arm.change)}; {arm.word}"
        if arm.change.mean is not None
        else f"null arm {arm.arm.replace('_', ' ')}: no change can be told yet"
        for arm in study.arms
    ]


def mean_text(experiment: Experiment, cycle: int) -> str:
    """The mean trait score of a cycle; "" where there is none."""
    mean = experiment.points[cycle].trait.mean if cycle in experiment.points else None
    return "" if mean is None else f"{mean:.1f}"


def met_text(experiment: Experiment, reading: str) -> str:
    """Whether, or in how many trainings, the paper's rule is met; "" where it cannot be said."""
    met, of = experiment.rule(reading)
    return "" if not of else ("yes" if met else "no") if of == 1 else f"{met} of {of}"
