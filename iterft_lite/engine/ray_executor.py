"""Steps on other machines, through Ray: one actor a GPU, or one a machine without, holds a local executor and its backends.

The process that sweeps (the driver) keeps the schedule, the locks, the store and the judging. A task goes out, progress and an
outcome come back; files are never sent: every machine sees the study's folder at the same path.

No two workers are ever in one step's folder:
- the driver has the step's `Making` while an actor is at it, and the actor has the step's `Working`;
- whoever wants to make a step that is still being worked on, by an actor that Ray lost sight of or that outlives its driver,
  waits until that worker's process is gone (`Making.try_acquire`): a lock goes with the process, Ray's word does not;
- nothing is ever done a second time by Ray itself (`max_retries`, `max_restarts` and `max_task_retries` are 0).

An actor ends with its driver, and the backends' processes end with the actor.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from iterft_lite.engine.executor import Executor, Lease, LocalExecutor, Outcome, Task
from iterft_lite.engine.ray_cluster import Site, first_line, load_ray
from iterft_lite.engine.store import StepFolder, Working
from iterft_lite.errors import BackendError, IterftError
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.files import disk_errors, open_append, our_error
from iterft_lite.model_code import trust, trusted
from iterft_lite.protocols import Progress
from iterft_lite.stages.judge import NotYet

OPENING = 60.0
"""Seconds that a worker is given to start: its GPU may still be another's."""

POLL = 0.2
"""Seconds between two looks at how far a task is."""

STOPPING = 15.0
"""Seconds that a worker is given to let go of a task that is not wanted any more."""

GONE = 30.0
"""Seconds that a lost worker's process is waited for."""

WORKER_LOG = "worker.log"
"""What an actor itself printed, beside its backends' logs."""

CALLS = 16
"""Calls to one actor at once: the tasks of two cells, and the questions how far they are."""


class Opener(Protocol):
    """What opens a local executor where it is called; it is sent there."""

    def __call__(self, logs: Path, threads: int) -> LocalExecutor:
        """Backends on this machine, none of them started yet.

        Args:
            logs: Folder of what they print.
            threads: That they may use where the recipe leaves it open.
        """
        ...


# -- in the actor


@dataclass(frozen=True)
class Sent:
    """A task without what cannot travel. Paths are absolute: an actor is in another folder."""

    folder: StepFolder
    recipe: Recipe
    inputs: Mapping[str, StepFolder]
    ahead: frozenset[str]

    @classmethod
    def of(cls, task: Task) -> Sent:
        """What is sent of a task."""
        inputs = {role: _absolute(source) for role, source in task.inputs.items()}
        return cls(_absolute(task.folder), task.recipe, inputs, task.ahead)


def _absolute(folder: StepFolder) -> StepFolder:
    return StepFolder(folder.path.absolute(), folder.step)


News = list[tuple[str, Progress]]
"""Progress, oldest first, each with the key of the step that it is of."""


@dataclass(frozen=True)
class Answer:
    """How a task ended, and the last of its progress."""

    outcome: Outcome | None
    error: BaseException | None
    news: News


class _Stopped(Exception):  # noqa: N818  # not an error
    """The driver does not want the task any more."""


class _Call:
    """A task in an actor, as far as others ask about it."""

    def __init__(self, sent: Sent) -> None:
        self.task = Task(sent.folder, sent.recipe, sent.inputs, sent.ahead, self._report)
        self.stopped = False
        self._news: News = []
        self._lock = threading.Lock()

    def _report(self, of: StepFolder, progress: Progress) -> None:
        with self._lock:
            if self.stopped:
                raise _Stopped
            # the newest number is enough; what has a sentence is kept
            if self._news and self._news[-1][0] == of.step.key and not self._news[-1][1].note:
                self._news.pop()
            self._news.append((of.step.key, progress))

    def take(self) -> News:
        """What was not taken yet."""
        with self._lock:
            news, self._news = self._news, []
        return news


