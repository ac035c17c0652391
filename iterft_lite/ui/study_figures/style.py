"""What all figures of studies share: colours that are told apart without colour, the axes, the marks, what is written below."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iterft_lite.digests import Json, canonical
from iterft_lite.hub import title
from iterft_lite.report.study import Experiment, StudyReport
from iterft_lite.ui.figures import BASELINE
from iterft_lite.ui.foreign import mathtext, one_line
from iterft_lite.ui.html import contrast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1d2129", "#555555", "#e3e3e3"

SETTINGS: Mapping[str, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.7,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "pdf.fonttype": 42,
    "svg.hashsalt": "iterft",
    "hatch.linewidth": 0.6,
}
"""Of matplotlib; letters stay letters in a PDF, and the same numbers come to the same bytes."""

PANEL = 1.75
"""Inches of a panel's side."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""By line: lines are told apart in grey too."""

CONTRASTS = (2.0, 12.0)
"""Contrast to white of a ramp's lightest and darkest line."""

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#8f2d6b", "#b8860b", "#1d2129")
"""Colours that people with any kind of colour blindness tell apart (Okabe and Ito 2008), dark enough for lines on white."""

STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (3, 1, 1, 1, 1, 1)), "-")

WORDS: Mapping[str, str] = {
    "rows": "n_sampled",
    "seed_rows": "n_seed",
    "train.dpo_beta": "beta",
    "train.learning_rate": "learning rate",
}
"""What the paper calls recipe keys."""


def key_words(key: str) -> str:
    """A recipe's key in a figure."""
    return WORDS.get(key, key.rpartition(".")[2].replace("_", " "))


def signed(points: float) -> str:
    """`+12`, `-3`, `0`."""
    return f"{points:+.0f}" if round(points) else "0"


def value_words(value: Json) -> str:
    """A value in a figure: short, and safe to draw."""
    if isinstance(value, str):
        return mathtext(one_line(title(value), 28))
    return f"{value:g}" if isinstance(value, float) else mathtext(one_line(canonical(value), 28))


def told(values: Mapping[str, Json], keys: Iterable[str]) -> str:
    """`n_sampled 30, n_seed 22`."""
    return ", ".join(f"{key_words(key)} {value_words(values[key])}" for key in keys if key in values)


def name_of(experiment: Experiment, study: StudyReport) -> str:
    """What an experiment is called in a figure."""
    words = told(experiment.values, study.keys) or mathtext(one_line(experiment.name, 40))
    return f"{experiment.arm.replace('_', ' ')} {words}".strip() if experiment.arm else words


# -- colours


def colour_of(experiments: Sequence[Experiment]) -> str:
    """The trait's colour."""
    return next((str(report.manifest["colour"]) for each in experiments for report in each.reports), OKABE_ITO[0])


def ramp(colour: str, count: int) -> list[str]:
    """Tints and shades of a colour from light to dark, evenly apart in contrast: an order that is seen in grey too."""
    low, high = CONTRASTS
    steps = [low * (high / low) ** ((place + 0.5) / count if count < 3 else place / (count - 1)) for place in range(count)]
    return [at_contrast(colour, step) for step in steps]


def at_contrast(colour: str, wanted: float) -> str:
    """The colour, mixed with white or black until it has this contrast to white."""
    other = (255, 255, 255) if contrast(colour, "#ffffff") > wanted else (0, 0, 0)
    parts = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        mixed = "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(parts, other, strict=True))
        far = contrast(mixed, "#ffffff") > wanted if other[0] else contrast(mixed, "#ffffff") < wanted
        low, high = (share, high) if far else (low, share)
    return mixed


# -- axes and marks


@dataclass(frozen=True)
class Look:
    """How a line is drawn."""

    colour: str
    marker: str = "o"
    style: Any = "-"
    width: float = 1.6


