"""How long steps took on this machine: one sample for each finished step, kept between runs.

Every session of a run adds its samples; `iterft doctor --measure` adds those of a small run. `forecast.py` reads them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
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
from iterft_lite.hardware import cpu_name
from iterft_lite.machine.resolve import Machine, Resolved
from iterft_lite.machine.work import UNITS, work_done
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
"""End of a judge's setting that uses the provider's batch endpoint. Batches are never timed: the provider takes up to a day."""

MOST_BYTES = 1 << 20
"""Size of the table at which its older half is dropped. A sample takes about 500 bytes."""


@dataclass(frozen=True)
class Kind:
    """What two steps must share to run equally fast.

    Attributes:
        machine: GPU, CPU and number of cores.
        act: What the step does.
        first: The step is the first of its act in a session: a process starts, a library compiles, a classifier is fitted.
        model: M[0]'s identity; "" for judges.
        parameters: M[0]'s number of weights; 0 for judges.
        setting: Trainer, precision and loss; export and quant; the judge's name; threads.
        versions: Versions of the libraries that do it.
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
    """One finished step.

    Attributes:
        kind: See there.
        name: The model as the recipe calls it.
        work: How much was done, by unit: `steps`, `tokens`, `rows`, `calls`.
        fixed: The part of `seconds` that does not grow with the work.
        seconds: The whole step.
        notes: Of rows that a model wrote: `cap` (most tokens a row), `cut` (rows that reached it), `data` (1 for rows to train
            on, 0 for answers).
        session: The same for all steps of one session.
        origin: A run, or `iterft doctor --measure`.
    """

    kind: Kind
    name: str
    work: Mapping[str, float]
    fixed: float
    seconds: float
    notes: Mapping[str, float]
    session: str
    origin: Literal["run", "doctor"]

    @property
    def units(self) -> float:
        """How much was done, in the act's unit (`UNITS`); 1 for an act without one."""
        return self.work.get(UNITS[self.kind.act], 1.0)


@dataclass(frozen=True)
class Setup:
    """What decides how long the steps of a resolved recipe take on a machine.

    Attributes:
        settings: `Kind.setting` by act.
        versions: `Kind.versions` by act.
        gpu: The machine has a GPU.
    """

    machine: str
    model: str
    name: str
    parameters: int
    settings: Mapping[Act, str]
    versions: Mapping[Act, str]
    gpu: bool = False

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
    return Setup(machine_name(machine), inputs.model, recipe.model, parameters, settings, found, bool(machine.gpu))


def machine_name(machine: Machine) -> str:
    """GPU, CPU and number of cores, in words."""
    return ", ".join(filter(None, (machine.gpu, cpu_name(), f"{os.cpu_count()} cores")))


# -- taking the time


@dataclass
class _Marks:
    """When a step of this session started, reported first, and reported its first and latest piece of work."""

    began: float
    moved: float | None = None
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None


@dataclass
class Stopwatch:
    """Follows a session and keeps a sample of each step that it does from beginning to end.

    Times are seconds of one clock. Steps that an earlier session began, another run did, or a fake did, give no sample.
    """

    plan: Plan
    setup: Setup
    origin: Literal["run", "doctor"] = "run"
    session: str = field(default_factory=lambda: secrets.token_hex(4))
    samples: list[Sample] = field(default_factory=list)
    _marks: dict[str, _Marks] = field(default_factory=dict)
    _seen: set[Act] = field(default_factory=set)
    _parameters: int = 0

    def began(self, step: Step, now: float) -> None:
        """A step has started."""
        self._marks[step.name] = _Marks(now)

    def moved(self, step: Step, progress: Progress, now: float) -> None:
        """A step reports progress."""
        marks = self._marks.get(step.name)
        if marks is None:
            return
        marks.moved = marks.moved or now
        if marks.last and progress.done < marks.last[1]:  # the step starts over with a smaller micro-batch or scale
            marks.first = marks.last = None
        if progress.done:
            marks.first = marks.first or (now, progress.done)
            marks.last = (now, progress.done)

    def done(self, step: Step, completion: Completion, reused: bool, now: float) -> None:
        """A step has finished."""
        results, act = completion.results, VERBS[step.verb].act
        if step.verb == "load_base":
            self._parameters = int(results.get("parameters", 0))
        marks = self._marks.pop(step.name, None)
        if not act or marks is None or reused:
            return
        first = act not in self._seen
        self._seen.add(act)
        resumed = completion.seconds > now - marks.began + 1
        if resumed or not self._parameters or (act == "judge" and self._waited(results)):
            return
        work, notes = work_done(self.plan, step, results)
        if not all(value > 0 for value in work.values()):
            return
        kind = replace(self.setup, parameters=self._parameters).kind(act, first)
        fixed = min(completion.seconds, max(0.0, _fixed(act, marks, work, completion.seconds)))
        self.samples.append(Sample(kind, self.setup.name, work, fixed, completion.seconds, notes, self.session, self.origin))

    def _waited(self, results: Mapping[str, Json]) -> bool:
        """Whether a judge's seconds say nothing of its speed: some verdicts were cached, or a batch was waited for."""
        return bool(results.get("cached", 0)) or self.setup.settings["judge"].endswith(BATCHES)


