"""Where a step runs: an executor knows processes and memory, nothing of order. Scheduling (`run.py`) is the other way round.

The local executor holds four resident backends on one GPU, or on the CPU. Another place to run (a second GPU, a cluster) is
another executor. Several runs may share one at a time: each has a `Lease`, and a step waits for the backends that it needs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from iterft_lite.digests import Json
from iterft_lite.engine.completion import Completion
from iterft_lite.engine.store import StepFolder, folder_at, input_folders
from iterft_lite.errors import RunError, StoreError
from iterft_lite.experiment.recipe import HELD_IN_32_BITS, Recipe
from iterft_lite.experiment.verbs import VERBS, BackendName, Verb, function_at
from iterft_lite.files import safe_member
from iterft_lite.hardware import Gpu, Peak
from iterft_lite.hub import folder_of
from iterft_lite.protocols import Backends, Generator, Progress
from iterft_lite.stages.export import untouched_gguf
from iterft_lite.stages.work import Work

Stage = Callable[[Work], dict[str, Json]]

ORDER: tuple[BackendName, ...] = ("trainer", "exporter", "generator", "judge")
"""In which a step takes its backends. One order for all: no two steps wait for each other."""

HOLDS = 0.7
"""Share of the GPU's memory that was free at first, which a model may take to be read there, beside what reading takes."""

MOMENT = 0.1
"""Seconds that a backend has been free before something is measured with it."""

PATIENCE = 0.5
"""Seconds after which a step that waits for a backend looks whether it is still wanted."""


@dataclass(frozen=True)
class Task:
    """A step to be run somewhere.

    Attributes:
        folder: The step's, begun.
        recipe: As resolved.
        inputs: By role, the folders of the steps that are read, finished.
        ahead: Verbs of the steps that are still to come: what memory is to be kept for.
        report: Takes progress: of the step itself, or of an input that is written again for it. Raises to stop.
    """

    folder: StepFolder
    recipe: Recipe
    inputs: Mapping[str, StepFolder]
    ahead: frozenset[str]
    report: Callable[[StepFolder, Progress], None]


