"""Another judge's verdicts on stored answers, beside those of the run's own judge.

RUN/judges/NAME/    another judge's verdicts on the run's answers: a manifest of steps in the run's own store
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iterft_lite.app.calibrate_judge import calibrate_own, known_calibration
from iterft_lite.app.check_judge import ELSEWHERE, require_judge
from iterft_lite.app.named_judge import Named, NotJudgedError, is_same, judge_folder, judged, material_of, own_answers
from iterft_lite.backends.chat_templates import rendering
from iterft_lite.backends.judge.identity import judge_identity
from iterft_lite.backends.judge.kinds import judge_price
from iterft_lite.data import prompts
from iterft_lite.data.traits import Trait
from iterft_lite.digests import Json
from iterft_lite.engine.backends import open_backends
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.manifest import Manifest, Run
from iterft_lite.engine.run import StepProgress, context_needed
from iterft_lite.engine.run import run as run_plan
from iterft_lite.engine.store import folder_at
from iterft_lite.errors import FolderError, UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import EVERYDAY, Plan, aggregate_step, everyday_step, judge_step, rubrics_of
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.experiment.rows import SCALES
from iterft_lite.experiment.steps import Step
from iterft_lite.protocols import Progress
from iterft_lite.report.report import Report, StepReader, read_report, with_scores


def rejudge(root: Path, judge: Named, overrides: Mapping[str, Any], on_progress: Callable[[int, Progress], None]) -> Report:
    """Have another judge score the run's stored answers. Keeps the verdicts that it gave before.

    The verdicts are steps in the run's store, under a manifest of their own.

    Args:
        root: The run folder; the run may still be going on.
        judge: The judge.
        overrides: Recipe keys of the judge's own: `api_base`, `judge_method`, `judge_samples`, `judge_batch`, `max_usd`.
        on_progress: Callback for the cycle and its progress.

    Raises:
        FolderError: If it is not a run folder, has no answers yet, or is of version 0.1.
    """
    subject = Run(root)
    known = subject.known()
    if known.format == 1:
        raise FolderError(f"`{root}` was made by version 0.1: its answers cannot be judged again", hint="run its recipe again")
    recipe = _recipe_with(known.value, judge, overrides)
    material = material_of(recipe, str(known.value.get("model_identity", "")))
    identity, _ = judge_identity(recipe, material)
    if not judge.again and is_same(known.value["judge"], identity):
        raise UserError(f"`{judge}` is the run's own judge", hint=f"`--judge '{judge}#1'` asks it once more")
    steps = _steps_again(subject, known, identity, material.trait, judge.again)
    if not steps:
        raise FolderError(f"`{root}` has no answers to judge yet")
    if any(step.verb == "judge" and not subject.folder(step).finished for step in steps):
        require_judge(identity, recipe, ELSEWHERE, live=False)
    with Run(judge_folder(root, judge), subject.store) as run:
        _note(run, judge, identity, steps)
        backends = open_backends(recipe, material.trait, identity, run.logs, seeds=material.seeds)
        plan = Plan(recipe, {step.name: step for step in steps})
        writing = Plan(recipe, {step.name: step for step in steps if step.part == EVERYDAY})
        with contextlib.closing(LocalExecutor(backends, recipe.model, context_needed(writing))) as executor:
            for event in run_plan(plan, run, executor, after="keep"):
                if isinstance(event, StepProgress):
                    on_progress(event.step.cycle, event.progress)
            if identity.own:
                calibrate_own(run, recipe, material, backends)
    return report_by(root, judge)


def _recipe_with(manifest: Mapping[str, Any], judge: Named, overrides: Mapping[str, Any]) -> Recipe:
    """The run's recipe with another judge.

    Raises:
        UserError: If the judge's address came from the folder and not from the user: a stranger may have made the folder.
    """
    own = {"judge": judge.name, "api_base": None, "judge_method": "auto", "judge_batch": False, "max_usd": 0.0}
    if judge.name == manifest["recipe"]["judge"]:
        own = {"judge": judge.name}
        address = manifest["recipe"].get("api_base")
        if address and overrides.get("api_base") is None:
            raise UserError(
                f"this folder would have `{judge.name}` asked at {address}",
                hint=f"if that is meant, add `--api-base {address}`",
            )
    given = {key: value for key, value in overrides.items() if value is not None}
    return make_recipe({**manifest["recipe"], **own, **given}, source="the run's recipe")


def _note(run: Run, judge: Named, identity: JudgeIdentity, steps: Sequence[Step]) -> None:
    """Note the judge in the folder. Refuses a folder with verdicts of the same judge by another revision, method or address;
    one that a failed first try left without any is taken."""
    known = run.manifest()
    if known is not None and not is_same(known.value["identity"], identity) and _has_verdicts(run, known):
        raise FolderError(
            f"`{run.root}` holds verdicts of another revision or reading of `{judge}`",
            hint="remove that folder, or name a repetition: `#2`",
        )
    run.write_manifest({"judge": str(judge), "identity": asdict(identity)}, steps)


def _has_verdicts(run: Run, known: Manifest) -> bool:
    """Whether the judge of a folder has judged any cycle to its end: before, nobody has seen a score of its."""
    return any(step.verb == "judge" and run.folder(step).finished for step in known.steps)


def _steps_again(run: Run, known: Manifest, identity: JudgeIdentity, trait: Trait, again: int) -> list[Step]:
    """The run's finished answers, another judge's steps on them, and the aggregate steps over those."""
    recipe = known.recipe
    rows = REGIMES[recipe["regime"]].rows
    rubrics = rubrics_of(trait, prompts.coherence_rubric(document=rows == "document"), rows)
    limits: dict[str, float] = {scale: recipe["evaluate"][f"{scale}_threshold"] for scale in SCALES}
    before = _everyday(run, known, rows) if identity.own else {}
    found: list[Step] = []
    for answers in known.steps:
        if answers.verb != "evaluate_samples" or answers.part or not run.folder(answers).finished:
            continue
        asked = _rubrics_asked(run, known, answers.cycle) or rubrics
        first = again * identity.samples
        verdicts = judge_step(answers.cycle, answers, identity, rows, asked, first_sample=first, everyday=before.get(EVERYDAY))
        found += [answers, verdicts, aggregate_step(answers.cycle, answers, verdicts, limits)]
    return [*before.values(), *found] if found else []


def _everyday(run: Run, known: Manifest, rows: str) -> dict[str, Step]:
    """By role, the untouched model, and the step in which it is asked for what a judge is fitted on, as a plan has it."""
    kept = next(step for step in known.steps if step.verb == "export" and step.cycle == -1)
    folder = folder_at(run.folder(kept).path)
    untouched = folder.step if folder else kept
    asked = prompts.plain_prompts(document=rows == "document")
    return {"model": untouched, EVERYDAY: everyday_step(untouched, rows, asked, rendering())}


def _rubrics_asked(run: Run, known: Manifest, cycle: int) -> dict[str, str] | None:
    """The rubrics that the run's own judge read in a cycle (the trait's may have changed since); None if it read none yet."""
    own = next((step for step in known.steps if (step.verb, step.cycle, step.part) == ("judge", cycle, "")), None)
    folder = folder_at(run.folder(own).path) if own else None
    return dict(folder.step.params["rubrics"]) if folder else None


class ReadBy:
    """Reads the runs of a study by a judge's scores (`report.cells.ReadRun`); those that it has not judged have none.

    Args:
        judge: The judge.
    """

    def __init__(self, judge: Named) -> None:
        self._judge = judge
        self.judged: list[Path] = []
        self.missing: list[Path] = []
        """Runs that it has judged, and that it has not."""

    def __call__(self, root: Path, reader: StepReader) -> Report:
        """A run's report."""
        try:
            found = report_by(root, self._judge, reader)
        except NotJudgedError:
            self.missing.append(root)
            nobody = {"name": str(self._judge), "kind": "", "note": "", "model": ""}
            return with_scores(read_report(root, reader), {}, nobody, {})
        self.judged.append(root)
        return found


