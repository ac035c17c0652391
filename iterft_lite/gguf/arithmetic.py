"""Merging and quantising rows of a matrix: with numpy, or with torch on a GPU.

Both give the same bytes for the same numbers. A matrix without an update gets the bytes of gguf's own `quantize` (tests compare
them bit by bit).

A merged matrix is rounded to 16 bits stochastically. Models are stored in 16 bits: every weight W lies exactly on the grid of
such numbers, and a trained update smaller than half a step would be rounded back to W, always in the direction of no effect (a
dead zone). So W + update becomes the number below or above it, with probabilities that make W + update the expected value:

    round(x) = the largest number of the grid <= x + u * step        u uniform in [0, 1), a function of tensor and place

A weight without an update stays as it is. The noise, about sqrt(step * |update|) a weight, averages out over the thousands of
weights of a row; a dead zone does not. q8_0 and K-quants need none of it: their steps differ from block to block, so weights
lie anywhere between two of them, and as many are pushed over the edge as the update asks for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from iterft_lite.errors import ResultError
from iterft_lite.gguf.file import Array
from iterft_lite.hardware import MERGING, Gpu

F32, F16, BF16, Q8_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)
PLAIN = (F32, F16, BF16)
HALF: Mapping[GGMLQuantizationType, int] = MappingProxyType({F16: 13, BF16: 16})
"""Formats of 16 bits, and the number of a float32's lowest bits that they drop."""
BLOCK = 32
"""Numbers that share a scale in q8_0."""
BLOCKS: Mapping[GGMLQuantizationType, tuple[int, Any]] = MappingProxyType({BF16: (1, quants.BF16), Q8_0: (BLOCK, quants.Q8_0)})
"""Block size, and gguf's quantiser of blocks."""
CACHED = 256 << 10
"""Numbers that a CPU works on at once: 1 MB in f32 fits its cache and keeps the share of Python's own time small."""


@dataclass(frozen=True)
class Update:
    """An update of some rows of a matrix: B A is added to them.

    Attributes:
        b: float32 [rows, rank], scaled.
        a: float32 [rank, columns].
        seed: Of the rounding to 16 bits, 32 bits: the matrix's own.
        first: Place of the first number in the matrix, row after row.
    """

    b: Array
    a: Array
    seed: int
    first: int = 0


class Arithmetic(Protocol):
    """A way to merge rows.

    Attributes:
        name: For people.
        threads: How many parts at once pay off.
    """

    name: str
    threads: int

    def merged(self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, update: Update | None) -> Array:
        """Rows in the number format `target`: W, or W + B A.

        Args:
            stored: W's rows as the base stores them, uint8 [rows, bytes a row].
            kind: Their format, one of `PLAIN`.
            target: One of `PLAIN`, or q8_0.
            update: B A; None to convert only.

        Returns:
            Contiguous uint8.

        Raises:
            ResultError: If a number is too large for f16.
        """
        ...


