"""The runs in a folder: their progress, and the newest one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.digests import Json
from iterft_lite.engine.manifest import MANIFEST, Run
from iterft_lite.engine.study import CELLS, is_study
from iterft_lite.errors import FolderError, IterftError
from iterft_lite.report.report import read_report

RUNS = Path("runs")
"""The default folder for runs, in which commands look for the newest."""


@dataclass(frozen=True)
class RunLine:
    """One run of a list.

    Attributes:
        finished, steps: Numbers of its finished and of its planned steps.
        changed: When its last session began, seconds since 1970.
    """

    folder: Path
    regime: str
    trait: str
    model: str
    finished: int
    steps: int
    changed: float


def default_out(name: str) -> Path:
    """The default folder of a recipe's run."""
    return RUNS / name


def run_folders(parent: Path) -> list[Path]:
    """Run folders in a folder, the newest first; the folder itself if it is a run."""
    found = [path.parent for path in (parent / MANIFEST, *parent.glob(f"*/{MANIFEST}")) if _is_run(path.parent)]
    return sorted(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime, reverse=True)


def runs_below(folder: Path) -> list[Path]:
    """The runs of a study, of a folder of runs, or of one of studies, by name."""
    studies = [folder] if is_study(folder) else studies_in(folder)
    return sorted(run for place in (folder, *(study / CELLS for study in studies)) for run in run_folders(place))


def studies_in(folder: Path) -> list[Path]:
    """The studies in a folder, by name."""
    return sorted(path for path in folder.glob("*") if is_study(path))


def newest_run(parent: Path = RUNS) -> Path:
    """The run whose session began last.

    Raises:
        FolderError: If there is none.
    """
    found = run_folders(parent)
    if not found:
        raise FolderError(f"there is no run in `{parent}`", hint="name a run folder, or make one: iterft run nano_sft")
    return found[0]


def list_runs(parent: Path) -> Iterator[RunLine]:
    """A line for each run of a folder, or cell of a study, the newest first. Skips folders that cannot be read.

    Raises:
        FolderError: If another folder than the usual one was named and is not there.
    """
    if parent != RUNS and not parent.is_dir():
        raise FolderError(f"there is no folder `{parent}`")
    for folder in run_folders(parent / CELLS if is_study(parent) else parent):
        with contextlib.suppress(IterftError):
            yield _line(folder)


def seeded_score_of(folder: Path) -> dict[str, Json] | None:
    """The seeded model's trait score in a run, with its interval; None if it is not finished."""
    return next((cycle.trait for cycle in read_report(folder).cycles if cycle.cycle == 0), None)


def verdict_folders(judge: Path) -> dict[int, Path] | None:
    """Folders of another judge's verdicts, by cycle; None where it is none that was asked beside the run's own.

    Args:
        judge: Its folder in the run.
    """
    run = Run(judge)
    known = run.manifest() if judge.is_dir() else None
    if known is None:
        return None
    steps = [step for step in known.steps if step.verb == "judge" and not step.part]
    return {step.cycle: run.folder(step).path for step in steps if run.folder(step).finished}


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
