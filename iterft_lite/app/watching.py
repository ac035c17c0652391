"""What a view of a run shows beside its events: forecast seconds of each step, and the newest text."""

from __future__ import annotations

import json
from pathlib import Path

from iterft_lite.app.session import Session
from iterft_lite.errors import FileError
from iterft_lite.files import ROWS, open_regular
from iterft_lite.machine.estimate import time_needed
from iterft_lite.machine.timing import read_table

TAIL = 16 << 10
"""Bytes at the end of a file of rows in which to look for the newest row."""


def step_seconds(opened: Session) -> tuple[dict[str, float], bool]:
    """Forecast seconds of each step, by name, and whether they are a guess: this machine never timed an act of the plan."""
    found = time_needed(opened.plan, opened.resolved, read_table())
    # a judge takes a small part of the time
    guessed = any(act != "judge" for act in found.missing)
    return {name: span.mid for name, span in found.steps.items()}, guessed


def newest_text(folder: Path) -> str:
    """Question and text of the last whole row in a step's folder; "" where it has none."""
    try:
        with open_regular(folder / ROWS) as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - TAIL))
            lines = file.read().split(b"\n")
    except (OSError, FileError):
        return ""
    for line in reversed(lines[:-1]):
        try:
            row = json.loads(line)
        except ValueError:
            return ""
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return f"{row.get('prompt') or ''}\n\n{row['text']}".strip()
        return ""
    return ""
