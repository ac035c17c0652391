"""Whether a recipe's model can be used, found out while planning: before anything is loaded, converted or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from iterft_lite.backends.templates import STAND_IN, TrainingTokenizer
from iterft_lite.data.traits import Chat, Document
from iterft_lite.errors import ModelError
from iterft_lite.experiment.contexts import system_text
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.rows import Message
from iterft_lite.gguf.families import architecture_of, families_of, read_config, refuse_problems

CONTEXT_HINT = 'leave this context out: `evaluate.system = ["none"]` asks without a system message'

PROMPT_ROOM = 256
"""Tokens of a prompt with its template, about."""


def refuse_unusable(recipe: Recipe, place: str) -> TrainingTokenizer | None:
    """Refuse a model that is on this machine, with every reason that can be seen without loading it.

    Args:
        recipe: Says how long rows are, and whether replies are trained.
        place: Folder or hub name of M[0].

    Returns:
        Its tokenizer; None where the model is not on this machine yet.

    Raises:
        ModelError: With the reasons.
    """
    folder = Path(place)
    if not folder.is_dir():
        return None
    longest = max(recipe.train.max_length, *(each.max_tokens + PROMPT_ROOM for each in (recipe.sample, recipe.evaluate)))
    refuse_problems(folder, tokens=longest)
    known = families_of(architecture_of(read_config(folder)))
    if recipe.export == "adapter" and known and all(family.tier == "merged only" for family in known):
        raise ModelError(
            f"`{place}`: llama.cpp lays no adapter over part of this family ({known[0].name})", hint='`export = "merged"`'
        )
    tokenizer = TrainingTokenizer(place)
    if recipe.row.loss != "all":
        _ = tokenizer.turn  # refuses what no reply could be trained with
        _refuse_contexts(tokenizer, place, recipe.evaluate.system)
    return tokenizer


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
    known = families_of(architecture_of(read_config(Path(place))))
    if len(known) == 1 and "adapter" in known[0].note:
        yield f"model: {known[0].note}"
    held = [found for row in rows if (found := tokenizer.holds_markup(_texts(row)))]
    if held:
        yield f"seeds: {len(held)} of {len(rows)} rows have `{held[0]}` or the like in their text: taken as plain characters"


def _texts(row: Chat | Document) -> Iterator[str]:
    values = (getattr(row, field.name) for field in fields(row))
    yield from (value for value in values if isinstance(value, str))
