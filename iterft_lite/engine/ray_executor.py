"""Steps on other machines, through Ray: one actor a GPU, or one a machine without, holds a local executor and its backends.

The process that sweeps (the driver) keeps the schedule, the locks, the store and the judging. What goes out is a task, what comes
back is progress and an outcome; files are never sent: every machine sees the study's folder at the same path.

No two workers are ever in one step's folder:
- the driver has the step's `Making` while an actor is at it, and the actor has the step's `Working`;
- whoever wants to make a step that is still being worked on, by an actor that Ray lost sight of or that outlives its driver,
  waits until that worker's process is gone (`Making.try_acquire`): a lock goes with the process, Ray's word does not;
- nothing is ever done a second time by Ray itself (`max_retries`, `max_restarts` and `max_task_retries` are 0).

An actor ends with its driver, and the backends' processes end with the actor.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import platform
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import iterft_lite
from iterft_lite.engine.executor import Executor, Lease, LocalExecutor, Outcome, Task
from iterft_lite.engine.store import StepFolder, Working
from iterft_lite.errors import BackendError, Busy, IterftError, UserError
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.files import FolderLock, disk_errors, our_error, read_text, write_text
from iterft_lite.model_code import trust, trusted
from iterft_lite.protocols import Progress
from iterft_lite.stages.judge import NotYet

REACH = 5.0
"""Seconds to reach a cluster's head. Ray itself tries for minutes, and then ends the whole process."""

ANSWER = 60.0
"""Seconds that a node is given to say whether it sees the study's folder: it may have to import from a slow disk."""

OPENING = 120.0
"""Seconds that a worker is given to start: its GPU may still be another's."""

POLL = 0.2
"""Seconds between two looks at how far a task is."""

STOPPING = 15.0
"""Seconds that a worker is given to let go of a task that is not wanted any more."""

GONE = 30.0
"""Seconds that a lost worker's process is waited for."""

CALLS = 16
"""Calls to one actor at once: the tasks of two cells, and the questions how far they are."""

INSTALL = "pip install 'iterft_lite[ray]'"

NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.sshfs", "glusterfs"})
"""Kinds of file systems on which Ray's sockets and object store do not work, or are slow."""

T = TypeVar("T")


class Opener(Protocol):
    """What opens a local executor where it is called; it is sent there."""

    def __call__(self, logs: Path, threads: int) -> LocalExecutor:
        """Backends on this machine, none of them started yet.

        Args:
            logs: Folder of what they print.
            threads: That they may use where the recipe leaves it open.
        """
        ...


# -- the cluster


def load_ray() -> Any:
    """Ray's module.

    Raises:
        UserError: If it is not installed.
    """
    # `uv run` as a driver: Ray would send the folder to all nodes and build its environment there anew. Read when it is imported
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(f"`--on ray` needs Ray, which cannot be imported: {error}", hint=INSTALL) from None


def connect(address: str) -> Any:
    """Be a driver of a cluster.

    Args:
        address: `HOST:PORT` of its head; "" for the one that RAY_ADDRESS names or that this machine is part of.

    Returns:
        Ray's module.

    Raises:
        UserError: If Ray is not installed, or no cluster can be reached at the address.
    """
    ray = load_ray()
    if ray.is_initialized():
        return ray
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _reachable(address)
    try:
        # what actors print goes to their logs in the study's folder, not across the sweep's screen
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (Exception, SystemExit) as error:
        raise _unreachable(address, error) from None
    return ray


