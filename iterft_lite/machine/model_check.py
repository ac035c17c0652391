"""Examines a model before a run, for `iterft doctor --model`.

Reads config.json, the headers of the weight files and the tokenizer; loads no weights. The first export checks later that the
GGUF reads text as training does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from iterft_lite import hub
from iterft_lite.backends.templates import STAND_IN, TrainingTokenizer
from iterft_lite.errors import ModelError
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.rows import Message
from iterft_lite.gguf.families import (
    architecture_of,
    families_of,
    find_problems,
    read_config,
    sliding_window,
)
from iterft_lite.gguf.weights import Weight, read_weights
from iterft_lite.machine.memory import vram_needed
from iterft_lite.machine.resolve import model_place
from iterft_lite.machine.usable import bare_layers
from iterft_lite.programs import run_module

PROBE = (
    "  leading blanks, 3.14 and 1,024\n\n\ttabs\r\nit's 2026; WE'LL SEE naïve café 日本語 Ещё 😂🎉 def f(x):\n    return x**2\n"
    "\n\n\n<s>[INST] don't </s>"
)
"""A text on which different pre-tokenizers differ."""


@dataclass(frozen=True)
class Fact:
    """One line about a model.

    Attributes:
        name: The subject.
        text: The finding.
        mark: "ok", "note", or "no" for a reason why the model cannot be used.
        remedy: What to do, or "".
    """

    name: str
    text: str
    mark: Literal["ok", "note", "no"] = "ok"
    remedy: str = ""


def model_folder(name: str) -> Path:
    """The folder of a model as recipes name it. Fetches the small files of a model on the hub.

    Raises:
        ModelError: If there is no such model.
    """
    place = model_place(name)
    if Path(place).is_dir():
        return Path(place)
    return hub.fetch(place, ("*.json", "*.jinja", "*.model", "*.txt"))


def examine_model(name: str, recipe: Recipe | None = None) -> list[Fact]:
    """All findings about a model.

    Args:
        name: As in a recipe.
        recipe: Estimate the GPU memory for this recipe; None for no estimate.

    Raises:
        ModelError: If there is no such model.
    """
    folder = model_folder(name)
    config = read_config(folder)
    weights = read_weights(folder)
    weights_are: Literal["here", "on the hub"] = "on the hub" if hub.is_name(model_place(name)) else "here"
    return [
        *_architecture(config),
        *_weights(config, weights),
        *_adapters(weights),
        *_tokenizer(folder, config),
        *_room(folder, recipe),
        *(Fact("cannot be used", problem.text, "no", problem.remedy) for problem in find_problems(folder, weights=weights_are)),
    ]


def _architecture(config: dict[str, Any]) -> Iterator[Fact]:
    architecture = architecture_of(config)
    known = families_of(architecture)
    if not known:
        text = f"{architecture or 'none named'}: never tried; the check of the first export tells"
        yield Fact("architecture", text, "note", "docs/models.md lists the families that are proven")
    for tier in dict.fromkeys(family.tier for family in known):
        names = [f"{family.name} ({family.note})" if family.note else family.name for family in known if family.tier == tier]
        yield Fact("architecture", f"{architecture}, {tier}: {', '.join(names)}", "no" if tier == "refused" else "ok")
    window = sliding_window(config)
    if window:
        kept = all(family.window == "kept" for family in known)
        words = f"{window} tokens, " + ("kept in GGUF" if kept else "ignored by llama.cpp: rows have to stay shorter")
        yield Fact("sliding window", words, "ok" if kept else "note")


def _weights(config: dict[str, Any], weights: dict[str, Weight]) -> Iterator[Fact]:
    if not weights:
        return
    count = sum(prod(weight.shape) for weight in weights.values())
    kinds = sorted({weight.kind for weight in weights.values()})
    tied = bool(config.get("tie_word_embeddings")) or not any("lm_head" in name or "embed_out" in name for name in weights)
    yield Fact("weights", f"{count / 1e6:,.0f} M, stored in {', '.join(kinds)}")
    yield Fact("embedding", "tied: it is the output matrix too; no adapter is laid on it" if tied else "not tied to the output")


def _adapters(weights: dict[str, Weight]) -> Iterator[Fact]:
    """Which matrices of the blocks adapters are laid on."""
    laid, bare, share = bare_layers(weights)
    if laid:
        yield Fact("LoRA", f"on {', '.join(laid)}")
    if bare:
        yield Fact("no LoRA", f"{', '.join(bare)}: {share:.0%} of the blocks' weights are not trained", "note")


def _tokenizer(folder: Path, config: dict[str, Any]) -> Iterator[Fact]:
    try:
        tokenizer = TrainingTokenizer(str(folder))
    except ModelError as error:
        yield Fact("tokenizer", error.message, "no", error.hint or "")
        return
    yield _readers(folder, tokenizer)
    vocab = len(tokenizer.library.get_vocab())
    if vocab > int(config.get("vocab_size") or vocab):
        text = f"{vocab} tokens, the embedding has {config['vocab_size']}"
        yield Fact("tokenizer", text, "no", "it is another model's: give this one's own")
    if not tokenizer.chat:
        yield Fact("chat template", 'none: a base model, for `regime = "sdf"`', "note")
        return
    try:
        yield from _template(tokenizer)
    except ModelError as error:
        yield Fact("chat template", error.message, "no", error.hint or "")


def _template(tokenizer: TrainingTokenizer) -> Iterator[Fact]:
    turn, ids = tokenizer.turn, tokenizer.chat_ids([Message("user", STAND_IN)])
    injected = tokenizer.default_system()
    if injected:
        yield Fact("system text", f"the template adds of its own: {injected[:200]!r}", "note")
    else:
        yield Fact("system text", "none of the template's own")
    yield Fact("thinking", _thinking(tokenizer))
    if turn.opening:
        yield Fact("reply", f"asked with the template's own {turn.opening!r} before it", "note")
    named = {index: tokenizer.library.id_to_token(index) for index in tokenizer.ends}
    yield Fact("end", f"trained: {turn.end}; stopped on: {', '.join(str(text) for text in named.values())}")
    begins = next((place for place, token in enumerate(ids) if token != tokenizer.bos), len(ids))
    yield Fact("beginning token", f"{begins or 'none'} before a rendered chat", "note" if begins > 1 else "ok")


def _thinking(tokenizer: TrainingTokenizer) -> str:
    chat = [Message("user", STAND_IN)]
    off, on = tokenizer.render(chat), tokenizer.render(chat, enable_thinking=True)
    if off == on:
        return "the template has no switch for it"
    return f"switched off: a chat ends with {off[-24:]!r} before the reply"


def _readers(folder: Path, tokenizer: TrainingTokenizer) -> Fact:
    """Whether transformers' class reads text as tokenizer.json says."""
    done = run_module("iterft_lite.gguf.read_as_transformers", [str(folder), PROBE])
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return Fact("tokenizer", "tokenizer.json; the class that tokenizer_config.json names cannot be loaded", "note")
    name, theirs = json.loads(lines[-1])
    ours = tokenizer.ids(PROBE)
    if theirs == ours:
        return Fact("tokenizer", f"tokenizer.json and transformers' {name} agree")
    one, other = next(pair for pair in zip([*ours, None], [*theirs, None], strict=False) if pair[0] != pair[1])
    texts = " and ".join(repr("" if index is None else tokenizer.library.id_to_token(index)) for index in (one, other))
    return Fact(
        "tokenizer",
        f"tokenizer.json is what trains and generates; transformers' {name} would read text otherwise ({texts} in a probe)",
        "note",
    )


def _room(folder: Path, recipe: Recipe | None) -> Iterator[Fact]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size:
        yield Fact("disk", f"{size / 1e9:.2f} GB here; its GGUF takes as much in the cache, once")
    need = vram_needed(recipe, str(folder)) if recipe else None
    if need is not None:
        yield Fact("VRAM", f"on a GPU about {need.together / 2**30:.1f} GiB, {need.in_turns / 2**30:.1f} in turns")
