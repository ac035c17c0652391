"""Merging and quantising rows of a matrix: with numpy, or with torch where there is much of it or a GPU.

Both give the same bytes for the same numbers, equal to gguf's own `quantize` (tests compare them bit by bit).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

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


class Arithmetic(Protocol):
    """What merging needs."""

    name: str

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

    def merged(
        self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, low_rank: tuple[Array, Array] | None
    ) -> Array:
        """See `Arithmetic`."""
        if low_rank is None and kind == target:
            return np.ascontiguousarray(stored)
        weights = dequantize(np.ascontiguousarray(stored), kind)
        if low_rank is not None:
            weights = weights + low_rank[0] @ low_rank[1]
        with np.errstate(over="ignore"):  # looked for below
            made = quantize(np.ascontiguousarray(weights), target)
        if target == F16 and not np.isfinite(made).all():
            raise too_large()
        return np.ascontiguousarray(made).view(np.uint8)


class TorchArithmetic:
    """On a GPU, or on many CPU cores."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._a: tuple[int, Any] | None = None
        self.name = f"torch, {device}"

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
    """torch for more than a gigabyte of weights, on the GPU if there is one; numpy for less, which starts sooner."""
    if weight_bytes < 10**9:
        return NumpyArithmetic()
    import torch

    return TorchArithmetic("cuda" if torch.cuda.is_available() else "cpu")