class Worker:
    """What a Ray actor is: a local executor that is asked from afar. Its methods are called side by side.

    Args:
        opener: Opens the executor.
        logs: Folder, on the shared disk, of all that is printed.
        threads: CPU threads for the backends.
        gpu: Whether it has a GPU.
        trusting: Models whose own code may run (`model_code.py`).
    """

    def __init__(self, opener: Opener, logs: Path, threads: int, gpu: bool, trusting: Sequence[str]) -> None:
        _print_to(logs / WORKER_LOG)
        _see_only(load_ray().get_gpu_ids() if gpu else [])
        for model in trusting:
            trust(model)
        self._executor = opener(logs, threads)
        self._calls: dict[int, _Call] = {}

    def ready(self) -> str:
        """The host, once the actor is there."""
        return platform.node()

    def run(self, number: int, sent: Sent) -> Answer:
        """Do a task. What goes wrong is part of the answer: it keeps its kind, message and hint, and Ray's traces stay out."""
        call = self._calls[number] = _Call(sent)
        try:
            with Working(sent.folder):
                return Answer(self._executor.run(call.task), None, call.take())
        except BaseException as error:
            return Answer(None, _travelling(error, sent), call.take())
        finally:
            del self._calls[number]

    def prepare(self, number: int, sent: Sent) -> Answer:
        """Start and load what a task's run needs later. The step is somebody else's: nothing is written in its folder."""
        call = self._calls[number] = _Call(sent)
        try:
            self._executor.prepare(call.task)
            return Answer(Outcome({}), None, call.take())
        except BaseException as error:
            return Answer(None, _travelling(error, sent), call.take())
        finally:
            del self._calls[number]

    def news(self, number: int) -> News:
        """How far a task is."""
        call = self._calls.get(number)
        return call.take() if call else []

    def stop(self, numbers: Sequence[int]) -> None:
        """Have tasks end soon: those that are inside a backend's call lose the backend."""
        calls = [self._calls[number] for number in numbers if number in self._calls]
        for call in calls:
            call.stopped = True
        self._executor.interrupt([call.task for call in calls])


def _print_to(log: Path) -> None:
    """Have whatever this process prints end up beside the study, where it outlives the node."""
    with disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = open_append(log)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _see_only(gpus: Sequence[int | str]) -> None:
    """Have this process, and the backends after it, see its GPUs and no others.

    Ray sets the variable for an actor that asks for GPUs, unless RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is in a node's
    environment. For one that asks for none it leaves what is there (RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO would change that, and
    has to be set before a worker's process begins): a CPU's worker would train on the node's GPU. Numbers are by PCI slot here
    as there (`programs.environment`).
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))


def _travelling(error: BaseException, sent: Sent) -> BaseException:
    """A failure as it is sent: this program's own as it is, others by their name; the log has the traceback."""
    if isinstance(error, IterftError | NotYet):
        return error
    if isinstance(error, _Stopped):
        return BackendError("the task was cancelled", exception="died")
    traceback.print_exc()
    if isinstance(error, OSError):
        return our_error(Path(error.filename or sent.folder.path), error)
    name = type(error).__name__
    return BackendError(f"`{sent.folder.step.name}` failed on {platform.node()}: {name}: {error}", exception=name)


# -- in the driver


