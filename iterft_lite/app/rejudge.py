"""Judges looked at: stored answers judged again by another, two judges compared, a judge held against careful readers.

RUN/judges/NAME/             what another judge said of the run's answers: a folder of steps like the run's own
RUN/judge_calibration.json   how the run's own judge ranks its trait's calibration answers
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from iterft_lite.backends.judge.prices import price_of
from iterft_lite.cache import cache_folder
from iterft_lite.data import prompts
from iterft_lite.data.traits import Scored, Trait, fill, read_trait
from iterft_lite.digests import Json, digest
from iterft_lite.engine.backends import judge_child, open_backends
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.manifest import Manifest, Run
from iterft_lite.engine.run import CONTEXT_STEP, StepProgress
from iterft_lite.engine.run import run as run_plan
from iterft_lite.engine.store import folder_at
from iterft_lite.errors import FolderError, TraitError, UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import Plan, aggregate_step, judge_step, rubrics_of
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.rows import JUDGED, SCALES
from iterft_lite.experiment.steps import Step
from iterft_lite.files import ROWS, read_json, write_json, write_output
from iterft_lite.machine.resolve import judge_of
from iterft_lite.metrics.agreement import Agreement, agreement, spearman
from iterft_lite.metrics.sanitize import fenced
from iterft_lite.metrics.score_parsing import weigh
from iterft_lite.protocols import Judge, JudgeRequest, JudgeResponse, Progress
from iterft_lite.report.report import CALIBRATION, Report, read_report, with_scores

ANCHOR = re.compile(r"^(?:- )?(?:Score )?\d{1,3}: .*$", re.MULTILINE)
"""An anchor in a rubric: a line that begins with its score."""


# -- who


@dataclass(frozen=True)
class Named:
    """A judge as a user names it: `openai/gpt-4o-mini#1` is the first repetition of what it says.

    Attributes:
        name: As in a recipe.
        again: Number of the repetition; 0 is the first time.
    """

    name: str
    again: int = 0

    def __str__(self) -> str:
        return f"{self.name}#{self.again}" if self.again else self.name


def named(text: str) -> Named:
    """Read a judge's name."""
    name, _, again = text.partition("#")
    if again and not again.isdigit():
        raise UserError(f"`{text}` is no judge", hint="write a judge, or a judge and the number of a repetition: `embedded#1`")
    return Named(name, int(again or 0))


def judge_folder(root: Path, judge: Named) -> Path:
    """Where a run keeps what another judge said."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", str(judge)).strip("-.")[-60:]
    return root / "judges" / f"{plain}-{digest(str(judge))[:8]}"


@contextlib.contextmanager
def open_judge(
    identity: JudgeIdentity, recipe: Recipe, trait: Trait, folder: Path, ledger: Path | None = None
) -> Iterator[Judge]:
    """A judge in its own process, ended afterwards.

    Args:
        folder: For its log.
        ledger: File with the dollars that `max_usd` counts; in `folder` if None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = judge_child(identity, recipe, trait, folder, ledger or folder / "judge_usd.txt")
    try:
        yield cast(Judge, child)
    finally:
        child.close()


# -- judge again


def rejudge(root: Path, judge: Named, overrides: Mapping[str, Any], on_progress: Callable[[int, Progress], None]) -> Report:
    """Have another judge score the run's stored answers, beside the first; what it has judged already is kept.

    The verdicts are steps in the run's store, under a manifest of their own.

    Args:
        root: The run folder; it may still be going.
        judge: Who.
        overrides: Recipe keys of the judge's own: `api_base`, `judge_method`, `judge_samples`, `judge_batch`, `max_usd`.
        on_progress: Takes the cycle and how far it has come.

    Raises:
        FolderError: If it is no run folder, has no answers yet, or is of version 0.1.
    """
    subject = Run(root)
    known = subject.known()
    if known.format == 1:
        raise FolderError(f"`{root}` was made by version 0.1: its answers cannot be judged again", hint="run its recipe anew")
    recipe = _recipe_with(known.value, judge, overrides)
    trait = read_trait(recipe.trait)
    identity, _ = judge_of(recipe, trait)
    if not judge.again and asdict(identity) == known.value["judge"]:
        raise UserError(f"`{judge}` is the run's own judge", hint=f"`--judge '{judge}#1'` asks it once more")
    steps = _steps_again(subject, known, identity, trait, judge.again)
    if not steps:
        raise FolderError(f"`{root}` has no answers to judge yet")
    with Run(judge_folder(root, judge), subject.store) as run:
        _note(run, judge, identity, steps)
        backends = open_backends(recipe, trait, identity, run.logs)
        plan = Plan(recipe, {step.name: step for step in steps})
        for event in run_plan(plan, run, LocalExecutor(backends, recipe.model, CONTEXT_STEP)):
            if isinstance(event, StepProgress):
                on_progress(event.step.cycle, event.progress)
    return report_by(root, judge)


