"""What a recipe comes to on this machine: its material read, its "auto"s decided."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from iterft_lite import hub
from iterft_lite.backends.judge.identity import judge_identity
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.data import prompts
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import SHIPPED, Chat, Document, Trait, parse_chat, read_trait
from iterft_lite.digests import digest
from iterft_lite.errors import ModelError, TraitError
from iterft_lite.experiment.inputs import ResolvedInputs
from iterft_lite.experiment.recipe import MixSettings, Recipe, Source
from iterft_lite.hardware import first_gpu
from iterft_lite.metrics.catalogue import semantics as metric_semantics
from iterft_lite.testing.fakes import FAKE

IDENTITY_SAMPLE = 1 << 20
"""Bytes at each end of a large weight file that go into a model's identity, beside its size."""

VOLTA, AMPERE = (7, 0), (8, 0)
"""CUDA compute capabilities: the first that Triton, which Unsloth needs, compiles for; the first with bf16."""

Table = TypeVar("Table", Source, Source | None, MixSettings)


@dataclass(frozen=True)
class Machine:
    """What decides the "auto"s.

    Attributes:
        gpu: Name of the NVIDIA GPU, or "".
        vram_free, vram_total: Bytes; 0 without a GPU.
        unsloth: Unsloth and bitsandbytes are installed.
        capability: The GPU's CUDA compute capability.
    """

    gpu: str
    vram_free: int
    vram_total: int
    unsloth: bool
    capability: tuple[int, int] = AMPERE

    @property
    def half(self) -> Literal["bf16", "f16"]:
        """The 16-bit format that the GPU computes in: those before Ampere know no bf16."""
        return "bf16" if self.capability >= AMPERE else "f16"


def this_machine() -> Machine:
    """Look at the machine, without importing torch."""
    unsloth = all(importlib.util.find_spec(name) is not None for name in ("unsloth", "bitsandbytes"))
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = first_gpu(pynvml)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Machine(str(name), int(memory.free), int(memory.total), unsloth, (int(major), int(minor)))
    except Exception:  # no package, no driver, no GPU: all the same here
        return Machine("", 0, 0, unsloth)


@dataclass(frozen=True)
class Resolved:
    """A recipe with its material.

    Attributes:
        recipe: The recipe with every "auto" decided that has a say in results.
        model: Folder that M[0] is loaded from, or hub name and commit.
        material: For the plan.
        choices: What was decided and why, a sentence each.
        asked: Who is to judge, as the recipe has it: it may be "auto".
    """

    recipe: Recipe
    model: str
    inputs: ResolvedInputs
    choices: tuple[str, ...]
    asked: str = ""


