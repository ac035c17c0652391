"""Commands that show what came of studies: `figure`, `compare`, and `report` of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from iterft_lite.ui.commands.study import only_option
from iterft_lite.ui.options import NewFile, RunFolder

if TYPE_CHECKING:
    from iterft_lite.report.cells import ReadRun
    from iterft_lite.report.study import StudyReport
    from iterft_lite.report.study_tables import Table

Found = TypeVar("Found")

FIGURES = ("sweep", "grid", "dpo", "tradeoff", "seeds", "teaser", "heatmap")

OutFile = NewFile()


@click.command()
@click.argument("kind", type=click.Choice(FIGURES))
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=RunFolder)
@click.option("--png", type=OutFile, help="Write the picture; <KIND>.png where no file is named.")
@click.option("--svg", type=OutFile, help="Write it as SVG.")
@click.option("--pdf", type=OutFile, help="Write it as PDF.")
@click.option("--csv", "table", type=OutFile, help="Write its numbers.")
@only_option
@click.option(
    "--line", default="", metavar="KEY", help="The recipe key that lines differ in [seed_rows; in dpo train.dpo_beta]."
)
@click.option("--panel", default="", metavar="KEY", help="The recipe key that panels differ in [rows].")
@click.option("--cell", "cells", multiple=True, metavar="NAME", help="A cell to show, in tradeoff and teaser; may be repeated.")
def figure(
    kind: str,
    folders: tuple[Path, ...],
    png: Path | None,
    svg: Path | None,
    pdf: Path | None,
    table: Path | None,
    only: tuple[str, ...],
    line: str,
    panel: str,
    cells: tuple[str, ...],
) -> None:
    """Draw a figure of studies or runs. From finished steps only.

    \b
      sweep     a panel a value of n_sampled, a line a value of n_seed; coherence below
      grid      a panel a cell
      dpo       a panel a value of n_sampled, a line a value of beta
      tradeoff  trait, coherence, perplexity and sentence length of a few cells
      seeds     each training faint, their mean bold
      teaser    three cells with a sample answer each
      heatmap   the largest late rise by cell
    \b
      iterft figure sweep studies/a --png sweep.png --csv sweep.csv
      iterft figure heatmap studies/a --only 'trait="bliss"' --pdf heatmap.pdf
      iterft figure tradeoff studies/a --cell seed_rows22_rows60 --svg tradeoff.svg
    """
    from iterft_lite.report.study import read_study_report
    from iterft_lite.ui.study_figures.kinds import Wanted, write_figure

    if not any((png, svg, pdf, table)):
        png = Path(f"{kind}.png")
    study = read_study_report(folders, only)
    wanted = Wanted(line, panel, cells)
    for path in write_figure(kind, study, wanted, {"png": png, "svg": svg, "pdf": pdf}, table):
        click.echo(f"wrote {path}", err=True)


@click.command()
@click.argument("folders", metavar="RUN RUN...", nargs=-1, required=True, type=RunFolder)
@only_option
@click.option("--judge", "by", metavar="JUDGE", help="By another judge's scores alone (see `iterft judge`).")
@click.option("--png", type=OutFile, help="Write the curves and the difference as a picture.")
@click.option("--csv", "table", type=OutFile, help="Write the curves' numbers.")
def compare(folders: tuple[Path, ...], only: tuple[str, ...], by: str | None, png: Path | None, table: Path | None) -> None:
    """Compare runs, or cells of a study. Shows recipes, curves, and the difference with its interval.

    Differences are paired by question. Runs that differ in their seed alone are one side, and the interval then covers
    questions and trainings.

    \b
      iterft compare runs/a runs/b
      iterft compare studies/a/cells/seed_rows22_rows60_s4* studies/a/cells/seed_rows22_rows30_s4*
      iterft compare studies/a --only rows=60 --png apart.png
      iterft compare runs/a runs/b --judge openai/gpt-4o-mini-2024-07-18
    """
    from iterft_lite.files import write_output
    from iterft_lite.report import compare as comparing
    from iterft_lite.report.study_tables import as_csv, curve_table
    from iterft_lite.ui.comparison import show_comparison
    from iterft_lite.ui.console import make_console

    found = _by(folders, by, lambda read: comparing.compare(folders, only, read))
    if png:
        from iterft_lite.ui.study_figures.kinds import write_comparison

        write_comparison(found, png)
        click.echo(f"wrote {png}", err=True)
    if table:
        write_output(table, as_csv(curve_table(found.study)))
        click.echo(f"wrote {table}", err=True)
    if not (png or table):
        show_comparison(found, make_console())


# -- the report of a study


def holds_several(folder: Path) -> bool:
    """Whether a folder is a study's, or holds runs or studies and is not a run itself."""
    if (folder / "run.json").exists():
        return False
    return (folder / "study.json").exists() or any(folder.glob("*/run.json")) or any(folder.glob("*/study.json"))


