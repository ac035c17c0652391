"""Digests: one text for one value, and SHA-256 of values, files and folders.

One core computes the SHA-256 of a gigabyte in a second, longer than many disks take to write it. So a model's GGUF, of which
each cycle makes one, has a digest that several cores compute: SHA-256 over the SHA-256s of its pieces.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

from iterft_lite.errors import FileError

Json = Any
"""What JSON can hold."""

PIECE = 16 << 20
"""Bytes of a piece of a large file; the last one may be shorter."""

LEAST_PIECE = 1 << 20
"""Bytes of the smallest piece that a record may ask for."""

READ = 1 << 20
"""Bytes that are read at a time: they stay in the processor's cache."""

HASHERS = min(4, os.cpu_count() or 1)
"""Cores that compute the digest of a large file."""


def canonical(value: Json) -> str:
    """One text for one value: keys sorted, no spaces, no NaN. What keys and digests are made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Json) -> str:
    """SHA-256 of a value's canonical text, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode(errors="surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file, 64 hex digits; nothing else is waited for.

    Raises:
        FileNotFoundError: If there is none.
        FileError: If it is something else, or cannot be read.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_by_pieces(path: Path, piece: int = PIECE) -> str:
    """SHA-256 over the SHA-256s of a file's pieces, 64 hex digits.

    Args:
        piece: Bytes of each; `LEAST_PIECE` or more.

    Raises:
        FileNotFoundError, FileError: As `file_digest`.
    """
    with _opened(path) as file, ThreadPoolExecutor(HASHERS) as threads:
        number, size, step = file.fileno(), os.fstat(file.fileno()).st_size, max(piece, LEAST_PIECE)
        pieces = threads.map(lambda start: piece_digest(number, start, min(start + step, size)), range(0, size, step))
        return over_pieces(pieces)


def piece_digest(file: int, start: int, stop: int) -> bytes:
    """SHA-256 of an open file's bytes from `start` to `stop`.

    Raises:
        OSError: If it cannot be read, or is shorter.
    """
    seen, at = hashlib.sha256(), start
    while at < stop:
        data = os.pread(file, min(READ, stop - at), at)
        if not data:
            raise OSError(errno.EIO, "the file is shorter than it was")
        seen.update(data)
        at += len(data)
    return seen.digest()


def over_pieces(pieces: Iterable[bytes]) -> str:
    """The digest of a file from those of its pieces, in order."""
    return hashlib.sha256(b"".join(pieces)).hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileError(f"`{path}` is not a file", hint="remove it")
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"`{path}` cannot be read: {(error.strerror or str(error)).lower()}") from error
