"""Held-out questions: on demand, every finished model answers them, in further steps of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from iterft_lite.app.session import Session, open_again
from iterft_lite.digests import Json
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.store import folder_at
from iterft_lite.errors import FolderError
from iterft_lite.experiment.plan import HELD_OUT, Plan, held_out_plan, judge_key
from iterft_lite.experiment.steps import Step
from iterft_lite.metrics.amplification import Amplification
from iterft_lite.report.report import Report, with_intervals, with_scores


@dataclass(frozen=True)
class HeldOut:
    """A run's results on held-out questions.

    Attributes:
        scores: Results of the aggregate step, by cycle (see `stages/aggregate.py`).
        verdict: The verdict on amplification from these answers alone.
    """

    scores: dict[int, dict[str, Json]]
    verdict: Amplification


@contextlib.contextmanager
def open_held_out(root: Path) -> Iterator[Session]:
    """A run folder with the plan of the questions that its finished models have not answered yet. The run writes models that
    `keep` removed again.

    Raises:
        TraitError: If there is nothing to ask.
        FolderError: If it is not a run folder, or no model is finished.
    """
    with open_again(root) as session:
        plan = held_out_plan(session.plan, session.resolved.inputs)
        steps = {name: step for name, step in plan.steps.items() if _can_be_done(step, plan, session.run)}
        asked = [step for step in steps.values() if step.part == HELD_OUT]
        if not asked:
            raise FolderError(f"`{root}` has no finished model yet")
        session.run.add_steps(asked)
        yield replace(session, plan=Plan(plan.recipe, steps))


def not_asked(asked: Session) -> list[int]:
    """Cycles whose model is gone, and its adapter too: nobody can ask them any more."""
    plan, run = asked.plan, asked.run
    gone = [step.cycle for step in plan if step.verb == "export" and _is_gone(step, plan, run)]
    return [cycle for cycle in gone if plan.of("evaluate_samples", cycle, HELD_OUT) is None]


def _can_be_done(step: Step, plan: Plan, run: Run) -> bool:
    """Whether a step is finished, or asks held-out questions of a model that is, and that is there or can be written again."""
    if step.part == HELD_OUT and not run.folder(step).finished:
        return all(_can_be_done(source, plan, run) and not _is_gone(source, plan, run) for source in plan.inputs(step).values())
    return run.folder(step).finished


def _is_gone(step: Step, plan: Plan, run: Run) -> bool:
    """Whether `keep = "ends"` removed an exported model and the adapter that it was made from."""
    if step.verb != "export" or run.folder(step).whole():
        return False
    return not all(run.folder(source).whole() for source in plan.inputs(step).values())


def read_held_out(root: Path, report: Report) -> HeldOut | None:
    """The results so far, by the run's own judge; None if there are none."""
    run = Run(root)
    known = run.known()
    steps = {(step.verb, step.cycle): step for step in known.steps if step.part == HELD_OUT}
    who = judge_key(report.manifest["judge"])
    scores = {}
    for cycle in report.cycles:
        found = [steps.get((verb, cycle.cycle)) for verb in ("evaluate_samples", "judge", "aggregate")]
        folders = [run.folder(step) for step in found if step is not None]
        if len(folders) == 3 and all(folder.finished for folder in folders):
            judged = folder_at(folders[1].path)
            if judged and judge_key(judged.step.params["judge"]) == who:
                for folder in folders[:2]:
                    folder.check_inputs()
                scores[cycle.cycle] = with_intervals(folders[2].verify().results)
    if not scores:
        return None
    return HeldOut(scores, with_scores(report, scores, report.judge, report.judge["calibration"]).verdict)