@dataclass(frozen=True)
class Outputs:
    """What a report is written as; the terminal's form where nothing is.

    Attributes:
        as_json: To standard output.
        html, png, table, markdown: Files.
    """

    as_json: bool = False
    html: Path | None = None
    png: Path | None = None
    table: Path | None = None
    markdown: Path | None = None


def report_study(folder: Path, outputs: Outputs, only: tuple[str, ...] = (), by: str | None = None) -> None:
    """Report on a study, or on a folder of runs as one.

    Args:
        only: `key=value` texts: these cells alone.
        by: The judge whose scores are read; each run's own if None.
    """
    from iterft_lite.report import study_tables

    study = _study_by(folder, only, by)
    if outputs.as_json:
        import json

        click.echo(json.dumps(study_tables.study_json(study), indent=1, ensure_ascii=False))
    if outputs.html:
        from iterft_lite.ui.study_page import write_study_page

        written = write_study_page(study, outputs.html)
        click.echo(f"wrote {outputs.html}", err=True)
        if written.beside:
            click.echo(
                f"wrote {written.beside}: {written.files} files of answers, {written.bytes / 1e6:.0f} MB; keep it there",
                err=True,
            )
    if outputs.png:
        from iterft_lite.ui.study_figures.kinds import Wanted, write_figure

        write_figure("sweep", study, Wanted(), {"png": outputs.png}, None)
        click.echo(f"wrote {outputs.png}", err=True)
    _write_tables(study_tables.verdict_table(study), outputs)
    if outputs == Outputs():
        from iterft_lite.ui.console import make_console
        from iterft_lite.ui.study_tables import show_study

        show_study(study, make_console())


def _study_by(folder: Path, only: tuple[str, ...], by: str | None) -> StudyReport:
    """A study, or a run, by the scores of a judge; each run's own if None. Raises as `_by`."""
    from iterft_lite.report.study import read_study_report

    return _by([folder], by, lambda read: read_study_report([folder], only, read))


def _by(folders: Sequence[Path], by: str | None, reading: Callable[[ReadRun], Found]) -> Found:
    """What is read from folders by the scores of a judge; each run's own if None.

    Raises:
        FolderError: If it has judged none of the runs.
    """
    from iterft_lite.app.named_judge import named
    from iterft_lite.app.rejudge import ReadBy
    from iterft_lite.errors import FolderError
    from iterft_lite.report.report import read_report

    if by is None:
        return reading(read_report)
    read = ReadBy(named(by))
    found = reading(read)
    if not read.missing:
        return found
    missing = next((folder for folder in folders if any(folder in (run, *run.parents) for run in read.missing)), folders[0])
    way = f"`iterft judge {missing} --judge '{by}'` has it judge the stored answers"
    if not read.judged:
        raise FolderError(f"`{by}` has judged nothing in {', '.join(f'`{folder}`' for folder in folders)}", hint=way)
    names = ", ".join(root.name for root in read.missing[:3]) + (", ..." if len(read.missing) > 3 else "")
    click.echo(f"`{by}` has not judged {len(read.missing)} of the runs ({names}): {way}", err=True)
    return found


def write_cycles(run: Path, outputs: Outputs, by: str | None) -> None:
    """Write the table of a run's cycles, where that is asked for, by the scores of a judge; the run's own if None."""
    if outputs.table or outputs.markdown:
        from iterft_lite.report.study_tables import curve_table

        _write_tables(curve_table(_study_by(run, (), by)), outputs)


def _write_tables(table: Table, outputs: Outputs) -> None:
    from iterft_lite.files import write_output
    from iterft_lite.report.study_tables import as_csv, as_markdown

    for path, form in ((outputs.table, as_csv), (outputs.markdown, as_markdown)):
        if path:
            write_output(path, form(table))
            click.echo(f"wrote {path}", err=True)