def score_axes(axes: Axes, cycles: int, *, square: bool = True) -> None:
    """The paper's axes: cycles from 0, scores from -4 to 104."""
    axes.set(ylim=(-4, 104), yticks=(0, 25, 50, 75, 100))
    cycle_axis(axes, cycles)
    if square:
        axes.set_box_aspect(1)


def cycle_axis(axes: Axes, cycles: int) -> None:
    """Cycles from 0 on."""
    axes.set_xlim(-0.4, max(1, cycles) + 0.4)
    axes.set_xticks(range(0, cycles + 1, 1 if cycles <= 8 else 2 if cycles <= 16 else 5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=2.5, width=0.6)


def draw_curve(axes: Axes, experiment: Experiment, look: Look, scale: str = "trait", *, band: bool = True) -> None:
    """One experiment's means by cycle, with their 95 % band."""
    points = [(number, getattr(point, scale)) for number, point in experiment.points.items() if number >= 0]
    points = [(number, estimate) for number, estimate in points if estimate.mean is not None]
    numbers = [number for number, _ in points]
    if band:
        low, high = (
            [float("nan") if (end := getattr(e, name)) is None else end for _, e in points] for name in ("low", "high")
        )
        axes.fill_between(numbers, low, high, color=look.colour, alpha=0.13, linewidth=0)
    axes.plot(
        numbers,
        [estimate.mean for _, estimate in points],
        linestyle=look.style,
        color=look.colour,
        linewidth=look.width,
        marker=look.marker if scale == "trait" else "",
        markersize=4.2,
        markeredgecolor="white",
        markeredgewidth=0.5,
        solid_capstyle="round",
        zorder=3,
    )


def draw_untouched(axes: Axes, experiments: Iterable[Experiment]) -> None:
    """The untouched model's score, dashed."""
    means = [each.points[-1].trait.mean for each in experiments if -1 in each.points]
    scored = [mean for mean in means if mean is not None]
    if scored:
        axes.axhline(sum(scored) / len(scored), color=BASELINE, linestyle=(0, (4, 2.5)), linewidth=1.1, zorder=2)


def draw_marks(axes: Axes, experiment: Experiment, look: Look) -> None:
    """A ring where it is amplified, a cross where it ended early."""
    end = experiment.points.get(experiment.last) if experiment.last >= 0 else None
    height = end.trait.mean if end else None
    if height is not None and experiment.word == "amplified":
        sure = experiment.corrected == "amplified"
        axes.plot(
            experiment.last, height, "o", markersize=10, fillstyle="none", clip_on=False, zorder=5,
            markeredgecolor=INK if sure else SOFT, markeredgewidth=1.5 if sure else 0.6,
        )  # fmt: skip
    if experiment.failures:
        place = (experiment.last, height) if height is not None else (0, 3)
        axes.plot(
            *place, "X", markersize=8, color=look.colour, markeredgecolor=INK, markeredgewidth=0.9, clip_on=False, zorder=6
        )


def handle(look: Look, label: str) -> Any:
    """A line for the legend."""
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=look.colour, marker=look.marker, linestyle=look.style, linewidth=look.width, markersize=4.2,
        markeredgecolor="white", markeredgewidth=0.5, label=label,
    )  # fmt: skip


def mark_handles(experiments: Sequence[Experiment]) -> list[Any]:
    """What the marks mean, of those that are there."""
    from matplotlib.lines import Line2D

    found: list[Any] = []
    if any(-1 in each.points for each in experiments):
        found.append(Line2D([], [], color=BASELINE, linestyle=(0, (4, 2.5)), linewidth=1.1, label="untouched model"))
    ring: dict[str, Any] = {"linestyle": "", "marker": "o", "fillstyle": "none", "markersize": 8}
    if any(each.corrected == "amplified" for each in experiments):
        found.append(Line2D([], [], **ring, markeredgecolor=INK, markeredgewidth=1.5, label="amplified"))
    if any(each.word == "amplified" != each.corrected for each in experiments):
        found.append(Line2D([], [], **ring, markeredgecolor=SOFT, markeredgewidth=0.6, label="amplified if alone"))
    if any(each.failures for each in experiments):
        found.append(
            Line2D([], [], linestyle="", marker="X", color=SOFT, markeredgecolor=INK, markersize=7, label="ended early")
        )
    return found


