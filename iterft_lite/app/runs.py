"""The runs of a folder: which there are, how far they are, and which is the newest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.digests import Json
from iterft_lite.engine.manifest import MANIFEST, Run
from iterft_lite.errors import FolderError, IterftError
from iterft_lite.report.report import read_report

RUNS = Path("runs")
"""Where a run goes that is given no `--out`, and where the newest is looked for."""


@dataclass(frozen=True)
class RunLine:
    """One run of a list.

    Attributes:
        finished, steps: How many of its planned steps are finished, and how many there are.
        changed: When it was last begun or gone on with, seconds since 1970.
    """

    folder: Path
    regime: str
    trait: str
    model: str
    finished: int
    steps: int
    changed: float


def default_out(name: str) -> Path:
    """Where a recipe's run goes that is given no `--out`."""
    return RUNS / name


def run_folders(parent: Path) -> list[Path]:
    """Run folders in a folder, the newest first; the folder itself where it is one."""
    found = [path.parent for path in (parent / MANIFEST, *parent.glob(f"*/{MANIFEST}")) if _is_run(path.parent)]
    return sorted(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime, reverse=True)


def newest_run(parent: Path = RUNS) -> Path:
    """The run that was last begun or gone on with.

    Raises:
        FolderError: If there is none.
    """
    found = run_folders(parent)
    if not found:
        raise FolderError(f"there is no run in `{parent}`", hint="name a run folder, or make one: iterft run nano_sft")
    return found[0]


def list_runs(parent: Path) -> Iterator[RunLine]:
    """A line for each run of a folder, the newest first; a folder that cannot be read is left out."""
    for folder in run_folders(parent):
        with contextlib.suppress(IterftError):
            yield _line(folder)


def seeded_score_of(folder: Path) -> dict[str, Json] | None:
    """The seeded model's trait score in a run, with its interval; None before it is there."""
    return next((cycle.trait for cycle in read_report(folder).cycles if cycle.cycle == 0), None)


def _line(folder: Path) -> RunLine:
    run = Run(folder)
    manifest = run.known()
    recipe, steps = manifest.recipe, manifest.steps
    finished = sum(run.folder(step).finished for step in steps)
    changed = (folder / MANIFEST).stat().st_mtime
    return RunLine(folder, recipe["regime"], manifest.value["trait"], recipe["model"], finished, len(steps), changed)


def _is_run(folder: Path) -> bool:
    with contextlib.suppress(IterftError, OSError):
        return bool(Run(folder).known())
    return False
