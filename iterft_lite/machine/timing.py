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
from iterft_lite.engine.backends import threads_of
from iterft_lite.engine.completion import Completion
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.experiment.versions import versions
from iterft_lite.files import writing
from iterft_lite.hardware import cpu_name
from iterft_lite.machine.resolve import Machine, Resolved
from iterft_lite.machine.work import ACTS, work_done
from iterft_lite.protocols import Progress

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
        """How much was done, in the act's unit; 1 for an act without one."""
        return self.work.get(ACTS[self.kind.act].unit, 1.0)


@dataclass(frozen=True)
class Setup:
    """How a resolved recipe works on a machine: a kind for each act, the name of M[0], and whether there is a GPU."""

    kinds: Mapping[Act, Kind]
    name: str
    gpu: bool = False

    def kind(self, act: Act, *, first: bool) -> Kind:
        """The kind of a step, which may be the first of its act in a session."""
        return replace(self.kinds[act], first=first)


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
    kinds = {}
    for act, setting in settings.items():
        packages = ACTS[act].libraries
        installed = ", ".join(f"{name} {version}" for name, version in versions(packages).items() if name in packages)
        model = ("", 0) if act == "judge" else (inputs.model, parameters)
        kinds[act] = Kind(machine_name(machine), act, False, *model, setting, installed)
    return Setup(kinds, recipe.model, bool(machine.gpu))


def machine_name(machine: Machine) -> str:
    """GPU, CPU and number of cores, in words."""
    return ", ".join(filter(None, (machine.gpu, cpu_name(), f"{os.cpu_count()} cores")))


# -- taking the time

Report = tuple[float, int]
"""When a step reported, in seconds of the stopwatch's clock, and how much was done by then."""


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
    _reports: dict[str, list[Report]] = field(default_factory=dict)
    _seen: set[Act] = field(default_factory=set)
    _parameters: int = 0

    def began(self, step: Step, now: float) -> None:
        """A step has started."""
        self._reports[step.name] = [(now, 0)]

    def moved(self, step: Step, progress: Progress, now: float) -> None:
        """A step reports progress."""
        reports = self._reports.get(step.name)
        if reports is None:
            return
        if progress.done < reports[-1][1]:  # the step starts over with a smaller micro-batch or scale
            del reports[1:]
        reports.append((now, progress.done))

    def done(self, step: Step, completion: Completion, reused: bool, now: float) -> None:
        """A step has finished."""
        results, act = completion.results, VERBS[step.verb].act
        if step.verb == "load_base":
            self._parameters = int(results.get("parameters", 0))
        reports = self._reports.pop(step.name, None)
        if not act or reports is None or reused:
            return
        first = act not in self._seen
        self._seen.add(act)
        is_resumed = completion.seconds > now - reports[0][0] + 1
        # cached verdicts, and batches that were waited for, say nothing about a judge's speed
        is_waiting = act == "judge" and (results.get("cached") or self.setup.kinds["judge"].setting.endswith(BATCHES))
        if is_resumed or is_waiting or not self._parameters:
            return
        work, notes = work_done(self.plan, step, results)
        if not all(value > 0 for value in work.values()):
            return
        is_fitted = self.setup.kinds["judge"].setting == "embedded"
        kind = replace(self.setup.kinds[act], first=first, parameters=0 if act == "judge" else self._parameters)
        fixed = min(completion.seconds, max(0.0, _fixed(act, reports, work, completion.seconds, is_fitted=is_fitted)))
        self.samples.append(Sample(kind, self.setup.name, work, fixed, completion.seconds, notes, self.session, self.origin))


def _fixed(act: Act, reports: Sequence[Report], work: Mapping[str, float], seconds: float, *, is_fitted: bool) -> float:
    """Seconds of a step that do not grow with its work, as far as its start and progress reports tell.

    Args:
        is_fitted: The judge is the embedded one, which is fitted before its first verdict unless an earlier session did that.
    """
    under_way = [report for report in reports if report[1]]
    if act == "train" and under_way and under_way[-1][1] > under_way[0][1]:
        (since, first), (until, last) = under_way[0], under_way[-1]
        return seconds - (until - since) / (last - first) * work["steps"]
    if act == "write" and reports[1:]:
        return reports[1][0] - reports[0][0]  # the model is loaded before the first report
    if act == "judge" and is_fitted and under_way:
        return under_way[0][0] - reports[0][0]
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


def seconds_per_unit(samples: Sequence[Sample]) -> float:
    """Median seconds a unit of work, beside the fixed seconds."""
    return median((sample.seconds - sample.fixed) / max(sample.units, 1e-9) for sample in samples)
