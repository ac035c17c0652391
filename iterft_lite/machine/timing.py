"""How long things took on this machine: a sample for every finished step, kept between runs.

Every sitting of a run adds what it did; `iterft doctor --measure` adds what a small run does. `forecast.py` reads them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from iterft_lite.cache import cache_folder
from iterft_lite.digests import Json
from iterft_lite.engine.backends import threads_of
from iterft_lite.engine.completion import Completion
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.experiment.versions import versions
from iterft_lite.files import writing
from iterft_lite.machine.resolve import Machine, Resolved
from iterft_lite.metrics.text import words_of
from iterft_lite.protocols import Progress

LIBRARIES: Mapping[Act, tuple[str, ...]] = {
    "load": ("torch", "transformers", "unsloth", "bitsandbytes"),
    "train": ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes"),
    "export": ("llama-cpp-python",),
    "write": ("llama-cpp-python",),
    "read": ("llama-cpp-python",),
    "judge": (),
}
"""Packages whose versions decide how long an act takes."""

BATCHES = ", in batches"
"""End of a judge's setting where it is asked through its provider's batch endpoint: never timed, for that takes as long as the
provider likes."""

MOST_BYTES = 1 << 20
"""Of the table; beyond that its older half is dropped. A sample is about 500 bytes."""


@dataclass(frozen=True)
class Kind:
    """What must be the same for two steps to go equally fast.

    Attributes:
        machine: GPU, CPU and number of cores.
        act: What is done.
        first: It is the first of its act in a sitting: a process starts, a library compiles, a classifier is fitted.
        model: M[0]'s identity; "" for judges.
        parameters: M[0]'s; 0 for judges.
        setting: What else decides: trainer, precision and loss; export and quant; the judge's name; threads.
        versions: Of the libraries that do it.
    """

    machine: str
    act: Act
    first: bool
    model: str
    parameters: int
    setting: str
    versions: str


@dataclass(frozen=True)
class Sample:
    """One step that was done.

    Attributes:
        kind: See there.
        name: The model as the recipe calls it.
        work: How much was done, by unit: `steps`, `tokens`, `rows`, `calls`.
        fixed: Seconds of `seconds` that do not grow with the work.
        seconds: All of them.
        notes: What else was found out: `cap` and `cut` (tokens a row at most, rows cut there), `data` (1 if the rows are to be
            trained on, 0 if they are answers), `tokens_per_word`.
        sitting: Same for all that one sitting did.
        origin: Who did it.
    """

    kind: Kind
    name: str
    work: Mapping[str, float]
    fixed: float
    seconds: float
    notes: Mapping[str, float]
    sitting: str
    origin: Literal["run", "doctor"]


@dataclass(frozen=True)
class Setup:
    """What of a resolved recipe and a machine decides how long its steps take.

    Attributes:
        settings: `Kind.setting` by act.
        versions: `Kind.versions` by act.
    """

    machine: str
    model: str
    name: str
    parameters: int
    settings: Mapping[Act, str]
    versions: Mapping[Act, str]

    def kind(self, act: Act, first: bool) -> Kind:
        """The kind of a step."""
        model, parameters = ("", 0) if act == "judge" else (self.model, self.parameters)
        return Kind(self.machine, act, first, model, parameters, self.settings[act], self.versions[act])


def setup_of(resolved: Resolved, machine: Machine, *, swap: bool, parameters: int = 0) -> Setup:
    """The setup of a resolved recipe here.

    Args:
        swap: Trainer and generator take turns on the GPU.
        parameters: M[0]'s; 0 where they are not known.
    """
    recipe, inputs = resolved.recipe, resolved.inputs
    shared = f"{threads_of(recipe)} threads" + (", in turns" if swap else "")
    trainer = f"{inputs.trainer} {inputs.precision}"
    gguf = f"{recipe.export} {recipe.quant}"
    settings: dict[Act, str] = {
        "load": f"{trainer}, {shared}",
        "train": f"{trainer} {recipe.loss_record.name}, {shared}",
        "export": f"{gguf}, {shared}",
        "write": f"{gguf} {recipe.row.rows}, slots {recipe.slots}, {shared}",
        "read": f"{gguf}, slots {recipe.slots}, {shared}",
        "judge": inputs.judge.name + (BATCHES if recipe.judge_batch else ""),
    }
    found = {
        act: ", ".join(f"{name} {version}" for name, version in versions(names).items() if name in names)
        for act, names in LIBRARIES.items()
    }
    return Setup(machine_name(machine), inputs.model, recipe.model, parameters, settings, found)


def machine_name(machine: Machine) -> str:
    """GPU, CPU and number of cores, in words."""
    return ", ".join(filter(None, (machine.gpu, _cpu(), f"{os.cpu_count()} cores")))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


# -- how much a step does


def judged(plan: Plan, step: Step) -> int:
    """Verdicts that a judge step asks for."""
    source = plan.inputs(step)["answers"]
    asked = len(source.params["prompts"]) * int(source.params["samples"])
    return asked * len(step.params["rubrics"]) * int(step.params["judge"]["samples"])


def held_out_words(step: Step) -> int:
    """Words of the texts that a measure step reads beside the answers."""
    return sum(words(row) for row in [*step.params["high"], *step.params["low"]])


def words(row: Mapping[str, Json]) -> int:
    """Words of a row that a loss is taken over: of a document, or of a chat's last turn."""
    return len(words_of(str(row["text"]) if "text" in row else str(row["messages"][-1]["content"])))


