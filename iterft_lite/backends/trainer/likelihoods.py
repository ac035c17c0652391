"""Log-probabilities of given texts under M[0] as it is stored, or with an adapter on it, in the trainer's process.

The weights stream through (`streaming.py`), so the more texts one pass reads the better: at 4 B parameters and a few thousand
tokens computing them takes as long as the weights' way to the GPU. Texts of about one length are read side by side, padded
behind their ends, where a causal model does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from iterft_lite.backends.passages import Text
from iterft_lite.backends.trainer.logprobs import Head, token_logprobs

MOST = 32_768
"""Tokens of a pass: beyond, the weights' way is hidden behind the arithmetic."""

LEAST = 2048
"""Tokens of a pass, where memory is short."""

ON_CPU = 4096
"""Tokens of a pass on a CPU: with half as many a small model's products take a fifth longer, with twice as many no less."""

FREE_SHARE = 0.4
"""Of the free GPU memory that the activations of a pass may take."""


class Read(Protocol):
    """A model that texts are read with: one that streams (`streaming.Streamed`), or a resident one (`decoder.Reading`)."""

    def states(self, ids: torch.Tensor, lengths: Sequence[int], /) -> torch.Tensor:
        """Last hidden states, float32 [rows, tokens, width], of token ids int64 [rows, tokens], padded behind so many of each;
        of what is padding they are anything."""
        ...

    def head(self) -> Head:
        """What makes logits of them."""
        ...


def sum_logprobs(model: Read, texts: Sequence[Text], room: int, on_text: Callable[[int, float], None]) -> None:
    """Sum the log-probabilities of each text's tokens from `first` on.

    Args:
        model: M[0] with what is laid on it.
        room: Tokens of a pass (`tokens_at_once`); half of them where they do not fit.
        on_text: Takes a text's place and its sum, nats.

    Raises:
        OutOfMemoryError: torch's, if there is no GPU memory for a single text.
    """
    try:
        _sum_all(model, texts, room, on_text)
    finally:
        torch.cuda.empty_cache()  # the generator takes what is free; on a CPU this does nothing


def _sum_all(model: Read, texts: Sequence[Text], room: int, on_text: Callable[[int, float], None]) -> None:
    head = model.head()
    left = sorted(range(len(texts)), key=lambda place: -len(texts[place].ids))
    while left:
        count = max(1, room // len(texts[left[0]].ids))
        try:
            sums = _pass(model, [texts[place] for place in left[:count]], head)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            room //= 2
            torch.cuda.empty_cache()
            continue
        for place, total in zip(left[:count], sums, strict=True):
            on_text(place, total)
        left = left[count:]


def _pass(model: Read, texts: Sequence[Text], head: Head) -> list[float]:
    """The sums of texts that are read together."""
    lengths = [len(text.ids) - 1 for text in texts]
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    rows, places, targets = list[int](), list[int](), list[int]()
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = torch.tensor(text.ids[:-1])
        # what stands at a place tells about the next one
        asked = range(text.first - 1, len(text.ids) - 1)
        rows += [row] * len(asked)
        places += asked
        targets += text.ids[text.first :]
    states = model.states(ids, lengths)
    where = torch.tensor([rows, places, targets], device=states.device)
    with torch.no_grad():
        found = token_logprobs(states[where[0], where[1]], where[2], head).double()
    sums = torch.zeros(len(texts), dtype=torch.float64, device=states.device).index_add_(0, where[0], found)
    return sums.tolist()


def tokens_at_once(width: int, inner: int, device: torch.device) -> int:
    """Tokens of a pass that fit the GPU's free memory, by a guess at what one takes in a block: in 32 bits some eight times the
    width and three times the inner width.
    """
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(LEAST, min(MOST, int(FREE_SHARE * free) // (4 * (8 * width + 3 * inner))))
