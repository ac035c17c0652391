"""A study's folder: many runs, its cells, over one store, and where each of them is.

    STUDY/study.json       the manifest: base recipe, axes, cells with their values, calibrations
    STUDY/state.json       where each cell is, rewritten every few seconds while a sweep runs
    STUDY/lock             held by the sweep that writes here
    STUDY/stop             asks that sweep to end
    STUDY/steps/KEY/       the steps of all cells, each once (`store.py`)
    STUDY/cells/NAME/      a run folder (`manifest.py`) whose store is the study's
    STUDY/probes/NAME/     likewise, of the models that a calibration tried
    STUDY/logs/            what the backends printed, and the judge's ledger

Everything is read from files alone, so that a sweep can be watched from any terminal of any machine that sees the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from iterft_lite.digests import Json, canonical
from iterft_lite.engine.manifest import Run, damaged_hint
from iterft_lite.engine.run import FAILURE
from iterft_lite.errors import FileError, FolderError
from iterft_lite.experiment.grid import Cell
from iterft_lite.files import disk_errors, read_object, read_record, write_json

STUDY_FORMAT = 1

STUDY = "study.json"
STATE = "state.json"
STOP = "stop"
CELLS = "cells"
PROBES = "probes"

SILENT = 15.0
"""Seconds after which a sweep that has not written its state is taken to be gone."""

AHEAD = 3600.0
"""Seconds that another machine's clock may be ahead of this one's."""

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
"""What a cell can be called: it is a folder's name, and comes from a file that somebody else may have written."""

Score = Annotated[float, Field(ge=0, le=100)]

Count = Annotated[int, Field(ge=0, le=10**12)]

FINITE = {"allow_inf_nan": False}
"""How numbers are read."""

State = Literal["queued", "running", "done", "result", "failed", "lost", "outside"]
"""`result`: the cell ended in something that says something of the model (it diverged, or writes nothing usable), and is not
tried again. `lost`: it was running when the sweep was ended without a word. `outside`: an earlier form of the study had it."""


@dataclass(frozen=True)
class StudyCell:
    """A cell as the manifest has it.

    Attributes:
        name: Also of its folder.
        values: By recipe key, what it has otherwise than the base recipe.
        arm: The null arm that it belongs to; "" for the others.
        threshold: The score at cycle 0 that its number of seed rows was found for, if any.
        inside: Whether the study's file still asks for it.
    """

    __pydantic_config__: ClassVar[dict[str, bool]] = FINITE

    name: str
    values: Mapping[str, Json]
    arm: str = ""
    threshold: float | None = None
    inside: bool = True

    @classmethod
    def of(cls, cell: Cell) -> StudyCell:
        """A cell of the grid."""
        return cls(cell.name, cell.overrides(), cell.arm, cell.threshold)


@dataclass(frozen=True)
class CellState:
    """Where a cell is.

    Attributes:
        state: See `State`.
        step: Name of the step that is being done, or that failed; "" otherwise.
        cycle, cycles: The last cycle with a score, -2 before there is any; the last that there will be.
        score, coherence: That cycle's means (1-100); None before there are any.
        finished, steps: Steps that are finished, and all.
        done, total: Within the step that is being done; 0 where that is not known.
        worker: Where it runs: `gpu 0`, `cpu`, `node-3 gpu 1`; "" where it does not.
        attempts: How often it was begun by the sweep that wrote this.
        failure: Step, kind, message and hint of the last failure; None if it did not fail.
    """

    __pydantic_config__: ClassVar[dict[str, bool]] = FINITE

    state: State = "queued"
    step: str = ""
    cycle: int = -2
    cycles: Count = 0
    score: Score | None = None
    coherence: Score | None = None
    finished: Count = 0
    steps: Count = 0
    done: Count = 0
    total: Count = 0
    worker: str = ""
    attempts: int = 0
    failure: dict[str, Json] | None = None


@dataclass(frozen=True)
class SweepState:
    """What a sweep writes while it goes on.

    Attributes:
        cells: By name.
        written: When, seconds since 1970.
        ended: Whether the sweep has ended; one that has not and is silent for `SILENT` seconds is gone.
        host, pid: Whose sweep it is.
        workers: Where cells run.
        usd: What judging has cost, dollars.
        steps, finished: Distinct steps of all cells, and how many of them are finished.
        seconds_left: As far as it is known.
    """

    __pydantic_config__: ClassVar[dict[str, bool]] = FINITE

    cells: Mapping[str, CellState] = field(default_factory=dict)
    written: float = 0.0
    ended: bool = False
    host: str = ""
    pid: int = 0
    workers: tuple[str, ...] = ()
    usd: float = 0.0
    steps: Count = 0
    finished: Count = 0
    seconds_left: float | None = None

    def alive(self, now: float) -> bool:
        """Whether the sweep that wrote this goes on, as far as files tell."""
        return not self.ended and -AHEAD < now - self.written < SILENT


@dataclass(frozen=True)
class _Manifest:
    """What study.json has to hold, whoever wrote it."""

    name: str
    base: dict[str, Any]
    cells: list[StudyCell]
    calibrations: list[dict[str, Any]] = field(default_factory=list)
    created: str = ""


