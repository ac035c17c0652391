"""Stored answers judged again by another judge, beside the first.

RUN/judges/NAME/    what another judge said of the run's answers: a folder of steps like the run's own
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iterft_lite.app.calibrate_judge import known_calibration
from iterft_lite.app.named_judge import Named, is_same, judge_folder, material_of, open_judge
from iterft_lite.backends.judge.identity import judge_identity
from iterft_lite.backends.judge.kinds import judge_price
from iterft_lite.data import prompts
from iterft_lite.data.traits import read_trait
from iterft_lite.digests import Json
from iterft_lite.engine.store import STEP_FILE, Store, folder_at
from iterft_lite.errors import FolderError, UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import judge_params
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.steps import Step, make_step
from iterft_lite.experiment.versions import libraries, versions
from iterft_lite.files import read_json
from iterft_lite.protocols import Judge, Progress
from iterft_lite.report.report import Report, planned, read_report, with_scores
from iterft_lite.stages import judge as judging_stage
from iterft_lite.stages import score as scoring_stage
from iterft_lite.stages.work import Work


def rejudge(root: Path, judge: Named, overrides: Mapping[str, Any], on_progress: Callable[[int, Progress], None]) -> Report:
    """Have another judge score the run's stored answers, beside the first; what it has judged already is kept.

    Args:
        root: The run folder; it may still be going.
        judge: Who.
        overrides: Recipe keys of the judge's own: `api_base`, `judge_method`, `judge_samples`, `judge_batch`, `max_usd`.
        on_progress: Takes the cycle and how far it has come.

    Raises:
        FolderError: If it is no run folder or has no answers yet.
    """
    manifest = read_report(root).manifest
    recipe = _recipe_with(manifest, judge, overrides)
    material = material_of(recipe, str(manifest.get("model_identity", "")))
    identity, _ = judge_identity(recipe, material)
    if not judge.again and is_same(manifest["judge"], identity):
        raise UserError(f"`{judge}` is the run's own judge", hint=f"`--judge '{judge}#1'` asks it once more")
    run = Store(root)
    todo = [step for step in planned(manifest) if step.verb == "judge" and not step.part and _answered(run, step)]
    if not todo:
        raise FolderError(f"`{root}` has no answers to judge yet")
    with Store(judge_folder(root, judge)) as store:
        _note(store, judge, identity)
        with open_judge(identity, recipe, material, store.logs) as backend:
            resting: dict[str, float] = {}
            while todo:
                step = min(todo, key=lambda step: resting.get(step.name, 0.0))  # batches of all cycles are out at once
                time.sleep(max(0.0, resting.get(step.name, 0.0) - time.monotonic()))
                try:
                    report = _reporter(on_progress, step.cycle)
                    verdicts = _judge_again(run, store, step, identity, judge.again, backend, report)
                except judging_stage.NotYet as patience:
                    resting[step.name] = time.monotonic() + patience.seconds
                    continue
                _score_again(run, store, step.cycle, verdicts)
                todo = [other for other in todo if other is not step]
    return report_by(root, judge)


def _recipe_with(manifest: Mapping[str, Any], judge: Named, overrides: Mapping[str, Any]) -> Recipe:
    """The run's recipe with another judge.

    Raises:
        UserError: If the folder's own address would be asked unasked: whoever made the folder chose it.
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


def _note(store: Store, judge: Named, identity: JudgeIdentity) -> None:
    """Say whose folder it is; refuse one of the same name and another revision or method."""
    known = store.manifest()
    if known is not None and not is_same(known["identity"], identity):
        raise FolderError(
            f"`{store.root}` holds verdicts of another revision or reading of `{judge}`",
            hint="remove that folder, or name a repetition: `#2`",
        )
    store.write_manifest({"judge": str(judge), "identity": asdict(identity)})


def _reporter(on_progress: Callable[[int, Progress], None], cycle: int) -> Callable[[Progress], None]:
    return lambda progress: on_progress(cycle, progress)


