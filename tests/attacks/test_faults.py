"""A kill or an error at single file operations, by chance: a run goes on and ends as an undisturbed one.

`python -m tests.attacks.faults` does this thousands of times (`docs/reliability.md`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from iterft_lite.app.sweep import locked
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.study import StudyFolder
from iterft_lite.errors import StoreError
from iterft_lite.files import FolderLock
from tests.attacks import faults


def test_a_run_continues_after_a_fault_at_any_file_operation() -> None:
    assert faults.operations(6, random.Random(1), ("dpo",)).keys() == {"good"}


@pytest.mark.parametrize("enter", [Run, lambda root: locked(StudyFolder(root))])
@pytest.mark.parametrize("fails", ["lock", "folder"])
def test_a_folder_left_half_made_by_a_fault_can_be_used_again(
    tmp_path: Path, enter: Callable[[Path], AbstractContextManager[object]], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error") if fails == "folder" else StoreError("no lock")

    root = tmp_path / "out"
    with monkeypatch.context() as patch:
        if fails == "lock":
            patch.setattr(FolderLock, "acquire", fail)
        else:
            root.mkdir()
            patch.setattr(Path, "mkdir", fail)
        with contextlib.suppress(StoreError), enter(root):
            raise AssertionError("it is entered all the same")
    with enter(root):
        assert (root / "steps").is_dir()
