"""Merging and quantising rows of a matrix: with numpy, or with torch on a GPU.

Both give the same bytes for the same numbers, equal to gguf's own `quantize` (tests compare them bit by bit).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from iterft_lite.errors import ExportError
from iterft_lite.gguf.file import Array

F32, F16, BF16, Q8_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)
PLAIN = (F32, F16, BF16)
BLOCK = 32
"""Numbers that share a scale in q8_0."""
BLOCKS: Mapping[GGMLQuantizationType, tuple[int, Any]] = MappingProxyType({BF16: (1, quants.BF16), Q8_0: (BLOCK, quants.Q8_0)})
"""Block size, and gguf's quantiser of blocks."""
CACHED = 256 << 10
"""Numbers worked on at once on a CPU: 1 MB in f32 stays in its cache, and is enough to keep Python's part small."""


class Arithmetic(Protocol):
    """What merging needs.

    Attributes:
        name: For people.
        threads: How many parts at once pay off.
    """

    name: str
    threads: int

    def merged(
        self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, low_rank: tuple[Array, Array] | None
    ) -> Array:
        """Rows in the number format `target`: W, or W + B A.

        Args:
            stored: W's rows as they lie in the base, uint8 [rows, bytes a row].
            kind: The format they are in: one of `PLAIN`.
            target: One of `PLAIN`, or q8_0.
            low_rank: float32 B [rows, rank], scaled, and A [rank, columns].

        Returns:
            Contiguous uint8.

        Raises:
            ExportError: If a number is too large for f16.
        """
        ...


class NumpyArithmetic:
    """On the CPU, without torch."""

    name = "numpy"
    threads = min(4, os.cpu_count() or 1)

    def merged(
        self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, low_rank: tuple[Array, Array] | None
    ) -> Array:
        """See `Arithmetic`."""
        if low_rank is None and kind == target:
            return np.ascontiguousarray(stored)
        rows = max(1, CACHED // (stored.shape[1] // GGML_QUANT_SIZES[kind][1]))
        made = []
        for start in range(0, len(stored), rows):
            weights = from_plain(stored[start : start + rows], kind)
            if low_rank is not None:
                weights = weights + low_rank[0][start : start + rows] @ low_rank[1]
            made.append(to_format(weights, target))
        return np.concatenate(made)


def from_plain(stored: Array, kind: GGMLQuantizationType) -> Array:
    """Float32 [rows, columns] from stored bytes in one of `PLAIN`."""
    if kind == BF16:
        return (np.ascontiguousarray(stored).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(stored).view(np.float16 if kind == F16 else np.float32).astype(np.float32)


def to_format(weights: Array, target: GGMLQuantizationType) -> Array:
    """Bytes of float32 rows in a format: what `gguf.quants.quantize` gives, without its loop over sixteen rows at a time.

    Raises:
        ExportError: If a number is too large for f16.
    """
    if target in BLOCKS:
        size, quantiser = BLOCKS[target]
        made: Array = quantiser.quantize_blocks(weights.reshape(-1, size)).reshape(len(weights), -1)
    else:
        with np.errstate(over="ignore"):  # looked for below
            made = weights.astype(np.float16 if target == F16 else np.float32)
        if target == F16 and not np.isfinite(made).all():
            raise too_large()
    return made.view(np.uint8)


class TorchArithmetic:
    """On a GPU; on a CPU for tests."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self.name = f"torch, {device}"
        # a GPU waits for copies, which four threads do side by side; on a CPU torch uses the cores by itself
        self.threads = 4 if device == "cuda" else 1

    def merged(
        self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, low_rank: tuple[Array, Array] | None
    ) -> Array:
        """See `Arithmetic`."""
        torch = self._torch
        if low_rank is None and kind == target:
            return np.ascontiguousarray(stored)
        formats = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
        weights = self._on_device(stored).view(formats[kind]).to(torch.float32)
        if low_rank is not None:
            weights = torch.addmm(weights, self._on_device(low_rank[0]), self._on_device(low_rank[1]))
        made = q8_0_torch(torch, weights) if target == Q8_0 else weights.to(formats[target])
        if target == F16 and not bool(torch.isfinite(made).all()):
            raise too_large()
        result: Array = made.contiguous().view(torch.uint8).cpu().numpy()
        return result

    def _on_device(self, array: Array) -> Any:
        # a copy: torch does not take read-only maps
        return self._torch.from_numpy(np.array(array)).to(self._device)


def q8_0_torch(torch: Any, weights: Any) -> Any:
    """Quantise float32 [rows, columns] to q8_0: uint8 [rows, columns / 32 * 34], bit-equal to `gguf.quants.quantize`.

    A block of 32 numbers is its scale, max|w| / 127 in f16, and 32 integers, round-half-away-from-zero(w / scale) with the
    scale not yet rounded.
    """
    blocks = weights.reshape(-1, BLOCK)
    # divided by a tensor: by a number, torch multiplies with its inverse on a GPU, which rounds differently
    scale = blocks.abs().amax(dim=1, keepdim=True) / torch.full((1, 1), 127.0, device=blocks.device)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), torch.ones_like(scale) / scale)
    scaled = blocks * inverse
    size = scaled.abs()
    whole = size.floor()
    rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())
    joined = torch.cat([scale.to(torch.float16).view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)], dim=1)
    return joined.reshape(weights.shape[0], -1)


def too_large() -> ExportError:
    """The error for a weight that f16 cannot hold."""
    return ExportError("a weight is above 65504, the largest number of f16", hint='export with `quant = "bf16"` or "q8_0"')


def choose_arithmetic(weight_bytes: int) -> Arithmetic:
    """torch for more than a gigabyte of weights where there is a GPU, numpy elsewhere.

    On a CPU numpy is faster than torch, whose intermediate results do not stay in the cache.
    """
    if weight_bytes < 10**9:
        return NumpyArithmetic()
    import torch

    return TorchArithmetic("cuda") if torch.cuda.is_available() else NumpyArithmetic()