def _answered(run: Store, step: Step) -> bool:
    """Whether the answers that a judge step reads are all there."""
    return (run.root / "steps" / dict(step.inputs)["answers"] / "sealed.json").exists()


def _params(run: Store, step: str) -> dict[str, Json]:
    params = read_json(run.root / "steps" / step / STEP_FILE)["params"]
    return dict(params)


def _judge_again(
    run: Store,
    store: Store,
    step: Step,
    identity: JudgeIdentity,
    again: int,
    judge: Judge,
    report: Callable[[Progress], None],
) -> Step:
    """One cycle's answers; the step that was made of it."""
    name = dict(step.inputs)["answers"]
    answers = next(source for source in planned(run.manifest() or {}) if source.name == name)
    recipe = read_report(run.root).recipe
    rows, rubrics = _asked(run, step, recipe)
    params = judge_params(identity, rows, rubrics, again * identity.samples)
    made = make_step("judge", step.cycle, params, {"answers": answers})
    folder = store.folder(made)
    if folder.seal_of() is None:
        folder.begin()
        work = Work(made, folder.path, {"answers": run.root / "steps" / name}, report)
        folder.seal(0.0, judging_stage.run(work, judge), versions=versions(libraries(made)))
    folder.verify()
    return made


def _asked(run: Store, step: Step, recipe: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Rows and rubrics of a judge step: its own, or where it has not begun yet, the trait's."""
    with contextlib.suppress(FileNotFoundError):
        known = _params(run, step.name)
        return known["rows"], known["rubrics"]
    trait, document = read_trait(str(recipe["trait"])), recipe["regime"] == "sdf"
    rubrics = {
        "trait": trait.rubric_document if document else trait.rubric,
        "coherence": prompts.coherence_rubric(document=document),
    }
    return "document" if document else "chat", rubrics


def _score_again(run: Store, store: Store, cycle: int, verdicts: Step) -> None:
    """The cycle's numbers by the other judge, computed as the run's own are."""
    own = next(step for step in planned(run.manifest() or {}) if step.verb == "score" and step.cycle == cycle and not step.part)
    try:
        params = _params(run, own.name)
    except FileNotFoundError:
        return  # the run has not come to it: its thresholds are not known here
    made = make_step("score", cycle, params, {"verdicts": verdicts})
    folder = store.folder(made)
    if folder.seal_of() is None:
        folder.begin()
        work = Work(made, folder.path, {"verdicts": store.folder(verdicts).path}, lambda _: None)
        folder.seal(0.0, scoring_stage.run(work), versions=versions(libraries(made)))
    folder.verify()


def report_by(root: Path, judge: Named) -> Report:
    """The run's report with another judge's scores, and none of the first one's.

    Raises:
        FolderError: If that judge has not been asked.
    """
    report = read_report(root)
    if not judge.again and judge.name == report.judge["name"]:
        return report
    store = Store(judge_folder(root, judge))
    known = store.manifest()
    if known is None:
        raise FolderError(
            f"`{judge}` has not judged `{root}`",
            hint=f"`iterft judge {root} --judge '{judge}'` has it judge the stored answers",
        )
    facts = {verb: _sealed(store, verb) for verb in ("score", "judge")}
    identity, spent = known["identity"], facts["judge"].values()
    about = {
        "name": str(judge),
        "kind": identity["kind"],
        "note": identity["note"],
        "model": "",
        "calls": sum(fact["calls"] for fact in spent),
        "cached": sum(fact["cached"] for fact in spent),
        "usd": round(sum(fact["usd"] for fact in spent), 6),
        "planned_usd": None if judge_price(identity["name"]) is None else 0.0,
    }
    return with_scores(report, facts["score"], about, known_calibration(identity, report))


def _sealed(store: Store, verb: str) -> dict[int, dict[str, Json]]:
    """Facts of the finished steps of a verb, by cycle."""
    found = {}
    for path in sorted((store.root / "steps").glob(f"*-{verb}/sealed.json")):
        if folder := folder_at(path.parent):
            folder.verify()
        found[int(read_json(path.with_name(STEP_FILE))["cycle"])] = dict(read_json(path)["facts"])
    return found
