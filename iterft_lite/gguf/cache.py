"""Where converted bases are kept, and by what name: the content of the model's files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import platformdirs

from iterft_lite.gguf.file import writing
from iterft_lite.hub import MODEL_FILES


def cache_folder() -> Path:
    """The user's cache for this program; `ITERFT_CACHE` names another."""
    given = os.environ.get("ITERFT_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("iterft_lite"))


def content_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files.

    Files are read once: a file of the same place, size and time of change is taken to be the same (8 GB take half a minute).
    """
    known_path = cache_folder() / "files.json"
    try:
        known = json.loads(known_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    whole, learned = hashlib.sha256(), {}
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        stat = path.stat()
        mark = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        digest = known.get(mark) or _digest(path)
        if mark not in known:
            learned[mark] = digest
        whole.update(f"{path.name} {digest}\n".encode())
    if learned:
        with writing(known_path) as temporary:
            temporary.write_text(json.dumps({**known, **learned}, indent=0), encoding="utf-8")
    return whole.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
