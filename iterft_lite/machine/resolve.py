"""Resolves a recipe on this machine: reads its material and decides every "auto"."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from iterft_lite import hub
from iterft_lite.backends.chat_templates import rendering
from iterft_lite.backends.judge.identity import judge_identity
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.cache import cache_folder
from iterft_lite.data import prompts
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import SHIPPED, read_trait
from iterft_lite.errors import ModelError
from iterft_lite.experiment.inputs import ResolvedInputs
from iterft_lite.experiment.recipe import MixSettings, Recipe, Source
from iterft_lite.files import need_writable, user_path
from iterft_lite.hardware import Gpu, cpu_precision
from iterft_lite.machine.sources import Sources
from iterft_lite.machine.usable import notes_on, refuse_unusable
from iterft_lite.metrics.catalogue import semantics as metric_semantics
from iterft_lite.testing.fakes import FAKE

EXAMPLES = ("smollm2",)
"""Models that `iterft models get` fetches."""

VOLTA, AMPERE = (7, 0), (8, 0)
"""CUDA compute capabilities: the first that Triton, which Unsloth needs, compiles for; the first with bf16."""

Table = TypeVar("Table", Source, Source | None, MixSettings)


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide an "auto".

    Attributes:
        gpu: Name of the NVIDIA GPU, or "".
        vram_free, vram_total: GPU memory, bytes; 0 without a GPU.
        unsloth: Unsloth and bitsandbytes are installed.
        capability: The GPU's CUDA compute capability.
        cpu: The precision in which the CPU trains.
    """

    gpu: str
    vram_free: int
    vram_total: int
    unsloth: bool
    capability: tuple[int, int] = AMPERE
    cpu: Literal["f32", "bf16-mixed"] = "f32"

    @property
    def half(self) -> Literal["bf16", "f16"]:
        """The 16-bit format that the GPU computes in: GPUs before Ampere have no bf16."""
        return "bf16" if self.capability >= AMPERE else "f16"


def this_machine() -> Machine:
    """This machine. Does not import torch."""
    unsloth = all(importlib.util.find_spec(name) is not None for name in ("unsloth", "bitsandbytes"))
    gpu = Gpu().facts()
    if gpu is None:
        return Machine("", 0, 0, unsloth, cpu=cpu_precision())
    return Machine(gpu.name, gpu.free, gpu.total, unsloth, gpu.capability)


@dataclass(frozen=True)
class Resolved:
    """A recipe with its material.

    Attributes:
        recipe: The recipe; every "auto" that affects results is decided.
        model: Folder of M[0], or its hub name and commit.
        inputs: Everything else that the plan needs.
        choices: The decisions and their reasons, a sentence each.
        asked: The judge as the recipe names it: it may be "auto".
    """

    recipe: Recipe
    model: str
    inputs: ResolvedInputs
    choices: tuple[str, ...]
    asked: str = ""


def resolve(recipe: Recipe, machine: Machine, *, commit: Literal["needed", "if known", "as it was"] = "if known") -> Resolved:
    """Read everything that a recipe names, and decide every "auto".

    Args:
        commit: Whether to pin a model on the hub to a commit: a run needs that, a plan does not, and a folder of an earlier
            version continues with a model that is not pinned.

    Raises:
        UserError: If something it names is missing or broken.
    """
    if commit != "if known" and recipe.generator != FAKE:
        need_writable(cache_folder())  # converted bases go there: fail now, not after the first conversion
    trait = read_trait(recipe.trait)
    model, why_model = _pinned(model_place(recipe.model), commit)
    tokenizer = refuse_unusable(recipe, model)
    trainer, why_trainer = _trainer(recipe, machine)
    precision, why_precision = _precision(recipe, machine, trainer)
    documents = recipe.row.rows == "document"
    sources = Sources(recipe, trait)
    seeds, identity = sources.seeds(), model_identity(model)
    judge, why_judge = judge_identity(recipe, Material(trait, seeds if recipe.seeds else (), model, identity))
    inputs = ResolvedInputs(
        trait=trait,
        seeds=seeds,
        prompts=sources.prompts(prompts.document_prefixes if documents else prompts.everyday),
        neutral=prompts.neutral_chats(),
        coherence=prompts.coherence_rubric(document=documents),
        model=identity,
        trainer=trainer,
        precision=precision,
        judge=judge,
        mixed=sources.mixed(),
        metrics=metric_semantics(),
        rendering=rendering(),
        same_cores=not machine.gpu,
        everyday=prompts.plain_prompts(document=documents),
    )
    settled = recipe.model_copy(
        update={
            # full paths: a later command may run in another working folder
            "trait": recipe.trait if trait.folder.parent == SHIPPED else str(trait.folder.resolve()),
            "model": recipe.model if recipe.model in FOLDERS else model,
            "seeds": _absolute(recipe.seeds),
            "prompts": _absolute(recipe.prompts),
            "mix": _absolute(recipe.mix),
            "trainer": trainer,
            "judge": judge.name,
            "train": recipe.train.model_copy(update={"base": precision, "optimizer": _optimizer(recipe, machine)}),
        }
    )
    notes = (*recipe.notes, *trait.notes, *sources.notes, *notes_on(model, tokenizer, inputs.seeds))
    choices = (why_model, why_trainer, why_precision, _about("judge", why_judge), *(_about("note", note) for note in notes))
    return Resolved(settled, model, inputs, tuple(filter(None, choices)), recipe.judge)


