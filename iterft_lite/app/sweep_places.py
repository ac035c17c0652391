"""Where a sweep's cells run: on this machine, or on a Ray cluster (`--on ray[:HOST:PORT]`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from iterft_lite.app.sweep import Place, Residents, local_places
from iterft_lite.backends.judge.kinds import FAKE_JUDGE
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.ray_cluster import Site, sites
from iterft_lite.engine.ray_executor import RayExecutor
from iterft_lite.errors import UserError
from iterft_lite.files import disk_errors
from iterft_lite.machine.resolve import Machine, this_machine


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
        UserError: If that is no place, or as `ray_places`.
    """
    kind, _, address = where.partition(":")
    if where == "local":
        return local_places(machine, chains), ()
    if kind != "ray":
        raise UserError(f"`--on {where}` is no place to run on", hint="`--on local`, `--on ray` or `--on ray:HOST:PORT`")
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
