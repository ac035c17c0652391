"""A kill or an error at single file operations, by chance: a run goes on and ends as an undisturbed one.

`python -m tests.attacks.faults` does this thousands of times (`docs/reliability.md`).
"""

from __future__ import annotations

import random

from tests.attacks import faults


def test_a_run_continues_after_a_fault_at_any_file_operation() -> None:
    assert faults.operations(6, random.Random(1), ("dpo",)).keys() == {"good"}
