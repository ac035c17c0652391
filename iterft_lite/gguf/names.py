"""Hugging Face names to GGUF names, and the order in which a converter has put a weight's rows.

llama.cpp's converter reorders rows of some weights (the query and key projections of Llama, for its form of rotary
embedding). A low-rank update has to follow: W' = W[order] means B' = B[order]. The order is not taken from a list of
architectures but read off the weights themselves, which holds for every architecture, or says that it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize

from iterft_lite.errors import ExportError
from iterft_lite.gguf.file import Array, GgufFile, Tensor
from iterft_lite.gguf.weights import Weight

PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", ""))
"""Prefixes of the language model in multimodal models, and their replacements."""

COLUMNS = 64
"""Compare rows by their first columns only: two different rows practically never agree in 64, and this reads one page a row."""


def tensor_names(architecture: str, blocks: int) -> Any:
    """gguf's table from names in Hugging Face models to names in GGUF files.

    Raises:
        ExportError: If the installed gguf does not know the architecture.
    """
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(
            f"the installed `gguf` package does not know the architecture `{architecture}`", hint="`pip install -U gguf`"
        )
    return gguf.get_tensor_name_map(known[architecture], blocks)


def gguf_name(names: Any, name: str) -> str | None:
    """`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`; None if the table does not have it."""
    for old, new in PREFIXES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    found: str | None = names.get_name(key=name, try_suffixes=(".weight", ".bias"))
    return found


def row_orders(weights: dict[str, Weight], base: GgufFile) -> dict[str, Array]:
    """The order of rows in the base GGUF, for each matrix that the converter changed in no other way.

    Returns:
        By GGUF name: int32 [rows] with `gguf[i] = hf[order[i]]`, or empty for the order of the original. Matrices that
        were changed in another way (cut, stacked, quantised) are missing.
    """
    names = tensor_names(base.architecture, int(base.value(f"{base.architecture}.block_count")))
    found: dict[str, Array] = {}
    for name, weight in weights.items():
        tensor = base.tensors.get(gguf_name(names, name) or "")
        if tensor is not None and len(tensor.shape) == 2 and tensor.shape == weight.shape:
            order = _row_order(weight, base, tensor)
            if order is not None:
                found[tensor.name] = order
    return found


def _row_order(weight: Weight, base: GgufFile, tensor: Tensor) -> Array | None:
    columns = min(COLUMNS, tensor.shape[1])
    stored = np.ascontiguousarray(base.rows(tensor)[:, : columns * tensor.row_bytes // tensor.shape[1]])
    try:
        cut = weight.float32(columns)
    except ExportError:
        return None
    original = np.ascontiguousarray(quantize(cut, tensor.kind)).view(np.uint8).reshape(stored.shape)
    # Try the known orders first (a comparison), then look each row up among the original ones (a dictionary). Rows that occur
    # twice leave the second way undecided.
    for order in _usual_orders(base, len(original)):
        if np.array_equal(original[order], stored):
            return order if isinstance(order, np.ndarray) else np.zeros(0, np.int32)
    place = {row.tobytes(): index for index, row in enumerate(original)}
    if len(place) < len(original):
        return None
    order = np.array([place.get(row.tobytes(), -1) for row in stored], np.int32)
    return order if len(set(order.tolist()) - {-1}) == len(original) else None


def _usual_orders(base: GgufFile, rows: int) -> Iterator[Array | slice]:
    """The original order, then each head's two halves interleaved, for query and for key heads."""
    yield slice(None)
    for key in ("head_count", "head_count_kv"):
        heads = base.value(f"{base.architecture}.attention.{key}")
        if isinstance(heads, int) and heads and rows % (2 * heads) == 0:
            yield np.arange(rows, dtype=np.int32).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def save_orders(path: Path, orders: dict[str, Array]) -> None:
    """Write the result of `row_orders` as an npz file."""
    with path.open("wb") as file:
        np.savez(file, **orders)  # type: ignore[arg-type]  # the arrays' names, not its own settings


def load_orders(path: Path) -> dict[str, Array]:
    """Read what `save_orders` wrote."""
    with np.load(path) as kept:
        return dict(kept)