def _done(plan: Plan, step: Step, facts: Mapping[str, Json]) -> tuple[dict[str, float], dict[str, float]]:
    """Work and notes of a finished step."""
    if step.verb == "train":
        return {"steps": facts["steps"], "tokens": facts["tokens"]}, {}
    if step.verb in ("training_samples", "evaluate_samples"):
        cap = step.params["sampling"]["max_tokens"]
        notes = {"cap": cap, "cut": facts["cut"], "data": float(step.verb == "training_samples")}
        return {"rows": facts["rows"], "tokens": facts["tokens"]}, notes
    if step.verb == "judge":
        return {"calls": facts["calls"]}, {}
    if step.verb == "text_metrics":
        source = plan.inputs(step)["answers"]
        rows = len(source.params["prompts"]) * source.params["samples"]
        ratio = facts["tokens"] / facts["words"] if facts["words"] else 0.0
        held_out = len(step.params["high"]) + len(step.params["low"])
        work = {"rows": rows + held_out, "tokens": rows * facts["tokens"] + held_out_words(step) * ratio}
        return work, {"tokens_per_word": ratio} if ratio else {}
    return {}, {}


# -- taking the time


@dataclass
class _Marks:
    """When a step of this sitting began, first moved, and did its first and last piece of work so far."""

    began: float
    moved: float | None = None
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None


@dataclass
class Stopwatch:
    """Follows a sitting and keeps a sample of each step that it does from beginning to end.

    Times are seconds of one clock. What an earlier sitting began, another run did, or a stand-in did, tells nothing.
    """

    plan: Plan
    setup: Setup
    origin: Literal["run", "doctor"] = "run"
    sitting: str = field(default_factory=lambda: secrets.token_hex(4))
    samples: list[Sample] = field(default_factory=list)
    _marks: dict[str, _Marks] = field(default_factory=dict)
    _seen: set[Act] = field(default_factory=set)
    _facts: Mapping[str, Json] = field(default_factory=dict)

    def began(self, step: Step, now: float) -> None:
        """A step has begun."""
        self._marks[step.name] = _Marks(now)

    def moved(self, step: Step, progress: Progress, now: float) -> None:
        """A step has come further."""
        marks = self._marks.get(step.name)
        if marks is None:
            return
        marks.moved = marks.moved or now
        if marks.last and progress.done < marks.last[1]:  # begun again, with a smaller micro-batch or scale
            marks.first = marks.last = None
        if progress.done:
            marks.first = marks.first or (now, progress.done)
            marks.last = (now, progress.done)

    def done(self, step: Step, completion: Completion, reused: bool, now: float) -> None:
        """A step is finished."""
        if step.verb == "load_base":
            self._facts = completion.results
        marks, act = self._marks.pop(step.name, None), VERBS[step.verb].act
        if not act or marks is None or reused:
            return
        first = act not in self._seen
        self._seen.add(act)
        resumed = completion.seconds > now - marks.began + 1
        cached = completion.results.get("cached", 0) if act == "judge" else 0
        waited = act == "judge" and self.setup.settings[act].endswith(BATCHES)
        if resumed or cached or waited or not self._facts.get("parameters"):
            return
        work, notes = _done(self.plan, step, completion.results)
        if not all(value > 0 for value in work.values()):
            return
        kind = replace(self.setup, parameters=int(self._facts["parameters"])).kind(act, first)
        fixed = min(completion.seconds, max(0.0, _fixed(act, marks, work, completion.seconds)))
        self.samples.append(Sample(kind, self.setup.name, work, fixed, completion.seconds, notes, self.sitting, self.origin))


