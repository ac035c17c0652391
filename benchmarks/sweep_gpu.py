"""Cells an hour of a study on one GPU and on several, and with one chain or two on each.

    python benchmarks/sweep_gpu.py [--size 4b] [--plans 1x1,1x2,2x2] [--cells 6] [--json FILE] [--work DIR]

A plan `2x2` is two GPUs with two chains each. Each plan runs the same kind of study in a folder of its own: cells of one cycle
after the seeded one (two models trained, exported, checked, asked and measured), which share the untouched model alone. Counted
is from the moment when as many cells have ended as are run side by side, up to the last one: starting processes, and the
untouched model, are behind it then. `--cells` is how many cells are counted on each GPU.

The models are those of `cycle_gpu.py`: a 4B's shape with random weights that never end by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cycle_gpu import write_recipe  # the benchmark beside this one


def run_plan(asked: argparse.Namespace, places: int, chains: int) -> dict[str, Any]:
    """Run one study and count its cells.

    Returns:
        `cells_an_hour`; `seconds` that they were counted over; `cells` that were counted; `start`: seconds before; `steps`:
        median seconds of a step by verb.
    """
    from iterft_lite.app.study_plan import StudyPlan
    from iterft_lite.app.sweep import CellEnded, CellEvent, CellStarted, open_sweep
    from iterft_lite.app.sweep_places import local_places
    from iterft_lite.engine.run import StepFinished
    from iterft_lite.machine.resolve import this_machine

    side_by_side = places * chains
    rates = [round((1 + number / 100) * 1e-9, 12) for number in range(side_by_side + asked.cells * places)]
    study = asked.work / f"study-{places}x{chains}.toml"
    study.write_text(f'base = {{ recipe = "cycle.toml" }}\n[sweep.grid]\n"train.learning_rate" = {rates}\n', encoding="utf-8")
    out = asked.work / f"out-{places}x{chains}"
    shutil.rmtree(out, ignore_errors=True)
    ended: list[float] = []
    took: dict[str, list[float]] = {}
    with open_sweep(StudyPlan(study), out, local_places(this_machine(), chains)[:places]) as sweep:
        began = time.perf_counter()
        for event in sweep.events():
            now = time.perf_counter() - began
            if isinstance(event, CellStarted | CellEnded):
                print(f"{places}x{chains} {now:7.1f} {event.cell} {event}"[:150], file=sys.stderr, flush=True)
            if isinstance(event, CellEvent) and isinstance(event.event, StepFinished) and event.event.step.cycle >= 0:
                took.setdefault(event.event.step.verb, []).append(event.event.completion.seconds)
            if isinstance(event, CellEnded):
                if event.state.state != "done":
                    raise SystemExit(f"{event.cell}: {event.state.failure}")
                ended.append(now)
    shutil.rmtree(out, ignore_errors=True)
    counted = len(ended) - side_by_side
    seconds = ended[-1] - ended[side_by_side - 1]
    return {
        "cells_an_hour": round(3600 * counted / seconds, 1),
        "cells": counted,
        "seconds": round(seconds, 1),
        "start": round(ended[side_by_side - 1], 1),
        "steps": {verb: round(statistics.median(seconds), 1) for verb, seconds in took.items()},
    }


def main() -> None:
    """Run the plans, and print cells an hour with the ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4b", choices=("tiny", "0.6b", "4b"))
    parser.add_argument("--plans", default="1x1,1x2,2x2")
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--answered", type=int, default=250)
    parser.add_argument("--written", type=int, default=300)
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--base", default="auto")
    parser.add_argument("--trainer", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "iterft-bench")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    asked.cycles, asked.vram, asked.export = 1, "auto", "merged"
    os.environ["ITERFT_CACHE"] = str(asked.work / "cache")
    write_recipe(asked)
    found: dict[str, dict[str, Any]] = {}
    for plan in asked.plans.split(","):
        places, chains = map(int, plan.split("x"))
        found[plan] = run_plan(asked, places, chains)
        first = next(iter(found.values()))["cells_an_hour"]
        print(f"{plan}: {found[plan]}, {found[plan]['cells_an_hour'] / first:.2f} times the first", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
