"""The untouched model as judge: M[0]'s own GGUF, which a run has anyway, read exactly. No key, no download."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iterft_lite.backends.judge.local import LocalJudge
from iterft_lite.gguf.base import base_gguf
from iterft_lite.gguf.merge import write_merged

QUANT = "q8_0"
"""The number format in which the untouched model judges, whatever the run's: half the memory of 16 bits, and nearly
their numbers."""


class BaseJudge(LocalJudge):
    """Meets the `Judge` protocol.

    Args:
        identity: Fields of the `JudgeIdentity`.
        model: Folder or hub name of M[0].
        room: As of `LocalJudge`.
    """

    def __init__(self, identity: Mapping[str, Any], *, model: str, **room: Any) -> None:
        super().__init__(identity, path=str(own_gguf(model)), **room)


def own_gguf(model: str) -> Path:
    """The model's GGUF in the cache, made there if it is not.

    Raises:
        ModelError: If there is no such model.
        NoRoom: If the disk has no room for it.
        ExportError: If it cannot be expressed.
    """
    base = base_gguf(model)
    path = base.folder / f"{QUANT}.gguf"
    if not path.is_file():
        write_merged(base.file, None, path, QUANT, threads=os.cpu_count() or 1)
    return path
