"""GGUF files: reading the header, taking tensors from the mapped file, writing a new file beside the old one's metadata.

The gguf package reads every string of a vocabulary as an array of its own: 6.6 s for Qwen's 151,936 tokens, where walking
over them takes a tenth of a second. Its constants and writer are used, its reader is not.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian).
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from iterft_lite.digests import HASHERS, PIECE, over_pieces, piece_digest
from iterft_lite.errors import ExportError, NoRoom
from iterft_lite.files import disk_errors, open_regular, read_errors

Array = npt.NDArray[Any]

MAGIC = b"GGUF"
SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip
"""Value types of fixed size, as `struct` writes them; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9

MOST_DIMS = 4
"""Most dimensions of a tensor in ggml."""

DAMAGE = (struct.error, ValueError, IndexError, KeyError, TypeError, ArithmeticError, RecursionError, MemoryError)
"""Exceptions that reading a damaged file can raise."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in a file.

    Attributes:
        name: GGUF's.
        shape: Rows first, the row's length last.
        kind: Number format.
        offset: Of the first byte in the file; 0 for a tensor that is yet to be written.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes a row takes."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(self.shape[-1] // block * size)

    @property
    def rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        """Bytes of the whole, without padding."""
        return self.rows * self.row_bytes


class GgufFile:
    """A GGUF file: its header read, its tensors mapped.

    Args:
        path: The file.

    Raises:
        ExportError: If it is not a whole GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with read_errors(path), open_regular(path) as file:
                self._map = np.memmap(file, dtype=np.uint8, mode="r")
            self._bytes = memoryview(self._map)  # type: ignore[arg-type]  # an array is a buffer
            self._read_header()
        except (OSError, *DAMAGE) as error:
            raise ExportError(
                f"`{path}` is not a whole GGUF file: {error}", hint="delete it: a converted base is made again"
            ) from error

    def _read_header(self) -> None:
        magic, version, tensors, fields = struct.unpack_from("<4sIQQ", self._bytes, 0)
        if magic != MAGIC or version not in (2, 3):
            raise ValueError(f"it begins with {bytes(magic)!r}, version {version}")
        at = 24
        self._fields: dict[str, tuple[int, int]] = {}
        for _ in range(fields):
            key, at = self._text(at)
            (kind,) = struct.unpack_from("<I", self._bytes, at)
            self._fields[key] = kind, at + 4
            at = self._skip(kind, at + 4)
        self._metadata_end = at
        alignment = int(self.value("general.alignment", GGUF_DEFAULT_ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        found = []
        for _ in range(tensors):
            name, at = self._text(at)
            (dims,) = struct.unpack_from("<I", self._bytes, at)
            if not 1 <= dims <= MOST_DIMS:
                raise ValueError(f"the tensor `{name}` has {dims} dimensions")
            *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", self._bytes, at + 4)
            at += 4 + 8 * dims + 12
            found.append(Tensor(name, tuple(reversed(shape)), GGMLQuantizationType(kind), offset))
        start = at + -at % alignment
        self.tensors = {tensor.name: Tensor(tensor.name, tensor.shape, tensor.kind, start + tensor.offset) for tensor in found}
        end = max((tensor.offset + tensor.bytes for tensor in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise ValueError(f"it ends {end - len(self._bytes)} bytes too early")

    def _text(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._bytes, at)
        end = at + 8 + length
        if end > len(self._bytes):
            raise ValueError(f"a text at byte {at} goes beyond the end")
        return str(self._bytes[at + 8 : end], "utf-8"), end

    def _skip(self, kind: int, at: int) -> int:
        """Where the value that begins at `at` ends."""
        if kind in SCALARS:
            return at + struct.calcsize(SCALARS[kind])
        unpack = struct.Struct("<Q").unpack_from
        if kind == STRING:
            return int(at + 8 + unpack(self._bytes, at)[0])
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind} at byte {at}")
        inner, count = struct.unpack_from("<IQ", self._bytes, at)
        at += 12
        if inner in SCALARS:
            return int(at + count * struct.calcsize(SCALARS[inner]))
        for _ in range(count):
            at = at + 8 + unpack(self._bytes, at)[0] if inner == STRING else self._skip(inner, at)
        return int(at)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the metadata, in order."""
        return tuple(self._fields)

    def value(self, key: str, default: Any = None) -> Any:
        """A number, text, or list from the metadata; `default` where there is none."""
        if key not in self._fields:
            return default
        return self._value(*self._fields[key])[0]

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind in SCALARS:
            return struct.unpack_from(SCALARS[kind], self._bytes, at)[0], self._skip(kind, at)
        if kind == STRING:
            return self._text(at)
        inner, count = struct.unpack_from("<IQ", self._bytes, at)
        at, values = at + 12, []
        for _ in range(count):
            value, at = self._value(inner, at)
            values.append(value)
        return values, at

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name: `qwen3`, `llama`, `gemma3`."""
        return str(self.value("general.architecture"))

    def metadata(self, changes: Mapping[str, int]) -> tuple[int, bytes]:
        """Number and bytes of all metadata fields, with some unsigned 32-bit numbers replaced.

        Raises:
            ExportError: If a field that is to be changed is not there, or is no such number.
        """
        copied = bytearray(self._bytes[24 : self._metadata_end])
        for key, number in changes.items():
            kind, at = self._fields.get(key, (None, 0))
            if kind != 4:
                raise ExportError(f"`{self.path}` has no `{key}` in its metadata")
            struct.pack_into("<I", copied, at - 24, number)
        return len(self._fields), bytes(copied)

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> Array:
        """Stored bytes of a tensor's rows, uint8 [rows, bytes a row], a view of the mapped file."""
        whole = self._map[tensor.offset : tensor.offset + tensor.bytes].reshape(tensor.rows, tensor.row_bytes)
        return np.asarray(whole[start:stop])


class Checksum:
    """The digest by pieces of a file (`digests.py`), computed by threads that read it just behind its writer."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(HASHERS)
        self._pieces: list[Future[bytes]] = []
        self._file, self._size = -1, 0

    def begin(self, path: Path) -> None:
        """A file that is yet to be written. It may get another name later."""
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def written(self, size: int) -> None:
        """So many bytes from the beginning are in the file by now."""
        self._size = size
        while (start := len(self._pieces) * PIECE) + PIECE <= size:
            self._pieces.append(self._threads.submit(piece_digest, self._file, start, start + PIECE))

    def hexdigest(self) -> str:
        """The digest of all bytes. Ends the threads.

        Raises:
            OSError: If the file cannot be read.
        """
        try:
            if (start := len(self._pieces) * PIECE) < self._size:
                self._pieces.append(self._threads.submit(piece_digest, self._file, start, self._size))
            return over_pieces(piece.result() for piece in self._pieces)
        finally:
            self.close()

    def close(self) -> None:
        """Give it up: no more is read."""
        self._threads.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class GgufWriter:
    """A GGUF file that is being written: threads put rows into their places, in any order.

    Args:
        path: An empty file.
        metadata: Number of fields, and their bytes.
        tensors: In the order in which they are in the file.
        alignment: Tensors begin at multiples of it.

    Raises:
        OSError: If the disk is full, or fails; so does `put`.
    """

    def __init__(self, path: Path, metadata: tuple[int, bytes], tensors: Sequence[Tensor], alignment: int) -> None:
        # A GGUF file: header, metadata, one record a tensor with its offset, then the tensors' bytes. Offsets count from the
        # first tensor, and tensors begin at multiples of the alignment, so all places are known before any byte is made.
        head = [struct.pack("<4sIQQ", MAGIC, 3, len(tensors), metadata[0]), metadata[1]]
        offset, offsets = 0, []
        for tensor in tensors:
            name, dims = tensor.name.encode(), len(tensor.shape)
            head += [struct.pack("<Q", len(name)), name]
            head.append(struct.pack(f"<I{dims}QIQ", dims, *reversed(tensor.shape), tensor.kind, offset))
            offsets.append(offset)
            offset += tensor.bytes + -tensor.bytes % alignment
        first = sum(map(len, head))
        first += -first % alignment
        self.size = first + offset
        self._places = {
            tensor.name: (first + offset, tensor.row_bytes) for tensor, offset in zip(tensors, offsets, strict=True)
        }
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(self._file, self.size)
            self._write(memoryview(b"".join(head)), 0)
        except OSError:
            self.close()
            raise

    def put(self, tensor: str, first_row: int, rows: Array) -> int:
        """Write contiguous rows of a tensor; gives the place in the file where they end."""
        start, row_bytes = self._places[tensor]
        return self._write(rows.reshape(-1).view(np.uint8).data, start + first_row * row_bytes)

    def close(self) -> None:
        """Nothing more is written."""
        os.close(self._file)

    def _write(self, data: memoryview, at: int) -> int:
        while data:
            taken = os.pwrite(self._file, data, at)
            data, at = data[taken:], at + taken
        return at


def ensure_room(folder: Path, needed: int, what: str) -> None:
    """Check the free space before anything is written.

    Raises:
        NoRoom: With what is needed and what is free.
        FolderError: If the folder cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(
            f"no space for {what}: it needs {size_text(needed)}, `{folder}` has {size_text(free)} free",
            hint='free some space, choose a smaller `quant`, or `export = "adapter"`',
        )


def size_text(size: int) -> str:
    """`1.4 MB`, `4.28 GB`: a size for people, in powers of 1000."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