def _reachable(address: str) -> None:
    """See that something listens: Ray would try for minutes, and end the process with `SystemExit`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(
            f"`{address}` is not the address of a Ray cluster",
            hint="`--on ray:HOST:PORT` with the port of its head (6379 unless given), on a machine of the cluster",
        )
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: BaseException) -> UserError:
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "auth" in told.lower() or "token" in told.lower():
        hint = "the cluster asks for a token: RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    elif address == "auto":
        hint = "start one: `ray start --head --temp-dir=/tmp/ray` here, `ray start --address=HOST:6379` on the others"
    else:
        hint = f"on a machine of the cluster, `ray status --address={address}` says whether it is up"
    where = "no Ray cluster is running here" if address == "auto" else f"the Ray cluster at `{address}` cannot be reached"
    return UserError(f"{where}: {told}", hint=hint)


@dataclass(frozen=True)
class Node:
    """A machine of a cluster.

    Attributes:
        id: Ray's.
        name: Its host's, and a number where a host has several.
        cpus, gpus: That Ray counts there.
    """

    id: str
    name: str
    cpus: float
    gpus: int

    def alive(self) -> bool:
        """Whether Ray still counts on it."""
        return any(row["NodeID"] == self.id and row["Alive"] for row in load_ray().nodes())

    def options(self) -> dict[str, Any]:
        """Of whatever is to run there and nowhere else."""
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        return {"scheduling_strategy": affinity(self.id, soft=False)}

    def start(self, function: Callable[..., T], *arguments: object) -> Any:
        """Call a function there; what `ray.get` waits for."""
        # 0: a task of a worker that died would be done again, and what it had written with it
        made = load_ray().remote(num_cpus=0, max_retries=0, **self.options())(function)
        return made.remote(*arguments)


def nodes(address: str) -> list[Node]:
    """The machines of a cluster that work can be sent to: those with GPUs if there are any, else all with a core to spare.

    Raises:
        UserError: As `connect`; or if there are none.
    """
    found = list(_nodes(connect(address).nodes()))
    chosen = [node for node in found if node.gpus] or [node for node in found if node.cpus >= 1]
    if not chosen:
        raise UserError("the Ray cluster has no node with a GPU or a core", hint="`ray status` lists what there is")
    return chosen


def _nodes(rows: Sequence[Mapping[str, Any]]) -> Iterator[Node]:
    seen: Counter[str] = Counter()
    for row in rows:
        if row["Alive"]:
            host = str(row["NodeManagerHostname"])
            seen[host] += 1
            name = host if seen[host] == 1 else f"{host}-{seen[host]}"
            resources = row["Resources"]
            yield Node(str(row["NodeID"]), name, float(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


# -- places


@dataclass(frozen=True)
class RayPlace:
    """A GPU of a node, or a node without one.

    Attributes:
        name: `node-3 gpu 1`, `node-3`.
        cpus: Its share of the node's cores.
        gpu: Whether it is a GPU.
        chains: Cells side by side: two on a GPU, one on a CPU.
    """

    name: str
    node: Node
    cpus: float
    gpu: bool

    @property
    def chains(self) -> int:
        """See above."""
        return 2 if self.gpu else 1

    def open_with(self, opener: Opener, logs: Path) -> RayExecutor:
        """A worker there, not started yet."""
        return RayExecutor(self, opener, logs.absolute() / self.name.replace(" ", ""))

    def ask(self, function: Callable[[], T]) -> T:
        """What a function says on that machine.

        Raises:
            BackendError: If the machine does not answer.
        """
        ray = load_ray()
        try:
            found: T = ray.get(self.node.start(function), timeout=ANSWER)
        except ray.exceptions.RayError as error:
            raise BackendError(f"{self.name} does not answer: {_first_line(error)}", exception="died") from None
        return found


@dataclass(frozen=True)
class RayPlaces:
    """Where work can be sent.

    Attributes:
        found: At least one.
        notes: On nodes that are left out, and why; a sentence each.
    """

    found: tuple[RayPlace, ...]
    notes: tuple[str, ...] = ()


def ray_places(address: str, study: Path) -> RayPlaces:
    """The places of a cluster that see a study's folder.

    Args:
        address: As of `connect`.
        study: The study's folder, which is there.

    Raises:
        UserError: If there is no cluster, or none of its nodes can be used.
    """
    found, notes = [], []
    chosen = nodes(address)
    for node, problem in _problems(chosen, study.absolute()):
        if problem:
            notes.append(f"{node.name} is left out: {problem}")
        else:
            found += list(_places(node))
    if not found:
        raise UserError(
            f"no node of the Ray cluster can be used for `{study}`:\n" + "\n".join(f"  - {note}" for note in notes),
            hint="every node needs the same version of iterft_lite, and the study's folder at the same path on a shared disk",
        )
    return RayPlaces(tuple(found), tuple(notes))


def _places(node: Node) -> Iterator[RayPlace]:
    # honest numbers: Ray goes by them when others use the cluster too, and sets OMP_NUM_THREADS to them
    share = node.cpus / max(1, node.gpus)
    share = float(int(share)) if share >= 1 else share
    if not node.gpus:
        yield RayPlace(node.name, node, share, gpu=False)
    for number in range(node.gpus):
        yield RayPlace(f"{node.name} gpu {number}", node, share, gpu=True)


@dataclass(frozen=True)
class _Nonce:
    """A file that only who sees the study's folder can read, and a lock that is held on it."""

    path: Path
    text: str
    version: str