def resolve(recipe: Recipe, machine: Machine, *, commit: Literal["needed", "if known", "as it was"] = "if known") -> Resolved:
    """Read what a recipe names and decide what it leaves open.

    Args:
        commit: Whether a model on the hub has to be pinned to a commit: a run needs it, a plan can do without, and a folder
            of an earlier version goes on with a model that is not.

    Raises:
        UserError: If something it names is missing or broken.
    """
    trait = read_trait(recipe.trait)
    model, why_model = _pinned(model_place(recipe.model), commit)
    trainer, why_trainer = _trainer(recipe, machine)
    precision, why_precision = _precision(recipe, machine, trainer)
    seeds, identity = seed_rows(recipe, trait), model_identity(model)
    judge, why_judge = judge_identity(recipe, Material(trait, seeds if recipe.seeds else (), model, identity))
    documents = recipe.row.rows == "document"
    inputs = ResolvedInputs(
        trait=trait,
        seeds=seeds,
        prompts=_prompts(recipe),
        neutral=prompts.neutral_chats(),
        coherence=prompts.coherence_rubric(document=documents),
        model=identity,
        trainer=trainer,
        precision=precision,
        judge=judge,
        mixed=_mixed(recipe),
        metrics=metric_semantics(),
    )
    settled = recipe.model_copy(
        update={
            # what the user brings is found again from another working folder
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
    choices = tuple(filter(None, (*recipe.notes, why_model, why_trainer, why_precision, why_judge)))
    return Resolved(settled, model, inputs, choices, recipe.judge)


def _trainer(recipe: Recipe, machine: Machine) -> tuple[str, str]:
    if recipe.trainer == FAKE:
        return FAKE, "FAKE trainer and generator: no model is trained, every number of this run is made up"
    if recipe.trainer != "auto":
        return recipe.trainer, ""
    reasons = {
        "no NVIDIA GPU": not machine.gpu,
        "unsloth is not installed": not machine.unsloth,
        "Unsloth holds no base in f32": recipe.train.base == "f32",
        f"{machine.gpu} is too old for Unsloth": machine.capability < VOLTA,
    }
    reason = next((reason for reason, so in reasons.items() if so), "")
    if reason:
        return "peft", f"trainer: peft ({reason})"
    return "unsloth", f"trainer: unsloth ({machine.gpu}, unsloth is installed)"


def _precision(recipe: Recipe, machine: Machine, trainer: str) -> tuple[str, str]:
    if trainer == FAKE:
        return "f32", ""
    if recipe.train.base != "auto":
        return recipe.train.base, ""
    if machine.gpu and (trainer == "unsloth" or importlib.util.find_spec("bitsandbytes")):
        return "nf4", "base held in nf4 (QLoRA)" + (", computing in f16 (the GPU has no bf16)" if machine.half == "f16" else "")
    return (machine.half, f"base held in {machine.half} (bitsandbytes is not installed)") if machine.gpu else ("f32", "")


def _optimizer(recipe: Recipe, machine: Machine) -> str:
    if recipe.train.optimizer != "auto":
        return recipe.train.optimizer
    return "adamw_8bit" if machine.gpu and importlib.util.find_spec("bitsandbytes") else "adamw"


# -- models


def model_place(name: str) -> str:
    """Where a model is: an embedded one's folder, a local folder, or a hub name as it is.

    Raises:
        ModelError: If it is neither there nor looks like a hub name.
    """
    if name in FOLDERS:
        return str(FOLDERS[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"`{path}` has no config.json", hint="a Hugging Face model folder is needed")
        return str(path.resolve())
    if hub.is_name(name):
        return name
    known = ", ".join(f"`{embedded}`" for embedded in FOLDERS)
    raise ModelError(
        f"there is no model `{name}`",
        hint=f"use {known}, a model folder, or a hub name such as Qwen/Qwen3-4B-Instruct-2507",
    )


def model_identity(place: str) -> str:
    """What pins M[0]: for a folder a digest of its files (of large ones size and both ends); else hub name and commit."""
    folder = Path(place)
    if not folder.is_dir():
        return f"hub:{place}"
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"):
            parts.append([path.name, path.stat().st_size, _ends(path)])
    return f"files:{digest(parts)}"


def _ends(path: Path) -> str:
    seen = hashlib.sha256()
    with path.open("rb") as file:
        seen.update(file.read(IDENTITY_SAMPLE))
        file.seek(max(0, path.stat().st_size - IDENTITY_SAMPLE))
        seen.update(file.read(IDENTITY_SAMPLE))
    return seen.hexdigest()


def _pinned(place: str, commit: Literal["needed", "if known", "as it was"]) -> tuple[str, str]:
    """A model's place with its commit where it is on the hub, and which that is."""
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
    """A table whose file, where it names one, is named with its full path."""
    if table is None or table.path is None or not Path(table.path).expanduser().exists():
        return table
    return table.model_copy(update={"path": str(Path(table.path).expanduser().resolve())})


def seed_rows(recipe: Recipe, trait: Trait) -> tuple[Chat, ...] | tuple[Document, ...]:
    """A run's seed rows: the user's own, or the trait's.

    Raises:
        TraitError: If they cannot be read.
    """
    documents = recipe.row.rows == "document"
    if recipe.seeds is None:
        return trait.documents if documents else trait.chats
    rows = read_source(recipe.seeds)
    return _documents(rows, recipe.seeds) if documents else _chats(rows, recipe.seeds)


def _prompts(recipe: Recipe) -> tuple[str, ...]:
    if recipe.prompts is None:
        return prompts.document_prefixes() if recipe.row.rows == "document" else prompts.everyday()
    column = recipe.prompts.text if recipe.row.rows == "document" else recipe.prompts.prompt
    found = [_column(row, column, recipe.prompts, number) for number, row in enumerate(read_source(recipe.prompts), 1)]
    return tuple(dict.fromkeys(found))  # a prompt that is there twice would be asked in two cycles


def _mixed(recipe: Recipe) -> tuple[Chat, ...] | tuple[Document, ...]:
    mix = recipe.mix
    if mix.path is None:
        return ()
    source = Source(path=mix.path, split=mix.split, prompt=mix.prompt, reply=mix.reply, text=mix.text)
    rows = read_source(source)
    return _documents(rows, source) if recipe.row.rows == "document" else _chats(rows, source)


def _chats(rows: list[dict[str, Any]], source: Source) -> tuple[Chat, ...]:
    chats = []
    for number, row in enumerate(rows, 1):
        if "messages" in row:
            try:
                chats.append(parse_chat(row))
            except ValueError as error:
                raise TraitError(f"`{source.path}`, row {number}: {error}") from None
        else:
            chats.append(Chat(_column(row, source.prompt, source, number), _column(row, source.reply, source, number)))
    return tuple(chats)


def _documents(rows: list[dict[str, Any]], source: Source) -> tuple[Document, ...]:
    return tuple(
        Document(str(row.get("title") or ""), str(row.get("genre") or ""), _column(row, source.text, source, number))
        for number, row in enumerate(rows, 1)
    )


def _column(row: dict[str, Any], column: str, source: Source, number: int) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        there = ", ".join(f"`{name}`" for name in row)
        raise TraitError(
            f"`{source.path}`, row {number}: column `{column}` is missing or empty (there: {there})",
            hint="name the columns in the recipe: `prompt`, `reply`, `text`",
        )
    return value


def read_source(source: Source) -> list[dict[str, Any]]:
    """The rows of a file (JSONL, JSON, Parquet, CSV), or of a dataset on the hub.

    Raises:
        TraitError: If it cannot be read.
    """
    path = Path(source.path).expanduser()
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    if path.suffix == ".jsonl" and path.is_file():
        return list(_jsonl(path))
    if path.suffix in kinds and not path.exists():
        raise TraitError(f"there is no file `{source.path}`")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # heavy: only where a recipe brings data of its own

    try:
        if path.is_file() and path.suffix in kinds:
            loaded = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        elif path.exists() or source.path.startswith((".", "/", "~")):
            raise TraitError(f"`{source.path}` is not a {', '.join(kinds)} file")
        else:
            loaded = datasets.load_dataset(source.path, split=source.split)
    except TraitError:
        raise
    except Exception as error:  # the library raises whatever its parts do
        raise TraitError(f"dataset `{source.path}` cannot be read: {error}") from None
    return [dict(row) for row in loaded]


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TraitError(f"`{path}`, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise TraitError(f"`{path}`, line {number}: not an object")
            yield row