class RayExecutor:
    """Runs steps in an actor. It starts with the first task; one that was lost is started again.

    Args:
        site: Where.
        opener: Opens the local executor there.
        logs: Folder, on the shared disk, of all that is printed there.
    """

    def __init__(self, site: Site, opener: Opener, logs: Path) -> None:
        self._site = site
        self._opener = opener
        self.logs = logs.absolute()
        self._actor: Any = None
        self._failed = False
        """No worker could be started."""
        self._closed = 0
        """How often it was closed: who waits for an actor sees it change."""
        self._opening = threading.Lock()
        self._tasks: dict[int, Task] = {}
        self._numbers = itertools.count()

    def lease(self) -> Executor:
        """One run's part in it."""
        return Lease(self)

    def usable(self) -> bool:
        """Whether tasks can be sent. Starts a lost worker again: on a node that is gone that may take a minute."""
        if not self._failed:
            with contextlib.suppress(BackendError):
                self._open()
        return not self._failed

    def run(self, task: Task) -> Outcome:
        """See `Executor.run`.

        Raises:
            BackendError: Of kind "machine", if the worker is lost or cannot be started.
        """
        if "judge" in VERBS[task.folder.step.verb].needs:
            raise ValueError("judging stays with the driver: one budget, one pace, one cache")
        actor = self._open()
        try:
            return self._done(actor, "run", task)
        except load_ray().exceptions.RayError as error:
            raise self._gone(actor, task, error) from None

    def prepare(self, task: Task) -> None:
        """See `Executor.prepare`."""
        actor = self._open()
        try:
            self._done(actor, "prepare", task)
        except load_ray().exceptions.RayError as error:
            self._drop(actor)
            raise BackendError(f"the worker at {self._site.name} was lost: {first_line(error)}", exception="died") from None

    def _done(self, actor: Any, what: Literal["run", "prepare"], task: Task) -> Outcome:
        """What an actor's method comes to.

        Raises:
            RayError: If the actor is lost.
            BaseException: What the method, or the task's `report`, raised.
        """
        number = next(self._numbers)
        self._tasks[number] = task
        try:
            answer = self._followed(actor, number, task, getattr(actor, what).remote(number, Sent.of(task)))
        finally:
            del self._tasks[number]
        if answer.outcome is None:
            raise answer.error or AssertionError("an answer is an outcome or an error")
        return answer.outcome

    def close(self) -> None:
        """End the actor with whatever runs in it; a later task starts another."""
        self._closed += 1
        with self._opening:
            self._end(self._actor)

    def interrupt(self, tasks: Collection[Task]) -> None:
        """Have these tasks end, and no others."""
        numbers = [number for number, task in list(self._tasks.items()) if any(task is other for other in tasks)]
        actor = self._actor
        if numbers and actor is not None:
            actor.stop.remote(numbers)

    # -- the actor's life

    def _open(self) -> Any:
        """The actor, started if there is none.

        Raises:
            BackendError: If it cannot be started.
        """
        closed = self._closed
        with self._opening:
            if self._actor is None:
                self._actor = self._started(closed)
            return self._actor

    def _started(self, closed: int) -> Any:
        ray, site = load_ray(), self._site
        options = {"num_cpus": site.cpus, "num_gpus": int(site.gpu), "max_restarts": 0, "max_task_retries": 0}
        made = ray.remote(Worker).options(**options, max_concurrency=CALLS, **site.node.options())
        actor = made.remote(self._opener, self.logs, max(1, int(site.cpus)), site.gpu, trusted())
        try:
            self._wait(actor, closed)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._failed = self._closed == closed
            self._end(actor)
            raise BackendError(f"no worker can be started at {site.name}: {first_line(error)}", exception="died") from None
        return actor

    def _wait(self, actor: Any, closed: int) -> None:
        """Return once an actor is there. Ray waits without an end for one that is bound to a node that is gone."""
        ray, end = load_ray(), time.monotonic() + OPENING
        ready = actor.ready.remote()
        while not ray.wait([ready], timeout=1.0)[0]:
            if self._closed != closed:
                raise TimeoutError("it was cancelled")
            if not self._site.node.alive():
                raise TimeoutError("the node has left the cluster")
            if time.monotonic() > end:
                raise TimeoutError(f"its core or GPU was not free within {OPENING:.0f} s")
        ray.get(ready)

    def _drop(self, actor: Any) -> None:
        """End an actor; the next task starts another."""
        with self._opening:
            if self._actor is actor:
                self._end(actor)

    def _end(self, actor: Any) -> None:
        self._actor = None
        if actor is not None:
            with contextlib.suppress(Exception):  # it is gone already, or the cluster is
                load_ray().kill(actor, no_restart=True)

    # -- a task's life

    def _followed(self, actor: Any, number: int, task: Task, answer: Any) -> Answer:
        """Tell a task's progress until it has ended.

        Args:
            answer: What Ray gives for the call.
        """
        ray = load_ray()
        try:
            while not ray.wait([answer], timeout=POLL)[0]:
                _tell(task, ray.get(actor.news.remote(number)))
            found: Answer = ray.get(answer)
            _tell(task, found.news)
        except ray.exceptions.RayError:
            raise
        except BaseException:  # `report` does not want it any more
            self._stop(actor, number, answer)
            raise
        return found

    def _stop(self, actor: Any, number: int, answer: Any) -> None:
        """Have a task end, and return when nothing of it runs any more."""
        ray = load_ray()
        try:
            actor.stop.remote([number])
            ended = bool(ray.wait([answer], timeout=STOPPING)[0])
        except ray.exceptions.RayError:
            ended = False
        if not ended:
            self._drop(actor)

    def _gone(self, actor: Any, task: Task, error: Exception) -> BackendError:
        """The error of a task whose actor is lost, once its process is gone, as far as that can be seen."""
        self._drop(actor)
        working, end = Working(task.folder), time.monotonic() + GONE
        while (still := working.busy()) and time.monotonic() < end:
            time.sleep(POLL)
        more = f"; its process may still be at work: `{working.path}` is held" if still else ""
        return BackendError(
            f"the worker at {self._site.name} was lost during `{task.folder.step.name}`: {first_line(error)}{more}\n"
            f"(its log is {self.logs / WORKER_LOG})",
            exception="died",
        )


def _tell(task: Task, news: News) -> None:
    """Report progress that came from afar, by the task's own folders."""
    folders = {folder.step.key: folder for folder in (*task.inputs.values(), task.folder)}
    for key, progress in news:
        task.report(folders.get(key, task.folder), progress)
