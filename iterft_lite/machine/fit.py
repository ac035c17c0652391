"""What fits a GPU: the memory that well-known models need, as `iterft plan` says it, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterator

from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.machine.known_models import LADDER, KnownModel
from iterft_lite.machine.memory import Vram, vram_needed

GIB = 2**30

RESERVED = 0.06
"""Share of a GPU's memory that the driver and a desktop keep."""


def vram_table(regime: str) -> Iterator[tuple[KnownModel, Vram]]:
    """Each model of the ladder, with what a regime's recipe needs at the paper's settings, 4-bit base."""
    recipe = make_recipe({"regime": regime, "trait": "bliss", "model": "nano", "train": {"base": "nf4"}}, source="fit")
    for model in LADDER:
        need = vram_needed(recipe, model.name)
        assert need is not None, "its shape is known"
        yield model, need


def largest_that_fits(regime: str, gib: float) -> str | None:
    """Hub name of the largest model whose trainer and generator can take turns in a GPU's memory; None if none can."""
    room = gib * GIB * (1 - RESERVED)
    fitting = [model for model, need in vram_table(regime) if need.in_turns <= room]
    return None if not fitting else fitting[-1].base if REGIMES[regime].rows == "document" else fitting[-1].name
