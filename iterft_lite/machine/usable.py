"""Whether a recipe's model can be used, found out while planning: before anything is loaded, converted or trained."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from math import prod
from pathlib import Path

from iterft_lite import hub
from iterft_lite.backends.templates import STAND_IN, TrainingTokenizer
from iterft_lite.data.traits import Chat, Document
from iterft_lite.errors import ModelError
from iterft_lite.experiment.contexts import system_text
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.rows import Message
from iterft_lite.files import file_mark
from iterft_lite.gguf.families import architecture_of, families_of, read_config, refuse_problems
from iterft_lite.gguf.weights import Weight, is_whole, read_weights

CONTEXT_HINT = 'leave this context out: `evaluate.system = ["none"]` asks without a system message'

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What adapters are laid on where an architecture has all of them."""

PROMPT_ROOM = 256
"""Tokens of a prompt with its template, about."""


def refuse_unusable(recipe: Recipe, place: str) -> TrainingTokenizer | None:
    """Refuse a model whose files are on this machine, with every reason that can be seen without loading it.

    Args:
        recipe: Says how long rows are, and whether replies are trained.
        place: Folder or hub name of M[0].

    Returns:
        Its tokenizer; None where that is not on this machine yet.

    Raises:
        ModelError: With the reasons.
    """
    folder = files_here(place)
    if folder is None:
        return None
    longest = max(recipe.train.max_length, *(each.max_tokens + PROMPT_ROOM for each in (recipe.sample, recipe.evaluate)))
    refuse_problems(folder, tokens=longest, weights="here" if Path(place).is_dir() else "on the hub")
    known = families_of(architecture_of(read_config(folder)))
    if recipe.export == "adapter" and known and all(family.tier == "merged only" for family in known):
        raise ModelError(
            f"`{place}`: llama.cpp lays no adapter over part of this family ({known[0].name})", hint='`export = "merged"`'
        )
    if not Path(place).is_dir() and not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = _tokenizer(folder, tuple(file_mark(path) for path in sorted(folder.iterdir()) if path.is_file()))
    if recipe.row.loss != "all":
        _ = tokenizer.turn  # refuses what no reply could be trained with
        _refuse_contexts(tokenizer, place, recipe.evaluate.system)
    return tokenizer


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path, _: tuple[str, ...]) -> TrainingTokenizer:
    """A model's tokenizer. That of a large vocabulary takes half a second to read, and all cells of a study have the same one.

    Args:
        _: Marks of its files (`file_mark`).
    """
    return TrainingTokenizer(str(folder))


def files_here(place: str) -> Path | None:
    """Where the files of a model are on this machine: its folder, or the hub's cache, which may have some; else None."""
    if Path(place).is_dir():
        return Path(place)
    cached = hub.cached_file(place, "config.json")
    return cached.parent if cached else None


def bare_layers(weights: Mapping[str, Weight]) -> tuple[list[str], list[str], float]:
    """Which matrices of the blocks adapters are laid on and which get none, by the names in the files; the latter's share.

    `backends/trainer/lora.py` decides it of the loaded model, and a training's results say what came of it.
    """
    kinds: dict[str, int] = {}
    for name, weight in weights.items():
        if len(weight.shape) > 1 and any(part.isdigit() for part in name.split(".")):
            expert = ".experts." in name or name.endswith(("experts.gate_up_proj", "experts.down_proj"))
            kind = "experts" if expert else name.removesuffix(".weight").rsplit(".", 1)[-1]
            kinds[kind] = kinds.get(kind, 0) + prod(weight.shape)
    chosen = [kind for kind in kinds if kind in PROJECTIONS] if set(PROJECTIONS) <= set(kinds) else [*kinds]
    bare = [kind for kind in kinds if kind not in chosen or kind in ("experts", "conv1d", "conv")]
    share = sum(kinds[kind] for kind in bare) / sum(kinds.values()) if bare else 0.0
    return [kind for kind in chosen if kind not in bare], bare, share


def _refuse_contexts(tokenizer: TrainingTokenizer, place: str, contexts: Sequence[str]) -> None:
    """Refuse evaluation contexts that the chat template takes no notice of.

    Raises:
        ModelError: If it refuses a system message, or leaves it out.
    """
    plain = (Message("user", STAND_IN),)
    for context in contexts:
        system = system_text(context)
        if system is None:
            continue
        try:
            seen = tokenizer.chat_ids((Message("system", system), *plain)) != tokenizer.chat_ids(plain)
        except ModelError as error:
            raise ModelError(f"`evaluate.system` has {context!r}: {error.message}", hint=CONTEXT_HINT) from None
        if not seen:
            raise ModelError(
                f"`evaluate.system` has {context!r}, but the chat template of `{place}` renders a chat with this system "
                "message as one without",
                hint=CONTEXT_HINT,
            )


def notes_on(place: str, tokenizer: TrainingTokenizer | None, rows: Sequence[Chat] | Sequence[Document]) -> Iterator[str]:
    """What a plan says of a model: what gets no adapter, text of the template's own, rows that hold special tokens.

    Args:
        place: Folder or hub name of M[0].
        tokenizer: Of the model, where it is on this machine.
        rows: The seed rows.
    """
    if tokenizer is None:
        return
    folder = files_here(place) or Path(place)
    known = families_of(architecture_of(read_config(folder)))
    bare, share = bare_layers(read_weights(folder))[1:] if is_whole(folder) else ([], 0.0)
    if bare:
        yield f"adapter: none on {', '.join(bare)}: {share:.0%} of the blocks' weights are not trained"
    elif len(known) == 1 and "adapter" in known[0].note:
        yield f"model: {known[0].note}"
    held = [found for row in rows if (found := tokenizer.holds_markup(_texts(row)))]
    if held:
        yield f"seeds: {len(held)} of {len(rows)} rows have `{held[0]}` or the like in their text: taken as plain characters"


def _texts(row: Chat | Document) -> Iterator[str]:
    values = (getattr(row, field.name) for field in fields(row))
    yield from (value for value in values if isinstance(value, str))
