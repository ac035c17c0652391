"""From logits to tokens and log-probabilities, with numpy, many rows at once."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from iterft_lite.errors import BackendError
from iterft_lite.protocols import Sampling

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

BLOCK = 64
"""Weights are summed by blocks of so many tokens, then one block is searched: exact enough in 32 bits for large
vocabularies."""

PIECE = 1 << 18
"""Numbers from which on handing a piece to another thread gains more than it costs."""


def unnormalised(logits: Floats, sampling: Sampling, *, out: Floats) -> None:
    """Write exp(logits / temperature), scaled to a maximum of 1 and truncated, to `out`; both float32 [n, vocab]."""
    # the largest becomes exp(0) = 1: nothing overflows, and `min_p` is then a plain threshold
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=out)
    if sampling.temperature != 1:
        out *= np.float32(1 / sampling.temperature)
    np.exp(out, out=out)
    if 0 < sampling.top_k < out.shape[1]:
        least = np.partition(out, -sampling.top_k, axis=1)[:, -sampling.top_k, None]
        out[out < least] = 0
    if sampling.top_p < 1:
        _keep_nucleus(out, sampling.top_p)
    if sampling.min_p > 0:
        out[out < np.float32(sampling.min_p)] = 0  # the largest is 1


def _keep_nucleus(weights: Floats, share: float) -> None:
    """Zero what is outside the smallest set of most likely tokens that holds `share` of the mass."""
    order = np.argsort(-weights, axis=1, kind="stable")
    ordered = np.take_along_axis(weights, order, axis=1)
    # A token stays while the mass before it is below the share: the token that crosses it still belongs to the nucleus.
    before = np.cumsum(ordered, axis=1, dtype=np.float64) - ordered
    ordered[before >= share * ordered.sum(axis=1, keepdims=True, dtype=np.float64)] = 0
    np.put_along_axis(weights, order, ordered, axis=1)


def choose(weights: Floats, uniforms: npt.NDArray[np.float64]) -> Ints:
    """A token a row by inverse transform: the first whose cumulated weights pass `uniforms` of the total.

    Args:
        weights: float32 [n, a multiple of BLOCK], not negative.
        uniforms: float64 [n], in [0, 1).

    Raises:
        BackendError: If weights are not finite or all zero.
    """
    rows = np.arange(len(weights))
    blocks = weights.reshape(len(weights), -1, BLOCK)
    # Two levels: the block in which the number falls, by the sums of blocks in 64 bits, then the token within the block. A sum
    # over 150,000 float32 numbers would be off by more than the rarest tokens weigh.
    mass = np.einsum("rbt->rb", blocks)  # as `blocks.sum(axis=2)`, four times as fast
    ends = np.cumsum(mass, axis=1, dtype=np.float64)
    total = ends[:, -1]
    if not (np.isfinite(total).all() and (total > 0).all()):
        raise BackendError(
            "the model's logits are not finite numbers", hint="its weights may be damaged, or training may have diverged"
        )
    target = uniforms * total
    # the second term is the last block with any mass: rounding must never lead past it into tokens of probability 0
    block = np.minimum((ends <= target[:, None]).sum(axis=1), (ends < total[:, None]).sum(axis=1))
    within = np.cumsum(blocks[rows, block], axis=1, dtype=np.float64)
    # the block's own sum was rounded to 32 bits: carry the share over, not the difference
    share = (target - (ends[rows, block] - mass[rows, block])) / mass[rows, block]
    aim = (share * within[:, -1])[:, None]
    place = np.minimum((within <= aim).sum(axis=1), (within < within[:, -1:]).sum(axis=1))
    chosen: Ints = (block * BLOCK + place).astype(np.int32)
    return chosen


def chosen_logprobs(logits: Floats, columns: npt.NDArray[np.integer[Any]], pool: Executor, threads: int) -> Doubles:
    """Natural log-probabilities of some tokens a row.

    Each thread is given one large piece: numpy lets the others work while it computes, but before and after each of its steps
    they stand in a line.

    Args:
        logits: float32 [n, vocab]; overwritten.
        columns: Tokens [n, k], or [1, k] for all rows alike.

    Returns:
        float64 [n, k].
    """

    def part(rows: Floats, wanted: npt.NDArray[np.integer[Any]]) -> Doubles:
        rows -= rows.max(axis=1, keepdims=True)
        found = np.take_along_axis(rows, wanted, axis=1).astype(np.float64)
        np.exp(rows, out=rows)
        made: Doubles = found - np.log(rows.sum(axis=1, keepdims=True).astype(np.float64))
        return made

    wanted = np.broadcast_to(columns, (len(logits), columns.shape[1]))
    pieces = min(threads, max(1, logits.size // PIECE))
    if pieces == 1:
        return part(logits, wanted)
    return np.concatenate(list(pool.map(part, np.array_split(logits, pieces), np.array_split(wanted, pieces))))


def log_softmax(logits: Floats) -> Floats:
    """Natural log-probabilities of logits, float32 [n, vocab]; 64 rows at a time, which stay in the processor's cache."""
    made = np.empty_like(logits)
    for start in range(0, len(logits), 64):
        part = logits[start : start + 64]
        shifted = part - part.max(axis=1, keepdims=True)
        mass = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
        made[start : start + 64] = shifted - np.log(mass).astype(np.float32)
    return made
