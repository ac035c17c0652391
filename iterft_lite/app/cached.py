"""Size of the user's cache folder by kind, and freeing it. The program can make everything in it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.cache import cache_folder
from iterft_lite.errors import UserError
from iterft_lite.files import disk_errors


@dataclass(frozen=True)
class Kind:
    """A kind of thing in the cache.

    Attributes:
        patterns: Patterns of its files and folders.
        about: What it is, and what it costs to make it again.
    """

    patterns: tuple[str, ...]
    about: str


KINDS: Mapping[str, Kind] = {
    "bases": Kind(("bases", "layouts", "files.json"), "base models as GGUF: converted again when a run needs them"),
    "models": Kind(("models",), "example models: fetched again by `iterft models get`"),
    "wheels": Kind(("wheels",), "compiled llama.cpp: compiled again by the next set-up, in minutes"),
    "llama.cpp": Kind(("llama.cpp-*",), "llama.cpp's converter: fetched again for models that need it"),
    "verdicts": Kind(("verdicts.sqlite*",), "what paid judges said: the same answers would be paid for again"),
    "calibrations": Kind(("calibrations",), "how judges rank the traits' calibration answers: asked again"),
    "judges": Kind(("judges",), "embedded judges: fitted again, in seconds"),
    "timings": Kind(("timings.jsonl",), "how long steps took here: plans would know no time until the next run"),
    "logs": Kind(("logs", "measuring-*"), "logs, and what an interrupted measurement left"),
}

DEAR = frozenset({"verdicts"})
"""Kinds that cost money to make again: `all` does not free them, only their name does."""


@dataclass(frozen=True)
class Kept:
    """The files of a kind."""

    kind: str
    about: str
    paths: tuple[Path, ...]
    bytes: int


def kept() -> list[Kept]:
    """The content of the cache by kind; "other" for the rest."""
    folder = cache_folder()
    found = {
        name: tuple(sorted({p for pattern in kind.patterns for p in folder.glob(pattern)})) for name, kind in KINDS.items()
    }
    known = {path for paths in found.values() for path in paths}
    others = tuple(sorted(path for path in folder.glob("*") if path not in known))
    rows = [Kept(name, KINDS[name].about, paths, sum(map(_size, paths))) for name, paths in found.items()]
    return [*rows, Kept("other", "nothing that this version knows", others, sum(map(_size, others)))]


def free(names: tuple[str, ...]) -> Iterator[Kept]:
    """Remove the files of some kinds; "all" means every kind that costs no money.

    Raises:
        UserError: If there is no such kind.
    """
    there = {each.kind: each for each in kept()}
    wanted = [name for name in there if name not in DEAR] if "all" in names else list(names)
    if wrong := [name for name in wanted if name not in there]:
        raise UserError(f"the cache has no kind `{wrong[0]}`", hint=f"kinds: {', '.join(there)}; or all")
    for name in wanted:
        for path in there[name].paths:
            with disk_errors(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        yield there[name]


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
