"""What the tests of strangers' folders share: a file that nobody may touch, and all that can be done with a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iterft_lite.digests import digest
from iterft_lite.engine.completion import RECORD
from iterft_lite.errors import IterftError
from tests.attacks import faults

PRECIOUS = "precious"
"""Name of the file that nobody may touch."""

SPECIAL: Mapping[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "huge": lambda path: (path.touch(), os.truncate(path, 3 << 30)),
    "gone": lambda _: None,
}
"""What may stand in the place of a file, and how it is made."""


def finished_by(make: Callable[[Path], Any], root: Path) -> Path:
    """A folder that a process of its own has made."""
    assert faults.forked(lambda: make(root)) == 0
    return root


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a JSON file; a completion record is given its right digest again, as a stranger would."""
    value = json.loads(path.read_text())
    edit(value)
    if path.name == RECORD:
        value["digest"] = digest({name: each for name, each in value.items() if name != "digest"})
    path.write_text(json.dumps(value))


def use(uses: Mapping[str, Callable[[Path], Any]], root: Path) -> None:
    """Do with a folder all that can be done with it; errors of ours are answers."""
    for do in uses.values():
        try:
            do(root)
        except IterftError:
            continue
