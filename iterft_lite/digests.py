"""Digests: one text for one value, and SHA-256 of values, files and folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Json = Any
"""What JSON can hold."""


def canonical(value: Json) -> str:
    """One text for one value: keys sorted, no spaces, no NaN. What keys and digests are made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Json) -> str:
    """SHA-256 of a value's canonical text, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
