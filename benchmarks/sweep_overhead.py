"""Seconds of the program itself between two steps of a sweep: by the fakes, which take no time.

    python benchmarks/sweep_overhead.py [--side 5] [--cycles 3] [--chains 1] [--json FILE]

A study of side x side cells is swept at one place. A gap is the time from the end of a step of the device to the beginning of
the next one there: the record of the one is written and digested, what is not read any more is removed, the other's folder is
begun; between two cells also everything that a cell's end and beginning take. The last time is that of the whole sweep, shared
out to the steps that were done: also reading and writing rows, scores, and the fakes themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import open_sweep
from iterft_lite.app.sweep_places import Residents
from iterft_lite.engine.executor import LocalExecutor, Outcome, Task

MOST = 0.3
"""Seconds that are aimed at."""


@dataclass
class Work:
    """When a step was being done: its cell's recipe, and the clock's seconds."""

    cell: str
    began: float
    ended: float


@dataclass
class Timed:
    """A place with the fakes that notes when steps are done."""

    chains: int
    name: str = "fakes"
    done: list[Work] = field(default_factory=list)

    def open(self, residents: Residents) -> LocalExecutor:
        """Backends there."""
        done = self.done

        class Here(LocalExecutor):
            def run(self, task: Task) -> Outcome:
                began = time.perf_counter()
                try:
                    return super().run(task)
                finally:
                    if task.folder.step.queue == "device":
                        done.append(Work(task.recipe.name, began, time.perf_counter()))

        opened = residents.executor(residents.logs)
        opened.__class__ = Here
        return opened


def swept(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Sweep a study and measure."""
    values = [list(range(start, start + 2 * asked.side, 2)) for start in (6, 20)]
    base = (
        f'{{ recipe = "sft", model = "nano", trainer = "fake", generator = "fake", judge = "fake", cycles = {asked.cycles} }}'
    )
    study = work / "study.toml"
    study.write_text(f"base = {base}\n[sweep.grid]\nseed_rows = {values[0]}\nrows = {values[1]}\n", encoding="utf-8")
    place = Timed(asked.chains)
    began = time.perf_counter()
    with open_sweep(StudyPlan(study), work / "out", [place]) as sweep:
        opened = time.perf_counter()
        for _ in sweep.events():
            pass
        ended = time.perf_counter()
        steps = sweep.state().finished
    return {
        "cells": len(sweep.cells),
        "steps": steps,
        "start": round(opened - began, 2),
        "within a cell": gaps(place.done, of_one_cell=True),
        "between cells": gaps(place.done, of_one_cell=False),
        "seconds a step, all in all": round((ended - opened) / steps, 4),
        "load": [round(each, 1) for each in os.getloadavg()],
    }


def gaps(done: Sequence[Work], *, of_one_cell: bool) -> dict[str, float]:
    """Seconds between one step's end and the next one's beginning."""
    pairs = [(one, other) for one, other in itertools.pairwise(done) if (one.cell == other.cell) == of_one_cell]
    found = sorted(max(0.0, other.began - one.ended) for one, other in pairs)
    if not found:
        return {}
    ninth = found[min(len(found) - 1, int(0.9 * len(found)))]
    seconds = {"median": statistics.median(found), "p90": ninth, "most": found[-1]}
    return {"gaps": len(found), **{name: round(value, 4) for name, value in seconds.items()}}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--chains", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = swept(asked, Path(folder))
    for name, value in found.items():
        print(f"{name:28} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if found["within a cell"]["median"] > MOST:
        sys.exit(f"more than {MOST} s between two steps")


if __name__ == "__main__":
    main()
