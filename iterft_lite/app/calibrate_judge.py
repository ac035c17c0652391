"""A judge compared with careful readers, on calibration answers that they scored.

RUN/judge_calibration.json   the run's own judge on its trait's calibration answers
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iterft_lite.app.check_judge import ELSEWHERE, require_judge
from iterft_lite.app.named_judge import Named, material_of, open_judge, own_answers
from iterft_lite.backends.judge.identity import judge_identity
from iterft_lite.backends.judge.kinds import Material, kind_of
from iterft_lite.cache import cache_folder
from iterft_lite.data import prompts
from iterft_lite.data.traits import Scored, fill, read_trait
from iterft_lite.digests import Json, digest
from iterft_lite.engine.manifest import Run
from iterft_lite.errors import ModelError, RecipeError, TraitError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.rows import SAMPLES
from iterft_lite.files import read_json, write_json
from iterft_lite.machine.resolve import model_identity, model_place
from iterft_lite.metrics.agreement import Agreement, agreement, calibrated, spearman
from iterft_lite.metrics.sanitize import fenced
from iterft_lite.metrics.score_parsing import weigh
from iterft_lite.protocols import Backends, Judge, JudgeRequest, JudgeResponse
from iterft_lite.report.report import CALIBRATION

ANCHOR = re.compile(r"^(?:- )?(?:Score )?\d{1,3}: .*$", re.MULTILINE)
"""An anchor in a rubric: a line that begins with its score."""


@dataclass(frozen=True)
class Calibration:
    """A judge compared with careful readers' scores of a trait's calibration answers, or of coherence's.

    Attributes:
        judge, revision, method: Who, and how it is read.
        subject: The trait's name, or "coherence".
        agreement: Judge against reader: Spearman, bias (judge - reader), spread.
        unscored: Answers without a score.
        order: Mean absolute change of scores when the rubric's anchors are given in reverse order, points; None where the
            judge reads no rubric.
        length: Spearman of (judge - reader) with the answer's length in characters.
        usd: What it cost.
        scores: The judge's scores, in the order of the answers.
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
    scores: tuple[float | None, ...] = ()


def calibrate(judge: Named, trait: str, overrides: Mapping[str, Any]) -> list[Calibration]:
    """Calibrate a judge on a trait's calibration answers and on coherence's. Keeps the result for reports.

    Args:
        overrides: As of `rejudge`, and `model`: the untouched one, which the base judge is.
            `max_usd` counts what this process spends on calibrations: those of a command.

    Raises:
        TraitError: If the trait has no calibration answers.
        UserError: If the judge cannot be asked.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = make_recipe(
        {"regime": "sft", "trait": trait, "model": "nano", "judge": judge.name, **given}, source="the judge's settings"
    )
    material = material_of(recipe, model_identity(model_place(recipe.model)))
    require_judge(judge_identity(recipe, material)[0], recipe, ELSEWHERE, live=False)
    return _calibrate(recipe, material)


@cache
def _spending() -> TemporaryDirectory[str]:
    """Folder that counts the dollars of this process's calibrations. It is removed when the process ends."""
    return TemporaryDirectory(prefix="iterft-")


def _calibrate(recipe: Recipe, material: Material, judge: Judge | None = None, own: str = "") -> list[Calibration]:
    """Calibrate a recipe's judge.

    Args:
        judge: It, where it is there already; else it is started, and ended.
        own: As of `own_answers`.
    """
    trait = material.trait
    identity, _ = judge_identity(recipe, material)
    if not trait.calibration:
        raise TraitError(f"trait `{trait.name}` has no calibration.jsonl", hint="15 answers with a reader's scores are enough")
    found = []
    ledger = Path(_spending().name) / "judge_usd.txt"
    opened = contextlib.nullcontext(judge) if judge else open_judge(identity, recipe, material, cache_folder() / "logs", ledger)
    with opened as backend:
        for subject, rubric, scored in (
            (trait.name, trait.rubric, trait.calibration),
            ("coherence", prompts.coherence_rubric(document=False), prompts.coherence_calibration()),
        ):
            made = _calibrate_one(backend, identity, subject, rubric, scored, own)
            path = _calibration_file(asdict(identity), own, subject, rubric, scored)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(made))
            found.append(made)
    return found


def _calibration_file(identity: Mapping[str, Any], own: str, subject: str, rubric: str, scored: Sequence[Scored]) -> Path:
    """The file of a calibration: one for each judge, revision, fit, method, rubric and set of answers."""
    who = [identity[key] for key in ("name", "revision", "method", "samples")]
    who += [sorted(sample.text for sample in SAMPLES.read(Path(own)))] if own else []
    rows = [[one.question, one.answer, one.score] for one in scored]
    return cache_folder() / "calibrations" / f"{digest([who, subject, rubric, rows])[:24]}.json"


