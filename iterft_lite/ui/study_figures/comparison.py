"""Curves of `iterft compare` over each other, and how far each side lies above the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from iterft_lite.report.compare import LETTERS, Apart, Comparison
from iterft_lite.report.study import Experiment
from iterft_lite.ui.foreign import mathtext, one_line
from iterft_lite.ui.study_figures import style
from iterft_lite.ui.study_figures.layout import longest
from iterft_lite.ui.study_figures.style import OKABE_ITO, STYLES, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 2.6
"""Inches of a panel's side."""


def comparison_figure(comparison: Comparison) -> Figure:
    """Trait, coherence, and the difference from the first side, by cycle."""
    from matplotlib.figure import Figure

    sides = comparison.sides
    looks = [Look(OKABE_ITO[n], style.MARKERS[n], STYLES[n], 1.8) for n in range(len(sides))]
    drawn = Figure(figsize=(SIDE * 3 + 1.2, SIDE + 1.35), layout="constrained")
    trait, coherence, apart = drawn.subplots(1, 3)
    cycles = longest(sides)
    for panel, scale in ((trait, "trait"), (coherence, "coherence")):
        style.score_axes(panel, cycles)
        panel.set(title=f"{scale}, score", xlabel="cycle")
        for each, look in zip(sides, looks, strict=True):
            style.draw_curve(panel, each, look, scale)
    style.draw_untouched(trait, sides)
    _differences(apart, comparison.apart, looks[1:], cycles)
    handles = [
        style.handle(look, mathtext(one_line(f"{letter}: {each.name}", 60)))
        for letter, each, look in zip(LETTERS, sides, looks, strict=False)
    ]
    style.head(drawn, comparison.study, sides, [*handles, *_untouched(sides)])
    style.foot(drawn, comparison.study, [*comparison.notes, "on the right paired by question", style.covers(sides)])
    return drawn


def _untouched(sides: Sequence[Experiment]) -> list[object]:
    return style.mark_handles(sides)[:1] if any(-1 in each.points for each in sides) else []


def _differences(axes: Axes, apart: Sequence[Apart], looks: Sequence[Look], cycles: int) -> None:
    style.cycle_axis(axes, cycles)
    axes.set_box_aspect(1)
    axes.axhline(0, color=style.INK, linewidth=0.9)
    axes.set(title="trait, above A", xlabel="cycle", ylabel="points")
    for each, look in zip(apart, looks, strict=True):
        found = [(number, e.mean, e.low, e.high) for number, e in each.by_cycle.items() if number >= 0 and e.mean is not None]
        numbers = [number for number, *_ in found]
        low, high = ([float("nan") if row[end] is None else row[end] for row in found] for end in (2, 3))
        axes.fill_between(numbers, low, high, color=look.colour, alpha=0.13, linewidth=0)  # type: ignore[arg-type]
        axes.plot(
            numbers, [mean for _, mean, *_ in found], linestyle=look.style, color=look.colour, marker=look.marker,
            linewidth=look.width, markersize=4.2, markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
