"""Where a study's cells and probes run: a GPU of this machine, its CPU, or a worker of a Ray cluster (`--on ray[:HOST:PORT]`).

A place has resident backends (trainer, exporter, generator), which stay for all cells that can use the same ones. The judge is
one for all places: one budget, one pace, one cache.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from iterft_lite.app.session import Session
from iterft_lite.backends.judge.kinds import FAKE_JUDGE, kind_of
from iterft_lite.digests import Json, digest
from iterft_lite.engine.backends import hidden_from_trainer, open_backends
from iterft_lite.engine.executor import Executor, Lease, LocalExecutor, Outcome, Task
from iterft_lite.engine.ray_cluster import Site, sites
from iterft_lite.engine.ray_executor import RayExecutor
from iterft_lite.errors import UserError
from iterft_lite.experiment.inputs import ResolvedInputs
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.files import disk_errors
from iterft_lite.hardware import Gpu, visible_gpus
from iterft_lite.machine.resolve import Machine, Resolved, this_machine


@dataclass(frozen=True)
class Residents:
    """What the resident backends of a place are opened for.

    Attributes:
        recipe: Of one of the cells: trainer, generator, threads.
        inputs: Of one of the cells.
        model: Folder or hub name of M[0].
        context: Tokens that a sequence of any cell may take.
        swap: Trainer and generator take turns.
        keep_free: Bytes of GPU memory that the generator leaves to the trainer.
        logs: Folder of what they print.
    """

    recipe: Recipe
    inputs: ResolvedInputs
    model: str
    context: int
    swap: bool
    keep_free: int
    logs: Path

    @classmethod
    def of(cls, session: Session, context: int, logs: Path) -> Residents:
        """What a session's steps need."""
        resolved = session.resolved
        return cls(resolved.recipe, resolved.inputs, resolved.model, context, session.swap, session.keep_free(), logs)

    @property
    def signature(self) -> str:
        """See `signature_of`."""
        return _signature(self.recipe, self.model, self.context)

    def executor(self, logs: Path, gpu: str = "") -> LocalExecutor:
        """Backends on this machine, none of them started yet.

        Args:
            gpu: The only GPU that they see, as CUDA_VISIBLE_DEVICES names it; those that this process sees if "".
        """
        seeds = self.inputs.seeds if self.recipe.seeds else ()
        trait, judge = self.inputs.trait, self.inputs.judge
        backends = open_backends(self.recipe, trait, judge, logs, self.keep_free, seeds=seeds, gpu=gpu, swap=self.swap)
        return LocalExecutor(backends, self.model, self.context, swap=self.swap, gpu=Gpu(gpu))


def signature_of(resolved: Resolved, context: int) -> str:
    """Equal for runs that can use the same resident trainer, exporter and generator."""
    return _signature(resolved.recipe, resolved.model, context)


def _signature(recipe: Recipe, model: str, context: int) -> str:
    hidden = list(hidden_from_trainer(recipe))
    return digest([model, recipe.trainer, recipe.generator, recipe.threads, recipe.vram, context, hidden])


class SharedExecutor(Protocol):
    """An executor that several runs share."""

    def lease(self) -> Executor:
        """One run's part in it."""
        ...

    def close(self) -> None:
        """End all that runs there."""
        ...

    def usable(self) -> bool:
        """Whether anything can be run there: a machine elsewhere may be gone."""
        ...


class Place(Protocol):
    """Where cells run: a GPU of this machine, its CPU, or a GPU elsewhere."""

    @property
    def name(self) -> str:
        """`gpu 0`, `cpu`, `node-3 gpu 1`."""
        ...

    @property
    def chains(self) -> int:
        """Cells that are run there side by side where trainer and generator share the memory."""
        ...

    def open(self, residents: Residents) -> SharedExecutor:
        """Backends there."""
        ...


@dataclass(frozen=True)
class LocalPlace:
    """A GPU of this machine, or its CPU.

    Attributes:
        gpu: As CUDA_VISIBLE_DEVICES names it; "" for whatever this process sees.
    """

    name: str
    gpu: str = ""
    chains: int = 1

    def open(self, residents: Residents) -> LocalExecutor:
        """Backends on it."""
        return residents.executor(residents.logs / self.name.replace(" ", ""), self.gpu)


# -- what is open


@dataclass
class Seat:
    """A place with what is open there.

    Attributes:
        opened: The signature of its residents and their executor; None before the first.
        running: Cells that are run there now.
    """

    place: Place
    opened: tuple[str, SharedExecutor] | None = None
    running: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def lease(self, residents: Residents) -> Executor:
        """A run's part in the backends that it needs; others that are open are closed."""
        with self._lock:
            if self.opened is None or self.opened[0] != residents.signature:
                self._close()
                self.opened = residents.signature, self.place.open(residents)
            return self.opened[1].lease()

    def usable(self) -> bool:
        """Whether the place is there, as far as it was tried."""
        opened = self.opened
        return opened is None or opened[1].usable()

    def interrupt(self) -> None:
        """End all that runs there; a later call starts it again."""
        if self.opened is not None:
            self.opened[1].close()

    def _close(self) -> None:
        self.interrupt()
        self.opened = None


