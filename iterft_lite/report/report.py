"""The report: computed from the run folder alone, at any time, also of a run that is still going."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from iterft_lite.digests import Json
from iterft_lite.engine.completion import Completion, read_completion
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.run import FAILURE
from iterft_lite.engine.store import StepFolder
from iterft_lite.errors import FileError
from iterft_lite.experiment.contexts import NONE, context_part
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.plan import EVERYDAY, HELD_OUT
from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.experiment.rows import JUDGED, SAMPLES, SCALES
from iterft_lite.experiment.steps import Step
from iterft_lite.files import ROWS, ROWS_LIMIT, read_bytes, read_json, read_object, read_rows
from iterft_lite.metrics.agreement import read_calibrated
from iterft_lite.metrics.amplification import FEWEST_PROMPTS, FROM_CYCLE, Amplification, PaperRule, amplification
from iterft_lite.metrics.catalogue import METRICS
from iterft_lite.metrics.curve import FEWEST_CYCLES, Curve
from iterft_lite.metrics.intervals import Interval, Scores, mean_interval

FIGURES = re.compile(r"[\d.]+")
"""In a remark: what differs between remarks of one kind."""

CALIBRATION = "judge_calibration.json"
"""Spearman of the run's judge with careful readers, by scale, where it is known; see `judging.py`."""

UNNAMED = "judge"
"""What a model on this machine gives as the judge's name: the recipe's own says more."""

MODEL = re.compile(rb'"model": "((?:[^"\\\\]|\\\\.)*)"')
"""The model of a verdict, in a row as it is written."""

VERIFIED = frozenset({"evaluate_samples", "judge", "aggregate", "text_metrics"})
"""Verbs whose files a report reads; of the others it is only held whether their inputs are still the same."""

NOTABLE = 5.0
"""Points by which a cycle lies off the fit that are worth a remark: it is then no approach to a level."""

SHOWN_SAMPLES = 2
"""Answers a question and cycle on the report's page."""


@dataclass(frozen=True)
class Cycle:
    """What is known of one cycle; parts that are not done yet are None or empty.

    Attributes:
        cycle: The paper's number; -1 the untouched model.
        trait, coherence: `mean`, `low`, `high`, `prompts`, `scored`, `unscored`, `reasons`, `by_prompt`; None before the score.
            `low` and `high` are None where there is no interval.
        rate: Share of answers above both thresholds.
        answers: How many were judged.
        train_rows: Rows that the cycle's model was trained on; 0 for the untouched one.
        dropped: Generated rows that were not trained on, by reason.
        metrics: What needs no judge (`metrics/catalogue.py`).
        training: The trainer's results (`TrainResult`).
        export: The export's results, parity among them.
        seconds: By verb.
        peak_vram: Most GPU memory that the run's processes held together, bytes by verb; empty without a GPU.
        contexts: By evaluation context, in the recipe's order, `trait`, `coherence`, `rate` and `answers` as above; the first
            one's are the cycle's own.
    """

    cycle: int
    trait: dict[str, Json] | None
    coherence: dict[str, Json] | None
    rate: float | None
    answers: int
    train_rows: int
    dropped: dict[str, int]
    metrics: dict[str, Json]
    training: dict[str, Json]
    export: dict[str, Json]
    seconds: dict[str, float]
    peak_vram: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, dict[str, Json]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A run as it stands.

    Attributes:
        manifest: What was asked and how it was resolved.
        steps: Those of the plan, in order.
        cycles: From -1 on, those that have begun.
        verdict: On amplification.
        judge: `name`, `kind`, `note`, `model`, `calls`, `cached`, `usd`, `planned_usd` (at most, None if
            the price is not known), and `spearman` with careful readers by scale, {} where
            it was not measured.
        complete: Every planned step is finished.
        failure: How the last session failed (step, kind, message, hint); None if it did not.
        version_changes: Packages of which the steps were made with more than one version: by package and version, the steps.
    """

    manifest: dict[str, Any]
    steps: tuple[Step, ...]
    cycles: tuple[Cycle, ...]
    verdict: Amplification
    judge: dict[str, Json]
    complete: bool
    version_changes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    failure: dict[str, Json] | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as resolved."""
        return dict(self.manifest["recipe"])