class StudyFolder:
    """A study's folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, cell: str) -> Run:
        """The run of a cell.

        Raises:
            FolderError: If a link stands in the place of its folder: it would lead out of the study.
        """
        place = self.root / CELLS / cell
        for path in (place.parent, place):
            if path.is_symlink():
                raise FolderError(f"`{path}` is a symbolic link where a folder of the study belongs", hint="remove it")
        return Run(place, store=self.root)

    def manifest(self) -> dict[str, Any] | None:
        """All of study.json, or None in a new folder.

        Raises:
            FolderError: If it cannot be read or is of a newer format.
        """
        path = self.root / STUDY
        try:
            found = read_object(path)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise FolderError(f"`{self.root}` is not a folder", hint="choose another folder with `--out`") from None
        except FileError as error:
            raise FolderError(error.message, hint=error.hint or damaged_hint(self.root)) from None
        number = found.get("format")
        if not isinstance(number, int) or number > STUDY_FORMAT:
            raise FolderError(f"`{path}` is of format {number!r}, this version reads {STUDY_FORMAT}", hint="update iterft_lite")
        try:
            _refuse_strange(path, read_record(path, _Manifest).cells)
        except FileError as error:
            raise FolderError(f"`{self.root}` is not the folder of a study: {error.message}") from None
        return found

    def known(self) -> dict[str, Any]:
        """The manifest of a study that is there.

        Raises:
            FolderError: If the folder is none.
        """
        found = self.manifest()
        if found is None:
            tried = sum(1 for _ in (self.root / PROBES).glob("*"))
            if tried:
                raise FolderError(
                    f"the study in `{self.root}` still searches its seed rows, {tried} tried so far",
                    hint="its cells are known after that; `iterft sweep stop` ends it, and the same `iterft sweep` goes on",
                )
            raise FolderError(
                f"`{self.root}` is not the folder of a study", hint="`iterft sweep STUDY.toml --out DIR` makes one"
            )
        return found

    def cells(self) -> list[StudyCell]:
        """The cells, in the order in which they are run; those that are outside now come last.

        Raises:
            FolderError: If the folder is not a study's, or its manifest is damaged.
        """
        fields = StudyCell.__dataclass_fields__
        return [StudyCell(**{key: each for key, each in row.items() if key in fields}) for row in self.known()["cells"]]

    def write_manifest(self, value: Mapping[str, Json], cells: Sequence[StudyCell]) -> None:
        """Note what was asked and which cells there are."""
        rows = [asdict(cell) for cell in cells]
        write_json(self.root / STUDY, {**value, "format": STUDY_FORMAT, "cells": rows})

    def write_state(self, state: SweepState) -> None:
        """Say where each cell is."""
        write_json(self.root / STATE, asdict(state))

    def state(self, now: float | None = None) -> SweepState:
        """Where each cell is: by the sweep's own word while it goes on, else by the cells' folders.

        Args:
            now: Seconds since 1970; the clock's if None.

        Raises:
            FolderError: If the folder is not a study's.
        """
        known = self.last_state()
        alive = known.alive(time.time() if now is None else now)
        found = {cell.name: self._cell_state(cell, known.cells.get(cell.name, CellState()), alive) for cell in self.cells()}
        return replace(known, cells=found, ended=not alive)

    def last_state(self) -> SweepState:
        """What a sweep wrote last, as it stands there; an empty one where it cannot be read."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, FileError):
            return read_record(self.root / STATE, SweepState)
        return SweepState()

    def _cell_state(self, cell: StudyCell, known: CellState, alive: bool) -> CellState:
        if not cell.inside and known.state != "running":
            return replace(known, state="outside")
        if known.state == "running" and not alive:
            return replace(known, state="lost", worker="")
        return known

    def ask_to_stop(self) -> None:
        """Leave word for the sweep that goes on here. A link in that place is not followed.

        Raises:
            FolderError: If it cannot be left.
        """
        path = self.root / STOP
        with disk_errors(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            os.close(handle)

    def forget_stop(self) -> None:
        """Take back what `ask_to_stop` left.

        Raises:
            FolderError: If it cannot be removed.
        """
        with disk_errors(self.root / STOP):
            (self.root / STOP).unlink(missing_ok=True)

    def failure(self, cell: str) -> dict[str, Json] | None:
        """How the last run of a cell failed; None if it did not."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, FileError):
            return read_object(self.root / CELLS / cell / FAILURE)
        return None


def is_study(root: Path) -> bool:
    """Whether a folder is a study's."""
    return (root / STUDY).is_file()


def _refuse_strange(path: Path, cells: Sequence[StudyCell]) -> None:
    """Refuse cells whose names are not plain folder names, or whose values do not belong in a recipe.

    Raises:
        FileError: With the first of them.
    """
    for cell in cells:
        if not NAME.fullmatch(cell.name):
            raise FileError(f"`{path}` has a cell `{cell.name}`: this cannot be the name of a cell")
        try:
            canonical(cell.values)
        except ValueError as error:
            raise FileError(f"`{path}`, cell `{cell.name}`: {error}") from None
