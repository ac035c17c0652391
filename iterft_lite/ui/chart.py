"""The curve in characters, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from iterft_lite.digests import Json
from iterft_lite.experiment.steps import cycle_name

CHART_ROWS = 11
CHART_STEP = 7
"""Columns a cycle takes in the chart."""


def chart(scores: Mapping[int, Mapping[str, Json]], cycles: int, trait: str) -> Text:
    """Trait and coherence by cycle on a grid of characters, 0 to 100 from bottom to top."""
    grid = [[" "] * (CHART_STEP * (cycles + 2)) for _ in range(CHART_ROWS)]
    styles: dict[tuple[int, int], str] = {}

    def put(row: int, column: int, mark: str, style: str) -> None:
        grid[row][column] = mark
        styles[row, column] = style

    def place(value: float) -> int:
        return round((1 - value / 100) * (CHART_ROWS - 1))

    base = scores.get(-1, {}).get("trait")
    if base and base["mean"] is not None:
        for column in range(0, len(grid[0]), 2):
            put(place(base["mean"]), column, "-", "red")
    for number, score in sorted(scores.items()):
        column = CHART_STEP * (number + 1) + CHART_STEP // 2
        for scale, mark, style, offset in (("coherence", "o", "green", 1), ("trait", "●", "yellow", 0)):
            value = score[scale]
            if value["mean"] is None:
                continue
            if scale == "trait" and value["low"] is not None:
                for row in range(place(value["high"]), place(value["low"]) + 1):
                    put(row, column, "│", "yellow")
            put(place(value["mean"]), column + offset, mark, f"bold {style}")
    text = Text()
    for row, line in enumerate(grid):
        label = f"{100 - 100 * row // (CHART_ROWS - 1):>4} " if row % 5 == 0 else "     "
        text.append(label + "│", style="dim")
        for column, mark in enumerate(line):
            text.append(mark, style=styles.get((row, column), ""))
        text.append("\n")
    text.append("     └" + "─" * len(grid[0]) + "\n      ", style="dim")
    for number in range(-1, cycles + 1):
        text.append(cycle_name(number).center(CHART_STEP), style="bold" if number in scores else "dim")
    text.append("\n      ")
    text.append("●", style="bold yellow")
    text.append(f" {trait} with 95 % interval   ")
    text.append("o", style="bold green")
    text.append(" coherence   ")
    text.append("- -", style="red")
    text.append(" untouched model")
    return text
