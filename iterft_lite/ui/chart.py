"""The curve in characters, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.text import Text

from iterft_lite.digests import Json
from iterft_lite.experiment.steps import cycle_name

CHART_ROWS = 11
CHART_STEP = 7
"""Columns of a cycle if there is room."""

LEAST_ROWS, MOST_ROWS = 5, 21

AXIS = 6
"""Columns of the labels and the line on the left."""

BELOW = 3
"""Lines below the grid: the axis, the cycles' names, the legend."""

TRAIT, COHERENCE, UNTOUCHED = "dark_orange3", "green4", "red3"
"""Colours that are readable on dark and light backgrounds."""


@dataclass
class _Grid:
    """Characters by row and column, the first row on top."""

    rows: int
    columns: int
    marks: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)

    def put(self, row: int, column: int, mark: str, style: str) -> None:
        if 0 <= column < self.columns:
            self.marks[row, column] = mark, style

    def place(self, value: float) -> int:
        """The row of a score."""
        return round((1 - min(100.0, max(0.0, value)) / 100) * (self.rows - 1))

    def line(self, row: int) -> Text:
        text = Text()
        for column in range(self.columns):
            text.append(*self.marks.get((row, column), (" ", "")))
        return text


def chart_step(cycles: int, width: int | None) -> int:
    """Columns of a cycle in a chart of a width; 0 if there is no room for one."""
    return CHART_STEP if width is None else max(0, min(CHART_STEP, (width - AXIS) // (cycles + 2)))


def chart(
    scores: Mapping[int, Mapping[str, Json]], cycles: int, trait: str, *, rows: int = CHART_ROWS, width: int | None = None
) -> Text:
    """Trait and coherence by cycle on a grid of characters, 0 to 100 from bottom to top.

    Args:
        scores: Results of the aggregate steps by cycle.
        rows: Lines of the grid; `BELOW` more follow.
        width: Columns of the whole chart; a good width if None.
    """
    step = chart_step(cycles, width)
    grid = _Grid(rows, step * (cycles + 2))
    base = scores.get(-1, {}).get("trait")
    if base and base["mean"] is not None:
        for column in range(0, grid.columns, 2):
            grid.put(grid.place(base["mean"]), column, "-", UNTOUCHED)
    for number, score in sorted(scores.items()):
        _draw(grid, step * (number + 1) + step // 2, score)
    return _framed(grid, rows).append(_names(scores, cycles, step)).append("\n").append(_legend(trait, width))


def _framed(grid: _Grid, rows: int) -> Text:
    """The grid with its axes."""
    labels = {0: " 100 ", rows - 1: "   0 "} | ({(rows - 1) // 2: "  50 "} if rows % 2 else {})
    text = Text(no_wrap=True, overflow="crop")
    for row in range(rows):
        text.append(labels.get(row, "     ") + "│", style="dim").append(grid.line(row)).append("\n")
    return text.append("     └" + "─" * grid.columns + "\n" + " " * AXIS, style="dim")


def _draw(grid: _Grid, column: int, score: Mapping[str, Json]) -> None:
    """One cycle's marks: coherence, the trait's interval, the trait."""
    trait, coherence = score["trait"], score["coherence"]
    if coherence["mean"] is not None:
        grid.put(grid.place(coherence["mean"]), column + 1, "o", f"bold {COHERENCE}")
    if trait["mean"] is None:
        return
    if trait["low"] is not None:
        for row in range(grid.place(trait["high"]), grid.place(trait["low"]) + 1):
            grid.put(row, column, "│", TRAIT)
    grid.put(grid.place(trait["mean"]), column, "●", f"bold {TRAIT}")


def _names(scores: Mapping[int, object], cycles: int, step: int) -> Text:
    """The cycles' names. If they do not fit side by side, every second one, then every third, and so on."""
    every = next((n for n in range(1, cycles + 3) if n * step > len(cycle_name(cycles))), 1)
    text = Text()
    for number in range(-1, cycles + 1):
        if (number + 1) % every:
            continue
        name = cycle_name(number) if step * every > 4 or number >= 0 else "M0"
        wide = min(every, cycles + 1 - number) * step
        text.append(name.center(wide)[:wide], style="bold" if number in scores else "dim")
    return text


def _legend(trait: str, width: int | None) -> Text:
    for words in (
        (f" {trait} with 95 % interval   ", " coherence   ", " untouched model"),
        (f" {trait}  ", " coherence  ", " untouched"),
        (f" {trait} ", " coh ", " M0"),
    ):
        text = Text(" " * AXIS)
        for mark, style, word in zip(("●", "o", "- -"), (f"bold {TRAIT}", f"bold {COHERENCE}", UNTOUCHED), words, strict=True):
            text.append(mark, style=style).append(word)
        if width is None or text.cell_len <= width:
            return text
    return text


# -- several curves over each other


def chart_over(
    curves: Mapping[str, Mapping[int, float]],
    cycles: int,
    styles: Mapping[str, str],
    *,
    rows: int = 15,
    width: int | None = None,
) -> Text:
    """Scores by cycle on one grid of characters, each curve drawn with its letter; where two fall together, both stand there.

    Args:
        curves: By letter and cycle; the untouched model is cycle -1.
        styles: By letter.
        rows: Lines of the grid.
    """
    step = chart_step(cycles, width)
    grid = _Grid(rows, step * (cycles + 2))
    taken: dict[tuple[int, int], int] = {}
    for letter, curve in curves.items():
        for number, score in sorted(curve.items()):
            place = grid.place(score), step * (number + 1) + step // 2
            beside = taken.get(place, 0)
            taken[place] = beside + 1
            grid.put(place[0], place[1] + min(beside, max(0, step - 2)), letter, f"bold {styles[letter]}")
    text = _framed(grid, rows)
    seen: dict[int, object] = {number: None for curve in curves.values() for number in curve}
    return text.append(_names(seen, cycles, step))