def _recipe_with(manifest: Mapping[str, Any], judge: Named, overrides: Mapping[str, Any]) -> Recipe:
    own = {"judge": judge.name, "api_base": None, "judge_method": "auto", "judge_batch": False, "max_usd": 0.0}
    if judge.name == manifest["recipe"]["judge"]:
        own = {"judge": judge.name}
    given = {key: value for key, value in overrides.items() if value is not None}
    return make_recipe({**manifest["recipe"], **own, **given}, source="the run's recipe")


def _note(run: Run, judge: Named, identity: JudgeIdentity, steps: Sequence[Step]) -> None:
    """Say whose verdicts they are; refuse a folder of one of the same name and another revision or method."""
    known = run.manifest()
    if known is not None and known.value["identity"] != asdict(identity):
        raise FolderError(
            f"`{run.root}` holds verdicts of another revision or reading of `{judge}`",
            hint="remove that folder, or name a repetition: `#2`",
        )
    run.write_manifest({"judge": str(judge), "identity": asdict(identity)}, steps)


def _steps_again(run: Run, known: Manifest, identity: JudgeIdentity, trait: Trait, again: int) -> list[Step]:
    """The run's finished answers, another judge's steps on them, and the scores that come of these."""
    recipe = known.recipe
    document = recipe["regime"] == "sdf"
    rows = "document" if document else "chat"
    rubrics = rubrics_of(trait, prompts.coherence_rubric(document=document), rows)
    limits: dict[str, float] = {scale: recipe["evaluate"][f"{scale}_threshold"] for scale in SCALES}
    found: list[Step] = []
    for answers in known.steps:
        if answers.verb != "evaluate_samples" or answers.part or not run.folder(answers).finished:
            continue
        asked = _rubrics_asked(run, known, answers.cycle) or rubrics
        first = again * identity.samples
        verdicts = judge_step(answers.cycle, answers, identity, rows, asked, trait.evidence, first_sample=first)
        found += [answers, verdicts, aggregate_step(answers.cycle, answers, verdicts, limits)]
    return found


def _rubrics_asked(run: Run, known: Manifest, cycle: int) -> dict[str, str] | None:
    """The rubrics that the run's own judge read in a cycle: the trait's may have been changed since; None before it began."""
    own = next((step for step in known.steps if (step.verb, step.cycle, step.part) == ("judge", cycle, "")), None)
    folder = folder_at(run.folder(own).path) if own else None
    return dict(folder.step.params["rubrics"]) if folder else None


def report_by(root: Path, judge: Named) -> Report:
    """The run's report with another judge's scores, and none of the first one's.

    Raises:
        FolderError: If that judge has not been asked.
    """
    report = read_report(root)
    if not judge.again and judge.name == report.judge["name"]:
        return report
    run, known = _judged(root, judge)
    results = {verb: _results(run, known, verb) for verb in ("aggregate", "judge")}
    identity, spent = known.value["identity"], results["judge"].values()
    about = {
        "name": str(judge),
        "kind": identity["kind"],
        "note": identity["note"],
        "model": "",
        "calls": sum(each["calls"] for each in spent),
        "cached": sum(each["cached"] for each in spent),
        "usd": round(sum(each["usd"] for each in spent), 6),
        "planned_usd": None if price_of(identity["name"]) is None else 0.0,
    }
    return with_scores(report, results["aggregate"], about, _known_calibration(identity, report))


def _judged(root: Path, judge: Named) -> tuple[Run, Manifest]:
    """Another judge's manifest.

    Raises:
        FolderError: If that judge has not been asked.
    """
    run = Run(judge_folder(root, judge))
    known = run.manifest() if run.root.is_dir() else None
    if known is None:
        raise FolderError(
            f"`{judge}` has not judged `{root}`",
            hint=f"`iterft judge {root} --judge '{judge}'` has it judge the stored answers",
        )
    return run, known


def _results(run: Run, known: Manifest, verb: str) -> dict[int, dict[str, Json]]:
    """Results of the finished steps of a verb, by cycle."""
    folders = [run.folder(step) for step in known.steps if step.verb == verb and not step.part]
    return {folder.step.cycle: folder.verify().results for folder in folders if folder.finished}


# -- agree


@dataclass(frozen=True)
class Agreed:
    """How two judges' scores of a run's answers compare.

    Attributes:
        scale: Trait or coherence.
        cycle: The paper's number; None: all together.
        agreement: Scores of the first judge against the second's.
    """

    scale: str
    cycle: int | None
    agreement: Agreement


