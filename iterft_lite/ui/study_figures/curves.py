"""Small multiples of curves: `sweep` and `dpo` (a panel a value of n_sampled), `grid` (a panel a cell), `seeds` (a panel an
experiment, its trainings faint)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iterft_lite.digests import Json, canonical
from iterft_lite.errors import UserError
from iterft_lite.report.study import Experiment, StudyReport, study_report
from iterft_lite.ui.study_figures import style
from iterft_lite.ui.study_figures.layout import Layout, layout, longest
from iterft_lite.ui.study_figures.style import PANEL, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRIP = 0.3
"""Height of the strip of coherence below a panel, of the panel's."""

WIDE = 4
"""Panels side by side where they have no order."""


def sweep(study: StudyReport, line: str = "", panel: str = "", *, usual: str = "seed_rows") -> Figure:
    """The paper's sweep: a panel a value of n_sampled, a line a value of n_seed, coherence below.

    Raises:
        UserError: If more varies than fits.
    """
    from matplotlib.figure import Figure

    place = layout(study, line, panel, usual=usual)
    rows, panels = place.rows(study), study.values_of(place.panel) if place.panel else [None]
    looks = line_looks(study, place)
    ratios = [height for _ in rows for height in (1.0, STRIP)]
    drawn = Figure(
        figsize=(PANEL * max(2, len(panels)) + 0.9, (PANEL * (1 + STRIP) + 0.22) * len(rows) + 1.25), layout="constrained"
    )
    axes = drawn.subplots(2 * len(rows), len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=ratios)
    cycles = longest(study.experiments)
    for number, row in enumerate(rows):
        for column, value in enumerate(panels):
            shown = place.at(study, {**row, **({place.panel: value} if place.panel else {})})
            upper, lower = axes[2 * number][column], axes[2 * number + 1][column]
            _panel(upper, lower, shown, [looks[_value(each, place)] for each in shown], cycles)
            if number == 0 and place.panel:
                upper.set_title(f"{style.key_words(place.panel)} = {style.value_words(value)}")
            if column == 0:
                upper.set_ylabel("\n".join(filter(None, (style.told(row, row), "score"))))
                lower.set_ylabel("coh.")
            if number == len(rows) - 1:
                lower.set_xlabel("cycle")
    handles = [style.handle(look, style.value_words(value)) for value, look in _legend(study, place, looks)]
    words = style.key_words(place.line) if place.line else ""
    style.head(drawn, study, study.experiments, [*handles, *style.mark_handles(study.experiments)], words)
    style.foot(drawn, study, _said(study, study.experiments))
    return drawn


def dpo(study: StudyReport, line: str = "", panel: str = "") -> Figure:
    """The same with a line a value of beta."""
    return sweep(study, line, panel, usual="train.dpo_beta")


def _panel(upper: Axes, lower: Axes, shown: Sequence[Experiment], looks: Sequence[Look], cycles: int) -> None:
    style.score_axes(upper, cycles)
    style.cycle_axis(lower, cycles)
    lower.set(ylim=(-4, 104), yticks=(0, 100))
    lower.set_box_aspect(STRIP)
    style.draw_untouched(upper, shown)
    for each, look in zip(shown, looks, strict=True):
        style.draw_curve(upper, each, look)
        style.draw_curve(lower, each, replace(look, width=0.9), "coherence", band=False)
    for each, look in zip(shown, looks, strict=True):
        style.draw_marks(upper, each, look)


def line_looks(study: StudyReport, place: Layout) -> dict[str, Look]:
    """How lines are drawn, by the line's value: from light to dark, each with a marker of its own."""
    values = study.values_of(place.line) if place.line else [None]
    colours = style.ramp(style.colour_of(study.experiments), len(values))
    return {
        canonical(value): Look(colour, style.MARKERS[number % len(style.MARKERS)])
        for number, (value, colour) in enumerate(zip(values, colours, strict=True))
    }


def _value(experiment: Experiment, place: Layout) -> str:
    return canonical(experiment.values.get(place.line) if place.line else None)


def _legend(study: StudyReport, place: Layout, looks: Mapping[str, Look]) -> list[tuple[Json, Look]]:
    return [(value, looks[canonical(value)]) for value in study.values_of(place.line)] if place.line else []


def _said(study: StudyReport, shown: Sequence[Experiment]) -> list[str]:
    amplified = any(each.word == "amplified" for each in shown)
    return [*([style.amplified_words(study)] if amplified else []), style.covers(shown)]


# -- a panel a cell


