"""`tradeoff`: what a rising trait costs, in coherence, perplexity and sentence length by cycle, and as paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from iterft_lite.errors import UserError
from iterft_lite.metrics.catalogue import METRICS
from iterft_lite.report.study import Experiment, Point, StudyReport
from iterft_lite.ui.study_figures import style
from iterft_lite.ui.study_figures.heatmap import shown_rise
from iterft_lite.ui.study_figures.layout import longest
from iterft_lite.ui.study_figures.style import OKABE_ITO, PANEL, STYLES, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 6
"""Cells of the figure."""

USUAL = 5
"""The paper's number of them."""

WIDE_RANGE = 20.0
"""Largest over smallest perplexity from which on its axis is logarithmic."""

PERPLEXITY, LENGTH = METRICS["perplexity_base"], METRICS["words_per_sentence"]


def tradeoff(study: StudyReport, names: Sequence[str] = ()) -> Figure:
    """Five panels.

    Args:
        names: Of experiments; those that rose the most if none is named.

    Raises:
        UserError: If one is not there, or there are too many.
    """
    from matplotlib.figure import Figure

    shown = named(study, names, MOST) if names else most_risen(study)
    looks = [Look(OKABE_ITO[n], style.MARKERS[n], STYLES[n], 1.5) for n in range(len(shown))]
    drawn = Figure(figsize=(PANEL * 5 + 1.7, PANEL + 1.2), layout="constrained")
    axes = list(drawn.subplots(1, 5))
    cycles = longest(shown)
    for panel, scale in zip(axes, ("trait", "coherence"), strict=False):
        style.score_axes(panel, cycles)
        panel.set_title(f"{scale}, score")
        for each, look in zip(shown, looks, strict=True):
            style.draw_curve(panel, each, look, scale)
            _markers(panel, each, look, scale)
    style.draw_untouched(axes[0], shown)
    _metric(axes[2], shown, looks, cycles, lambda point: point.metrics.get(PERPLEXITY.name), "perplexity under M0")
    _metric(axes[3], shown, looks, cycles, lambda point: point.metrics.get(LENGTH.name), "words a sentence")
    for panel in axes[:4]:
        panel.set_xlabel("cycle")
    _paths(axes[4], shown, looks)
    for each, look in zip(shown, looks, strict=True):
        style.draw_marks(axes[0], each, look)
    handles = [style.handle(look, style.name_of(each, study)) for each, look in zip(shown, looks, strict=True)]
    style.head(drawn, study, shown, [*handles, *style.mark_handles(shown)])
    chosen = "cells that were named" if names else "cells that rose the most"
    style.foot(drawn, study, [chosen, "on the right from cycle 0 (open) to the last", style.covers(shown)])
    return drawn


def most_risen(study: StudyReport) -> list[Experiment]:
    """The experiments with the largest rise, the largest first."""
    risen = [each for each in study.experiments if shown_rise(each) is not None]
    if not risen:
        raise UserError("no cell has scores in two cycles yet", hint="`iterft sweep status` says how far the study is")
    return sorted(risen, key=lambda each: -(shown_rise(each) or 0.0))[:USUAL]


def named(study: StudyReport, names: Sequence[str], most: int) -> list[Experiment]:
    """The experiments of these names, or of a cell with this name.

    Raises:
        UserError: If one is not there, or there are more than `most`.
    """
    found = []
    for name in names:
        mine = [each for each in study.everything if name in (each.name, *(cell.name for cell in each.cells))]
        if not mine:
            known = ", ".join(each.name for each in study.everything[:6])
            raise UserError(f"there is no cell `{name}`", hint=f"there are {known}" + ", ..." * (len(study.everything) > 6))
        found.append(mine[0])
    if len(found) > most:
        raise UserError(f"{len(found)} cells are named, at most {most} fit", hint="name fewer")
    return found


def _markers(axes: Axes, experiment: Experiment, look: Look, scale: str) -> None:
    if scale != "trait":
        points = {number: getattr(point, scale).mean for number, point in experiment.points.items() if number >= 0}
        _line(axes, {number: mean for number, mean in points.items() if mean is not None}, look)


def _line(axes: Axes, values: dict[int, float], look: Look) -> None:
    axes.plot(
        list(values), list(values.values()), linestyle=look.style, color=look.colour, marker=look.marker, linewidth=look.width,
        markersize=4.2, markeredgecolor="white", markeredgewidth=0.5, zorder=3,
    )  # fmt: skip


def _metric(
    axes: Axes,
    shown: Sequence[Experiment],
    looks: Sequence[Look],
    cycles: int,
    of: Callable[[Point], float | None],
    words: str,
) -> None:
    """A metric by cycle, and the untouched model's dashed."""
    from iterft_lite.ui.figures import BASELINE

    style.cycle_axis(axes, cycles)
    axes.set_box_aspect(1)
    axes.set_title(words)
    found = [{number: value for number, point in each.points.items() if (value := of(point)) is not None} for each in shown]
    values = [value for each in found for value in each.values()]
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=style.SOFT)
        axes.set_yticks([])
        return
    for each, look in zip(found, looks, strict=True):
        _line(axes, {number: value for number, value in each.items() if number >= 0}, look)
    untouched = [each[-1] for each in found if -1 in each]
    if untouched:
        axes.axhline(sum(untouched) / len(untouched), color=BASELINE, linestyle=(0, (4, 2.5)), linewidth=1.1, zorder=2)
    if min(values) > 0 and max(values) / min(values) > WIDE_RANGE:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(values) * 1.08)


def _paths(axes: Axes, shown: Sequence[Experiment], looks: Sequence[Look]) -> None:
    """Trait against coherence, a path a cell."""
    axes.set(xlim=(-4, 104), ylim=(-4, 104), xticks=(0, 25, 50, 75, 100), yticks=(0, 25, 50, 75, 100))
    axes.set(xlabel="coherence", ylabel="trait")
    axes.set_title("trait against coherence")
    axes.set_box_aspect(1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=style.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=2.5, width=0.6)
    for each, look in zip(shown, looks, strict=True):
        means = [(point.coherence.mean, point.trait.mean) for number, point in each.points.items() if number >= 0]
        path = [(across, up) for across, up in means if across is not None and up is not None]
        if path:
            across, up = zip(*path, strict=True)
            axes.plot(
                across, up, linestyle=look.style, color=look.colour, linewidth=1.3, marker=look.marker, markersize=3, zorder=3
            )
            axes.plot(across[0], up[0], look.marker, color="white", markeredgecolor=look.colour, markersize=5.5, zorder=4)