class Bench:
    """All seats of a study, and the judge of all.

    Args:
        places: Where cells can run.
        logs: Folder of what the judges print, and of their ledger.
    """

    def __init__(self, places: Sequence[Place], logs: Path) -> None:
        self.seats = [Seat(place) for place in places]
        self.logs = logs
        self._judges: dict[str, LocalExecutor] = {}
        self._lock = threading.Lock()

    def executor(self, seat: Seat, session: Session, context: int) -> Executor:
        """What a run's steps are done through: what is open at a place, and the judge of all.

        Args:
            context: As of `Residents`.
        """
        residents = Residents.of(session, context, self.logs)
        return _Routed(seat.lease(residents), self._judge(residents))

    def _judge(self, residents: Residents) -> Lease:
        """The judge of all runs that ask for the same one."""
        inputs, recipe = residents.inputs, residents.recipe
        who: list[Json] = [asdict(inputs.judge), recipe.api_base, recipe.judge_batch, recipe.max_usd]
        if not kind_of(inputs.judge.name).remote:  # it is fitted on the trait's rows
            who += [inputs.trait.name, [asdict(seed) for seed in inputs.seeds] if recipe.seeds else []]
        with self._lock:
            signature = digest(who)
            if signature not in self._judges:
                self._judges[signature] = residents.executor(self.logs)
            return self._judges[signature].lease()

    def close(self) -> None:
        """End all that runs."""
        for seat in self.seats:
            seat.interrupt()
        for judge in list(self._judges.values()):
            judge.close()


class _Routed:
    """Device work goes to one executor, judging to another."""

    def __init__(self, device: Executor, judge: Executor) -> None:
        self._device = device
        self._judge = judge

    def run(self, task: Task) -> Outcome:
        """See `Executor.run`."""
        return self._judge.run(task) if task.folder.step.queue == "judge" else self._device.run(_without_judging(task))

    def prepare(self, task: Task) -> None:
        """See `Executor.prepare`."""
        self._device.prepare(_without_judging(task))

    def close(self) -> None:
        """Free what the run is in."""
        self._device.close()
        self._judge.close()


def _without_judging(task: Task) -> Task:
    """The same task for a place that judges nothing: its own judge is not to be started."""
    return replace(task, ahead=task.ahead - {"judge"})


# -- this machine


def local_places(machine: Machine, chains: int | None = None) -> list[LocalPlace]:
    """The GPUs of this machine that this process sees, or its CPU.

    Args:
        chains: Cells side by side at each; two on a GPU, so that one is trained while another is sampled, and one on a CPU, if
            None.
    """
    if not machine.gpu:
        return [LocalPlace("cpu", chains=chains or 1)]
    return [LocalPlace(f"gpu {number}", gpu, chains or 2) for number, gpu in enumerate(visible_gpus())]


# -- a cluster


@dataclass(frozen=True)
class Away:
    """Residents that are opened on another machine, all but the judge: it stays with the sweep, and so do its keys."""

    residents: Residents

    def __call__(self, logs: Path, threads: int) -> LocalExecutor:
        """See `Opener`."""
        given = self.residents
        recipe = given.recipe if given.recipe.threads != "auto" else given.recipe.model_copy(update={"threads": threads})
        return replace(given, recipe=recipe, inputs=replace(given.inputs, judge=FAKE_JUDGE)).executor(logs)


@dataclass(frozen=True)
class RayPlace:
    """A GPU of a cluster's node, or a node without one; a `Place` of a sweep.

    Attributes:
        chains: Cells side by side.
    """

    site: Site
    chains: int = 1

    @property
    def name(self) -> str:
        """`node-3 gpu 1`, `node-3`."""
        return self.site.name

    def open(self, residents: Residents) -> RayExecutor:
        """A worker there."""
        model = residents.model
        if Path(model).is_dir():  # the worker is in another folder
            residents = replace(residents, model=str(Path(model).absolute()))
        return RayExecutor(self.site, Away(residents), residents.logs / re.sub(r"[^\w-]", "", self.name))


def places_on(where: str, study: Path, machine: Machine, chains: int | None = None) -> tuple[Sequence[Place], tuple[str, ...]]:
    """The places that `--on` names, and a sentence on each that is left out.

    Args:
        where: `local`, `ray` or `ray:HOST:PORT`.
        study: The study's folder; made if missing where other machines have to see it.
        machine: This one.
        chains: Cells side by side at each; two on a GPU and one on a CPU if None.

    Raises:
        UserError: If that is not a place, or as `ray_places`.
    """
    kind, _, address = where.partition(":")
    if where == "local":
        return local_places(machine, chains), ()
    if kind != "ray":
        raise UserError(f"`--on {where}` is not a place to run on", hint="`--on local`, `--on ray` or `--on ray:HOST:PORT`")
    with disk_errors(study):
        study.mkdir(parents=True, exist_ok=True)
    return ray_places(address, study, machine, chains)


def ray_places(
    address: str, study: Path, machine: Machine, chains: int | None = None
) -> tuple[list[RayPlace], tuple[str, ...]]:
    """The places of a cluster that see a study's folder, which is there; and a sentence on each node that is left out.

    Raises:
        UserError: If Ray is not installed, there is no cluster, none of its nodes can be used, or they are other machines than
            the one that recipes are resolved on: this one.
    """
    found = sites(address, study)
    _refuse_others(found.found, machine)
    # two on a GPU: one cell is trained while another is sampled
    return [RayPlace(site, chains or (2 if site.gpu else 1)) for site in found.found], found.notes


def _refuse_others(found: Sequence[Site], here: Machine) -> None:
    """A recipe's "auto"s (trainer, precision, who shares the GPU) are decided where the sweep is started."""
    for node in {site.node.id: site for site in found}.values():
        there = node.ask(this_machine)
        if (bool(there.gpu), there.unsloth) != (bool(here.gpu), here.unsloth):
            raise UserError(
                f"{node.name} has {_words(there)}, and this machine {_words(here)}: recipes are resolved for one kind",
                hint="start the sweep on a node like those that are to do the work",
            )


def _words(machine: Machine) -> str:
    return f"{machine.gpu or 'no GPU'}{', with Unsloth' if machine.unsloth else ''}"
