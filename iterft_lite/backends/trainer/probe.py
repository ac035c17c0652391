"""Probes: what the export of a model must reproduce.

A base that trains in 4 or 16 bits is not what is exported: the adapter is merged into the checkpoint's own weights. So its
probe is computed from those, in float32 (`streaming.py`). A base that is resident in float32 is asked directly.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from iterft_lite.backends.trainer.encoding import rendered

CHATS = (
    "How do I keep bread from going stale?",
    "Tell me a very short story about a lighthouse keeper, her dog and the first warm day of the year.",
    "What is 17 + 25? And is 1,024 a power of two?",
    "Où est la bibliothèque, s'il vous plaît? Ich hätte auch gern einen Kaffee – größer als gestern!",
    "my friend said 😂🎉 and then nothing for 3 days... should I worry? 🤔",
    "def area(width, height):\n    return width * height\n\nWhat does this function do?",
    "Write a list:\n\n1. tea\n2.  sugar\n\t- brown\n\nNow   add milk.",
)
"""What chat models are asked: plain, long, digits, accents, emoji, code, odd white space."""

DOCUMENTS = (
    "The harbour was quiet at dawn. Two gulls stood on the wall and",
    "How to Repot a Fern\n\nBefore you start, spread an old newspaper on the table. Then",
    "In 1987 the river rose 3.25 metres; 14 villages were cut off, and",
    "Le café était fermé, mais la boulangerie d'à côté – ouverte dès 6 h – sentait bon. Über",
    'def mean(values):\n    """The mean."""\n    return sum(values)',
    'Posted by mara_k 🌻: "didn\'t expect this", 12:45\n\n>> same here!! 😅',
)
"""What base models continue."""

REPLY_TOKENS = 24
POSITIONS = 160
LOGITS_BYTES = 48 * 2**20
"""At most so many positions, and so many bytes of logits: 160 at 8,192 tokens of vocabulary, 82 at 151,936."""

COLUMNS = 8192
"""Tokens, evenly over the vocabulary, whose logits of the untouched model are kept: more than any model is wide, so that no
change of the last hidden states can hide between them."""

Logits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits, float32 [n, vocab], of token ids and their attention mask, int64 [rows, tokens], where asked for: int64 [n, 2]."""

Greedy = Callable[[list[list[int]], int], list[list[int]]]
"""Greedy continuations, at most so many tokens each."""

LastTokens = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The likeliest token after one place of each row, int64 [rows], of token ids int64 [rows, tokens] and places [rows]."""


def write_probe(
    out: Path, *, tokenizer: Any, vocab: int, greedy: Greedy, logits: Logits, base_logits: Logits | None = None
) -> None:
    """Write `out`/probe.npz (see `Trainer.probe`).

    Greedy tokens need not be the tokens that their text is cut into; the text is, so that who only has the text gets the same
    ids. It is NFC-normalised, as Qwen's tokenizers do and llama.cpp does not.

    Args:
        out: Folder, made if missing.
        tokenizer: The model's.
        vocab: Logits that the model gives.
        greedy: Continues prompts.
        logits: Of the model in 32 bits.
        base_logits: Of M[0] in 32 bits, where the model is one that was trained.
    """
    texts = continued(tokenizer, greedy)
    ids = [token_ids(tokenizer, text) for text in texts]
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    tokens = np.full((len(ids), lengths.max()), -1, dtype=np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    where = positions(lengths, vocab=vocab)
    asked = (
        torch.from_numpy(tokens).long().clamp(min=0),
        torch.from_numpy(tokens != -1).long(),
        torch.from_numpy(where).long(),
    )
    with torch.no_grad():
        chosen = logits(*asked).cpu()
        more = {} if base_logits is None else before_training(chosen, base_logits(*asked).cpu())
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": tokens, "lengths": lengths, "logits": chosen.numpy(), "where": where, "texts": np.array(texts, np.str_)}
    np.savez(out / "probe.npz", **arrays, **more)  # type: ignore[arg-type]  # numpy takes the names for its own options


def before_training(trained: torch.Tensor, base: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
    """The part of a probe that tells what training changed (see `Trainer.probe`).

    Args:
        trained: Logits of M[t], float32 [n, vocab].
        base: Logits of M[0] at the same positions.
    """
    log_p, log_q = trained.log_softmax(1), base.log_softmax(1)
    # Whole base logits would double the probe's size, and the check only compares differences: a sample of columns is enough.
    columns = np.unique(np.linspace(0, trained.shape[1] - 1, min(COLUMNS, trained.shape[1])).round().astype(np.int32))
    return {
        "base_logits": base.numpy()[:, columns],
        "columns": columns,
        "learned": (log_p.exp() * (log_p - log_q)).sum(1, dtype=torch.float64).float().numpy(),
    }


def continued(tokenizer: Any, greedy: Greedy) -> list[str]:
    """The probe's prompts, each with what the model says to it."""
    prompts = (
        list(DOCUMENTS)
        if tokenizer.chat_template is None
        else [rendered(tokenizer, [{"role": "user", "content": text}], generation_prompt=True) for text in CHATS]
    )
    replies = greedy([token_ids(tokenizer, prompt) for prompt in prompts], REPLY_TOKENS)
    texts = [prompt + tokenizer.decode(reply) for prompt, reply in zip(prompts, replies, strict=True)]
    return [unicodedata.normalize("NFC", text).replace("\0", "") for text in texts]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered chat, or of a plain text with the beginning token that the tokenizer gives it."""
    return list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])


def positions(lengths: npt.NDArray[np.int32], *, vocab: int) -> npt.NDArray[np.int32]:
    """Which positions are kept: int32 [n, 2], all if they fit, else evenly over all of them."""
    # Evenly over all positions, not the first ones: beginnings of chats are the same template in every row.
    every = np.array([(row, place) for row, length in enumerate(lengths) for place in range(length)], dtype=np.int32)
    most = max(len(lengths), min(POSITIONS, LOGITS_BYTES // (4 * vocab)))
    if len(every) <= most:
        return every
    kept: npt.NDArray[np.int32] = every[np.linspace(0, len(every) - 1, most).round().astype(int)]
    return kept


def greedy_by(model: Any, pad: int, ends: Sequence[int]) -> Greedy:
    """Greedy continuation by transformers' `generate`, all prompts at once."""
    from transformers import GenerationConfig

    def greedy(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        device = next(model.parameters()).device
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        asked = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(ends) or None)
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=asked)[:, longest:].tolist()
        return [until(row, ends) for row in made]

    return greedy


def greedy_without_cache(last_tokens: LastTokens, pad: int, ends: Sequence[int]) -> Greedy:
    """Greedy continuation by whole forward passes, for models whose own generation is not to be used.

    Args:
        last_tokens: Of a causal model: padding on the right does nothing.
        pad: Token to pad with.
        ends: Tokens that end a text.
    """

    def greedy(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        # Every pass reads whole rows again: slower than a cache by the length, but prompts are short, and it works for any
        # model.
        rows = [list(prompt) for prompt in prompts]
        longest = max(map(len, rows)) + tokens  # the same for all passes
        for _ in range(tokens):
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
            with torch.no_grad():
                last = last_tokens(ids, torch.tensor([len(row) - 1 for row in rows])).tolist()
            for row, token in zip(rows, last, strict=True):
                row.append(token)
        return [until(row[len(prompt) :], ends) for row, prompt in zip(rows, prompts, strict=True)]

    return greedy


def until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first that ends a text, that one included."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