def _calibrate_one(
    judge: Judge, identity: JudgeIdentity, subject: str, rubric: str, scored: Sequence[Scored], own: str = ""
) -> Calibration:
    scale = "coherence" if subject == "coherence" else "trait"
    plain, usd = _scores(judge, identity, scale, rubric, scored, own)
    turned, more = reversed_anchors(rubric), 0.0
    order = None
    if identity.kind == "llm" and turned != rubric:
        other, more = _scores(judge, identity, scale, turned, scored, own)
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
        tuple(plain),
    )


def _scores(
    judge: Judge, identity: JudgeIdentity, scale: str, rubric: str, scored: Sequence[Scored], own: str
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
            sample,
            own,
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


def store_calibration(root: Path, backends: Backends) -> None:
    """Note in a run how its own judge does on its trait. Calibrates a judge that costs nothing; for any other it looks up the
    result of `iterft judge calibrate`.

    Args:
        backends: The run's, which has ended; its judge has loaded or fitted what it judges by.
    """
    backends.watch("judge", None)  # the run listened, and is not there any more
    _store(root, backends.judge)


def calibrate_own(run: Run, recipe: Recipe, material: Material, backends: Backends) -> None:
    """Calibrate a judge that is fitted on the untouched model's own answers, and so a judge of this run alone.

    Args:
        run: The folder of its verdicts.
        backends: With which they were made.
    """
    manifest = run.manifest()
    own = own_answers(run, manifest) if manifest else ""
    backends.watch("judge", None)
    with contextlib.suppress(TraitError):
        _calibrate(recipe, material, backends.judge, own)


def store_calibrations(roots: Iterable[Path], *, starts: Collection[str]) -> None:
    """Note in each run of a study how its judge does on its trait. Each judge is calibrated once, and kept for all of them.

    Args:
        roots: The runs' folders.
        starts: Names of judges that may be started for it here; what is known of any other is looked up.
    """
    for root in roots:
        _store(root, None, starts)


def _store(root: Path, judge: Judge | None, starts: Collection[str] = ()) -> None:
    """Note in a run how its own judge does.

    Args:
        judge: It, where it is there.
        starts: Names of judges that may be started where it is not.
    """
    run = Run(root)
    kept = run.known()
    manifest, own = kept.value, own_answers(run, kept)
    identity, trait = manifest["judge"], str(manifest["recipe"]["trait"])
    known = known_calibration(identity, own, trait)
    with contextlib.suppress(RecipeError):
        if not known and (judge or identity["name"] in starts) and kind_of(identity["name"]).calibrates:
            recipe = make_recipe(manifest["recipe"], source="the run's recipe")
            with contextlib.suppress(TraitError, ModelError, OSError):  # without a writable cache nothing is known
                _calibrate(recipe, material_of(recipe, str(manifest.get("model_identity", ""))), judge, own)
                known = known_calibration(identity, own, trait)
    if known:
        write_json(root / CALIBRATION, known)


def kept_scores(identity: Mapping[str, Any], own: str, trait_name: str) -> dict[str, list[float | None]]:
    """By scale, a judge's scores of a trait's calibration answers and of coherence's, as far as they were calibrated."""
    found: dict[str, list[float | None]] = {}
    for scale, known in _kept(identity, own, trait_name):
        if known.get("scores"):
            found[scale] = list(known["scores"])
    return found


def _kept(identity: Mapping[str, Any], own: str, trait_name: str) -> Iterator[tuple[str, dict[str, Json]]]:
    """By scale, the calibrations of a judge that are in the cache."""
    trait = read_trait(trait_name)
    for scale, subject, rubric, scored in (
        ("trait", trait.name, trait.rubric, trait.calibration),
        ("coherence", "coherence", prompts.coherence_rubric(document=False), prompts.coherence_calibration()),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            yield scale, dict(read_json(_calibration_file(identity, own, subject, rubric, scored)))


def known_calibration(identity: Mapping[str, Any], own: str, trait_name: str) -> dict[str, Json]:
    """By scale what is known of a judge on a trait and its answers: fields of `metrics.agreement.Calibrated`."""
    found: dict[str, Json] = {}
    with contextlib.suppress(TraitError):
        for scale, known in _kept(identity, own, trait_name):
            with contextlib.suppress(KeyError, TypeError):  # ignore a damaged file
                found[scale] = asdict(calibrated(Agreement(**known["agreement"])))
    return found
