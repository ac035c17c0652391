"""Weights of a Hugging Face folder, read from safetensors files without torch, bfloat16 included.

Format: https://github.com/huggingface/safetensors#format: 8 bytes of length, a JSON header, then the tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iterft_lite.errors import ExportError
from iterft_lite.gguf.file import Array

NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""How each stored format is mapped; the bits of bfloat16 as integers."""


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
        """The numbers as they are stored, mapped; bfloat16 as uint16."""
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
    """Name and place of every tensor in a folder's safetensors files; empty where there are none.

    Raises:
        ExportError: If a file is damaged.
    """
    found: dict[str, Weight] = {}
    for path in sorted(folder.glob(pattern)):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except ValueError as error:
            raise ExportError(f"`{path}` is not a whole safetensors file: {error}") from error
        for name, entry in header.items():
            if name != "__metadata__":
                start, _ = entry["data_offsets"]
                found[name] = Weight(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start)
    return found