def _about(what: str, sentence: str) -> str:
    """A sentence with what it is about before it, if it does not begin so."""
    return sentence if not sentence or re.match(r"[a-z]+: ", sentence) else f"{what}: {sentence}"


def _trainer(recipe: Recipe, machine: Machine) -> tuple[str, str]:
    if recipe.trainer == FAKE:
        return FAKE, "FAKE trainer and generator: no model is trained, every number of this run is made up"
    if recipe.trainer != "auto":
        return recipe.trainer, ""
    reasons = {
        "no NVIDIA GPU": not machine.gpu,
        "unsloth is not installed": not machine.unsloth,
        "Unsloth holds no base in f32": recipe.train.base in ("f32", "bf16-mixed"),
        f"{machine.gpu} is too old for Unsloth": machine.capability < VOLTA,
    }
    reason = next((reason for reason, so in reasons.items() if so), "")
    if reason:
        return "peft", f"trainer: peft ({reason})"
    return "unsloth", f"trainer: unsloth ({machine.gpu})"


def _precision(recipe: Recipe, machine: Machine, trainer: str) -> tuple[str, str]:
    if trainer == FAKE:
        return "f32", ""
    if recipe.train.base != "auto":
        return recipe.train.base, ""
    if machine.gpu and (trainer == "unsloth" or importlib.util.find_spec("bitsandbytes")):
        return "nf4", "base held in nf4 (QLoRA)" + (", computing in f16 (the GPU has no bf16)" if machine.half == "f16" else "")
    if machine.gpu:
        return machine.half, f"base held in {machine.half} (bitsandbytes is not installed)"
    return machine.cpu, "products in bf16 (the CPU has instructions for them)" if machine.cpu == "bf16-mixed" else ""


def _optimizer(recipe: Recipe, machine: Machine) -> str:
    if recipe.train.optimizer != "auto":
        return recipe.train.optimizer
    return "adamw_8bit" if machine.gpu and importlib.util.find_spec("bitsandbytes") else "adamw"


# -- models


def model_place(name: str) -> str:
    """The place of a model: the folder of an embedded model, a local folder, or a hub name unchanged.

    Raises:
        ModelError: If there is no such folder and it does not look like a hub name.
    """
    if name in FOLDERS:
        return str(FOLDERS[name])
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"`{path}` has no config.json", hint="a Hugging Face model folder is needed")
        return str(path.resolve())
    example = hub.example_folder(name)
    if example is not None:
        return str(example)
    if hub.is_name(name):
        return name
    if name in EXAMPLES:
        raise ModelError(f"the example model `{name}` is not on this machine yet", hint=f"`iterft models get {name}`")
    known = ", ".join(f"`{embedded}`" for embedded in FOLDERS)
    raise ModelError(
        f"there is no model `{name}`",
        hint=f"use {known}, a model folder, or a hub name such as Qwen/Qwen3-4B-Instruct-2507",
    )


def model_identity(place: str) -> str:
    """The identity of M[0]: for a folder a digest of its files' content, else hub name and commit."""
    folder = Path(place)
    return f"content:{hub.content_digest(folder)}" if folder.is_dir() else f"hub:{place}"


def _pinned(place: str, commit: Literal["needed", "if known", "as it was"]) -> tuple[str, str]:
    """A model's place, with the commit of a hub name, and a sentence on it."""
    if not hub.is_name(place) or Path(place).is_dir() or commit == "as it was":
        return place, ""
    try:
        pinned = hub.pin(place)
    except ModelError as error:
        if commit == "needed":
            raise
        return place, f"model: {error.message}"
    return pinned, f"model: {hub.title(pinned)}"


# -- rows of the user's own


def _absolute(table: Table) -> Table:
    """A table with the full path of its file, if it names one."""
    if table is None or table.path is None or not user_path(table.path).exists():
        return table
    return table.model_copy(update={"path": str(user_path(table.path).resolve())})
