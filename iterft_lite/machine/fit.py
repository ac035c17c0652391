"""What fits: the GPU memory that well-known models need, and how long work takes where nothing was measured.

The memory is `estimate.vram_needed`'s, which `iterft plan` prints: here for shapes that need not be downloaded first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.machine.estimate import Shape, Vram, shape_of, time_needed, vram_needed
from iterft_lite.machine.forecast import sentence
from iterft_lite.machine.known_models import LADDER, KnownModel
from iterft_lite.machine.resolve import Resolved, this_machine
from iterft_lite.machine.timing import read_table

GIB = 2**30

RESERVED = 0.06
"""Share of a GPU's memory that the driver and a desktop keep."""

CPU_FLOPS = 3e10
"""Floating-point operations a second and core: f32 products took 46 to 86 GFLOP/s on two cores (docs/benchmarks.md)."""

LARGE = 100_000_000
"""Weights of a model that is slow on a CPU."""

PASSES = {"write": 2, "train": 6}
"""Operations a weight and token: forward alone, and with the backward pass."""


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
    return None if not fitting else fitting[-1].base if regime == "sdf" else fitting[-1].name


def rough_cpu_seconds(plan: Plan, shape: Shape, cores: int) -> float:
    """How long a plan takes on a CPU by the number of operations alone, for models that nothing was measured of.

    Rows are taken to be half as long as they may be.
    """
    recipe, parameters = plan.recipe, shape.linear + shape.embedding
    row = recipe.sample.max_tokens / 2
    answers = recipe.evaluate.questions * recipe.evaluate.samples * recipe.evaluate.max_tokens / 2 * (recipe.cycles + 2)
    written = answers + recipe.cycles * recipe.rows * row
    trained = (recipe.seed_rows + recipe.cycles * recipe.rows) * recipe.train.epochs * row
    operations = parameters * (PASSES["write"] * written + PASSES["train"] * trained)
    return operations / (CPU_FLOPS * cores)


def time_sentence(plan: Plan, resolved: Resolved) -> str:
    """How long a plan will take here: from what was measured, else for a large model on a CPU by the operations alone."""
    found, shape = time_needed(plan, resolved, read_table()), shape_of(resolved.model)
    known = not found.missing and all(ground.nearness != "scaled" for ground in found.grounds.values())
    if this_machine().gpu or shape is None or shape.linear < LARGE or known:
        return sentence(found)
    seconds = rough_cpu_seconds(plan, shape, os.cpu_count() or 1)
    return f'on this CPU {rough(seconds)} by the number of operations alone: take a GPU, or `model = "nano"`'


def rough(seconds: float) -> str:
    """`hours`, `about 12 hours`, `about 3 days`: for what is known within a factor of two or so."""
    hours = seconds / 3600
    return f"about {hours / 24:.0f} days" if hours > 36 else f"about {hours:.0f} hours" if hours > 1.5 else "an hour or so"