@dataclass(frozen=True)
class Outcome:
    """What running a step came to.

    Attributes:
        results: The stage's.
        digests: Digests by pieces of files, by name, taken while they were written.
    """

    results: dict[str, Json]
    digests: Mapping[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """A place where steps run, one call a step. Calls come from several threads, one a queue."""

    def run(self, task: Task) -> Outcome:
        """Do a step; its files are in its folder afterwards.

        Raises:
            NotYet: If it is to be taken up again later.
            IterftError: If it fails; `kind` says of whose doing it is.
        """
        ...

    def prepare(self, task: Task) -> None:
        """Start and load what the steps to come need, while somebody else makes this one. What fails here, fails again and with
        its own words in the step that needs it."""
        ...

    def close(self) -> None:
        """End whatever runs; a later call starts it again."""
        ...


def stage_of(verb: str) -> Stage:
    """The function behind a verb."""
    return cast(Stage, function_at(VERBS[verb].stage))


class Claims:
    """Which task has which backend. A backend keeps what it loaded between two calls of a step: one step has it at a time."""

    def __init__(self) -> None:
        self._holders: dict[BackendName, Task] = {}
        self._lines: dict[BackendName, list[Task]] = defaultdict(list)
        """Who waits, who came first first; what is measured lets one pass that came later."""
        self._overtaken: list[Task] = []
        self._freed: dict[BackendName, float] = {}
        self._changed = threading.Condition()

    def take(self, name: BackendName, task: Task) -> None:
        """Wait for a backend, unless the task has it already.

        Raises:
            BaseException: What the task's `report` raises where it was cancelled.
        """
        waited, held = False, self.held([task])
        assert name in held or all(ORDER.index(other) < ORDER.index(name) for other in held), f"{name} after {held}"
        with self._changed:
            line = self._lines[name]
            line.append(task)
        try:
            while not self._taken(name, task):
                note = "" if waited else f"waiting for the {name}"
                task.report(task.folder, Progress(0, 0, "", note=note))
                waited = True
        finally:
            with self._changed:
                line[:] = [other for other in line if other is not task]
                self._overtaken = [other for other in self._overtaken if other is not task]
                self._changed.notify_all()

    def _taken(self, name: BackendName, task: Task) -> bool:
        """Whether the task has the backend now; else a moment has passed."""
        with self._changed:
            if self._holders.get(name) is task:
                return True
            line = self._lines[name]
            first = min(line, key=self._lets_pass)  # the first of the smallest
            # a step that was waiting for what has just ended is about to ask
            early = self._freed.get(name, 0.0) + MOMENT - time.monotonic() if self._lets_pass(task) else 0.0
            if name not in self._holders and first is task and early <= 0:
                self._holders[name] = task
                self._overtaken += [other for other in line[: line.index(task)] if self._lets_pass(other)]
                return True
            self._changed.wait(early if early > 0 else PATIENCE)
            return False

    def _lets_pass(self, task: Task) -> bool:
        """Whether no step waits for this one, and none has overtaken it yet: else it might wait until the run's end."""
        return task.folder.step.queue == "measure" and not any(other is task for other in self._overtaken)

    def release(self, task: Task, only: BackendName | None = None) -> None:
        """Let others have what a task has, or one backend of it."""
        with self._changed:
            for name, holder in list(self._holders.items()):
                if holder is task and only in (None, name):
                    del self._holders[name]
                    self._freed[name] = time.monotonic()
            self._changed.notify_all()

    def held(self, tasks: Collection[Task]) -> list[BackendName]:
        """Backends that these tasks have."""
        with self._changed:
            return [name for name, holder in self._holders.items() if any(holder is task for task in tasks)]


class _OnFirstCall:
    """A backend that a step takes when it first calls it: an export merges while another step still has the generator."""

    def __init__(self, backend: object, take: Callable[[], None]) -> None:
        self._backend = backend
        self._take = take

    def __getattr__(self, name: str) -> object:
        self._take()
        return getattr(self._backend, name)


class Interruptible(Protocol):
    """An executor that several runs share."""

    def run(self, task: Task) -> Outcome:
        """See `Executor.run`."""
        ...

    def prepare(self, task: Task) -> None:
        """See `Executor.prepare`."""
        ...

    def interrupt(self, tasks: Collection[Task]) -> None:
        """Have these tasks end, and no others."""
        ...


class Lease:
    """One run's part in an executor that several share: closing it frees what this run is in, and nothing of the others'.

    Args:
        shared: The executor.
    """

    def __init__(self, shared: Interruptible) -> None:
        self._shared = shared
        self._tasks: list[Task] = []

    def run(self, task: Task) -> Outcome:
        """See `Executor.run`."""
        with self._noted(task):
            return self._shared.run(task)

    def prepare(self, task: Task) -> None:
        """See `Executor.prepare`."""
        with self._noted(task):
            self._shared.prepare(task)

    @contextlib.contextmanager
    def _noted(self, task: Task) -> Iterator[None]:
        """Have `close` end what a task is in."""
        self._tasks.append(task)
        try:
            yield
        finally:
            self._tasks = [other for other in self._tasks if other is not task]

    def close(self) -> None:
        """End the backends that steps of this run are in; they start again when they are called again."""
        self._shared.interrupt(self._tasks)


class LocalExecutor:
    """Runs steps on this machine, through resident backends.

    Args:
        backends: Proxies of child processes, or fakes.
        model: Folder or hub name of M[0].
        context: Tokens that a sequence may take (`run.context_needed`).
        swap: Trainer and generator do not share the GPU's memory: the one ends before the other begins.
        gpu: Whose memory is looked at; the first one's if None.
    """

    def __init__(self, backends: Backends, model: str, context: int, *, swap: bool = False, gpu: Gpu | None = None) -> None:
        self.backends = backends
        self._place = model
        self._context = context
        self._swap = swap
        self._gpu = gpu or Gpu()
        facts = self._gpu.facts()
        self._room = facts.free if facts else 0
        """Bytes of the GPU's memory that other programs had left when nothing here was loaded; 0 without a GPU."""
        self._claims = Claims()
        self._loading = threading.Lock()
        self._base: Path | None = None
        self._untouched: dict[str, Path] = {}
        """By number format, the file of the untouched model in this machine's cache, once it was asked for."""

    def run(self, task: Task) -> Outcome:
        """See `Executor.run`."""
        verb = VERBS[task.folder.step.verb]
        if not verb.reads:  # where an adapter is gone, the generator reads what was exported
            _refuse_gone(task.inputs)
        needs: set[BackendName] = {*verb.needs}
        if verb.reads and self._streams(task.recipe):
            needs.add("trainer")
        with self._claimed(frozenset(needs), task):
            return self._run(verb, task)

    def _streams(self, recipe: Recipe) -> bool:
        """Whether the trainer reads texts under M[0] and M[t].

        On a GPU: it holds its base in fewer bits than are stored, so that those stream through it for its probes anyway. On a
        CPU: its products are in bf16, and faster than llama.cpp's.
        """
        if self._swap:
            return False
        if self._gpu.there:
            return recipe.train.base not in HELD_IN_32_BITS
        return recipe.trainer == "peft" and recipe.train.base == "bf16-mixed"

    def _run(self, verb: Verb, asked: Task) -> Outcome:
        """Do a step that has the backends it begins with."""
        self._make_room(verb.needs, asked)
        if verb.name == "load_base" and not self._swap:  # the first of a run: the others import while this one does
            self.backends.prepare(*_needed(asked))
        task, listener = _heard(asked)
        with Peak(self._gpu, self.backends.pids) as peak:
            results = stage_of(verb.name)(self._work(task, listener, asked))
        if peak.bytes and verb.queue in ("device", "generator", "measure"):
            results = {**results, "peak_vram": peak.bytes}  # all of this executor's processes together
        return Outcome(results, _digests(results))

    def prepare(self, task: Task) -> None:
        """See `Executor.prepare`. Where trainer and generator take turns, whoever has the memory keeps it."""
        if self._swap and self.backends.running("generator"):
            return
        if not self._swap:
            self.backends.prepare(*_needed(task) - {"trainer"})
        if "train" in task.ahead and not self.backends.running("trainer"):
            with self._claimed(VERBS["train"].needs, task):
                if not self.backends.running("trainer"):  # by now another run's step may have started it
                    self.backends.trainer.load(self._model, task.recipe.train)

    def close(self) -> None:
        """End all backends."""
        self.backends.close()

    def lease(self) -> Lease:
        """One run's part in this executor."""
        return Lease(self)

    def usable(self) -> bool:
        """Whether tasks can be sent: this machine is always there."""
        return True

    def interrupt(self, tasks: Collection[Task]) -> None:
        """End the backends that these tasks have."""
        held = self._claims.held(tasks)
        if held:
            self.backends.close(*held)

    @contextlib.contextmanager
    def _claimed(self, needs: frozenset[BackendName], task: Task) -> Iterator[None]:
        """Give a task what it begins with; what comes later in `ORDER` it takes when it first calls it.

        Where trainer and generator take turns, they and the exporter are one thing.
        """
        if self._swap and needs & set(ORDER[:3]):
            needs = needs | set(ORDER[:3])
        wanted = [name for name in ORDER if name in needs]
        try:
            for name in wanted if self._swap else wanted[:1]:
                self._claims.take(name, task)
            yield
        finally:
            self._claims.release(task)

    @cached_property
    def _model(self) -> str:
        """Folder of M[0]; fetched from the hub when it is first needed."""
        return folder_of(self._place)

    def _work(self, task: Task, listener: Callable[[str], None], asked: Task) -> Work:
        """What a stage is given.

        Args:
            task: Whose progress is reported.
            listener: Is told of the silence of what the step has: a generator may still write another's answers.
            asked: The same task, as what claims backends.
        """

        def take(name: BackendName) -> None:
            self._claims.take(name, asked)
            self.backends.watch(name, listener)

        def on_first_call(name: BackendName) -> Any:
            return _OnFirstCall(getattr(self.backends, name), lambda: take(name))

        backends = replace(self.backends, **{name: on_first_call(name) for name in ORDER})
        return Work(
            step=task.folder.step,
            recipe=task.recipe,
            folder=task.folder.path,
            inputs={role: source.path for role, source in task.inputs.items() if not _gone(source)},
            report=lambda progress: task.report(task.folder, progress),
            backends=backends,
            model=lambda: self._model,
            load=lambda role: self._load(asked, role, backends.generator),
            streams=self._streams(task.recipe),
            release=lambda name: self._claims.release(asked, name),
        )

    # -- memory

    def _make_room(self, needs: frozenset[BackendName], task: Task) -> None:
        """Have the GPU's memory go to whom a step needs."""
        generates = bool(needs & {"generator", "exporter"})
        if self._swap and "trainer" in needs:
            self._free_memory("generator")
        elif self._swap and generates:
            self._free_memory("trainer")
        elif self._gpu.there and self._trains(task) and (generates or task.folder.step.verb == "train"):
            # The base takes its memory before the generator takes what is left: also in a later session, where a training and
            # answers begin at once.
            with self._loading:
                if not self.backends.running("trainer"):
                    self.backends.trainer.load(self._model, task.recipe.train)

    def _trains(self, task: Task) -> bool:
        """Whether the trainer is still needed."""
        return "train" in task.ahead or (any(VERBS[name].reads for name in task.ahead) and self._streams(task.recipe))

    def _free_memory(self, name: BackendName) -> None:
        """End a backend and wait until the GPU has its memory back: the next one plans with what is free."""
        if self.backends.running(name):
            self.backends.close(name)
            self._gpu.wait_for_release()

    # -- exported models

    def _load(self, asked: Task, role: str, generator: Generator) -> None:
        """Make the exported model of an input the generator's current one; written again where it was removed.

        Args:
            asked: As what claims backends.
            generator: As a stage calls it: whoever loads a model has the generator until its step ends.
        """
        gguf, lora = (self._stored(asked), None) if role == "base_model" else self._present(asked.inputs[role], asked)
        slots = None if asked.recipe.slots == "auto" else asked.recipe.slots
        generator.load(gguf, lora, self._model, slots=slots, context=self._context, exact=False)

    def _stored(self, task: Task) -> Path:
        """M[0] in the number format that it is stored in: what is measured under it means the same in every run.

        In q8_0 where the GPU has no room for that: weights that come from the host's memory for each batch take minutes, and
        perplexities differ by 0.02 % (docs/benchmarks.md).
        """
        if self._base is None or not self._base.exists():
            self._base = self.backends.exporter.stored(self._model)
            if self._room and self._base.stat().st_size > HOLDS * self._room:
                folder = task.folder.path
                self._base = untouched_gguf(self.backends.exporter, self._model, folder, "q8_0", lambda _: None)
        return self._base

    def _exported(self, folder: StepFolder) -> tuple[Path, Path | None]:
        """As `exported_files`, with the untouched model's place in this machine's cache."""
        gguf, lora = exported_files(folder)
        return gguf or self._untouched.get(folder.step.params["quant"], Path()), lora

    def _removed(self, source: StepFolder) -> bool:
        """Whether the files of an exported model are not here: `keep` removed them, or this machine's cache lacks the base."""
        return source.step.verb == "export" and not (source.whole() and self._exported(source)[0].is_file())

    def _present(self, source: StepFolder, asked: Task) -> tuple[Path, Path | None]:
        """The files of an exported model, which is written again if it was removed."""
        if self._removed(source):
            self._claims.release(asked, "generator")  # nobody waits for the exporter who has the generator
            self._claims.take("exporter", asked)
            if self._removed(source):  # else another step has written it by now
                self._restore(source, asked)
            if not self._swap:
                self._claims.release(asked, "exporter")  # the next export need not wait for these texts
        return self._exported(source)

    def _restore(self, source: StepFolder, asked: Task) -> None:
        """Write an exported model again that was removed.

        Raises:
            StoreError: If its adapter was removed too.
        """
        whole = folder_at(source.path)
        if whole is None:
            raise StoreError(f"`{source.path}` has no step.json: the model of `{source.step.name}` cannot be written again")
        inputs = {role: found for role, path in input_folders(source.path, whole.step).items() if (found := folder_at(path))}
        _refuse_gone(inputs)
        again = replace(asked, folder=_as_chosen(whole), inputs=inputs)
        work = self._work(*_heard(again), asked)
        if not source.whole():
            whole.take_again(_digests(stage_of("export")(work)))
        self._claims.release(asked, "generator")
        if exported_files(whole)[0] is None:
            quant = whole.step.params["quant"]
            self._untouched[quant] = untouched_gguf(work.backends.exporter, self._model, whole.path, quant, work.report)


def _needed(task: Task) -> frozenset[BackendName]:
    """The backends of the steps that are still to come."""
    return frozenset(name for verb in task.ahead for name in VERBS[verb].needs)


def _refuse_gone(inputs: Mapping[str, StepFolder]) -> None:
    """Refuse a step whose adapter to read was removed; with a training done again whatever rests on it is another.

    Raises:
        StoreError: With the adapter's folder.
    """
    for source in inputs.values():
        if _gone(source):
            raise StoreError(
                f"the adapter of `{source.step.name}` is gone from `{source.path}`: "
                '`keep = "ends"` leaves those of cycle 0 and of the last cycle alone',
                hint="choose another folder with `--out`, and `--set keep=adapters`",
            )


def _gone(source: StepFolder) -> bool:
    """Whether an adapter was removed."""
    return source.step.verb == "train" and not source.whole()


def _as_chosen(folder: StepFolder) -> StepFolder:
    """The folder of an export with the kind that `export = "auto"` came to in it, so that it is written again as it was."""
    found = folder.completion()
    kind = found.results.get("kind") if found is not None else None
    params = {**folder.step.params, "kind": kind or folder.step.params["kind"]}
    return StepFolder(folder.path, replace(folder.step, params=params))


def _heard(task: Task) -> tuple[Task, Callable[[str], None]]:
    """A task whose progress is remembered, and what tells that a backend is silent: the same progress with a note."""
    last = [Progress(0, 0, "")]

    def report(of: StepFolder, progress: Progress) -> None:
        last[0] = replace(progress, note="")
        task.report(of, progress)

    return replace(task, report=report), lambda sentence: task.report(task.folder, replace(last[0], note=sentence))


def exported_files(folder: StepFolder) -> tuple[Path | None, Path | None]:
    """The GGUF of a finished export, and the LoRA GGUF to lay over it, if any.

    The GGUF is None for the untouched model of the step's quant, which is not the step's but this machine's cache's
    (`stages.export.untouched_gguf`). Earlier versions noted where it lay then, as a full path.

    Raises:
        RunError: If the step is not finished.
        StoreError: If its record names anything that is not a file of the step.
    """
    found = folder.completion()
    if found is None:
        raise RunError(f"`{folder.step.name}` is not finished")
    gguf, lora = found.results.get("gguf"), found.results.get("lora")
    is_elsewhere = isinstance(gguf, str) and Path(gguf).is_absolute()
    return None if is_elsewhere else _own_file(folder, found, gguf), _own_file(folder, found, lora)


def _own_file(folder: StepFolder, found: Completion, name: Json) -> Path | None:
    """The place of a file that a record's results name: one of the step's own, which are held against their digests."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in found.files:
        raise StoreError(
            f"the record of `{folder.path}` has `{name}` loaded, which is not a file of that step",
            hint=f"remove the folder `{folder.path}` to have it done again",
        )
    return safe_member(folder.path, name)


def _digests(results: Mapping[str, Json]) -> dict[str, str]:
    """The digest by pieces of a merged file, by file name, as taken while it was written."""
    return {results["gguf"]: results["digest"]} if results.get("digest") else {}
