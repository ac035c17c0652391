"""`heatmap`: the largest late rise by cell, as a number and a shade."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iterft_lite.report.study import Experiment, StudyReport
from iterft_lite.ui.study_figures import style
from iterft_lite.ui.study_figures.layout import Layout, layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 0.62
"""Inches of a cell."""

MOST = 40.0
"""Points of a rise or fall at which shades end."""

COLOURS = ("#2166ac", "#f7f7f7", "#b35806")
"""Fall, none, rise: blue and orange, which all eyes tell apart; in grey the sign of the number does."""

ACROSS = 3
"""Maps side by side."""


def heatmap(study: StudyReport, line: str = "", panel: str = "") -> Figure:
    """A map for each value of what varies besides n_sampled (down) and n_seed (across).

    Raises:
        UserError: If there would be too many maps.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    place = layout(study, line, panel, most_rows=12)
    maps = place.rows(study)
    columns, rows = (study.values_of(key) if key else [None] for key in (place.line, place.panel))
    across = min(ACROSS, len(maps))
    down = -(-len(maps) // across)
    size = (max(3.6, (SIDE * len(columns) + 0.7) * across + 0.9), (SIDE * len(rows) + 0.75) * down + 0.95)
    drawn = Figure(figsize=size, layout="constrained")
    axes = list(drawn.subplots(down, across, squeeze=False).flat)
    shades = LinearSegmentedColormap.from_list("rise", COLOURS), Normalize(-MOST, MOST)
    for cell, row in zip(axes, maps, strict=False):
        _map(cell, study, place, row, shades)
    for cell in axes[len(maps) :]:
        cell.set_visible(False)
    style.head(drawn, study, study.experiments, [])
    late = any(each.late_rise is not None for each in study.experiments)
    what = "largest rise over cycle 0 among cycles from 4 on" if late else "change from cycle 0 to the last cycle"
    said = [f"numbers: {what}, points", f"framed: amplified, corrected for {len(study.experiments)} experiments (Holm)"]
    style.foot(drawn, study, [*said, *(["hatched: ended early"] if any(each.failures for each in study.experiments) else [])])
    return drawn


def shown_rise(experiment: Experiment) -> float | None:
    """What a cell of the map shows: the late rise, or before cycle 4 the change so far."""
    return experiment.change.mean if experiment.late_rise is None else experiment.late_rise


def _map(axes: Axes, study: StudyReport, place: Layout, row: object, shades: tuple[object, object]) -> None:
    from matplotlib.patches import Rectangle

    columns, rows = (study.values_of(key) if key else [None] for key in (place.line, place.panel))
    assert isinstance(row, dict)
    colours, scale = shades
    for down, wanted in enumerate(rows):
        for across, value in enumerate(columns):
            at = {key: each for key, each in ((place.panel, wanted), (place.line, value)) if key}
            for each in place.at(study, {**row, **at}):
                rise = shown_rise(each)
                face = colours(scale(rise)) if rise is not None else "#ffffff"  # type: ignore[operator]
                hatch = "////" if each.failures else None
                axes.add_patch(
                    Rectangle(
                        (across - 0.5, down - 0.5),
                        1,
                        1,
                        facecolor=face,
                        hatch=hatch,
                        edgecolor="#9a9a9a" if hatch else "#ffffff",
                        linewidth=0,
                    )
                )
                if each.corrected == "amplified":
                    axes.add_patch(
                        Rectangle((across - 0.43, down - 0.43), 0.86, 0.86, fill=False, edgecolor=style.INK, linewidth=1.6)
                    )
                _number(axes, across, down, rise, each)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5), xticks=range(len(columns)), yticks=range(len(rows)))
    axes.set_xticklabels([style.value_words(value) if place.line else "" for value in columns])
    axes.set_yticklabels([style.value_words(value) if place.panel else "" for value in rows])
    axes.set(
        xlabel=style.key_words(place.line) if place.line else "", ylabel=style.key_words(place.panel) if place.panel else ""
    )
    axes.set_title(style.told(row, row), fontsize=8)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _number(axes: Axes, across: int, down: int, rise: float | None, experiment: Experiment) -> None:
    strong = rise is not None and abs(rise) > 0.62 * MOST
    text = "" if rise is None else style.signed(rise)
    if experiment.failures:
        text = f"{text}\nended c{max(0, experiment.last)}" if text else "ended"
    plate = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    axes.text(
        across, down, text or "...", ha="center", va="center", fontsize=7 if "\n" in text else 8.5,
        color="#ffffff" if strong else style.INK, fontweight="bold" if experiment.corrected == "amplified" else "normal",
        bbox=plate if experiment.failures and not strong else None,
    )  # fmt: skip
