"""Digests: one text for one value, and SHA-256 of values, files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from iterft_lite.errors import FileError

Json = Any
"""What JSON can hold."""


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
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileError(f"`{path}` is not a file", hint="remove it")
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"`{path}` cannot be read: {(error.strerror or str(error)).lower()}") from error
