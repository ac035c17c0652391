"""Versions of this program and of the libraries that decide results."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping

from iterft_lite import __version__
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import LLAMA, VERBS

TRAINERS: Mapping[str, tuple[str, ...]] = {
    "peft": ("torch", "transformers", "peft"),
    "trl": ("torch", "transformers", "trl", "peft"),
    "unsloth": ("torch", "transformers", "peft", "unsloth"),
    "fake": (),
}
"""What each trainer computes with; bitsandbytes comes in where the base or the optimiser has few bits."""

REPORTED = (
    *("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes"),
    *LLAMA,
    *("scikit-learn", "litellm"),
)
"""Packages whose versions belong to a run."""


def versions(names: Iterable[str] = REPORTED) -> dict[str, str]:
    """Versions of this program, Python, and the named packages as far as they are installed."""
    found = {"iterft_lite": __version__, "python": platform.python_version()}
    found |= {name: version for name in names if (version := _installed(name))}
    return found


@functools.cache
def _installed(package: str) -> str:
    """The version of a package; "" where it is not installed. A process keeps those it began with."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def libraries(step: Step, trained_by: Recipe | None = None) -> tuple[str, ...]:
    """Packages that a step's result depends on, besides this one.

    Args:
        trained_by: The recipe as resolved, where the step is one of a trainer.
    """
    if step.verb in ("load_base", "train") and trained_by:
        train = trained_by.train
        bits = "nf4" in train.base or "8bit" in train.optimizer
        return (*TRAINERS[trained_by.trainer], *(("bitsandbytes",) if bits else ()))
    if step.verb == "judge":
        judge = step.params["judge"]
        local = str(judge["name"]).startswith("local:")
        return ("scikit-learn", "numpy") if judge["kind"] == "embedded" else LLAMA if local else ("litellm",)
    return VERBS[step.verb].libraries
