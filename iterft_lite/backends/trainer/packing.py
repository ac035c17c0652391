"""Attention within rows that stand one after the other in one sequence: nothing is computed for padding.

Rows of self-written text differ in length by half; padded to the longest of four a fifth to a third of a batch is padding.
Everything in a decoder but attention takes each token for itself; attention is computed row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from iterft_lite.backends.trainer.products import Factors, slices

LONG = 256
"""Tokens a row above which its probabilities are too many to be kept for the backward pass: torch's attention computes them
anew, which is slower for short rows only."""


@dataclass(frozen=True)
class Rows:
    """Rows of one sequence, and what a token of theirs looks at: its own row, up to itself.

    Attributes:
        lengths: Tokens of each row.
        window: Tokens that one may look at, itself included; None: all before it.
    """

    lengths: tuple[int, ...]
    window: int | None = None

    @property
    def keeps(self) -> bool:
        """Probabilities are kept: rows are short, or torch's attention knows no windows."""
        longest = max(self.lengths)
        return longest <= LONG or (self.window is not None and self.window < longest)

    @property
    def mask(self) -> torch.Tensor:
        """0 where a token (row) looks at another (column), else -inf: float32 [longest, longest], or larger."""
        longest = max(self.lengths)
        return _mask(-(-longest // 64) * 64, self.window if self.window is not None and self.window < longest else None)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, products: Factors, out: torch.Tensor
) -> list[Any]:
    """softmax(q k^T + mask) v of each row; heads that share keys are one product.

    Scores are products of float32 always: an exponential follows them, and bf16 rounds a score of 16 by 1/16.

    Args:
        query: Scaled; float32 [tokens, heads, width].
        key, value: float32 and any float [tokens, kv heads, width].
        rows: Of the tokens.
        products: Types of the factors of other products.
        out: Takes what is made, [tokens, heads, width].

    Returns:
        What `attend_back` needs, by row.
    """
    if not rows.keeps:
        return [_attend_long(query[row], key[row], value[row], out[row]) for row in slices(rows.lengths)]
    mask, (_, shared, width) = rows.mask, key.shape
    heads, value, kept = query.shape[1], value.to(products.forward), []
    for row in slices(rows.lengths):
        length = row.stop - row.start
        # Grouped-query attention: the queries of all heads that share a key head are put below each other, so that one product
        # [heads / shared x length, width] [width, length] serves them all and keys need no copy a head.
        asked = query[row].transpose(0, 1).reshape(shared, -1, width)
        keys, values = key[row].transpose(0, 1), value[row].transpose(0, 1)
        scores = torch.bmm(asked, keys.transpose(1, 2)).view(heads, length, length)
        shares = torch.softmax(scores.add_(mask[:length, :length]), -1).view(shared, -1, length)
        out[row] = torch.bmm(shares.to(products.forward), values).view(heads, length, width).transpose(0, 1)
        kept.append([each.to(products.backward) for each in (asked, keys, values, shares)])
    return kept


def attend_back(
    slope: torch.Tensor, rows: Rows, kept: list[Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Write the gradients of `attend`'s query, key and value, shaped as they are, into the last three.

    Args:
        slope: Gradient of what was made, [tokens, heads, width], of the type that products of backward passes have.
        rows: As given to `attend`.
        kept: What that returned.
        query, key, value: Take the gradients.
    """
    _, shared, width = key.shape
    heads = query.shape[1]
    for row, parts in zip(slices(rows.lengths), kept, strict=True):
        if not rows.keeps:
            for place, made in zip((query, key, value), _back_long(slope[row], *parts), strict=True):
                place[row] = made
            continue
        asked, keys, values, shares = parts
        length = row.stop - row.start
        # the sum over heads that share keys comes for free: their rows are one dimension of the product
        back = slope[row].transpose(0, 1).reshape(shared, -1, width)
        value[row] = torch.bmm(shares.transpose(1, 2), back).transpose(0, 1)
        # of a softmax: p * (dp - sum(p * dp))
        scores = torch._softmax_backward_data(torch.bmm(back, values.transpose(1, 2)), shares, -1, shares.dtype)
        key[row] = torch.bmm(scores.transpose(1, 2), asked).transpose(0, 1)
        query[row] = torch.bmm(scores, keys).view(heads, length, width).transpose(0, 1)


class Cache:
    """Keys and values of rows that grow by a token each at a time.

    Args:
        kept: Of each row, what `attend` kept in float32.
        lengths: Tokens of each row, int64 [rows].
        room: Tokens that will come.
    """

    def __init__(self, kept: Sequence[Sequence[torch.Tensor]], lengths: torch.Tensor, room: int) -> None:
        _, keys, values, _ = kept[0]
        shape = (len(kept), len(keys), int(lengths.max()) + room, keys.shape[-1])
        self._keys, self._values = keys.new_zeros(shape), values.new_zeros(shape)
        for row, (_, keys, values, _) in enumerate(kept):
            self._keys[row, :, : keys.shape[1]], self._values[row, :, : keys.shape[1]] = keys, values
        self._rows, self._lengths = torch.arange(len(kept)), lengths.clone()

    def add(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append a token of each row: float32 and any float, [rows, kv heads, width]."""
        self._keys[self._rows, :, self._lengths] = key
        self._values[self._rows, :, self._lengths] = value.float()
        self._lengths += 1

    def seen_by(self, query: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T) v for the last token of each row, float32 [rows, heads, width]; queries are scaled."""
        rows, shared, room, width = self._keys.shape
        scores = query.reshape(rows, shared, -1, width) @ self._keys.transpose(2, 3)
        scores.masked_fill_(torch.arange(room) >= self._lengths[:, None, None, None], float("-inf"))
        return (torch.softmax(scores, -1) @ self._values).view(rows, -1, width)


def _attend_long(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> tuple[Any, ...]:
    """One long row by torch's attention; what is kept is its own graph."""
    with torch.enable_grad():
        given = tuple(each.detach().float().requires_grad_() for each in (query, key, value))
        asked, keys, values = (each.transpose(0, 1)[None] for each in given)
        made = torch.nn.functional.scaled_dot_product_attention(asked, keys, values, is_causal=True, scale=1.0, enable_gqa=True)
    out.copy_(made[0].detach().transpose(0, 1))
    return given, made


def _back_long(slope: torch.Tensor, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(made, given, slope.transpose(0, 1)[None].float())


@lru_cache(maxsize=8)
def _mask(length: int, window: int | None) -> torch.Tensor:
    never = torch.full((length, length), float("-inf"))
    return never.triu(1) if window is None else never.triu(1) + never.tril(-window)
