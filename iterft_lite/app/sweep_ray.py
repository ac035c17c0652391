"""A sweep's cells on a Ray cluster: `--on ray[:HOST:PORT]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from iterft_lite.app.sweep import Residents
from iterft_lite.backends.judge.kinds import FAKE_JUDGE
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.ray_cluster import Site, sites
from iterft_lite.engine.ray_executor import RayExecutor
from iterft_lite.errors import UserError
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
    """A GPU of a cluster's node, or a node without one; a `Place` of a sweep."""

    site: Site

    @property
    def name(self) -> str:
        """`node-3 gpu 1`, `node-3`."""
        return self.site.name

    @property
    def chains(self) -> int:
        """Two on a GPU, so that one cell is trained while another is sampled."""
        return 2 if self.site.gpu else 1

    def open(self, residents: Residents) -> RayExecutor:
        """A worker there."""
        model = residents.model
        if Path(model).is_dir():  # the worker is in another folder
            residents = replace(residents, model=str(Path(model).absolute()))
        return RayExecutor(self.site, Away(residents), residents.logs / self.name.replace(" ", ""))


def ray_places(address: str, study: Path) -> tuple[list[RayPlace], tuple[str, ...]]:
    """The places of a cluster that see a study's folder, which is there; and a sentence on each node that is left out.

    Raises:
        UserError: If Ray is not installed, there is no cluster, none of its nodes can be used, or they are other machines than
            the one that recipes are resolved on: this one.
    """
    found = sites(address, study)
    _refuse_others(found.found, this_machine())
    return [RayPlace(site) for site in found.found], found.notes


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