def _fixed(act: Act, marks: _Marks, work: Mapping[str, float], seconds: float) -> float:
    """Seconds of a step that do not grow with its work, as far as its progress reports tell."""
    if act == "train" and marks.first and marks.last and marks.last[1] > marks.first[1]:
        pace = (marks.last[0] - marks.first[0]) / (marks.last[1] - marks.first[1])
        return seconds - pace * work["steps"]
    if act == "write" and marks.moved:
        return marks.moved - marks.began  # the model is loaded before the first report
    return 0.0


# -- the table


def table_path() -> Path:
    """The file of samples, in the user's cache: a line each."""
    return cache_folder() / "timings.jsonl"


def read_table(path: Path | None = None) -> list[Sample]:
    """All samples, oldest first, without the lines that this version cannot read."""
    try:
        lines = (path or table_path()).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    return [sample for line in lines if (sample := _read_sample(line)) is not None]


def _read_sample(line: str) -> Sample | None:
    """The sample of a line; None if it is none."""
    try:
        value: dict[str, Any] = json.loads(line)
        if "sitting" in value:  # the name of `session` in lines of earlier versions
            value["session"] = value.pop("sitting")
        sample = Sample(**(value | {"kind": Kind(**value["kind"])}))
        numbers = [sample.fixed, sample.seconds, sample.units, *sample.work.values(), *sample.notes.values()]
        return sample if all(math.isfinite(number) and number >= 0 for number in numbers) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def add_to_table(samples: Iterable[Sample], path: Path | None = None) -> None:
    """Add samples in one write: two runs that end together lose nothing.

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

NAMES: Mapping[Act, str] = {
    "load": "loading",
    "train": "training",
    "export": "exporting",
    "write": "writing",
    "read": "reading",
    "judge": "judging",
}


def rates(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """What was measured, for people: name and figure. The first step of an act is told apart where there are others."""
    rows = []
    for act, name in NAMES.items():
        mine = [sample for sample in samples if sample.kind.act == act]
        later = [sample for sample in mine if not sample.kind.first] or mine
        if not later:
            continue
        seconds, fixed = (median(getattr(sample, of) for sample in later) for of in ("seconds", "fixed"))
        unit = "verdicts" if act == "judge" else UNITS[act]
        figures = [f"{1 / max(seconds_per_unit(later), 1e-9):,.0f} {unit}/s" if unit else f"{seconds:.1f} s"]
        figures += [f"{fixed:.1f} s besides"] if fixed >= 0.05 else []
        figures += [f"the first {mine[0].seconds:.1f} s"] if len(later) < len(mine) else []
        rows.append((f"{name} ({later[0].kind.setting})" if act == "judge" else name, ", ".join(figures)))
    return rows


def seconds_per_unit(samples: Sequence[Sample]) -> float:
    """Median seconds a unit of work, beside the fixed seconds."""
    return median((sample.seconds - sample.fixed) / max(sample.units, 1e-9) for sample in samples)