class StepReader:
    """Reads finished steps of a store and verifies them, each once: runs of one store share steps."""

    def __init__(self) -> None:
        self._records: dict[Path, Completion | None] = {}
        self._finished: dict[Path, Completion | None] = {}
        self._judges: dict[Path, frozenset[str]] = {}

    def finished(self, folder: StepFolder) -> Completion | None:
        """The record of a step whose files, where a report reads them, and inputs are those that it names.

        Raises:
            StoreError: If they are not.
        """
        if folder.path not in self._finished:
            self._records[folder.path] = found = folder.completion()
            if found:
                # Digests of gigabytes of models would take minutes, and a report reads none of them: only files that it reads
                # are verified.
                folder.verify(read=self._record) if folder.step.verb in VERIFIED else folder.check_inputs(self._record)
            self._finished[folder.path] = found
        return self._finished[folder.path]

    def _record(self, path: Path) -> Completion | None:
        """A step's record, which is asked for by each step that reads it."""
        if path not in self._records:
            self._records[path] = read_completion(path)
        return self._records[path]

    def judges(self, folder: StepFolder) -> frozenset[str]:
        """The models that a judge step's verdicts on the trait are by."""
        if folder.path not in self._judges:
            self._judges[folder.path] = _judges(folder.path / ROWS)
        return self._judges[folder.path]


def _judges(path: Path) -> frozenset[str]:
    """The models that verdicts on the trait are by."""
    try:
        # A study has hundreds of thousands of verdicts, and parsing them takes ten times as long. What a judge wrote cannot
        # look like the field: quotes within a text are escaped.
        found = set(MODEL.findall(read_bytes(path, limit=ROWS_LIMIT)))
    except FileNotFoundError:
        return frozenset()
    if len(found) == 1 and not any(b"\\" in model for model in found):
        return frozenset(model.decode(errors="replace") for model in found)
    verdicts = [row.get("trait") for row in read_rows(path)]
    models = [verdict.get("model") for verdict in verdicts if isinstance(verdict, Mapping)]
    return frozenset(model for model in models if isinstance(model, str))


def read_report(root: Path, reader: StepReader | None = None) -> Report:
    """Read a run folder; each step's folder is verified once.

    Args:
        reader: Of the store's steps, where several runs of it are read.

    Raises:
        FolderError: If it is none.
        StoreError: If a finished step's files were changed, or it was made of other results than those that are there.
    """
    run, reader = Run(root), reader or StepReader()
    manifest = run.known()
    steps = [step for step in manifest.steps if step.part != HELD_OUT]
    finished: dict[str, Completion] = {}
    for step in steps:
        if found := reader.finished(run.folder(step)):
            finished[step.name] = found
    contexts = manifest.value["recipe"]["evaluate"].get("system") or [NONE]
    # a cycle appears as soon as one of its steps is finished: a report of a run in progress shows how far it is
    cycles = tuple(
        _cycle(number, [step for step in steps if step.cycle == number], finished, contexts)
        for number in sorted({step.cycle for step in steps})
        if any(step.name in finished for step in steps if step.cycle == number)
    )
    known: dict[str, Json] = {}
    with contextlib.suppress(FileNotFoundError):
        known = read_json(root / CALIBRATION)
    judge = _measured(_judge(run, reader, manifest.value, steps, finished), known, str(manifest.value["trait"]))
    verdict = _verdict(cycles, manifest.value, known)
    complete = all(step.name in finished for step in steps)
    return Report(
        manifest.value, tuple(steps), cycles, verdict, judge, complete, _version_changes(finished), last_failure(root)
    )


def last_failure(root: Path) -> dict[str, Json] | None:
    """How a run's last session failed: step, kind, message, hint; None if it did not."""
    try:
        return read_object(root / FAILURE)
    except (FileNotFoundError, FileError):
        return None