def _problems(found: Sequence[Node], study: Path) -> Iterator[tuple[Node, str]]:
    """Each node with what is wrong with it; "" where nothing is."""
    ray = load_ray()
    nonce = _Nonce(study / f"ray-{secrets.token_hex(8)}", secrets.token_hex(16), iterft_lite.__version__)
    lock = FolderLock(nonce.path.with_suffix(".lock"), "nodes are being asked")
    try:
        write_text(nonce.path, nonce.text)
        lock.acquire()
        asked = [(node, node.start(_problem_here, nonce)) for node in found]
        end = time.monotonic() + ANSWER
        for node, answer in asked:
            try:
                yield node, ray.get(answer, timeout=max(0.0, end - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                yield node, f"it did not answer within {ANSWER:.0f} s"
            except ray.exceptions.RayError as error:
                yield node, f"it cannot run iterft_lite: {_first_line(error)}"
    finally:
        lock.release()
        for path in (nonce.path, lock.path):
            path.unlink(missing_ok=True)


def _problem_here(nonce: _Nonce) -> str:
    """Why this machine cannot work in a study's folder; "" if it can. Runs on the node."""
    if iterft_lite.__version__ != nonce.version:
        return f"it has iterft_lite {iterft_lite.__version__}, and {nonce.version} sweeps"
    try:
        if read_text(nonce.path) != nonce.text:
            raise FileNotFoundError
    except (OSError, IterftError):
        return f"it does not see the study's folder, `{nonce.path.parent}`"
    if not os.access(nonce.path.parent, os.W_OK):
        return f"it may not write in `{nonce.path.parent}`"
    try:
        # held by the driver: a file system that grants it here as well keeps no two machines apart
        FolderLock(nonce.path.with_suffix(".lock"), "").acquire()
    except Busy:
        return _temporary_problem()
    return f"locks on `{nonce.path.parent}` are not seen on other machines: mount it with locks (NFS: without `nolock`)"


def _temporary_problem() -> str:
    """Ray's sockets and shared memory do not work, or crawl, on a disk of the network."""
    with contextlib.suppress(Exception):  # Ray has no public word for it
        folder = importlib.import_module("ray._private.worker")._global_node.get_temp_dir_path()
        kind = _file_system(Path(folder).resolve())
        if kind in NETWORK:
            return f"Ray's temporary folder `{folder}` is on {kind}: start Ray there with `--temp-dir` on a local disk"
    return ""


def _file_system(path: Path) -> str:
    """The kind of file system that a folder is on, as the kernel names it."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    around = [(len(place), kind) for _, place, kind, *_ in mounts if path.is_relative_to(place)]
    return max(around)[1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    """

    def __init__(self, opener: Opener, logs: Path, threads: int, gpu: bool, trusting: Sequence[str]) -> None:
        _print_to(logs / "worker.log")
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
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
    """A failure as it is sent: one of ours as it is, others by their name; the log has the traceback."""
    if isinstance(error, IterftError | NotYet):
        return error
    if isinstance(error, _Stopped):
        return BackendError("the task is not wanted any more", exception="died")
    traceback.print_exc()
    if isinstance(error, OSError):
        return our_error(Path(error.filename or sent.folder.path), error)
    name = type(error).__name__
    return BackendError(f"`{sent.folder.step.name}` failed on {platform.node()}: {name}: {error}", exception=name)


# -- in the driver


class RayExecutor:
    """Runs steps in an actor. It starts with the first task; one that was lost is started anew with the next.

    Args:
        place: Where.
        opener: Opens the local executor there.
        logs: Folder, on the shared disk, of all that is printed there.
    """

    def __init__(self, place: RayPlace, opener: Opener, logs: Path) -> None:
        self._place = place
        self._opener = opener
        self._logs = logs
        self._lost = False
        self._actor: Any = None
        self._opening = threading.Lock()
        self._tasks: dict[int, Task] = {}
        self._numbers = itertools.count()

    @property
    def lost(self) -> bool:
        """Whether no worker could be started there any more: nothing more is to be sent."""
        return self._lost

    def lease(self) -> Executor:
        """One run's part in it."""
        return Lease(self)

    def run(self, task: Task) -> Outcome:
        """See `Executor.run`.

        Raises:
            BackendError: Of kind "machine", if the worker is lost or cannot be started.
        """
        if "judge" in VERBS[task.folder.step.verb].needs:
            raise ValueError("judging stays with the driver: one budget, one pace, one cache")
        actor, number = self._open(), next(self._numbers)
        self._tasks[number] = task
        try:
            answer = self._followed(actor, number, task)
        except load_ray().exceptions.RayError as error:
            raise self._gone(actor, task, error) from None
        finally:
            del self._tasks[number]
        if answer.outcome is None:
            raise answer.error or AssertionError("an answer is an outcome or an error")
        return answer.outcome

    def close(self) -> None:
        """End the actor with whatever runs in it; a later task starts another."""
        with self._opening:
            self._end(self._actor)

    def interrupt(self, tasks: Collection[Task]) -> None:
        """Have these tasks end, and no others."""
        numbers = [number for number, task in self._tasks.items() if any(task is other for other in tasks)]
        if numbers and self._actor is not None:
            self._actor.stop.remote(numbers)

    def _open(self) -> Any:
        """The actor, started if there is none."""
        with self._opening:
            if self._actor is None:
                self._actor = self._started()
            return self._actor

    def _started(self) -> Any:
        ray, place = load_ray(), self._place
        threads = max(1, int(place.cpus))
        options = {"num_cpus": place.cpus, "num_gpus": int(place.gpu), "max_restarts": 0, "max_task_retries": 0}
        made = ray.remote(Worker).options(**options, max_concurrency=CALLS, **place.node.options())
        actor = made.remote(self._opener, self._logs, threads, place.gpu, trusted())
        try:
            self._wait(actor)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._lost = True
            ray.kill(actor, no_restart=True)
            raise BackendError(f"no worker can be started at {place.name}: {_first_line(error)}", exception="died") from None
        return actor

    def _wait(self, actor: Any) -> None:
        """Return once an actor is there. One that is bound to a node that is gone would be waited for without an end."""
        ray, end = load_ray(), time.monotonic() + OPENING
        ready = actor.ready.remote()
        while not ray.wait([ready], timeout=1.0)[0]:
            if not self._place.node.alive():
                raise TimeoutError("the node has left the cluster")
            if time.monotonic() > end:
                raise TimeoutError(f"its core or GPU was not free within {OPENING:.0f} s")
        ray.get(ready)

    def _followed(self, actor: Any, number: int, task: Task) -> Answer:
        """Send a task, and tell its progress until it has ended."""
        ray = load_ray()
        answer = actor.run.remote(number, Sent.of(task))
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
        """The error of a task whose actor is gone, after nothing of it runs any more, as far as that can be seen."""
        self._drop(actor)
        working = Working(task.folder)
        end = time.monotonic() + GONE
        while working.busy() and time.monotonic() < end:
            time.sleep(POLL)
        still = f"; its process may still be at work: `{working.path}` is held" if working.busy() else ""
        name = task.folder.step.name
        return BackendError(
            f"the worker at {self._place.name} was lost during `{name}`: {_first_line(error)}{still}\n(its log is {self._logs})",
            exception="died",
        )

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


def _tell(task: Task, news: News) -> None:
    """Report progress that came from afar, by the task's own folders."""
    folders = {folder.step.key: folder for folder in (*task.inputs.values(), task.folder)}
    for key, progress in news:
        task.report(folders.get(key, task.folder), progress)