def scores_of(root: Path, judge: Named) -> dict[str, dict[tuple[int, tuple[str, int]], float]]:
    """By scale: a judge's scores of a run's answers, by cycle and answer.

    Raises:
        FolderError: If that judge has not been asked.
    """
    own = Run(root)
    is_own = not judge.again and judge.name == own.known().value["judge"]["name"]
    run, known = (own, own.known()) if is_own else _judged(root, judge)
    found: dict[str, dict[tuple[int, tuple[str, int]], float]] = {scale: {} for scale in SCALES}
    for step in known.steps:
        if step.verb != "judge" or step.part:
            continue
        folder = run.folder(step)
        folder.check_inputs()
        for row in JUDGED.read(folder.path / ROWS):
            for scale in SCALES:
                if (score := row.score(scale)) is not None:
                    found[scale][step.cycle, row.id] = score
    return found


def agree(root: Path, first: Named, second: Named) -> list[Agreed]:
    """Compare two judges on the answers that both scored, by scale and cycle."""
    one, other = scores_of(root, first), scores_of(root, second)
    rows = []
    for scale in SCALES:
        both = sorted(one[scale].keys() & other[scale].keys())
        for cycle in [None, *sorted({cycle for cycle, _ in both})]:
            keys = [key for key in both if cycle is None or key[0] == cycle]
            rows.append(Agreed(scale, cycle, agreement([one[scale][k] for k in keys], [other[scale][k] for k in keys])))
    return rows


def write_bland_altman(root: Path, first: Named, second: Named, path: Path) -> None:
    """Draw difference against mean of two judges' scores, a panel a scale, with the limits of agreement (PNG)."""
    from matplotlib.figure import Figure

    one, other = scores_of(root, first), scores_of(root, second)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, scale in zip(figure.subplots(1, 2, sharey=True), SCALES, strict=True):
        keys = sorted(one[scale].keys() & other[scale].keys())
        a, b = [one[scale][key] for key in keys], [other[scale][key] for key in keys]
        axes.scatter(
            [(x + y) / 2 for x, y in zip(a, b, strict=True)], [x - y for x, y in zip(a, b, strict=True)], s=9, alpha=0.5
        )
        found = agreement(a, b)
        for value, style in ((found.difference, "-"), (found.low, "--"), (found.high, "--")):
            if value is not None:
                axes.axhline(value, color="#800000", linestyle=style, linewidth=1)
                axes.annotate(f"{value:+.1f}", (100, value), ha="right", va="bottom", fontsize=8)
        axes.set(title=f"{scale}: {found.pairs} answers", xlabel="mean of both scores", xlim=(-1, 102))
        axes.set_ylabel(f"{first} - {second}".replace("$", r"\$") if scale == "trait" else "", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_output(path, drawn.getvalue())


# -- calibrate


@dataclass(frozen=True)
class Calibration:
    """A judge held against careful readers' scores of a trait's calibration answers, or of coherence's.

    Attributes:
        judge, revision, method: Who, and how it is read.
        subject: The trait's name, or "coherence".
        agreement: Judge against reader: Spearman, bias (judge - reader), spread.
        unscored: Answers without a score.
        order: Mean absolute change of scores when the rubric's anchors are given in reverse order, points; None where the
            judge reads no rubric.
        length: Spearman of (judge - reader) with the answer's length in characters.
        usd: What it cost.
    """

    judge: str
    revision: str
    method: str
    subject: str
    agreement: Agreement
    unscored: int
    order: float | None
    length: float | None
    usd: float


def calibrate(judge: Named, trait: str, overrides: Mapping[str, Any]) -> list[Calibration]:
    """A judge on a trait's calibration answers and on coherence's. Kept for reports.

    Args:
        overrides: As of `rejudge`. `max_usd` counts what this process spends on calibrations: those of a command.

    Raises:
        TraitError: If the trait has no calibration answers.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = make_recipe(
        {"regime": "sft", "trait": trait, "model": "nano", "judge": judge.name, **given}, source="the judge's settings"
    )
    return _calibrate(recipe, read_trait(trait))


@cache
def _spending() -> TemporaryDirectory[str]:
    """Folder for the dollars of this process's calibrations; it is removed when the process ends."""
    return TemporaryDirectory(prefix="iterft-")


def _calibrate(recipe: Recipe, trait: Trait) -> list[Calibration]:
    identity, _ = judge_of(recipe, trait)
    if not trait.calibration:
        raise TraitError(f"trait `{trait.name}` has no calibration.jsonl", hint="15 answers with a reader's scores are enough")
    found = []
    ledger = Path(_spending().name) / "judge_usd.txt"
    with open_judge(identity, recipe, trait, cache_folder() / "logs", ledger) as backend:
        for subject, rubric, scored in (
            (trait.name, trait.rubric, trait.calibration),
            ("coherence", prompts.coherence_rubric(document=False), prompts.coherence_calibration()),
        ):
            made = _calibrate_one(backend, identity, subject, rubric, scored)
            path = _calibration_file(asdict(identity), subject, rubric, scored)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(made))
            found.append(made)
    return found


