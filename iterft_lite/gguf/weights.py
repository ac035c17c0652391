"""Weights of a Hugging Face folder, read from safetensors files without torch, bfloat16 included.

Format: https://github.com/huggingface/safetensors#format: 8 bytes of length, a JSON header, then the tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iterft_lite.errors import ExportError, FileError
from iterft_lite.files import open_regular, read_errors, read_object
from iterft_lite.gguf.file import Array

NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""numpy's type for each stored format; bfloat16 is mapped as integers."""

LONGEST_HEADER = 100 << 20
"""Bytes, as in the safetensors library."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a safetensors file.

    Attributes:
        file: It lies in.
        kind: As safetensors writes it: "F32", "F16", "BF16", ...
        shape: Rows first.
        offset: Of its first byte in the file.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    def stored(self) -> Array:
        """The stored numbers, memory-mapped; bfloat16 as uint16."""
        if self.kind not in NUMPY:
            raise ExportError(
                f"`{self.file}` holds numbers of the kind {self.kind}", hint="name the model's 16-bit or 32-bit version"
            )
        return np.memmap(self.file, dtype=NUMPY[self.kind], mode="r", offset=self.offset, shape=self.shape or (1,))

    def float32(self, columns: int | None = None) -> Array:
        """The numbers in float32, or those of the first columns."""
        stored = self.stored()[..., :columns]
        if self.kind == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def read_weights(folder: Path, pattern: str = "model*.safetensors") -> dict[str, Weight]:
    """Name and place of every tensor in a folder's safetensors files; empty if there are no such files.

    Raises:
        ExportError: If a file is damaged.
    """
    found: dict[str, Weight] = {}
    for path in sorted(folder.glob(pattern)):
        try:
            found |= _header(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"`{path}` is not a whole safetensors file: {error}") from error
    return found


def is_whole(folder: Path) -> bool:
    """Whether all safetensors files of a model are in a folder: of one on the hub there may be some."""
    try:
        named = set(read_object(folder / "model.safetensors.index.json")["weight_map"].values())
    except FileNotFoundError:
        return any(folder.glob("model*.safetensors"))
    except (FileError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / str(name)).is_file() for name in named)


def _header(path: Path) -> dict[str, Weight]:
    """Name and place of every tensor in one file; each lies inside of it."""
    with read_errors(path), open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"its header claims to have {length} bytes")
        header = json.loads(file.read(length))
        size = file.seek(0, 2)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + int(place) for place in entry["data_offsets"])
            if not 8 + length <= start <= end <= size:
                raise ValueError(f"`{name}` claims to lie at bytes {start} to {end} of {size}")
            shape = tuple(int(many) for many in entry["shape"])
            if min(shape, default=0) < 0:
                raise ValueError(f"`{name}` claims to have the shape {shape}")
            found[name] = Weight(path, str(entry["dtype"]), shape, start)
    return found
