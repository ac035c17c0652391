"""The cells of a study, or runs that are in none, read off their folders: what each was, how far it came, its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iterft_lite.digests import Json, canonical
from iterft_lite.engine.manifest import MANIFEST, Run
from iterft_lite.engine.study import CELLS, State, StudyFolder, is_study
from iterft_lite.errors import FolderError, IterftError, failure_of
from iterft_lite.experiment.grid import Cell, chosen
from iterft_lite.experiment.null_arms import null_arms_of
from iterft_lite.experiment.recipe import MACHINE_KEYS
from iterft_lite.experiment.recipe_keys import flat
from iterft_lite.report.report import Report, StepReader, last_failure, read_report

SEED = "seed"
"""The recipe's key: cells that differ in it alone are one experiment."""

NO_DIFFERENCE = MACHINE_KEYS | {"name", "keep", "max_usd"}
"""Recipe keys that no result depends on."""


@dataclass(frozen=True)
class CellReport:
    """A cell as it stands.

    Attributes:
        name: What it is called; unique among those that were read together.
        folder: Its run folder, which may not be there yet.
        values: By recipe key, what cells that were read together differ in.
        arm: The null arm that it belongs to; "" for the others.
        threshold: The score at cycle 0 that its number of seed rows was found for, if any.
        state: As in `engine/study.py`: by its folder where that tells, else by what the sweep wrote.
        failure: Step, kind, message and hint of how it ended; None if it did not fail.
        report: None before it has begun, or where its folder cannot be read.
    """

    name: str
    folder: Path
    values: Mapping[str, Json]
    arm: str = ""
    threshold: float | None = None
    state: State = "queued"
    failure: Mapping[str, Json] | None = None
    report: Report | None = None

    @property
    def experiment(self) -> str:
        """One text for cells that are alike but for their random seed."""
        return canonical([self.arm, sorted([key, value] for key, value in self.values.items() if key != SEED)])


ReadRun = Callable[[Path, StepReader], Report]
"""Reads a run folder, with what is known of the steps of its store."""


def read_cells(folders: Sequence[Path], only: Sequence[str] = (), read: ReadRun = read_report) -> list[CellReport]:
    """The cells of studies, run folders, and folders of those; each step that they share is read and verified once.

    Args:
        only: What cells must have to be read: `rows=50`.
        read: How a run is read: by its own judge's scores unless something else is given.

    Raises:
        FolderError: If there are none.
        RecipeError: If no cell has what `only` says.
        IterftError: If no folder can be read: why the first cannot.
    """
    found = [cell for folder in folders for cell in _cells_at(folder)]
    # A run may be named twice: by itself, as a cell of its study, through a link. The same folder is one cell.
    unique = list({os.path.realpath(cell.folder): cell for cell in found}.values())
    if only:
        kept = {cell.identity for cell in chosen([_as_cell(cell) for cell in unique], only)}
        unique = [cell for cell in unique if _as_cell(cell).identity in kept]
    reader = _Reader(read)
    found = [reader.read(cell) for cell in unique]
    if reader.errors and not any(cell.report for cell in found):
        raise reader.errors[0]
    one_study = len(folders) == 1 and is_study(folders[0])
    return _named_apart(_with_differences(found if one_study else [_whole(cell) for cell in found]))


def _as_cell(cell: CellReport) -> Cell:
    return Cell(cell.values, cell.arm, cell.threshold)


def _cells_at(folder: Path) -> Iterator[CellReport]:
    """The cells of a folder, not read yet."""
    if is_study(folder):
        yield from _cells_of_study(folder)
        return
    runs = [folder] if (folder / MANIFEST).is_file() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    studies = sorted(path for path in folder.glob("*") if is_study(path)) if not runs else []
    if not runs and not studies:
        raise FolderError(
            f"`{folder}` is neither a run nor a study, and holds none", hint="`iterft run` and `iterft sweep` make them"
        )
    for study in studies:
        yield from _cells_of_study(study)
    for run in runs:
        recipe = Run(run).known().recipe
        arms = null_arms_of(recipe)
        name = run.name or str(run)
        yield CellReport(name, run, _settings(recipe), arms[0].name if len(arms) == 1 else "")


def _settings(recipe: Mapping[str, Any]) -> dict[str, Json]:
    return {key: value for key, value in flat(recipe).items() if key not in NO_DIFFERENCE}


def _cells_of_study(root: Path) -> Iterator[CellReport]:
    folder = StudyFolder(root)
    base = flat(folder.known().get("base") or {}) if isinstance(folder.known().get("base"), Mapping) else {}
    state = folder.state()
    cells = [cell for cell in folder.cells() if state.cells[cell.name].state != "outside"]
    keys = list(dict.fromkeys(key for cell in cells for key in cell.values))
    for cell in cells:
        # A cell only lists what it changes. Null arms and added cells leave axes of the grid out: there the base recipe's value
        # holds.
        values = {key: cell.values.get(key, base.get(key)) for key in keys if key in cell.values or key in base}
        known = state.cells[cell.name]
        yield CellReport(cell.name, root / CELLS / cell.name, values, cell.arm, cell.threshold, known.state, known.failure)


class _Reader:
    """Reads cells; one that cannot be read says why, and the others are read."""

    def __init__(self, read: ReadRun) -> None:
        self._read = read
        self.steps = StepReader()
        self.errors: list[IterftError] = []

    def read(self, cell: CellReport) -> CellReport:
        """The same cell with its report and state."""
        if not (cell.folder / MANIFEST).is_file():
            return cell
        try:
            report = self._read(cell.folder, self.steps)
        except IterftError as error:
            self.errors.append(error)
            return replace(cell, state="failed", failure={"step": "", **asdict(failure_of(error))})
        failure = last_failure(cell.folder) or cell.failure
        return replace(cell, report=report, failure=None if report.complete else failure, state=_state(cell, report, failure))


def _state(cell: CellReport, report: Report, failure: Mapping[str, Json] | None) -> State:
    if report.complete:
        return "done"
    if failure is None or cell.state == "running":
        return cell.state
    return "result" if failure.get("kind") == "result" else "failed"


def _with_differences(cells: Sequence[CellReport]) -> list[CellReport]:
    """The cells with the values in which they differ from each other; their seed stays."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.values))
    seen = {key: {canonical(_value(cell, key)) for cell in cells if not cell.arm or len(cells) == 1} for key in keys}
    varied = [key for key in keys if len(seen[key]) > 1 or key == SEED]
    return [replace(cell, values={key: found for key in varied if (found := _value(cell, key)) is not None}) for cell in cells]


def _whole(cell: CellReport) -> CellReport:
    """The same cell with all settings of its run: those of other studies may differ in any."""
    return replace(cell, values={**cell.values, **_settings(cell.report.recipe)}) if cell.report else cell


def _value(cell: CellReport, key: str) -> Json:
    """A cell's value of a key: as the study has it, else as its run's recipe was resolved."""
    if key in cell.values or cell.report is None:
        return cell.values.get(key)
    return flat(cell.report.recipe).get(key)


def _named_apart(cells: Sequence[CellReport]) -> list[CellReport]:
    """The cells, each with a name of its own: with its folder's parents where two are called alike."""
    names = [cell.name for cell in cells]
    return [replace(cell, name="/".join(cell.folder.parts[-3:]) if names.count(cell.name) > 1 else cell.name) for cell in cells]