def _version_changes(finished: Mapping[str, Completion]) -> dict[str, dict[str, list[str]]]:
    """By package and version the steps that were made with it, where that is more than one version."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for step, completion in finished.items():
        for package, version in completion.versions.items():
            found[package][version].append(step)
    return {package: dict(steps) for package, steps in found.items() if len(steps) > 1}


def with_scores(
    report: Report, scores: Mapping[int, dict[str, Json]], judge: Mapping[str, Json], calibration: Mapping[str, Json]
) -> Report:
    """The same run by another judge.

    Args:
        scores: Facts of the other judge's score steps, by cycle; cycles without one lose theirs.
        judge: `Report.judge` of the other.
        calibration: How it does against careful readers, by scale (`metrics.agreement.Calibrated`).
    """
    cycles = tuple(
        replace(
            cycle,
            trait=(results := with_intervals(scores.get(cycle.cycle, {}))).get("trait"),
            coherence=results.get("coherence"),
            rate=results.get("rate"),
            answers=int(results.get("answers", 0)),
            contexts={},  # another judge is asked in the first one alone
        )
        for cycle in report.cycles
    )
    verdict = _verdict(cycles, report.manifest, calibration)
    return replace(report, cycles=cycles, verdict=verdict, judge=_measured(judge, calibration, str(report.manifest["trait"])))


def with_intervals(score: Mapping[str, Json]) -> dict[str, Json]:
    """The results of an aggregate step with mean and intervals recomputed from its scores by prompt.

    So a report has one arithmetic throughout, whichever version of the program finished the run.
    """
    scales = {scale: score[scale] for scale in ("trait", "coherence") if score.get(scale)}
    return {**score, **{scale: {**known, **asdict(mean_interval(known["by_prompt"]))} for scale, known in scales.items()}}


def _measured(judge: Mapping[str, Json], calibration: Mapping[str, Json], trait: str) -> dict[str, Json]:
    """A judge with what is known of its scores, and `notes`: what a reader must know of it, a clause each; `note` is all of
    them."""
    known = {scale: read_calibrated(found) for scale, found in calibration.items()}
    names = {"trait": trait}
    doubts = [f"judge not reliable here on {names.get(of, of)}: {found.doubt}" for of, found in known.items() if found.doubt]
    notes = list(dict.fromkeys(filter(None, (judge["note"], *doubts))))
    spearman = {scale: found.spearman for scale, found in known.items()}
    return {**judge, "note": "; ".join(notes), "notes": notes, "spearman": spearman, "calibration": dict(calibration)}


def _verdict(cycles: tuple[Cycle, ...], manifest: Mapping[str, Any], calibration: Mapping[str, Json]) -> Amplification:
    """On amplification; a judge that ranks the trait's calibration answers badly cannot say "amplified"."""
    scales = {scale: _by_cycle(cycles, scale) for scale in ("trait", "coherence")}
    verdict = amplification(scales["trait"], scales["coherence"], seed=int(manifest["recipe"]["seed"]))
    # Only the claim is withdrawn. "No change shown" claims nothing, and a doubtful judge makes it no stronger.
    if verdict.word == "amplified" and read_calibrated(calibration.get("trait")).doubt:
        return replace(verdict, word="judge not reliable here")
    return verdict


def _cycle(number: int, steps: list[Step], finished: Mapping[str, Completion], contexts: Sequence[str]) -> Cycle:
    results: dict[str, dict[str, Json]] = {}
    scores: dict[str, dict[str, Json]] = {}
    seconds: dict[str, float] = defaultdict(float)
    for step in steps:
        if completion := finished.get(step.name):
            seconds[step.verb] += completion.seconds
            if not step.part:
                results[step.verb] = completion.results
            if step.verb == "aggregate":
                scores[step.part] = with_intervals(completion.results)
    score = scores.get("", {})
    return Cycle(
        cycle=number,
        trait=score.get("trait"),
        coherence=score.get("coherence"),
        rate=score.get("rate"),
        answers=int(score.get("answers", 0)),
        train_rows=int(results.get("build_dataset", {}).get("rows", 0)),
        dropped={reason: count for reason, count in results.get("build_dataset", {}).get("dropped", {}).items() if count},
        metrics=results.get("text_metrics", {}),
        training=results.get("train", {}),
        export=results.get("export", {}),
        seconds={verb: round(value, 2) for verb, value in seconds.items()},
        contexts={context: scores.get(context_part(place), {}) for place, context in enumerate(contexts)},
        peak_vram={verb: int(known["peak_vram"]) for verb, known in results.items() if known.get("peak_vram")},
    )


def _by_cycle(cycles: tuple[Cycle, ...], scale: str) -> dict[int, Scores]:
    scored = ((cycle.cycle, getattr(cycle, scale)) for cycle in cycles)
    return {number: value["by_prompt"] for number, value in scored if value}


