"""`teaser`: three cells, the one that fell most, the one that moved least, the one that rose most, each with an answer."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iterft_lite.errors import UserError
from iterft_lite.report.cells import CellReport
from iterft_lite.report.report import shown_samples
from iterft_lite.report.study import Experiment, StudyReport
from iterft_lite.ui.foreign import mathtext, one_line
from iterft_lite.ui.study_figures import style
from iterft_lite.ui.study_figures.layout import longest
from iterft_lite.ui.study_figures.style import Look
from iterft_lite.ui.study_figures.tradeoff import named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 2.45
"""Inches of a panel's side."""

QUESTION, ANSWER = 80, 230
"""Characters of a question and of an answer that are shown."""

LINE = 42
"""Characters of a line below a panel."""

LINES = 9

LOOKS = {"decayed": Look("#2166ac", "v", width=2.4), "amplified": Look("#b35806", "^", width=2.4)}
"""By the verdict among all; the cell that rose most need not have risen."""

PLAIN = Look("#555555", "o", width=2.4)


@dataclass(frozen=True)
class Example:
    """An answer of the last model of a cell.

    Attributes:
        cycle: Whose answer it is.
        trait: Its score; None where it has none.
    """

    question: str
    answer: str
    cycle: int
    trait: float | None


def teaser(study: StudyReport, names: Sequence[str] = ()) -> Figure:
    """Three panels with an answer below each.

    Args:
        names: Of three cells; chosen if none is named.

    Raises:
        UserError: If one is not there, or there are not three to choose from.
    """
    from matplotlib.figure import Figure

    shown = named(study, names, 3) if names else chosen(study)
    drawn = Figure(figsize=(SIDE * len(shown) + 0.9, SIDE + 3.2), layout="constrained")
    axes = drawn.subplots(2, len(shown), squeeze=False, sharey="row", height_ratios=(SIDE, 1.5))
    for column, each in enumerate(shown):
        look = LOOKS.get(each.corrected, PLAIN)
        upper, lower = axes[:, column]
        style.score_axes(upper, longest(shown))
        style.draw_untouched(upper, [each])
        style.draw_curve(upper, each, look)
        style.draw_marks(upper, each, look)
        upper.set_title(f"{style.name_of(each, study)}: {each.corrected}", fontsize=8.5)
        upper.set_xlabel("cycle")
        _write(lower, example(each))
    axes[0][0].set_ylabel("score")
    style.head(drawn, study, shown, style.mark_handles(shown))
    answers = "below: the answer of the last model whose score is nearest to that model's mean"
    style.foot(drawn, study, [*([] if names else ["cells chosen by their change"]), answers, style.covers(shown)])
    return drawn


def chosen(study: StudyReport) -> list[Experiment]:
    """The one that fell the most, the one that moved the least, the one that rose the most.

    Raises:
        UserError: If there are not three.
    """
    moved = sorted(
        (each for each in study.experiments if each.change.mean is not None), key=lambda each: each.change.mean or 0.0
    )
    if len(moved) < 3:
        raise UserError(f"{len(moved)} cells have scores in two cycles, three are needed", hint="name fewer with `--cell`")
    still = min(moved[1:-1], key=lambda each: abs(each.change.mean or 0.0))
    return [moved[0], still, moved[-1]]


def example(experiment: Experiment) -> Example | None:
    """An answer that stands for the last model: of the question and sample whose score is nearest to the mean."""
    cell = next(
        (cell for cell in experiment.cells if cell.report and any(c.cycle == experiment.last for c in cell.report.cycles)), None
    )
    if cell is None or cell.report is None or experiment.last < 0:
        return None
    return example_of(cell, experiment.last, experiment.points[experiment.last].trait.mean)


def example_of(cell: CellReport, cycle: int, mean: float | None) -> Example | None:
    """The answer of one training's cycle whose score is nearest to `mean`; None where its answers are not there."""
    assert cell.report is not None, "only cells that have begun have answers"
    found = [
        Example(question, sample.text, cycle, sample.trait)
        for question, cycles in shown_samples(cell.folder, cell.report, None, cycles=(cycle,)).items()
        for sample in cycles.get(cycle, [])
    ]
    return min(found, key=lambda each: abs((mean or 0.0) - (each.trait if each.trait is not None else 1e9)), default=None)


def _write(axes: Axes, found: Example | None) -> None:
    axes.axis("off")
    if found is None:
        axes.text(0, 1, "its answers are not there", transform=axes.transAxes, va="top", fontsize=7, color=style.SOFT)
        return
    score = "" if found.trait is None else f", score {found.trait:.0f}"
    question = textwrap.fill(drawable(one_line(found.question, QUESTION)), LINE - 6)
    answer = textwrap.wrap(drawable(one_line(found.answer, ANSWER)), LINE) or ["(an empty answer)"]
    answer = [*answer[: LINES - 1], f"{answer[LINES - 1][: LINE - 3]}..."] if len(answer) > LINES else answer
    text = "\n".join([*answer, f"(cycle {found.cycle}{score})"])
    down = 0.085 * (question.count("\n") + 1) + 0.02
    axes.text(0, 0.97, question, transform=axes.transAxes, va="top", fontsize=7, fontweight="bold")
    axes.text(0, 0.97 - down, text, transform=axes.transAxes, va="top", fontsize=7, linespacing=1.25)


def drawable(text: str) -> str:
    """A text for the figure's font: signs that it lacks by name, a row of the same once with its number; letters as boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    parts: list[tuple[str, int]] = []
    for sign in text:
        shown = sign if ord(sign) in known else _named(sign)
        if parts and len(shown) > 1 and parts[-1][0] == shown:
            parts[-1] = shown, parts[-1][1] + 1
        elif shown:
            parts.append((shown, 1))
    return mathtext("".join(shown if count == 1 else f"{shown[:-1]} x{count}]" for shown, count in parts))


def _named(sign: str) -> str:
    """A sign's name in brackets; "" for joiners and skin tones, which are nothing by themselves."""
    kind = unicodedata.category(sign)
    if kind in ("Mn", "Cf", "Sk"):
        return ""
    return "\u25a1" if kind.startswith("L") else f"[{unicodedata.name(sign, 'sign').lower()}]"
