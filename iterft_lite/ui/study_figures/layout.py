"""Which recipe key is which: the lines of a panel, the panels of a row, and a row for each value of what else varies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iterft_lite.digests import Json, canonical
from iterft_lite.errors import UserError
from iterft_lite.report.study import Experiment, StudyReport

LINES, PANELS = "seed_rows", "rows"
"""The paper's: n_seed and n_sampled."""

MOST_ROWS = 8
"""Rows of panels that a page holds."""

MOST_PANELS = 8
"""Panels of a row."""


@dataclass(frozen=True)
class Layout:
    """Where experiments stand.

    Attributes:
        line, panel: Recipe keys; "" where nothing varies that could be one.
        rest: Other keys that vary.
    """

    line: str
    panel: str
    rest: tuple[str, ...] = ()

    def rows(self, study: StudyReport) -> list[dict[str, Json]]:
        """What each row of panels has of the other keys; only combinations that are there."""
        values = [study.values_of(key) for key in self.rest]
        combined = (dict(zip(self.rest, row, strict=True)) for row in itertools.product(*values))
        return [row for row in combined if any(has(each, row) for each in study.experiments)]

    def at(self, study: StudyReport, values: Mapping[str, Json]) -> list[Experiment]:
        """The experiments with these values, by the line's."""
        return [each for each in study.experiments if has(each, values)]


def has(experiment: Experiment, values: Mapping[str, Json]) -> bool:
    """Whether an experiment has these values."""
    return all(canonical(experiment.values.get(key)) == canonical(value) for key, value in values.items())


def layout(study: StudyReport, line: str = "", panel: str = "", *, usual: str = LINES, most_rows: int = MOST_ROWS) -> Layout:
    """The layout that is asked for, or else the paper's as far as these keys vary.

    Args:
        line, panel: Recipe keys; chosen if "".
        usual: The line's where it varies.

    Raises:
        UserError: If a key does not vary, or what varies besides is too much for one figure.
    """
    for key in filter(None, (line, panel)):
        if key not in study.keys:
            raise UserError(f"`{key}` does not vary in this study", hint=f"what varies: {', '.join(study.keys) or 'nothing'}")
    if line and line == panel:
        raise UserError(f"`{line}` cannot be both lines and panels", hint="give `--line` and `--panel` different keys")
    free = [key for key in sorted(study.keys, key=lambda key: _is_text(study, key)) if key not in (line, panel)]
    line = line or _taken(free, usual, LINES)
    panel = panel or _taken(free, PANELS)
    found = Layout(line, panel, tuple(key for key in study.keys if key not in (line, panel)))
    rows, panels = len(found.rows(study)), len(study.values_of(panel)) if panel else 1
    if rows > most_rows:
        raise UserError(
            f"{', '.join(found.rest)} vary besides: {rows} rows of panels, at most {most_rows} fit",
            hint=f"show a part: `--only {found.rest[0]}=VALUE`",
        )
    if panels > MOST_PANELS:
        raise UserError(
            f"`{panel}` has {panels} values, at most {MOST_PANELS} panels fit side by side", hint="`--only`, `--panel`"
        )
    return found


def _is_text(study: StudyReport, key: str) -> bool:
    """Whether a key's values are texts: those of numbers come first, since lines and panels show an order."""
    return any(isinstance(value, str) for value in study.values_of(key))


def _taken(free: list[str], *wanted: str) -> str:
    """The first of the wanted keys that is free, else the first free one, taken out; "" where none is left."""
    found = next((key for key in wanted if key in free), free[0] if free else "")
    if found:
        free.remove(found)
    return found


def longest(experiments: Sequence[Experiment]) -> int:
    """The last cycle that any of them is to reach."""
    planned = [int(report.recipe["cycles"]) for each in experiments for report in each.reports]
    return max(planned, default=1)