def _calibration_file(identity: Mapping[str, Any], subject: str, rubric: str, scored: Sequence[Scored]) -> Path:
    """Where a calibration is kept: by judge, revision and method, rubric and answers."""
    who = [identity[key] for key in ("name", "revision", "method", "samples")]
    rows = [[one.question, one.answer, one.score] for one in scored]
    return cache_folder() / "calibrations" / f"{digest([who, subject, rubric, rows])[:24]}.json"


def _calibrate_one(judge: Judge, identity: JudgeIdentity, subject: str, rubric: str, scored: Sequence[Scored]) -> Calibration:
    scale = "coherence" if subject == "coherence" else "trait"
    plain, usd = _scores(judge, identity, scale, rubric, scored)
    turned, more = reversed_anchors(rubric), 0.0
    order = None
    if identity.kind == "llm" and turned != rubric:
        other, more = _scores(judge, identity, scale, turned, scored)
        changes = [abs(a - b) for a, b in zip(plain, other, strict=True) if a is not None and b is not None]
        order = sum(changes) / len(changes) if changes else None
    both = [(ours, one) for ours, one in zip(plain, scored, strict=True) if ours is not None]
    ours = [score for score, _ in both]
    theirs = [one.score for _, one in both]
    return Calibration(
        identity.name,
        identity.revision,
        identity.method,
        subject,
        agreement(ours, theirs),
        len(scored) - len(both),
        order,
        spearman([a - b for a, b in zip(ours, theirs, strict=True)], [float(len(one.answer)) for _, one in both]),
        usd + more,
    )


def _scores(
    judge: Judge, identity: JudgeIdentity, scale: str, rubric: str, scored: Sequence[Scored]
) -> tuple[list[float | None], float]:
    """The judge's scores of calibration answers, and what they cost."""
    replies: dict[str, JudgeResponse] = {}
    asks = [
        JudgeRequest(
            f"k{place}/{scale}/{sample}",
            "coherence" if scale == "coherence" else "trait",
            fill(rubric, {"question": fenced(one.question), "answer": fenced(one.answer)}),
            one.answer,
            one.question,
        )
        for place, one in enumerate(scored)
        for sample in range(identity.samples)
    ]
    judge.ask(asks, lambda reply: replies.update({reply.id: reply}))
    weighed = [
        weigh([replies[f"k{place}/{scale}/{sample}"] for sample in range(identity.samples)]) for place in range(len(scored))
    ]
    return [verdict.score for verdict in weighed], sum(verdict.usd for verdict in weighed)


def reversed_anchors(rubric: str) -> str:
    """A rubric with its anchor answers in reverse order."""
    anchors = [match[0] for match in ANCHOR.finditer(rubric)]
    backwards = iter(anchors[::-1])
    return ANCHOR.sub(lambda _: next(backwards), rubric)


def store_calibration(root: Path) -> None:
    """Note in a run how its own judge does on its trait: the embedded judge is tried out now, which takes two seconds, any
    other is looked up in what `iterft judge calibrate` has found.
    """
    report = read_report(root)
    identity = report.manifest["judge"]
    known = _known_calibration(identity, report)
    if not known and identity["kind"] == "embedded" and identity["name"] == "embedded":
        recipe = make_recipe(report.recipe, source="the run's recipe")
        with contextlib.suppress(TraitError, OSError):  # without a cache that can be written nothing is known
            _calibrate(recipe, read_trait(recipe.trait))
            known = _known_calibration(identity, report)
    if known:
        write_json(root / CALIBRATION, known)


def _known_calibration(identity: Mapping[str, Any], report: Report) -> dict[str, Json]:
    """Spearman by scale, as far as it is known for this judge, this trait and these answers."""
    try:
        trait = read_trait(str(report.recipe["trait"]))
    except TraitError:
        return {}
    coherence = prompts.coherence_rubric(document=False)
    found: dict[str, Json] = {}
    for scale, subject, rubric, scored in (
        ("trait", trait.name, trait.rubric, trait.calibration),
        ("coherence", "coherence", coherence, prompts.coherence_calibration()),
    ):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            found[scale] = read_json(_calibration_file(identity, subject, rubric, scored))["agreement"]["spearman"]
    return found
