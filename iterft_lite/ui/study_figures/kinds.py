"""All figures of studies by name, and their files: pictures that say where they come from, and their numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from iterft_lite import __version__
from iterft_lite.errors import UserError
from iterft_lite.files import write_output
from iterft_lite.report.compare import Comparison
from iterft_lite.report.study import StudyReport
from iterft_lite.report.study_tables import Table, as_csv, curve_table, verdict_table
from iterft_lite.ui.study_figures import comparison, curves, heatmap, style, teaser, tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["png", "svg", "pdf"]

DPI = 300
"""Of a PNG: enough for print."""


@dataclass(frozen=True)
class Wanted:
    """What a figure is to show.

    Attributes:
        line, panel: Recipe keys; chosen if "".
        cells: Names of cells, of figures that show a few; chosen if empty.
    """

    line: str = ""
    panel: str = ""
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A form of figure.

    Attributes:
        about: What it shows, for people.
        draw: Of a study.
        numbers: What is drawn, as a table.
        takes: Whether it is laid out by keys or by named cells.
    """

    about: str
    draw: Callable[[StudyReport, Wanted], Figure]
    numbers: Callable[[StudyReport], Table] = curve_table
    takes: Literal["keys", "cells", "neither"] = "keys"


KINDS: Mapping[str, Kind] = {
    "sweep": Kind("a panel a value of n_sampled, a line a value of n_seed", lambda s, w: curves.sweep(s, w.line, w.panel)),
    "grid": Kind("a panel a cell", lambda s, w: curves.grid(s, w.line, w.panel)),
    "dpo": Kind("a panel a value of n_sampled, a line a value of beta", lambda s, w: curves.dpo(s, w.line, w.panel)),
    "tradeoff": Kind(
        "what a rising trait costs, by cycle and as paths", lambda s, w: tradeoff.tradeoff(s, w.cells), takes="cells"
    ),
    "seeds": Kind("each training faint, their mean bold", lambda s, _: curves.seeds(s), takes="neither"),
    "teaser": Kind("three cells with an answer each", lambda s, w: teaser.teaser(s, w.cells), takes="cells"),
    "heatmap": Kind("the largest late rise by cell", lambda s, w: heatmap.heatmap(s, w.line, w.panel), numbers=verdict_table),
}


def draw(kind: str, study: StudyReport, wanted: Wanted = Wanted()) -> Figure:
    """A figure of a study.

    Raises:
        UserError: If the study has nothing to show in it, or it does not take what is wanted.
    """
    import matplotlib

    found = KINDS[kind]
    _refuse(kind, found, wanted)
    if not any(each.points for each in study.everything):
        raise UserError("no cell has a score yet", hint="`iterft sweep status` says how far the study is")
    with matplotlib.rc_context(dict(style.SETTINGS)):  # type: ignore[arg-type]
        return found.draw(study, wanted)


def _refuse(kind: str, found: Kind, wanted: Wanted) -> None:
    if wanted.cells and found.takes != "cells":
        raise UserError(
            f"`--cell` does not go with `{kind}`", hint="it goes with tradeoff and teaser; `--only` leaves cells out"
        )
    if (wanted.line or wanted.panel) and found.takes != "keys":
        raise UserError(f"`--line` and `--panel` do not go with `{kind}`", hint="they go with sweep, grid, dpo and heatmap")


def picture(drawn: Figure, form: Format, source: Mapping[str, str]) -> bytes:
    """A figure in a file's format, with its provenance in the file's own fields; the same numbers come to the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(dict(style.SETTINGS)):  # type: ignore[arg-type]
        drawn.savefig(out, format=form, dpi=DPI, metadata=_fields(form, source))
    return out.getvalue()


def provenance(kind: str, study: StudyReport) -> dict[str, str]:
    """Where a figure comes from: title, what it shows, the program, and a mark that equal numbers share."""
    said = {of: ", ".join(study.said(of)) for of in ("trait", "regime", "model", "judge")}
    about = "; ".join(f"{of} {words}" for of, words in said.items() if words)
    return {
        "title": f"{study.name}: {kind}",
        "about": f"{about}; {len(study.cells)} cells, {study.seeds} trainings an experiment at most",
        "program": f"iterft_lite {__version__}",
        "source": f"steps {study.mark}",
    }


def _fields(form: Format, source: Mapping[str, str]) -> dict[str, str | None]:
    """Provenance as each format calls it; no date, which would make every file another."""
    if form == "png":
        names = {"title": "Title", "about": "Description", "program": "Software", "source": "Source"}
        return {name: source[key] for key, name in names.items()}
    if form == "svg":
        names = {"title": "Title", "about": "Description", "program": "Creator", "source": "Source"}
        return {**{name: source[key] for key, name in names.items()}, "Date": None}
    about = f"{source['about']}; {source['source']}"
    return {"Title": source["title"], "Subject": about, "Creator": source["program"], "Producer": None, "CreationDate": None}


def write_figure(
    kind: str, study: StudyReport, wanted: Wanted, pictures: Mapping[Format, Path | None], table: Path | None
) -> Sequence[Path]:
    """Write a figure in the formats that have a path, and its numbers as CSV.

    Returns:
        What was written.
    """
    written = []
    drawn = draw(kind, study, wanted) if any(pictures.values()) else None
    for form, path in pictures.items():
        if path and drawn:
            write_output(path, picture(drawn, form, provenance(kind, study)))
            written.append(path)
    if table:
        write_output(table, as_csv(KINDS[kind].numbers(study)))
        written.append(table)
    return written


def write_comparison(compared: Comparison, path: Path) -> None:
    """Write a comparison as a PNG."""
    import matplotlib

    with matplotlib.rc_context(dict(style.SETTINGS)):  # type: ignore[arg-type]
        drawn = comparison.comparison_figure(compared)
    write_output(path, picture(drawn, "png", provenance("comparison", compared.study)))