def _judge(
    run: Run, reader: StepReader, manifest: Mapping[str, Any], steps: list[Step], finished: Mapping[str, Completion]
) -> dict[str, Json]:
    results = [finished[step.name].results for step in steps if step.verb == "judge" and step.name in finished]
    identity = manifest["judge"]
    models: set[str] = set()
    for step in steps:
        if step.verb == "judge" and step.name in finished:
            models |= reader.judges(run.folder(step))
    return {
        "name": identity["name"],
        "kind": identity["kind"],
        "note": identity["note"],
        "own": next((step.key for step in steps if step.part == EVERYDAY), ""),  # what it was fitted on
        "model": ", ".join(sorted(models - {"", UNNAMED})),
        "calls": sum(each["calls"] for each in results),
        "cached": sum(each["cached"] for each in results),
        "usd": round(sum(each["usd"] for each in results), 6),
        "planned_usd": manifest.get("planned_usd"),
    }


def beside_scores(report: Report, cycle: Cycle) -> list[tuple[str, str]]:
    """What stands beside a cycle's scores, heading and figure: the metrics, what the loss's record shows of the training, and
    how
    much of the trained change the exported model shows."""
    recipe = report.recipe
    loss = LOSSES.get(recipe.get("loss") or REGIMES[recipe["regime"]].loss)
    found = [(each.words, figure(cycle.metrics.get(each.name), each.form)) for each in METRICS.values() if each.shown]
    found += [(each.words, figure(cycle.training.get(each.name), each.form)) for each in (loss.columns if loss else ())]
    return [*found, ("export kept", _kept(cycle))]


def _kept(cycle: Cycle) -> str:
    """`98% +-3`, or `too small` where the format's noise hides the change; "" where nothing was compared."""
    change = (cycle.export.get("parity") or {}).get("change") or {}
    kept, error = change.get("kept"), change.get("error")
    if kept is None or error is None:
        return ""
    return f"{kept:.0%} +-{100 * error:.0f}" if error < 0.5 else "too small"


def figure(value: float | None, form: str) -> str:
    """A number in a table; "" where there is none."""
    return "" if value is None else format(value, form)


@dataclass(frozen=True)
class ShownSample:
    """One answer with its verdict."""

    text: str
    trait: float | None
    coherence: float | None
    finish: str


def shown_samples(
    root: Path,
    report: Report,
    most: int | None = SHOWN_SAMPLES,
    verdicts: Mapping[int, Path] | None = None,
    cycles: Collection[int] | None = None,
) -> dict[str, dict[int, list[ShownSample]]]:
    """Answers by question and cycle, for the eye.

    Args:
        most: Of each question and cycle; all if None.
        verdicts: Folders of another judge's verdicts, by cycle; the run's own judge's if None.
        cycles: Of these alone; of all if None.
    """
    run = Run(root)
    shown: dict[str, dict[int, list[ShownSample]]] = defaultdict(dict)
    for cycle in (each for each in report.cycles if cycles is None or each.cycle in cycles):
        folders = {step.verb: run.folder(step).path for step in report.steps if step.cycle == cycle.cycle and not step.part}
        judge = folders.get("judge") if verdicts is None else verdicts.get(cycle.cycle)
        judged = {row.id: row for row in JUDGED.read(judge / ROWS)} if judge else {}
        answers = SAMPLES.read(folders["evaluate_samples"] / ROWS) if "evaluate_samples" in folders else []
        for sample in sorted(answers, key=lambda sample: sample.id):
            mine = shown[sample.prompt].setdefault(cycle.cycle, [])
            if most is None or len(mine) < most:
                row = judged.get(sample.id)
                trait, coherence = (row.score(scale) if row else None for scale in SCALES)
                mine.append(ShownSample(sample.text, trait, coherence, sample.finish))
    return dict(shown)


def version_sentence(report: Report) -> str:
    """Which steps were made with which version, where a library changed within the run; else ""."""
    changes = []
    for package, steps in report.version_changes.items():
        cycles = {version: list(dict.fromkeys(name.split("-")[0] for name in names)) for version, names in steps.items()}
        changes.append(f"{package} " + ", ".join(f"{version} ({' '.join(of)})" for version, of in cycles.items()))
    return f"not all steps were made with the same versions: {'; '.join(changes)}" if changes else ""


