"""How many seed rows give a seeded model of a wanted strength: bisection, each probe an ordinary run without later cycles.

The authors compare models and traits at equal strength of cycle 0, not at equal numbers of seed rows (docs/protocol.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from iterft_lite.app.session import Session, open_run
from iterft_lite.engine.executor import Executor, LocalExecutor
from iterft_lite.engine.run import Event, Shared
from iterft_lite.errors import RunError, TraitError
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.files import write_json
from iterft_lite.machine.resolve import resolve, this_machine

THRESHOLDS = (5.0, 20.0, 40.0, 60.0, 80.0)
"""Cycle-0 scores to reach, as the authors chose them."""

GRID = 2
"""Step between numbers of seed rows, as the authors chose it for SFT."""

MOST = 200
"""Most seed rows that are tried, as the authors chose it."""

FILE = "calibration.json"


@dataclass(frozen=True)
class Probe:
    """One seeded model.

    Attributes:
        seed_rows: The number of rows that it was trained on.
        score: Its mean trait score.
        folder: Its run folder.
    """

    seed_rows: int
    score: float
    folder: Path


@dataclass(frozen=True)
class Found:
    """The result for one threshold.

    Attributes:
        threshold: The cycle-0 score to reach.
        seed_rows: The smallest number on the grid that reaches it; the largest number if none does.
        score: The score that it reaches.
        reached: The score is at least the threshold.
    """

    threshold: float
    seed_rows: int
    score: float
    reached: bool


def calibrate(
    recipe: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    grid: int = GRID,
    most: int = MOST,
    reuse: Sequence[Path] = (),
    on_event: Callable[[Event], None],
    on_begin: Callable[[int], None] = lambda _: None,
    on_probe: Callable[[Probe], None],
) -> list[Found]:
    """Find the number of seed rows for each threshold. The same command again continues where it stopped.

    Files: `out`/steps/, one store for all probes, which `--reuse` takes; `out`/seed_rows_NNN/ for each probe, a run over it;
    `out`/calibration.json.

    Args:
        recipe, overrides: As of `iterft run`; `seed_rows` and `cycles` are set by the search.
        thresholds: Cycle-0 scores (1-100).
        grid: Numbers of seed rows are multiples of this.
        most: Seed rows at most; never more than the recipe's trait or dataset has.
        reuse: Run folders, or folders of them; their finished steps are reused.
        on_event: Callback for the events of a probe.
        on_begin: Callback for the seed rows of each probe that begins.
        on_probe: Callback for each finished probe.

    Raises:
        UserError: As `open_run`.
        RunError: If a probe fails, or its judge scores nothing.
    """
    probes: dict[int, Probe] = {}
    shared: list[LocalExecutor] = []

    def probe(seed_rows: int) -> float:
        if seed_rows not in probes:
            on_begin(seed_rows)
            asked = [*overrides, f"seed_rows={seed_rows}", "cycles=0"]
            folder = out / f"seed_rows_{seed_rows:03d}"
            with open_run(recipe, asked, folder, reuse, store=out) as opened:
                if not shared:  # one set of processes for all probes: the base is loaded once
                    shared.append(opened.executor())
                score = seeded_score(opened, shared[0], seed_rows, on_event)
            probes[seed_rows] = Probe(seed_rows, score, folder)
            on_probe(probes[seed_rows])
        return probes[seed_rows].score

    try:
        there = len(resolve(read_recipe(recipe, overrides), this_machine()).inputs.seeds)
        if not there:
            raise TraitError("there are no seed rows to calibrate with")
        answers = list(search(sorted(thresholds), numbers(grid, min(most, there)), probe))
    finally:
        for executor in shared:
            executor.close()
    write_json(
        out / FILE,
        {
            "found": [asdict(found) for found in answers],
            "probes": [{"seed_rows": each.seed_rows, "score": each.score} for _, each in sorted(probes.items())],
        },
    )
    return answers


def seeded_score(
    probe: Session, executor: Executor, seed_rows: int, on_event: Callable[[Event], None], shared: Shared | None = None
) -> float:
    """Run a probe; the trait score of its seeded model.

    Args:
        seed_rows: Its seed rows, for the error.
        shared: What it knows together with other probes that run at the same time.

    Raises:
        RunError: If the probe fails, or its judge scores nothing.
    """
    with contextlib.closing(probe.events(executor, shared=shared)) as events:
        for event in events:
            on_event(event)
    made = probe.run.folder(probe.plan.steps["c0-aggregate"]).completion()
    score = made.results["trait"]["mean"] if made else None
    if score is None:
        raise RunError(f"the judge scored no answer of the model with {seed_rows} seed rows")
    return float(score)


def numbers(grid: int, most: int) -> list[int]:
    """The numbers of seed rows to try: multiples of `grid`, and the largest possible number."""
    return sorted({*range(grid, most + 1, grid), most})


def search(thresholds: Sequence[float], tried: Sequence[int], score: Callable[[int], float]) -> Iterator[Found]:
    """The fewest seed rows for each threshold, lowest threshold first, by bisection.

    Assumes that the score rises with the number of rows. If it does not, the result still reaches its threshold, but fewer rows
    might do so too.
    """
    low = 0
    for threshold in thresholds:
        high = len(tried) - 1
        if score(tried[high]) < threshold:
            yield Found(threshold, tried[high], score(tried[high]), reached=False)
            continue
        while low < high:
            middle = (low + high) // 2
            if score(tried[middle]) >= threshold:
                high = middle
            else:
                low = middle + 1
        yield Found(threshold, tried[low], score(tried[low]), reached=True)