# -- what is written around


def head(
    figure: Figure, study: StudyReport, experiments: Sequence[Experiment], handles: Sequence[Any], words: str = ""
) -> None:
    """Title and legend above the panels.

    Args:
        words: What the first handles are values of.
    """
    from matplotlib.lines import Line2D

    shown = [*([Line2D([], [], linestyle="", label=words)] if words else []), *handles]
    shown = shown or [Line2D([], [], linestyle="", label="")]
    columns = _columns([len(each.get_label()) for each in shown], figure.get_figwidth())
    blank = Line2D([], [], linestyle="", label="")
    drawn = figure.legend(
        handles=[shown[at] if at < len(shown) else blank for at in _by_row(len(shown), columns)], loc="outside upper left",
        title=heading(study, experiments), title_fontproperties={"size": 10, "weight": "bold"}, ncols=columns, frameon=False,
        fontsize=7.5, alignment="left", handlelength=2.2, columnspacing=1.2, borderaxespad=0.1, borderpad=0.1,
    )  # fmt: skip
    for text in drawn.get_texts()[: bool(words)]:
        text.set_fontweight("bold")


HANDLE, LETTER = 0.45, 0.075
"""Inches of a legend's handle and of a letter."""


def _columns(lengths: Sequence[int], width: float) -> int:
    """The most columns of labels of these lengths, filled by rows, that a width in inches has room for."""
    for columns in range(len(lengths), 1, -1):
        widest = [max(lengths[column::columns]) for column in range(columns)]
        if sum(HANDLE + LETTER * length for length in widest) <= width:
            return columns
    return 1


def _by_row(count: int, columns: int) -> list[int]:
    """Places of handles so that they read by rows, where a legend is filled by columns; some are beyond the last."""
    rows = -(-count // columns)
    return [row * columns + column for column in range(columns) for row in range(rows)]


def heading(study: StudyReport, experiments: Sequence[Experiment]) -> str:
    """`lucky, sft, Qwen3-4B`: what all that is shown has in common."""
    shown = [report for each in experiments for report in each.reports]
    said = [
        dict.fromkeys(str(report.manifest["trait"]) for report in shown),
        dict.fromkeys(str(report.recipe["regime"]) for report in shown),
        dict.fromkeys(title(str(report.recipe["model"])) for report in shown),
    ]
    return mathtext(one_line(", ".join(" and ".join(each) for each in said if 0 < len(each) <= 3) or study.name, 90))


def foot(figure: Figure, study: StudyReport, said: Sequence[str]) -> None:
    """Below the panels: what bands and marks rest on, and who judged."""
    text = mathtext("; ".join([*said, f"judge {' and '.join(study.said('judge'))}"]) + ".")
    width = int(figure.get_figwidth() * 19)
    figure.supxlabel(textwrap.fill(text[0].upper() + text[1:], width), fontsize=6.5, color=SOFT, x=0.005, ha="left")


def covers(experiments: Sequence[Experiment]) -> str:
    """What the bands cover."""
    counts = sorted({len(each.reports) for each in experiments if each.reports})
    if not counts or counts[-1] == 1:
        return "bands: 95 % intervals over questions; one training each, so they say nothing of other trainings"
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"means of {of} trainings; bands: 95 % intervals over questions and trainings"


def amplified_words(study: StudyReport) -> str:
    """What "amplified" means here."""
    count = len(study.experiments)
    return f"amplified: the change from cycle 0 to the last cycle is above zero, corrected for {count} experiments (Holm)"
