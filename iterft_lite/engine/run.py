"""Walk a plan: do every step that is not finished, its queues side by side, and say what happens as events. Prints nothing.

The schedule knows steps, queues and order; an executor knows where and how a step runs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from iterft_lite.digests import Json
from iterft_lite.engine.completion import Completion
from iterft_lite.engine.executor import Executor, Task
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.store import Making, StepFolder
from iterft_lite.errors import FailureKind, failure_of
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import Keep
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import Queue
from iterft_lite.experiment.versions import libraries, versions
from iterft_lite.files import our_error
from iterft_lite.protocols import Progress
from iterft_lite.stages.judge import NotYet

CONTEXT_STEP = 64
"""Contexts are rounded up to this many tokens."""

FAILURE = "failure.json"
"""In a run folder: how its last session failed; gone once one ends well."""

WAIT = 1.0
"""Seconds until it is looked again whether another process has made a step. Runs of one process tell each other (`Shared`)."""


@dataclass(frozen=True)
class StepStarted:
    """A step is being done."""

    step: Step


@dataclass(frozen=True)
class StepProgress:
    """A step has come further."""

    step: Step
    progress: Progress


@dataclass(frozen=True)
class StepFinished:
    """A step is finished; `reused` if an earlier session, or another run, did it."""

    step: Step
    completion: Completion
    reused: bool


@dataclass(frozen=True)
class StepFailed:
    """A step has failed, and the run ends. `kind` says of whose doing it is."""

    step: Step
    kind: FailureKind
    message: str
    hint: str


Event = StepStarted | StepProgress | StepFinished | StepFailed


class _StopQueue(Exception):  # noqa: N818  # not an error
    """The run is ending: a queue leaves its step as it is."""


def run(
    plan: Plan,
    store: Run,
    executor: Executor,
    *,
    reuse: Mapping[str, Path] | None = None,
    after: Literal["close", "keep"] = "close",
    shared: Shared | None = None,
) -> Generator[Event, None, None]:
    """Do a plan in a run folder whose lock is held.

    Args:
        reuse: Folders of steps that other stores hold, by key; what is among them is not done again.
        after: Whether the executor ends with the run, or stays for another; it always ends when the run fails.
        shared: What this run knows together with others over one store; its own if None.

    Yields:
        Events, in the order in which they happen.

    Raises:
        IterftError: The first failure of any queue; finished steps and rows are kept.
    """
    shared = shared or Shared([plan])
    walk = _Walk(plan, store, executor, reuse or {}, shared)
    shared.follow(walk.finished_elsewhere)
    threads = [threading.Thread(target=walk.work_off, args=(name,), daemon=True) for name in get_args(Queue)]
    for thread in threads:
        thread.start()
    try:
        ended = 0
        while ended < len(threads):
            event = walk.events.get()
            if event is None:
                ended += 1
            else:
                yield event
    finally:
        walk.stop()
        for thread in threads:
            thread.join()
        shared.unfollow(walk.finished_elsewhere)
        if after == "close":
            executor.close()
    if walk.failure is not None:
        raise walk.failure


class Shared:
    """What runs over one store know together: which steps this process has verified, and which exports are still read.

    Args:
        plans: Of all runs.
    """

    def __init__(self, plans: Iterable[Plan]) -> None:
        self._readers: dict[str, set[str]] = {}
        """By key of a step that leaves a model, the keys of the steps that read it."""
        self._reads: dict[str, set[str]] = {}
        """The other way round. A study has thousands of steps: only what a finished step has read is looked at."""
        self._exports: set[str] = set()
        self._last: set[str] = set()
        """Keys of the last exports and trainings of the plans."""
        self._first: set[str] = set()
        """Keys of the trainings of cycle 0."""
        self._finished: set[str] = set()
        self._verified: set[str] = set()
        self._told: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        for plan in plans:
            self.add(plan)

    def add(self, plan: Plan) -> None:
        """One more run over the store."""
        with self._lock:
            self._note(plan)

    def _note(self, plan: Plan) -> None:
        exports, trainings = ([step for step in plan if step.verb == verb] for verb in ("export", "train"))
        self._exports |= {step.key for step in exports}
        self._last |= {step.key for step in (*exports[-1:], *trainings[-1:])}
        self._first |= {step.key for step in trainings[:1]}
        for step in (*exports, *trainings):
            readers = {reader.key for reader in plan if step.name in dict(reader.inputs).values()}
            self._readers.setdefault(step.key, set()).update(readers)
            for reader in readers:
                self._reads.setdefault(reader, set()).add(step.key)

    def follow(self, told: Callable[[str], None]) -> None:
        """Have a run told the key of every step that is finished."""
        with self._lock:
            self._told.append(told)

    def unfollow(self, told: Callable[[str], None]) -> None:
        """The run has ended."""
        with self._lock:
            self._told.remove(told)

    def verify(self, folder: StepFolder) -> Completion:
        """Check a finished step, its files once a process.

        Raises:
            StoreError: As `StepFolder.verify`.
        """
        if folder.step.key in self._verified:
            found = folder.completion()
            if found is not None:
                return found
        found = folder.verify(pruned=folder.step.verb in ("export", "train"), mend=folder.step.verb == "export")
        self._verified.add(folder.step.key)
        return found

    def finish(self, key: str, keep: Keep) -> list[tuple[str, str]]:
        """Note a finished step.

        Returns:
            Key of a step and pattern of its files, of the models that no step reads any more and that `keep` does not keep.
        """
        self._verified.add(key)
        with self._lock:
            told = list(self._told)
        for each in told:
            each(key)
        return self._ended(key, keep)

    def _ended(self, key: str, keep: Keep) -> list[tuple[str, str]]:
        """As `finish`, also of a step that nobody does."""
        with self._lock:
            self._finished.add(key)
            touched = self._reads.get(key, set()) | ({key} & self._readers.keys())
            unread = [made for made in touched if {made, *self._readers[made]} <= self._finished]
            exports = [made for made in unread if made in self._exports and (keep != "last" or made not in self._last)]
            adapters = [made for made in unread if made not in self._exports | self._last | self._first]
        merged = [(made, "*.gguf" if keep == "ends" else "model.gguf") for made in exports] if keep != "all" else []
        return merged + ([(made, "adapter/*.safetensors") for made in adapters] if keep == "ends" else [])

    def drop(self, plan: Plan, others: Iterable[Plan], store: Path) -> None:
        """A run is abandoned: remove what only its steps would have read, as `keep` says.

        Adapters stay: whoever has the run tried again needs them, and exports are written again from them.

        Args:
            others: Plans of the runs that continue.
            store: Where the steps are.
        """
        needed = {step.key for other in others for step in other}
        for step in plan:
            if step.key not in needed:
                unread = self._ended(step.key, plan.recipe.keep)
                remove(store, [(key, files) for key, files in unread if key in self._exports])


class _Walk:
    """What the queues of a run share."""

    def __init__(self, plan: Plan, store: Run, executor: Executor, reuse: Mapping[str, Path], shared: Shared) -> None:
        self.plan = plan
        self.store = store
        self.executor = executor
        self.reuse = reuse
        self.shared = shared
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.failure: BaseException | None = None
        self._finished: set[str] = set()
        self._resting: dict[str, float] = {}
        """By step that is to be taken up again, when (monotonic seconds)."""
        self._since: dict[str, float] = {}
        """By step that is being done, up to when its seconds are counted."""
        self._changed = threading.Condition()
        self._stopping = False
        self._is_ready = False
        """Whether what the run needs was started, as far as it was tried."""

    def work_off(self, name: Queue) -> None:
        """Do a queue's steps, each as soon as what it reads is finished; what rests is taken up again."""
        try:
            todo = [step for step in self.plan if step.queue == name]
            while todo:
                # a batch takes hours: the judge goes on with whatever is ready, the others keep their order
                step = self._next(todo[:1] if name in ("device", "generator") else todo)
                if self._do(step):
                    todo = [other for other in todo if other is not step]
                    self._prune(step)
        except _StopQueue:
            pass
        except BaseException as error:
            if not self._stopping:
                place = Path(getattr(error, "filename", None) or self.store.root)
                self.failure = our_error(place, error) if isinstance(error, OSError) else error
        finally:
            if self.failure is not None:
                self.stop()
            self.events.put(None)

    def stop(self) -> None:
        """Have all queues end soon; one that is inside a backend's call is freed by ending the backend."""
        with self._changed:
            unfinished = len(self._finished) < len(self.plan.steps)
            self._stopping = True
            self._changed.notify_all()
        if unfinished:
            self.executor.close()

    def _next(self, steps: Sequence[Step]) -> Step:
        """The first of some steps whose inputs are finished and that does not rest, once there is one."""
        with self._changed:
            while True:
                self._go_on()
                ready = [step for step in steps if {name for _, name in step.inputs} & self.plan.steps.keys() <= self._finished]
                rests = {step.name: self._resting.get(step.name, 0.0) - time.monotonic() for step in ready}
                for step in ready:
                    if rests[step.name] <= 0:
                        return step
                self._changed.wait(min(rests.values(), default=None))

    def _go_on(self) -> None:
        if self._stopping:
            raise _StopQueue

    def _do(self, step: Step) -> bool:
        """Do a step; False if it rests."""
        folder = self.store.folder(step)
        done = self._finished_already(folder)
        if done is None:
            making = Making(folder)
            if not making.try_acquire():
                self._get_ready(folder)
                self._rest(step, WAIT)
                return False
            try:
                # the process that had the right before may have finished it
                done = self._finished_already(folder) or self._make(folder)
            finally:
                making.release()
            if done is None:
                return False
        self.events.put(done)
        with self._changed:
            self._finished.add(step.name)
            self._changed.notify_all()
        return True

    def _finished_already(self, folder: StepFolder) -> StepFinished | None:
        """The event of a step that is there already, or that another store has."""
        step = folder.step
        found = folder.completion()
        if found is None and step.key in self.reuse:
            found = folder.reuse(self.reuse[step.key])
        if found is None:
            return None
        return StepFinished(step, self.shared.verify(folder), reused=True)

    def _get_ready(self, folder: StepFolder) -> None:
        """Use the time in which somebody else makes a step of the device: once a run."""
        if self._is_ready or folder.step.queue != "device":
            return
        self._is_ready = True
        left = [step for step in self.plan if step.key not in self.reuse and not self.store.folder(step).finished]
        with contextlib.suppress(Exception):  # the step that needs it says what is wrong
            self.executor.prepare(replace(self._task(folder), ahead=frozenset(step.verb for step in left)))

    def finished_elsewhere(self, key: str) -> None:
        """Another run has finished a step: who waits for it need not wait for the next look."""
        with self._changed:
            for name in [name for name in self._resting if self.plan.steps[name].key == key]:
                del self._resting[name]
            self._changed.notify_all()

    def _rest(self, step: Step, seconds: float) -> None:
        with self._changed:
            self._resting[step.name] = time.monotonic() + seconds

    def _make(self, folder: StepFolder) -> StepFinished | None:
        """Have a step made; None if it rests."""
        step = folder.step
        if step.name not in self._since:
            self.events.put(StepStarted(step))
            self._since[step.name] = time.monotonic()
        folder.begin()
        try:
            made = self.executor.run(self._task(folder))
        except NotYet as patience:
            self._rest(step, patience.seconds)
            folder.spend(self._seconds(step))
            return None
        except BaseException as error:
            folder.spend(self._seconds(step))
            self._say_failed(step, error)
            raise
        self._go_on()
        made_by = versions(libraries(step, self.plan.recipe))
        return StepFinished(step, folder.complete(self._seconds(step), made.results, made.digests, made_by), reused=False)

    def _say_failed(self, step: Step, error: BaseException) -> None:
        if not self._stopping and not isinstance(error, _StopQueue):
            failure = failure_of(error)
            self.events.put(StepFailed(step, failure.kind, failure.message, failure.hint))

    def _seconds(self, step: Step) -> float:
        """Seconds since this was asked last, or since the step began."""
        since, now = self._since[step.name], time.monotonic()
        self._since[step.name] = now
        return now - since

    def _task(self, folder: StepFolder) -> Task:
        def report(of: StepFolder, progress: Progress) -> None:
            self._go_on()
            self.events.put(StepProgress(of.step, progress))

        inputs = {role: self.store.folder(source) for role, source in self.plan.inputs(folder.step).items()}
        ahead = frozenset(step.verb for step in self.plan if step.name not in self._finished and step.key not in self.reuse)
        return Task(folder, self.plan.recipe, inputs, ahead, report)

    def _prune(self, finished: Step) -> None:
        """Remove models that no unfinished step reads, as `keep` says."""
        remove(self.store.store, self.shared.finish(finished.key, self.plan.recipe.keep))