def export_sentences(report: Report) -> list[str]:
    """What the checks of the exports remarked: each kind of remark once, with its cycles and the figures of the first."""
    alike: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for cycle in report.cycles:
        for note in cycle.export.get("notes") or ():
            alike[FIGURES.sub("", str(note))].append((cycle.cycle, str(note)))
    return [_export_sentence([cycle for cycle, _ in notes], notes[0][1]) for notes in alike.values()]


def _export_sentence(cycles: Sequence[int], note: str) -> str:
    if len(cycles) == 1:
        return f"export of cycle {cycles[0]}: {note}"
    return f"exports of cycles {', '.join(map(str, cycles))}: {note} (figures of cycle {cycles[0]})"


def verdict_sentences(verdict: Amplification) -> list[str]:
    """Both verdicts in words, a sentence each."""
    sentences = [f"interval: {_interval_verdict(verdict)}"]
    if verdict.unscored:
        cycles = " and ".join(filter(None, [", ".join(map(str, verdict.unscored[:-1])), str(verdict.unscored[-1])]))
        last = f"; cycle {verdict.last} is the last with a score" if verdict.last >= 0 else ""
        sentences.append(f"cycle{'s' * (len(verdict.unscored) > 1)} {cycles}: no answer could be scored for the trait{last}")
    if verdict.coherence.mean is not None:
        sentences.append(f"coherence: {_change(verdict.coherence)}")
    for rule in verdict.paper:
        sentences.append(f"paper's rule (15 points from cycle 4 on, anchor {rule.anchor}): {_rule(rule, verdict)}")
    sentences.append(f"fit: {curve_sentence(verdict.fit)}")
    if verdict.noise is not None:
        sentences.append(f"noise alone would meet the paper's rule in {100 * verdict.noise:.1f} % of runs of this size")
    return sentences


def curve_sentence(curve: Curve) -> str:
    """`half of the way in 1.3 cycles (95 % interval 0.8 to 2.2), towards 21 of 100 (95 % interval 14 to 29)`."""
    level, half = curve.level, curve.half_life
    if curve.kind == "none" or level.mean is None:
        return f"none, {FEWEST_CYCLES} scored cycles from cycle 0 on and {FEWEST_PROMPTS} prompts with scores in all are needed"
    off = f"; a cycle lies {curve.off:.0f} points off it" if curve.off >= NOTABLE else ""
    if curve.kind == "approach" and half.high is None:
        return f"half of the way in about {half.mean:.1f} cycles; where it ends is not in sight, so there is no interval{off}"
    at = f"{level.mean:.0f} of 100 (95 % interval {level.low:.0f} to {level.high:.0f})"
    if curve.kind == "level":
        return f"no change is shown, so no half-life; {at} on the mean of all cycles"
    return f"half of the way in {half.mean:.1f} cycles (95 % interval {half.low:.1f} to {half.high:.1f}), towards {at}{off}"


def _interval_verdict(verdict: Amplification) -> str:
    if verdict.word == "too early":
        return "too early, two scored cycles from cycle 0 on are needed"
    need = f"; a verdict needs {FEWEST_PROMPTS}" if verdict.word == "too few prompts" else ""
    if verdict.trait.mean is None:
        return f"{verdict.word}, none has scores both in cycle 0 and in cycle {verdict.last}{need}"
    return f"{verdict.word}; trait {_change(verdict.trait, f' from cycle 0 to cycle {verdict.last}')}{need}"


def _change(change: Interval, between: str = "") -> str:
    """A change in points, with its interval and the number of prompts that it rests on."""
    prompts = f"{change.prompts} prompt{'s' * (change.prompts != 1)}"
    if change.low is None or change.high is None:
        return f"{change.mean:+.1f} points{between} (no interval: {prompts} with scores in both cycles)"
    return f"{change.mean:+.1f} points{between} (95 % interval {change.low:+.1f} to {change.high:+.1f}, paired over {prompts})"


def _rule(rule: PaperRule, verdict: Amplification) -> str:
    if rule.any is not None:
        words = ", ".join(f"{name} {'yes' if getattr(rule, name) else 'no'}" for name in ("any", "all", "last"))
        return f"{words}; largest rise {rule.largest:+.1f}"
    if verdict.last >= FROM_CYCLE:
        return f"none, cycle {rule.anchor} has no score"
    return "none, no cycle from 4 on has a score" if max(verdict.unscored, default=0) >= FROM_CYCLE else "too early"
