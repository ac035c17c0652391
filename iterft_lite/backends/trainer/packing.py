"""Rows of a batch one after the other in one sequence: nothing is computed for padding.

Rows of self-written text differ in length by half; padded to the longest of four a fifth to a third of a batch is padding.
Everything in a decoder but attention takes each token for itself. Attention is computed row by row; it is registered with
transformers under the name `PACKED`, reached through the model's own code, and told the rows' lengths with each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface

from iterft_lite.backends.trainer.products import Factors, slices

PACKED = "iterft_packed"
"""Name of the attention among transformers'."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' model types whose attention is what is computed here: causal, or causal within a window, and nothing else."""

LONG = 256
"""Tokens a row above which its probabilities are too many to be kept for the backward pass: torch's attention computes them
anew, which is slower for short rows only."""


def packed_states(model: Any, ids: torch.Tensor, lengths: Sequence[int], products: Factors) -> torch.Tensor:
    """Last hidden states [tokens, width] of rows that stand one after the other.

    Args:
        model: A causal language model of `ARCHITECTURES`.
        ids: int64 [rows, tokens], padded on the right.
        lengths: Tokens of each row that are wanted.
        products: Of attention.
    """
    places = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    # Each row counts its positions from 0 again, so rotary embeddings are those of the row alone.
    packed = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        states: torch.Tensor = model.get_decoder()(
            input_ids=packed[None], position_ids=places[None], use_cache=False, rows=tuple(lengths), products=products
        )[0][0]
    finally:
        config._attn_implementation = before
    return states


def packed_attention(
    module: torch.nn.Module,  # noqa: ARG001  # transformers' signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001  # rows are told apart by their lengths
    *,
    scaling: float,
    rows: tuple[int, ...],
    products: Factors,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row (an attention function of transformers').

    Args:
        module: The attention layer.
        query: [1, heads, tokens, width].
        key, value: [1, kv heads, tokens, width].
        attention_mask: None.
        scaling: Of the scores.
        rows: Tokens of each row.
        products: Their factors' types.
        sliding_window: Tokens that one may look at, itself included; None: all before it.

    Returns:
        [1, tokens, heads, width], and no probabilities.
    """
    window = sliding_window if sliding_window is not None and sliding_window < max(rows) else None
    given = (each[0].float() for each in (query, key, value))
    # Kept probabilities take rows x heads x length^2 numbers. Up to LONG tokens that is little, and the backward pass need not
    # compute them again. torch's own causal attention knows no window, so windows come here whatever the length.
    if max(rows) <= LONG or window is not None:
        made: torch.Tensor = _Attention.apply(*given, rows, scaling, window, products)  # type: ignore[no-untyped-call]
        return made[None], None
    query, key, value = given
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[None, :, row], key[None, :, row], value[None, :, row], is_causal=True, scale=scaling, enable_gqa=True
        )
        for row in slices(rows)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """softmax(scaling q k^T + mask) v of each row, with the probabilities kept; heads that share keys are one product.

    Scores are products of float32 always: an exponential follows them, and bf16 rounds a score of 16 by 1/16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: tuple[int, ...],
        scaling: float,
        window: int | None,
        products: Factors,
    ) -> torch.Tensor:
        heads, tokens, width = query.shape
        shared = key.shape[0]
        # lengths are rounded up so that few masks are made and cached; each row takes its corner
        mask = _mask(-(-max(rows) // 64) * 64, window, query.device)
        made = torch.empty(tokens, heads, width, dtype=products.forward, device=query.device)
        query, value = query * scaling, value.to(products.forward)
        kept = []
        for row in slices(rows):
            length = row.stop - row.start
            # Grouped-query attention: the queries of all heads that share a key head are put below each other, so that one
            # product [heads / shared x length, width] [width, length] serves them all and keys need no copy a head.
            asked, keys, values = query[:, row].reshape(shared, -1, width), key[:, row], value[:, row]
            scores = torch.bmm(asked, keys.transpose(1, 2)).view(heads, length, length)
            shares = torch.softmax(scores.add_(mask[:length, :length]), -1).view(shared, -1, length)
            # written token by token, as the output projection reads it
            made[row] = torch.bmm(shares.to(products.forward), values).view(heads, length, width).transpose(0, 1)
            kept += [each.to(products.backward) for each in (asked, keys, values, shares)]
        ctx.rows, ctx.scaling = rows, scaling
        ctx.save_for_backward(*kept)
        return made

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept = ctx.saved_tensors
        slope = slopes[0].to(kept[0].dtype)  # [tokens, heads, width]
        tokens, heads, width = slope.shape
        shared = kept[1].shape[0]
        # laid out as the projections are: token by token
        queries = torch.empty(tokens, heads, width, dtype=slope.dtype, device=slope.device)
        keys, values = (torch.empty(tokens, shared, width, dtype=slope.dtype, device=slope.device) for _ in range(2))
        for number, row in enumerate(slices(ctx.rows)):
            asked, key, value, shares = kept[4 * number : 4 * number + 4]
            length = row.stop - row.start
            # the sum over heads that share keys comes for free: their rows are one dimension of the product
            back = slope[row].transpose(0, 1).reshape(shared, -1, width)
            values[row] = torch.bmm(shares.transpose(1, 2), back).transpose(0, 1)
            # of a softmax: p * (dp - sum(p * dp))
            scores = torch._softmax_backward_data(torch.bmm(back, value.transpose(1, 2)), shares, -1, shares.dtype)
            keys[row] = torch.bmm(scores.transpose(1, 2), asked).transpose(0, 1)
            queries[row] = torch.bmm(scores, key).view(heads, length, width).transpose(0, 1)
        queries *= ctx.scaling
        return (*(each.transpose(0, 1).float() for each in (queries, keys, values)), None, None, None, None)


@lru_cache(maxsize=8)
def _mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """0 where a token (row) may look at another (column), else -inf: float32 [length, length]."""
    never = torch.full((length, length), float("-inf"), device=device)
    return never.triu(1) if window is None else never.triu(1) + never.tril(-window)


AttentionInterface.register(PACKED, packed_attention)
