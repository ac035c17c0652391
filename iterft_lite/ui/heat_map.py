"""A study's cells as a grid of characters: score, cycle and state of each, in the size of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from iterft_lite.digests import Json, canonical
from iterft_lite.engine.study import CellState, StudyCell
from iterft_lite.experiment.grid import SHORT
from iterft_lite.experiment.steps import cycle_name
from iterft_lite.ui.foreign import one_line

LEVELS = (
    (20, "black on #fff0d9"),
    (40, "black on #fdcc8a"),
    (60, "black on #fc8d59"),
    (80, "white on #d7301f"),
    (101, "white on #7f0000"),
)
"""Background by score: light to dark, also in grey; the number stands in it."""

WORDS: Mapping[str, tuple[str, str]] = {
    "queued": (".", "dim"),
    "result": ("result", "bold magenta"),
    "failed": ("failed", "bold red3"),
    "lost": ("lost", "bold red3"),
    "outside": ("outside", "dim"),
}
"""What stands in a cell without a score, or behind the score of one that has ended otherwise than done."""

MARKS: Mapping[str, str] = {
    "running": ">",
    "done": "",
    "queued": ".",
    "result": "!",
    "failed": "x",
    "lost": "?",
    "outside": "-",
}

WIDE, NARROW = 10, 5
"""Columns of a cell: `54.1 c3 >`, and `54>`."""

MOST_LABEL = 34


@dataclass(frozen=True)
class _Layout:
    """Which cell stands where.

    Attributes:
        columns: Values of the key along the top.
        rows: By label, the cells' names by column.
    """

    key: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]


def heat_map(cells: Sequence[StudyCell], states: Mapping[str, CellState], *, width: int, height: int) -> Text:
    """The grid. What does not fit the height is left out and counted.

    Args:
        cells: In the manifest's order.
        states: By name.
        width, height: In characters; at least 20 and 3.
    """
    layout = _layout(cells)
    wanted = max([len(layout.key.rpartition(".")[2]), *map(len, layout.rows)])  # a study may have no cell left
    label = min(MOST_LABEL, wanted, max(8, width // 2))
    wide = WIDE if label + 1 + WIDE * len(layout.columns) <= width else NARROW
    columns = layout.columns[: max(1, (width - label - 1) // wide)]
    lines = [_head(layout, columns, label, wide)]
    for row, names in layout.rows.items():
        lines.append(_row(row, [names.get(column) for column in columns], states, label, wide))
    if len(lines) > height:
        hidden = len(lines) - height + 1
        lines = [*lines[: height - 1], Text(f"... and {hidden} more rows", style="dim")]
    return Text("\n").join(lines)


def _layout(cells: Sequence[StudyCell]) -> _Layout:
    key, same = _top_key(cells), _same(cells)
    columns = list(dict.fromkeys(_word(cell.values[key]) for cell in _sorted(cells, key) if key in cell.values))
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        others = {name: value for name, value in cell.values.items() if name != key and name not in same}
        place = _word(cell.values[key]) if key in cell.values else columns[0] if columns else ""
        label = _label(others, cell) if key in cell.values else cell.name
        rows.setdefault(label, {})[place] = cell.name
    return _Layout(key, tuple(columns or [""]), dict(sorted(rows.items(), key=lambda row: _natural(row[0]))))


def _same(cells: Sequence[StudyCell]) -> set[str]:
    """Keys that have one value in all cells of the grid."""
    grid = [cell for cell in cells if not cell.arm]
    return {key for key in (grid[0].values if grid else ()) if len({canonical(cell.values.get(key)) for cell in grid}) == 1}


def _top_key(cells: Sequence[StudyCell]) -> str:
    """The key with the most values, seeds last."""
    values: dict[str, set[str]] = {}
    for cell in cells:
        for key, value in cell.values.items():
            values.setdefault(key, set()).add(canonical(value))
    return max(values, key=lambda key: (key != "seed", len(values[key])), default="")


def _sorted(cells: Sequence[StudyCell], key: str) -> list[StudyCell]:
    return sorted((cell for cell in cells if key in cell.values), key=lambda cell: _natural(_word(cell.values[key])))


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sorts numbers in a text as numbers."""
    parts: list[tuple[int, float, str]] = []
    for word in text.replace("=", " ").split():
        try:
            parts.append((0, float(word), ""))
        except ValueError:
            parts.append((1, 0.0, word))
    return parts


def _label(values: Mapping[str, Json], cell: StudyCell) -> str:
    words = " ".join(f"{SHORT.get(key, key.rpartition('.')[2])}={_word(value)}" for key, value in values.items())
    return one_line(" ".join(filter(None, (cell.arm, words))) or "base", 60)


def _word(value: Json) -> str:
    return f"{value:g}" if isinstance(value, float) else one_line(value if isinstance(value, str) else canonical(value), 30)


def _head(layout: _Layout, columns: Sequence[str], label: int, wide: int) -> Text:
    head = Text(_fit(layout.key.rpartition(".")[2], label).rjust(label) + " ", style="bold")
    for column in columns:
        head.append(_fit(column, wide - 1).center(wide - 1) + " ")
    return head


def _row(name: str, cells: Sequence[str | None], states: Mapping[str, CellState], label: int, wide: int) -> Text:
    line = Text(_fit(name, label).ljust(label) + " ")
    for cell in cells:
        line.append_text(_cell(states.get(cell, CellState()) if cell else None, wide - 1)).append(" ")
    return line


def _cell(state: CellState | None, width: int) -> Text:
    if state is None:
        return Text(" " * width)
    if state.score is None:
        word, style = WORDS.get(state.state, (MARKS[state.state], ""))
        return Text(_fit(word if len(word) <= width else word[0], width).center(width), style=style)
    mark = MARKS[state.state]
    cycle = cycle_name(state.cycle) if state.cycle >= 0 else "M0"
    text = f"{state.score:.1f} {cycle} {mark}".strip() if width >= WIDE - 1 else f"{state.score:.0f}{mark}"
    return Text(_fit(text, width).center(width), style=next(style for most, style in LEVELS if state.score < most))


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


LEGEND = "trait score, last cycle  > running  . queued  ! a result  x failed  ? lost"