def report_by(root: Path, judge: Named, reader: StepReader | None = None) -> Report:
    """The run's report with another judge's scores, and steps, in place of its own judge's.

    Args:
        reader: As of `read_report`.

    Raises:
        NotJudgedError: If that judge has not been asked.
    """
    report = read_report(root, reader)
    if not judge.again and judge.name == report.judge["name"]:
        return report
    run, known = judged(root, judge)
    results = {verb: _results(run, known, verb) for verb in ("aggregate", "judge")}
    identity, spent = known.value["identity"], results["judge"].values()
    about = {
        "name": str(judge),
        "kind": identity["kind"],
        "note": identity["note"],
        "own": next((step.key for step in known.steps if step.part == EVERYDAY), ""),
        "model": "",
        "calls": sum(each["calls"] for each in spent),
        "cached": sum(each["cached"] for each in spent),
        "usd": round(sum(each["usd"] for each in spent), 6),
        "planned_usd": None if judge_price(identity["name"]) is None else 0.0,
    }
    theirs = {(step.verb, step.cycle): step for step in known.steps if not step.part}
    steps = tuple(step if step.part else theirs.get((step.verb, step.cycle), step) for step in report.steps)
    calibration = known_calibration(identity, own_answers(run, known), str(report.recipe["trait"]))
    return with_scores(replace(report, steps=steps), results["aggregate"], about, calibration)


def _results(run: Run, known: Manifest, verb: str) -> dict[int, dict[str, Json]]:
    """Results of the finished steps of a verb, by cycle."""
    folders = [run.folder(step) for step in known.steps if step.verb == verb and not step.part]
    return {folder.step.cycle: folder.verify().results for folder in folders if folder.finished}
