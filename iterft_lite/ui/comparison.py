"""A comparison in the terminal: what the recipes differ in, the curves over each other, how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterft_lite.digests import Json, canonical
from iterft_lite.experiment.steps import cycle_name, cycle_title
from iterft_lite.hub import title
from iterft_lite.metrics.across_seeds import Estimate
from iterft_lite.report.compare import LETTERS, Comparison, sentences
from iterft_lite.report.study import Experiment
from iterft_lite.ui.chart import chart_over, chart_step
from iterft_lite.ui.foreign import one_line, safe
from iterft_lite.ui.tables import WARNING, first_that_fits, plain_table

STYLES = dict(zip(LETTERS, ("dodger_blue1", "dark_orange3", "green4", "magenta", "gold3", "grey58"), strict=True))
"""Readable on dark and on light backgrounds alike; the letters tell the curves apart."""


def show_comparison(comparison: Comparison, console: Console) -> None:
    """All of it."""
    for letter, side in zip(LETTERS, comparison.sides, strict=False):
        console.print(Text(letter, style=f"bold {STYLES[letter]}").append(f"  {_about(side)}", style="default"))
    console.print()
    for note in (*comparison.notes, *comparison.study.notes):
        console.print(safe(note), style=WARNING, markup=False)
    console.print(_settings(comparison))
    console.print()
    if chart := _chart(comparison, console.width):
        console.print(chart)
        console.print()
    tables = [_by_cycle(comparison, form) for form in _FORMS]
    console.print(first_that_fits(tables, console, console.width) or tables[-1])
    console.print()
    for sentence in sentences(comparison):
        console.print(safe(sentence), style="bold" if " ends " in sentence else "", markup=False)
    console.print(f"judge: {' and '.join(map(one_line, comparison.study.said('judge')))}", style="dim", markup=False)
    if all(len(side.reports) == 1 for side in comparison.sides):
        console.print(
            "one training a side: the intervals cover questions only, another seed may come out otherwise", style="dim"
        )


def _about(side: Experiment) -> str:
    reports = side.reports
    count = f"{len(reports)} trainings, " if len(reports) > 1 else ""
    recipe = reports[0].recipe
    trait = one_line(reports[0].manifest["trait"])
    return f"{one_line(side.name)}: {count}{recipe['regime']}, {trait}, {one_line(title(recipe['model']))}"


def _settings(comparison: Comparison) -> Table | str:
    if not comparison.settings:
        return "the recipes are the same"
    letters = LETTERS[: len(comparison.sides)]
    table = plain_table("they differ in", *letters)
    for key, values in comparison.settings.items():
        table.add_row(key, *(_value(value) for value in values))
    return table


def _value(value: Json) -> str:
    return "" if value is None else one_line(value if isinstance(value, str) else canonical(value), 30)


def _chart(comparison: Comparison, width: int) -> Text | None:
    curves = {
        letter: {number: point.trait.mean for number, point in side.points.items() if point.trait.mean is not None}
        for letter, side in zip(LETTERS, comparison.sides, strict=False)
    }
    cycles = max((number for curve in curves.values() for number in curve), default=0)
    return chart_over(curves, cycles, STYLES, width=width) if any(curves.values()) and chart_step(cycles, width) else None


@dataclass(frozen=True)
class _Form:
    """What the table of cycles shows."""

    titles: bool = True
    intervals: bool = True


_FORMS = (_Form(), _Form(titles=False), _Form(titles=False, intervals=False))


def _by_cycle(comparison: Comparison, form: _Form) -> Table:
    letters = LETTERS[: len(comparison.sides)]
    table = plain_table("cycle", *letters, *(f"{letter} - A" for letter in letters[1:]))
    for number in sorted({number for side in comparison.sides for number in side.points}):
        scores = [side.points[number].trait if number in side.points else None for side in comparison.sides]
        apart = [each.by_cycle.get(number) for each in comparison.apart]
        title = cycle_title(number) if form.titles else cycle_name(number)
        table.add_row(title, *map(_score, scores), *(_apart(each, form) for each in apart))
    return table


def _score(estimate: Estimate | None) -> str:
    return "" if estimate is None or estimate.mean is None else f"{estimate.mean:.1f}"


def _apart(estimate: Estimate | None, form: _Form) -> str:
    if estimate is None or estimate.mean is None:
        return ""
    is_known = form.intervals and estimate.low is not None and estimate.high is not None
    return f"{estimate.mean:+.1f}" + (f" [{estimate.low:+.0f} {estimate.high:+.0f}]" if is_known else "")
