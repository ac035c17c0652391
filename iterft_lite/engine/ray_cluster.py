"""A Ray cluster: reaching it, and which of its nodes can work in a study's folder.

Ray's habits that are answered here: it waits for minutes for a cluster that is not there, and then ends the process; `uv run`
makes it send the folder of the user to all nodes; a task whose worker died is done again; a node may lack the shared folder, or
see it without locks.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import iterft_lite
from iterft_lite.errors import BackendError, Busy, IterftError, UserError
from iterft_lite.files import FolderLock, read_text, write_text

REACH = 5.0
"""Seconds to reach a cluster's head. Ray itself tries for minutes, and then ends the whole process."""

ANSWER = 60.0
"""Seconds that a node is given to say whether it sees the study's folder: it may have to import from a slow disk."""

INSTALL = "pip install 'iterft_lite[ray]'"

NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.sshfs", "glusterfs"})
"""Kinds of file systems on which Ray's sockets and shared memory do not work, or crawl."""

T = TypeVar("T")


def first_line(error: BaseException) -> str:
    """What an error says, in a line. What was raised on a node comes wrapped into Ray's own trace."""
    cause = getattr(error, "cause", None)
    found = cause if isinstance(cause, BaseException) else error
    return (str(found).strip() or type(found).__name__).splitlines()[0]


# -- the cluster


def load_ray() -> Any:
    """Ray's module.

    Raises:
        UserError: If it is not installed.
    """
    # read when Ray is imported: under `uv run` it would send the user's folder to all nodes, and build its environment there
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
    if not host or not re.fullmatch("[0-9]{1,5}", port) or "/" in host:
        raise UserError(
            f"`{address}` is not the address of a Ray cluster",
            hint="`--on ray:HOST:PORT` with the port of its head (6379 unless given), on a machine of the cluster",
        )
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except (OSError, ValueError, OverflowError) as error:  # a host that is no name, a port beyond the last
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: BaseException) -> UserError:
    if address == "auto":
        hint = "start one: `ray start --head --temp-dir=/tmp/ray` here, `ray start --address=HOST:6379` on the others"
        return UserError(f"no Ray cluster is running here: {first_line(error)}", hint=hint)
    hint = (
        f"`ray status --address={address}` on a machine of the cluster says whether it is up; the port is the head's"
        " (mostly 6379). A cluster that asks for a token (all do from Ray 2.61 on) needs RAY_AUTH_MODE=token, and its token in"
        " ~/.ray/auth_token or RAY_AUTH_TOKEN"
    )
    return UserError(f"the Ray cluster at `{address}` cannot be reached: {first_line(error)}", hint=hint)


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


# -- sites


@dataclass(frozen=True)
class Site:
    """A GPU of a node, or a node without one.

    Attributes:
        name: `node-3 gpu 1`, `node-3`.
        cpus: Its share of the node's cores.
        gpu: Whether it is a GPU.
    """

    name: str
    node: Node
    cpus: float
    gpu: bool

    def ask(self, function: Callable[[], T]) -> T:
        """What a function says on that machine.

        Raises:
            BackendError: If the machine does not answer.
        """
        ray = load_ray()
        try:
            found: T = ray.get(self.node.start(function), timeout=ANSWER)
        except ray.exceptions.RayError as error:
            raise BackendError(f"{self.name} does not answer: {first_line(error)}", exception="died") from None
        return found


@dataclass(frozen=True)
class Sites:
    """Where work can be sent.

    Attributes:
        found: At least one.
        notes: On nodes that are left out, and why; a sentence each.
    """

    found: tuple[Site, ...]
    notes: tuple[str, ...] = ()


def sites(address: str, study: Path) -> Sites:
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
            found += list(_sites_of(node))
    if not found:
        raise UserError(
            f"no node of the Ray cluster can be used for `{study}`:\n" + "\n".join(f"  - {note}" for note in notes),
            hint="every node needs the same version of iterft_lite, and the study's folder at the same path on a shared disk",
        )
    return Sites(tuple(found), tuple(notes))


def _sites_of(node: Node) -> Iterator[Site]:
    # honest numbers: Ray goes by them when others use the cluster too, and sets OMP_NUM_THREADS to them
    share = node.cpus / max(1, node.gpus)
    share = float(int(share)) if share >= 1 else share
    if not node.gpus:
        yield Site(node.name, node, share, gpu=False)
    for number in range(node.gpus):
        yield Site(f"{node.name} gpu {number}", node, share, gpu=True)


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
                yield node, f"it cannot run iterft_lite: {first_line(error)}"
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