def grid(study: StudyReport, line: str = "", panel: str = "") -> Figure:
    """A panel a cell: n_sampled down, n_seed across, coherence dotted.

    Raises:
        UserError: If more than two keys vary.
    """
    from matplotlib.figure import Figure

    place = layout(study, line, panel, most_rows=1)
    rows = list(reversed(study.values_of(place.panel))) if place.panel else [None]
    columns = study.values_of(place.line) if place.line else [None]
    side = PANEL * 0.78
    drawn = Figure(figsize=(side * max(3, len(columns)) + 0.9, side * len(rows) + 1.3), layout="constrained")
    axes = drawn.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    look = Look(style.at_contrast(style.colour_of(study.experiments), 4.5))
    cycles = longest(study.experiments)
    for row, lines in zip(rows, axes, strict=True):
        for column, cell in zip(columns, lines, strict=True):
            values = {key: value for key, value in ((place.panel, row), (place.line, column)) if key}
            _cell(cell, place.at(study, values), look, cycles)
    for column, cell in zip(columns, axes[0], strict=True):
        cell.set_title(f"{style.key_words(place.line)} {style.value_words(column)}" if place.line else "")
    for row, cell in zip(rows, axes[:, 0], strict=True):
        cell.set_ylabel(f"{style.key_words(place.panel)} {style.value_words(row)}\nscore" if place.panel else "score")
    for cell in axes[-1]:
        cell.set_xlabel("cycle")
    handles = [style.handle(look, "trait"), style.handle(_coherent(look), "coherence"), *style.mark_handles(study.experiments)]
    style.head(drawn, study, study.experiments, handles)
    style.foot(drawn, study, ["in the corners: change from cycle 0 to the last", *_said(study, study.experiments)])
    return drawn


def _coherent(look: Look) -> Look:
    return replace(look, colour=style.SOFT, style=":", width=1.0, marker="")


def _cell(axes: Axes, shown: Sequence[Experiment], look: Look, cycles: int) -> None:
    style.score_axes(axes, cycles)
    if not shown:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=style.SOFT, fontsize=7)
    style.draw_untouched(axes, shown)
    for each in shown:
        style.draw_curve(axes, each, _coherent(look), "coherence", band=False)
        style.draw_curve(axes, each, look)
        style.draw_marks(axes, each, look)
        if each.change.mean is not None:
            axes.set_title(style.signed(each.change.mean), loc="right", fontsize=7, color=style.SOFT, pad=2)


# -- trainings of one experiment


def seeds(study: StudyReport) -> Figure:
    """A panel an experiment of several trainings: each faint, the first dark, their mean bold with its band.

    Raises:
        UserError: If no experiment has several trainings.
    """
    from matplotlib.figure import Figure

    shown = [each for each in study.everything if len(each.reports) > 1]
    if not shown:
        raise UserError("no experiment has several trainings", hint="let `seed` vary: `seed = [42, 43, 44]` in `[sweep.grid]`")
    columns = min(WIDE, len(shown))
    rows = -(-len(shown) // columns)
    drawn = Figure(figsize=(PANEL * max(2, columns) + 0.9, (PANEL + 0.25) * rows + 1.1), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False, sharey=True).flat)
    bold = Look(style.at_contrast(style.colour_of(shown), 4.0), width=2.6)
    for cell, each in zip(axes, shown, strict=False):
        _trainings(cell, each, bold, longest(shown))
        cell.set_title(style.name_of(each, study), fontsize=7.5)
    for cell in axes[len(shown) :]:
        cell.set_visible(False)
    for cell in axes[max(0, len(shown) - columns) : len(shown)]:
        cell.set_xlabel("cycle")
    drawn.supylabel("score", fontsize=8)
    handles = [
        style.handle(bold, "mean"),
        style.handle(replace(FIRST, colour=style.INK), "first training"),
        style.handle(OTHER, "other trainings"),
        *style.mark_handles(shown),
    ]
    style.head(drawn, study, shown, handles)
    style.foot(drawn, study, _said(study, shown))
    return drawn


FIRST = Look(style.INK, "", "-", 0.9)
OTHER = Look("#9a9a9a", "", "-", 0.8)


def _trainings(axes: Axes, experiment: Experiment, bold: Look, cycles: int) -> None:
    style.score_axes(axes, cycles)
    style.draw_untouched(axes, [experiment])
    style.draw_curve(axes, experiment, bold)
    for number, cell in enumerate(cell for cell in experiment.cells if cell.report):
        alone: Any = study_report([cell]).everything[0]
        style.draw_curve(axes, alone, FIRST if number == 0 else OTHER, band=False)
        style.draw_marks(axes, replace(alone, word="no change shown", corrected="no change shown"), OTHER)
    style.draw_marks(axes, replace(experiment, cells=()), bold)