def remove(store: Path, files: Iterable[tuple[str, str]]) -> None:
    """Remove files of steps.

    Args:
        files: Key of a step and pattern of its files.
    """
    for key, pattern in files:
        for path in (store / "steps" / key).glob(pattern):
            path.unlink(missing_ok=True)


def context_needed(plan: Plan) -> int:
    """Tokens that one sequence of this plan may take: the longest prompt with the longest answer, rounded up.

    A prompt is taken to have less than a token to two bytes, and a chat template 64 tokens. What the model's own template and
    tokenizer take beyond them the generator adds, which has the tokenizer.
    """
    needed = 0
    for step in plan:
        if step.verb in ("training_samples", "evaluate_samples"):
            longest = max(map(_size, step.params["prompts"].values()), default=0) + _size(step.params.get("system") or "")
            needed = max(needed, step.params["sampling"]["max_tokens"] + longest // 2 + CONTEXT_STEP)
        elif step.verb == "text_metrics":
            texts = [str(row.get("text") or row.get("messages")) for row in [*step.params["high"], *step.params["low"]]]
            needed = max(needed, max(map(_size, texts), default=0) // 2 + CONTEXT_STEP)
    return -(-needed // CONTEXT_STEP) * CONTEXT_STEP


def _size(text: str) -> int:
    return len(text.encode())


def failure_record(event: StepFailed) -> dict[str, Json]:
    """A failure as it stands in a run's folder and in JSON."""
    return {"step": event.step.name, "kind": event.kind, "message": event.message, "hint": event.hint}