class NumpyArithmetic:
    """On the CPU, without torch."""

    name = "numpy"
    threads = min(8, os.cpu_count() or 1)

    def merged(self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, update: Update | None) -> Array:
        """See `Arithmetic`."""
        if update is None and kind == target:
            return np.ascontiguousarray(stored)
        columns = stored.shape[1] // GGML_QUANT_SIZES[kind][1]
        # A few rows at a time: the float32 copy of a whole matrix would leave the processor's cache between one operation and
        # the next.
        rows = max(1, CACHED // columns)
        made = []
        for start in range(0, len(stored), rows):
            weights = from_plain(stored[start : start + rows], kind)
            if update is not None:
                if target in HALF:
                    weights = on_grid(weights, kind, target)
                # The update goes onto the weights as the untouched model has them in this format, so that the difference to it
                # is the update alone. Then the sum is rounded by chance: to the nearest number most updates would vanish, being
                # less than half a step.
                weights = weights + update.b[start : start + rows] @ update.a
                if target in HALF:
                    weights = rounded_by_chance(weights, target, update.seed, update.first + start * columns)
            made.append(to_format(weights, target))
        return np.concatenate(made)


def on_grid(weights: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType) -> Array:
    """The weights as the untouched model has them in `target`, float32: rounding them is no part of the update."""
    return weights if kind == target else from_plain(to_format(weights, target), target)


def rounded_by_chance(weights: Array, target: GGMLQuantizationType, seed: int, first: int) -> Array:
    """Round weights stochastically to the grid of `target`; float32 [rows, columns]. The expected value is the weight itself.

    Treat a float32 as an integer. Its lowest bits are those that the format drops. Add a random number of as many bits, then
    clear them: the sum carries into the kept bits with the probability that the dropped part is of a step. A float's sign is a
    bit of its own, so the carry goes away from zero for both signs. Below 2^-14 f16's steps do not shrink further: there
    `to_format` rounds once more, by less than 3e-8.

    Args:
        weights: float32 [rows, columns].
        target: One of `HALF`.
        seed, first: See `Update`.
    """
    cut = np.uint32((1 << HALF[target]) - 1)
    places = np.arange(first, first + weights.size, dtype=np.uint64).astype(np.uint32)
    bits = np.ascontiguousarray(weights, np.float32).reshape(-1).view(np.uint32) + (scrambled(places, seed) & cut)
    rounded: Array = (bits & ~cut).view(np.float32).reshape(weights.shape)
    return rounded


def scrambled(places: Array, seed: int) -> Array:
    """32 random-looking bits for each place: Wellons' `lowbias32` hash of place xor seed, uint32.

    A hash of a counter has no state: parts of a matrix can be rounded in any order and on any device.
    Source: https://nullprogram.com/blog/2018/07/31/.
    """
    x = places ^ np.uint32(seed)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def from_plain(stored: Array, kind: GGMLQuantizationType) -> Array:
    """Float32 [rows, columns] from stored bytes in one of `PLAIN`."""
    if kind == BF16:
        return (np.ascontiguousarray(stored).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(stored).view(np.float16 if kind == F16 else np.float32).astype(np.float32)


def to_format(weights: Array, target: GGMLQuantizationType) -> Array:
    """Bytes of float32 rows in a format: what `gguf.quants.quantize` gives, without its loop over sixteen rows at a time.

    Raises:
        ResultError: If a number is too large for f16.
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
        self._on_cpu = NumpyArithmetic()
        self.name = f"torch, {device}"
        # a GPU waits for copies, which four threads can do side by side; on a CPU torch itself uses all cores
        self.threads = 4 if device == "cuda" else 1
        self._transfers: SimpleQueue[_Transfer] = SimpleQueue()
        for _ in range(self.threads):
            self._transfers.put(_Transfer(torch, self._device))

    def merged(self, stored: Array, kind: GGMLQuantizationType, target: GGMLQuantizationType, update: Update | None) -> Array:
        """See `Arithmetic`. What does not fit into the GPU's memory is merged on the CPU."""
        if update is None and kind == target:
            return np.ascontiguousarray(stored)
        transfer = self._transfers.get()
        try:
            with self._torch.cuda.stream(transfer.stream):
                return transfer.download(self._merged(transfer.upload(stored), kind, target, update))
        except RuntimeError as error:
            if not no_memory(error):
                raise
            self._torch.cuda.empty_cache()
            return self._on_cpu.merged(stored, kind, target, update)
        finally:
            self._transfers.put(transfer)

    def _merged(self, stored: Any, kind: GGMLQuantizationType, target: GGMLQuantizationType, update: Update | None) -> Any:
        """Tensors on the device: uint8 [rows, bytes a row] of both formats."""
        torch = self._torch
        formats = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
        weights = stored.view(formats[kind]).to(torch.float32)
        if update is not None:
            if target in HALF and kind != target:
                # as `on_grid` does
                weights = weights.to(formats[target]).to(torch.float32)
            weights = torch.addmm(weights, self._on_device(update.b), self._on_device(update.a))
            if target in HALF:
                weights = rounded_by_chance_torch(torch, weights, HALF[target], update.seed, update.first)
        made = q8_0_torch(torch, weights) if target == Q8_0 else weights.to(formats[target])
        if target == F16 and not bool(torch.isfinite(made).all()):
            raise too_large()
        return made.contiguous().view(torch.uint8)

    def _on_device(self, array: Array) -> Any:
        # copy: torch takes no read-only maps
        return self._torch.from_numpy(np.array(array)).to(self._device)


class _Transfer:
    """A thread's way to the device and back: a stream, and memory from which a GPU copies by itself.

    Copies from other memory go through the driver's own, one after the other for all threads (2.5 times as slow with four).
    """

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch, self._device = torch, device
        self._is_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self._is_gpu else None
        self._kept: dict[str, Any] = {}

    def upload(self, array: Array) -> Any:
        """A tensor on the device with an array's bytes."""
        pinned = self._pinned("up", array.nbytes)
        np.copyto(pinned.numpy().reshape(array.shape), array)
        return pinned.reshape(array.shape).to(self._device, non_blocking=True, copy=True)

    def download(self, tensor: Any) -> Array:
        """A uint8 tensor of the device as an array."""
        pinned = self._pinned("down", tensor.numel()).reshape(tensor.shape)
        pinned.copy_(tensor, non_blocking=True)
        if self.stream is not None:
            self.stream.synchronize()
        return np.array(pinned.numpy())

    def _pinned(self, name: str, size: int) -> Any:
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=self._is_gpu)
        return kept[:size]


def rounded_by_chance_torch(torch: Any, weights: Any, bits: int, seed: int, first: int) -> Any:
    """`rounded_by_chance` of float32 [rows, columns]. torch has no unsigned arithmetic: 64 bits are cut to 32."""
    whole = 0xFFFFFFFF
    x = (torch.arange(first, first + weights.numel(), device=weights.device) & whole) ^ seed
    x ^= x >> 16
    x = (x * 0x7FEB352D) & whole
    x ^= x >> 15
    x = (x * 0x846CA68B) & whole
    x ^= x >> 16
    cut = (1 << bits) - 1
    stored = weights.contiguous().view(torch.int32)
    # a sum beyond 2^31 would change the sign; no weight is that large
    return ((stored + (x & cut).to(torch.int32).reshape(weights.shape)) & ~cut).view(torch.float32)


def q8_0_torch(torch: Any, weights: Any) -> Any:
    """Quantise float32 [rows, columns] to q8_0: uint8 [rows, columns / 32 * 34], bit-equal to `gguf.quants.quantize`.

    A block of 32 numbers is its scale, max|w| / 127 in f16, and 32 integers, round-half-away-from-zero(w / scale) with the
    scale not yet rounded.
    """
    blocks = weights.reshape(-1, BLOCK)
    # divide by a tensor: for division by a number, torch on a GPU multiplies with the inverse, which rounds differently
    scale = blocks.abs().amax(dim=1, keepdim=True) / torch.full((1, 1), 127.0, device=blocks.device)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), torch.ones_like(scale) / scale)
    scaled = blocks * inverse
    size = scaled.abs()
    whole = size.floor()
    # half away from zero: floor(2 x) is 1 from a half on. torch.round would go to the even neighbour.
    rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())
    joined = torch.cat([scale.to(torch.float16).view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)], dim=1)
    return joined.reshape(weights.shape[0], -1)


def too_large() -> ResultError:
    """The error for a weight that f16 cannot hold."""
    return ResultError("a weight is above 65504, the largest number of f16", hint='export with `quant = "bf16"` or "q8_0"')


def no_memory(error: RuntimeError) -> bool:
    """Whether torch says that there is no memory: its own class, the driver's words, or those of a library beneath."""
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def choose_arithmetic(weight_bytes: int) -> Arithmetic:
    """torch for more than a gigabyte of weights where there is a GPU with room for it, numpy elsewhere.

    On a CPU numpy is faster than torch, whose intermediate results do not stay in the cache.
    """
    if weight_bytes < 10**9 or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return NumpyArithmetic()
    is_ready = _on_gpu.cache_info().currsize > 0  # its memory is taken already
    if not is_ready and (facts := Gpu().facts()) and facts.free < MERGING:
        return NumpyArithmetic()
    import torch

    try:
        return _on_gpu() if torch.cuda.is_available() else NumpyArithmetic()
    except RuntimeError as error:
        if not no_memory(error):
            raise
        return NumpyArithmetic()


@cache
def _on_gpu() -> TorchArithmetic:
    """One for all exports of a process: torch keeps memory for every stream that there was."""
    return TorchArithmetic("cuda")
