"""Seed rows of a study's cells that its file gives as scores: found once for all cells that share their cycle 0.

The probes are runs without later cycles over the study's store: the ones that are chosen are the cells' own cycle 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from iterft_lite.app.calibrate_seeds import GRID, MOST, Found, numbers, search, seeded_score
from iterft_lite.app.session import Prepared, prepare, take
from iterft_lite.app.study_plan import Calibration, StudyPlan
from iterft_lite.digests import Json
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.run import Event
from iterft_lite.engine.study import PROBES, StudyFolder
from iterft_lite.errors import TraitError
from iterft_lite.experiment.grid import Cell, Threshold, with_rows

OnProbe = Callable[[str, Event], None]
"""Takes the name of a probe and what happens in it."""


@dataclass(frozen=True)
class Calibrated:
    """A study's cells, all of them known.

    Attributes:
        cells: Each once.
        notes: What came out otherwise than asked, a sentence each.
        records: What was found, for the manifest.
    """

    cells: Sequence[Cell]
    notes: tuple[str, ...] = ()
    records: tuple[dict[str, Json], ...] = ()


def calibrated(study: StudyPlan, folder: StudyFolder, on_event: OnProbe | None) -> Calibrated:
    """Find the seed rows of every cell. Issued again, finished probes are read.

    Raises:
        RunError: If a probe fails, or its judge scores nothing.
    """
    rows: dict[str, int | None] = {}
    records: list[dict[str, Json]] = []
    notes: list[str] = []
    for calibration in study.calibrations:
        with _Probes(calibration, folder, on_event) as probes:
            found = list(search(calibration.thresholds, probes.numbers, probes.score))
        records.append(_record(calibration, found))
        notes += _not_reached(calibration, found)
        reached = {each.threshold: each.seed_rows if each.reached else None for each in found}
        rows |= {cell.identity: reached[cell.values["seed_rows"].score] for cell in calibration.cells}
    cells, doubled = _each_once(study.cells, rows)
    return Calibrated(cells, (*notes, *doubled), tuple(records))


class _Probes:
    """The models that a calibration tries, through one set of backends."""

    def __init__(self, calibration: Calibration, folder: StudyFolder, on_event: OnProbe | None) -> None:
        self._calibration = calibration
        self._folder = folder
        self._on_event = on_event
        self._executor: LocalExecutor | None = None
        there = len(prepare(calibration.recipe(1), purpose="plan").resolved.inputs.seeds)
        if not there:
            raise TraitError("there are no seed rows to calibrate with")
        self.numbers = numbers(GRID, min(MOST, there))

    def __enter__(self) -> _Probes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.close()

    def score(self, seed_rows: int) -> float:
        """The trait score of the model that was trained on so many rows."""
        name = f"{self._calibration.name}_seed_rows{seed_rows}"
        out = self._folder.root / PROBES / name
        known = Run(out, self._folder.root).manifest()
        recipe = self._calibration.recipe(seed_rows)
        prepared: Prepared = prepare(recipe, known, known.value.get("judge") if known else None)
        with take(prepared, out, self._folder.root) as session:
            if self._executor is None:
                self._executor = session.executor()
            return seeded_score(session, self._executor, seed_rows, lambda event: self._tell(name, event))

    def _tell(self, name: str, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(name, event)


def _record(calibration: Calibration, found: Sequence[Found]) -> dict[str, Json]:
    """What was found, by threshold."""
    return {
        "name": calibration.name,
        "cells": [cell.name for cell in calibration.cells],
        "found": {
            f"{each.threshold:g}": {"seed_rows": each.seed_rows, "score": each.score, "reached": each.reached} for each in found
        },
    }


def _not_reached(calibration: Calibration, found: Sequence[Found]) -> Iterator[str]:
    for each in found:
        if not each.reached:
            many = sum(cell.values["seed_rows"].score == each.threshold for cell in calibration.cells)
            yield (
                f"a score of {each.threshold:g} at cycle 0 is not reached: {each.seed_rows} seed rows, the most there are, "
                f"come to {each.score:.1f}; {many} cell{'s are' if many > 1 else ' is'} left out"
            )


def _each_once(cells: Sequence[Cell], rows: dict[str, int | None]) -> tuple[list[Cell], list[str]]:
    """The cells with their numbers of rows, each once; and which thresholds came to one number."""
    kept: dict[str, Cell] = {}
    notes: dict[str, None] = {}
    for cell in cells:
        if isinstance(cell.values.get("seed_rows"), Threshold):
            many = rows[cell.identity]
            if many is None:
                continue
            cell = with_rows(cell, many)
        first = kept.setdefault(cell.identity, cell)
        if first is not cell and first.threshold != cell.threshold:
            notes[
                f"the scores {first.threshold or 0:g} and {cell.threshold or 0:g} at cycle 0 both come to "
                f"{cell.values['seed_rows']} seed rows: one cell"
            ] = None
    return list(kept.values()), list(notes)
