"""The curve as a picture: trait and coherence by cycle, in the paper's style."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterft_lite.files import write_output
from iterft_lite.hub import title
from iterft_lite.report.report import Report
from iterft_lite.ui.foreign import mathtext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "#800000"
COHERENCE = "#4b8b5a"


@dataclass(frozen=True)
class Inks:
    """Colours of a figure's lines and letters."""

    ink: str = "#1d2129"
    soft: str = "#666666"
    grid: str = "#dddddd"
    baseline: str = BASELINE
    coherence: str = COHERENCE


LETTERS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
"""What matplotlib draws in the colour of letters."""

PAGE: Mapping[str, str] = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--baseline)",
    "#050505": "var(--coherence)",
}
"""Colours that stand for those of a page, which are others on a dark screen."""


def figure(report: Report, inks: Inks = Inks()) -> Figure:
    """Scores (1-100) against cycle with 95 % bands; the untouched model as a dashed line, as in the paper's figures."""
    import matplotlib  # slow to import, and only wanted here

    colours: dict[Any, Any] = dict.fromkeys(LETTERS, inks.ink)
    with matplotlib.rc_context(colours):
        return _figure(report, inks)


def _figure(report: Report, inks: Inks) -> Figure:
    from matplotlib.figure import Figure

    trait_colour = report.manifest["colour"]
    drawn = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    axes = drawn.subplots()
    base = next((cycle for cycle in report.cycles if cycle.cycle < 0 and cycle.trait), None)
    if base and base.trait and base.trait["mean"] is not None:
        axes.axhline(base.trait["mean"], color=inks.baseline, linestyle="--", linewidth=1.2, label="untouched model, trait")
    for scale, colour, style in (("coherence", inks.coherence, ":"), ("trait", trait_colour, "-")):
        points = [(cycle.cycle, getattr(cycle, scale)) for cycle in report.cycles if cycle.cycle >= 0 and getattr(cycle, scale)]
        points = [(number, score) for number, score in points if score["mean"] is not None]
        numbers = [number for number, _ in points]
        # a cycle without an interval leaves a gap in the band
        low, high = ([math.nan if s[end] is None else s[end] for _, s in points] for end in ("low", "high"))
        axes.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(numbers, [s["mean"] for _, s in points], style, color=colour, marker="o", markersize=4, label=scale)
    recipe = report.recipe
    axes.set(ylim=(-4, 104), yticks=(0, 25, 50, 75, 100), xlabel="cycle", ylabel="score (1-100)")
    axes.set_xticks(range(recipe["cycles"] + 1))
    axes.set_xlim(-0.3, recipe["cycles"] + 0.3)
    heading = f"{report.manifest['trait']}, {recipe['regime']}, {title(recipe['model'])}"
    axes.set_title(mathtext(heading), loc="left", fontsize=11)
    name = report.judge["name"]
    judge = ": ".join(filter(None, (name, report.judge["note"].removeprefix(f"{name} judge: "))))
    drawn.supxlabel(mathtext(textwrap.fill(f"judge {judge}", 120)), fontsize=7, color=inks.soft, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=inks.grid, linewidth=0.6)
    # above the curves, never on them
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    return drawn


def write_png(report: Report, path: Path) -> None:
    """Write the figure."""
    drawn = io.BytesIO()
    figure(report).savefig(drawn, format="png")
    write_output(path, drawn.getvalue())


def svg(report: Report) -> str:
    """The figure as an SVG element, for a page: in the page's colours, light or dark."""
    buffer = io.StringIO()
    figure(report, Inks(*PAGE)).savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    for stand_in, colour in PAGE.items():
        text = text.replace(stand_in, colour)
    return text[text.index("<svg") :]
