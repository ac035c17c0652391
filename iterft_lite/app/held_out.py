"""The held-out questions: every finished model answers them, on demand, as further steps in the run's own folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from iterft_lite.app.session import Opened, open_again
from iterft_lite.digests import Json
from iterft_lite.engine.store import StepFolder, Store, folder_at
from iterft_lite.errors import FolderError
from iterft_lite.experiment.plan import HELD_OUT, Plan, held_out_plan, judge_key
from iterft_lite.experiment.steps import Step, cycle_name
from iterft_lite.metrics.amplification import Amplification
from iterft_lite.report.report import Report, with_intervals, with_scores


@dataclass(frozen=True)
class HeldOut:
    """What is known of a run on held-out questions.

    Attributes:
        scores: Facts of the score, by cycle (see `stages/score.py`).
        verdict: On amplification, by these answers alone.
    """

    scores: dict[int, dict[str, Json]]
    verdict: Amplification


@contextlib.contextmanager
def open_held_out(root: Path) -> Iterator[Opened]:
    """A run folder with the plan of what its finished models are still to be asked; models that `keep` removed are written
    again for it.

    Raises:
        TraitError: If there is nothing to ask.
        FolderError: If it is no run folder, or no model is finished.
    """
    with open_again(root) as opened:
        plan = held_out_plan(opened.plan, opened.resolved.inputs)
        steps = {name: step for name, step in plan.steps.items() if _can_be_done(step, plan, opened.store)}
        if not any(step.part == HELD_OUT for step in steps.values()):
            raise FolderError(f"`{root}` has no finished model yet")
        yield replace(opened, plan=Plan(plan.recipe, steps))


def _can_be_done(step: Step, plan: Plan, store: Store) -> bool:
    """Whether a step is finished, or asks held-out questions of a model that is."""
    if step.part == HELD_OUT:
        return all(_can_be_done(source, plan, store) for source in plan.inputs(step).values())
    return store.folder(step).seal_of() is not None


def read_held_out(root: Path, report: Report) -> HeldOut | None:
    """What was asked so far by the run's own judge; None if nothing was."""
    scores = {}
    who = judge_key(report.manifest["judge"])
    for cycle in report.cycles:
        answer, judge, score = (_folder(root, verb, cycle.cycle) for verb in ("evaluate_samples", "judge", "aggregate"))
        if judge and score and (seal := score.seal_of()) and judge.step.params["judge"] == who:
            score.verify()
            for source in filter(None, (answer, judge)):
                source.check_inputs()
            scores[cycle.cycle] = with_intervals(seal.facts)
    if not scores:
        return None
    return HeldOut(scores, with_scores(report, scores, report.judge, report.judge["spearman"]).verdict)


def _folder(root: Path, verb: str, cycle: int) -> StepFolder | None:
    return folder_at(root / "steps" / f"{cycle_name(cycle)}-{verb}-{HELD_OUT}")
