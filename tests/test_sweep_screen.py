"""What a sweep shows on a terminal: the grid, what is being done, and what has failed, at every size."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from iterft_lite.app.sweep import CellEnded, CellStarted
from iterft_lite.engine.study import CellState, StudyCell, SweepState
from iterft_lite.ui.heat_map import heat_map
from iterft_lite.ui.live_sweep import SweepView, sweep_panel

CELLS = [
    StudyCell(f"seed_rows{seeds}_rows{rows}", {"seed_rows": seeds, "rows": rows, "cycles": 3})
    for rows in (20, 30, 100)
    for seeds in (5, 10, 40, 60)
]
DIVERGED = {"step": "c0-train", "kind": "result", "message": "the training diverged", "hint": ""}
STATE = SweepState(
    {
        **{cell.name: CellState() for cell in CELLS},
        "seed_rows5_rows20": CellState("done", cycle=3, score=8.4),
        "seed_rows10_rows20": CellState("running", "c2-train", cycle=1, score=61.0, done=5, total=25, worker="gpu 0"),
        "seed_rows60_rows100": CellState("result", "c0-train", failure=DIVERGED),
        "seed_rows40_rows30": CellState("running", "base-export", cycle=-1, score=5.0),
    },
    workers=("gpu 0", "gpu 1"),
    host="pi",
    usd=1.25,
    steps=120,
    finished=30,
    seconds_left=4000.0,
)


def drawn(width: int, height: int, state: SweepState = STATE) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(sweep_panel("a study", CELLS, state, width=width, height=height, spent="2:00"))
    return str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "height"), [(40, 12), (60, 14), (80, 24), (120, 40), (200, 60)])
def test_the_view_of_a_sweep_fits_every_terminal(width: int, height: int) -> None:
    lines = drawn(width, height)
    assert len(lines) <= height
    assert {len(line) for line in lines} == {width}
    text = "\n".join(lines)
    assert "1 of 12 cells" in text
    assert "c2-train" in text


def test_every_cell_shows_its_score_its_cycle_and_its_state() -> None:
    text = "\n".join(drawn(100, 30))
    for part in (
        "8.4 c3",
        "61.0 c1 >",
        "5.0 M0 >",
        "result",
        "rows=100",
        "$1.25",
        "1 result",
        "about 1:07:00 left",
        "gpu 0, gpu 1 on pi",
    ):
        assert part in text
    assert "seed_rows60_rows100: result: the training diverged" in text
    assert "cycles" not in text  # all cells have the same


def test_a_machine_that_does_all_by_itself_is_named_once() -> None:
    assert "a study pi ─" in drawn(100, 30, replace(STATE, workers=("pi",)))[0]


def test_numeric_axes_are_sorted_by_value() -> None:
    lines = heat_map(CELLS, STATE.cells, width=80, height=20).plain.splitlines()
    assert lines[0].split() == ["seed_rows", "5", "10", "40", "60"]
    assert [line.split()[0] for line in lines[1:]] == ["rows=20", "rows=30", "rows=100"]


def test_rows_that_do_not_fit_are_counted() -> None:
    assert heat_map(CELLS, STATE.cells, width=80, height=3).plain.splitlines()[-1] == "... and 2 more rows"


def test_without_a_terminal_a_sweep_prints_a_line_for_each_result() -> None:
    console = Console(file=io.StringIO(), width=200)
    view = SweepView("a study", CELLS, lambda: STATE, console)
    with view:
        view.take(CellStarted("seed_rows5_rows20", "gpu 0", 2))
        view.take(CellEnded("seed_rows60_rows100", STATE.cells["seed_rows60_rows100"]))
    assert str(console.file.getvalue()).splitlines() == [  # type: ignore[attr-defined]
        "seed_rows5_rows20: begun on gpu 0, attempt 2",
        "seed_rows60_rows100: result (result: the training diverged)",
        "1 of 12 cells, 30 of 120 steps, 0 s, 1 result, $1.25",
    ]
