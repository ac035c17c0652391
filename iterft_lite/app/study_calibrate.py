"""Seed rows of a study's cells that its file gives as scores: found once for all cells that share their cycle 0.

The probes are runs without later cycles over the study's store: the ones that are chosen are the cells' own cycle 0.
"""

from __future__ import annotations

import functools
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from iterft_lite.app.calibrate_seeds import GRID, MOST, Found, numbers, search, seeded_score
from iterft_lite.app.session import prepare, take
from iterft_lite.app.study_plan import Calibration, PlannedCell, StudyPlan
from iterft_lite.app.sweep_places import Bench, Seat
from iterft_lite.digests import Json
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.run import Event, Shared, context_needed
from iterft_lite.engine.study import PROBES, STOP, StudyFolder
from iterft_lite.errors import RunError, TraitError
from iterft_lite.experiment.grid import Cell, Threshold, with_rows

BEAT = 1.0
"""Seconds between two signs of life."""

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


def calibrated(
    study: StudyPlan,
    calibrations: Sequence[Calibration],
    folder: StudyFolder,
    bench: Bench,
    guessed: Sequence[PlannedCell],
    on_event: OnProbe | None,
    reuse: Mapping[str, Path] | None = None,
) -> Calibrated:
    """Find seed rows, a search at each place at a time. Issued again, finished probes are read.

    Args:
        calibrations: What is searched; cells of the study's others are left out.
        guessed: The cells with some numbers of rows: they tell what the backends are to have room for, and which models are
            read again after the searches.
        reuse: Folders of finished steps that other stores hold, by key.

    Raises:
        RunError: If a probe fails, or its judge scores nothing.
    """
    answers = _Searches(folder, bench, guessed, on_event, reuse or {}).work_off(calibrations)
    rows: dict[str, int | None] = {}
    records: list[dict[str, Json]] = []
    notes: list[str] = []
    for calibration, found in zip(calibrations, answers, strict=True):
        records.append(_record(calibration, found))
        notes += _not_reached(calibration, found)
        reached = {each.threshold: each.seed_rows if each.reached else None for each in found}
        rows |= {cell.identity: reached[cell.values["seed_rows"].score] for cell in calibration.cells}
    known = [cell for cell in study.cells if cell.identity in rows or not isinstance(cell.values.get("seed_rows"), Threshold)]
    if len(known) < len(study.cells):
        waiting = len(study.cells) - len(known)
        notes.append(f"left out until they are asked for: {waiting} of the cells, whose seed rows were not searched")
    cells, doubled = _each_once(known, rows)
    return Calibrated(cells, (*notes, *doubled), tuple(records))


class _Searches:
    """Searches for seed rows over one store, side by side at the places that there are."""

    def __init__(
        self,
        folder: StudyFolder,
        bench: Bench,
        guessed: Sequence[PlannedCell],
        on_event: OnProbe | None,
        reuse: Mapping[str, Path],
    ) -> None:
        self._folder = folder
        self._bench = bench
        self._on_event = on_event
        self._reuse = reuse
        self._context = max(context_needed(each.plan) for each in guessed)
        self._shared = Shared(each.plan for each in guessed)
        self._lock = threading.Lock()
        self._is_ending = False

    def work_off(self, calibrations: Sequence[Calibration]) -> list[list[Found]]:
        """What each search found.

        Raises:
            IterftError: The first failure of any; the others are ended then.
        """
        seats: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        for seat in self._bench.seats:
            seats.put(seat)

        def search_one(calibration: Calibration) -> list[Found]:
            seat = seats.get()
            try:
                return self._search(calibration, seat)
            finally:
                seats.put(seat)

        self._folder.forget_stop()
        self._tell_others(ended=False)
        with ThreadPoolExecutor(len(self._bench.seats)) as pool:
            found = [pool.submit(search_one, calibration) for calibration in calibrations]
            try:
                self._wait(found)
            except BaseException:
                self._is_ending = True
                pool.shutdown(wait=False, cancel_futures=True)
                self._bench.close()
                self._tell_others(ended=True)
                raise
        return [each.result() for each in found]

    def _wait(self, searches: Sequence[Future[list[Found]]]) -> None:
        """Return when all searches have ended; meanwhile other terminals see that the sweep goes on, and can end it.

        Raises:
            RunError: If somebody asked the sweep to stop.
            BaseException: What a search raised.
        """
        left = set(searches)
        while left:
            done, left = wait(left, BEAT, FIRST_COMPLETED)
            self._tell_others(ended=False)
            for each in done:
                each.result()
            if (self._folder.root / STOP).exists():
                raise RunError("the sweep was asked to stop", hint="everything finished is kept: the same command goes on")

    def _tell_others(self, *, ended: bool) -> None:
        """Write the state as it was before, with a sign of life."""
        workers = tuple(seat.place.name for seat in self._bench.seats)
        before = self._folder.last_state()
        cells = {name: replace(cell, state="lost") if cell.state == "running" else cell for name, cell in before.cells.items()}
        state = replace(before, cells=cells, ended=ended, written=time.time(), workers=workers, pid=os.getpid())
        self._folder.write_state(replace(state, host=platform.node()))

    def _search(self, calibration: Calibration, seat: Seat) -> list[Found]:
        there = len(prepare(calibration.recipe(1), purpose="plan").resolved.inputs.seeds)
        if not there:
            raise TraitError("there are no seed rows to calibrate with")
        score = functools.cache(functools.partial(self._score, calibration, seat))
        return list(search(calibration.thresholds, numbers(GRID, min(MOST, there)), score))

    def _score(self, calibration: Calibration, seat: Seat, seed_rows: int) -> float:
        """The trait score of the model that was trained on so many rows."""
        name = f"{calibration.name}_seed_rows{seed_rows}"
        out = self._folder.root / PROBES / name
        known = Run(out, self._folder.root).manifest()
        prepared = prepare(calibration.recipe(seed_rows), known, known.value.get("judge") if known else None)
        self._shared.add(prepared.plan)
        with take(prepared, out, self._folder.root, self._reuse) as session:
            executor = self._bench.executor(seat, session, max(self._context, context_needed(prepared.plan)))
            return seeded_score(session, executor, seed_rows, lambda event: self._tell(name, event), self._shared)

    def _tell(self, name: str, event: Event) -> None:
        if self._is_ending:
            raise RunError("another search has failed")
        if self._on_event is not None:
            with self._lock:
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