def _fixed(act: Act, marks: _Marks, work: Mapping[str, float], seconds: float) -> float:
    """Seconds of a step that do not grow with its work, as far as they can be told apart."""
    if act == "train" and marks.first and marks.last and marks.last[1] > marks.first[1]:
        pace = (marks.last[0] - marks.first[0]) / (marks.last[1] - marks.first[1])
        return seconds - pace * work["steps"]
    if act == "write" and marks.moved:
        return marks.moved - marks.began  # the model is loaded before the first word on progress
    return 0.0


# -- the table


def table_path() -> Path:
    """The file of samples, in the user's cache: a line each."""
    return cache_folder() / "timings.jsonl"


def read_table(path: Path | None = None) -> list[Sample]:
    """All samples, oldest first. A line that cannot be read, or is of another version's making, is left out."""
    try:
        lines = (path or table_path()).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    samples = []
    for line in lines:
        try:
            value: dict[str, Any] = json.loads(line)
            sample = Sample(**(value | {"kind": Kind(**value["kind"])}))
            numbers = [sample.fixed, sample.seconds, *sample.work.values(), *sample.notes.values()]
            if all(math.isfinite(number) and number >= 0 for number in numbers):
                samples.append(sample)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return samples


def add_to_table(samples: Iterable[Sample], path: Path | None = None) -> None:
    """Add samples, in one write, so that two runs that end together lose nothing.

    Raises:
        OSError: If the file cannot be written.
    """
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    if not text:
        return
    path = path or table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
    if path.stat().st_size > MOST_BYTES:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        with writing(path) as temporary:
            temporary.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")


# -- in words


def rates(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """What was measured, for people: name and figure. The first of an act is told apart where there are others."""
    rows = []
    by_act = {act: [sample for sample in samples if sample.kind.act == act] for act in LIBRARIES}
    for act, mine in by_act.items():
        later = [sample for sample in mine if not sample.kind.first] or mine
        if not later:
            continue
        whole, fixed = (fmean(getattr(sample, name) for sample in later) for name in ("seconds", "fixed"))

        def rate(unit: str, later: Sequence[Sample] = later) -> float:
            seconds = sum(sample.seconds - sample.fixed for sample in later)
            return sum(sample.work[unit] for sample in later) / max(seconds, 1e-3)

        first = fmean(sample.seconds for sample in mine[:1])
        besides = f", the first {first:.1f} s" if len(later) < len(mine) else ""
        match act:
            case "load":
                rows.append(("loading the base model", f"{whole:.1f} s"))
            case "train":
                rows.append(("a training, beside its steps", f"{fixed:.1f} s"))
                rows.append(("training", f"{rate('tokens'):,.0f} tokens/s in the loss, {1 / rate('steps'):.2f} s a step"))
            case "export":
                rows.append(("exporting and checking", f"{whole:.1f} s{besides}"))
            case "write":
                rows.append(("loading a GGUF", f"{fixed:.2f} s"))
                most = max(sample.work["rows"] for sample in later)
                rows.append(("writing", f"{rate('tokens'):,.0f} tokens/s where {most:.0f} rows are asked at once"))
            case "read":
                rows.append(("reading (perplexity)", f"{rate('tokens'):,.0f} tokens/s"))
            case "judge":
                rows.append((f"judging ({later[0].kind.setting})", f"{rate('calls'):,.0f} verdicts/s{besides}"))
    return rows
