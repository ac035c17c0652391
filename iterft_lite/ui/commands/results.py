"""Commands that use a run: `report`, `chat`, `export`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import click

from iterft_lite.ui.commands.study import only_option
from iterft_lite.ui.commands.study_results import OutFile, Outputs, holds_several, report_study, write_cycles
from iterft_lite.ui.options import RunFolder, interruptible, newest_run_argument, trust_option

QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")


@click.command()
@newest_run_argument
@click.option("--full", is_flag=True, help="Every measure by cycle, and both verdicts with their rules.")
@click.option("--json", "as_json", is_flag=True, help="The machine-readable form.")
@click.option("--html", type=OutFile, help="Write a self-contained page; of a large study its answers beside it.")
@click.option("--png", type=OutFile, help="Write the figure; of a study `iterft figure sweep`.")
@click.option("--csv", "table", type=OutFile, help="Write the numbers: of a run its cycles, of a study its verdicts.")
@click.option("--md", "markdown", type=OutFile, help="Write the same as a Markdown table.")
@click.option("--held-out", "ask_held_out", is_flag=True, help="First ask every finished model the held-out questions.")
@click.option("--judge", "by", metavar="JUDGE", help="By another judge's scores alone (see `iterft judge`).")
@only_option
@trust_option
def report(
    out: Path,
    full: bool,
    as_json: bool,
    html: Path | None,
    png: Path | None,
    table: Path | None,
    markdown: Path | None,
    ask_held_out: bool,
    by: str | None,
    only: tuple[str, ...],
) -> None:
    """Report on a run or a study, finished or not. By default on the newest run in runs/.

    \b
      iterft report
      iterft report runs/bliss --full
      iterft report runs/bliss --html bliss.html
      iterft report studies/a --html study.html --csv verdicts.csv
      iterft report studies/a --only rows=60
    """
    from iterft_lite.report import json_form
    from iterft_lite.report import report as reports

    outputs = Outputs(as_json, html, png, table, markdown)
    if holds_several(out):
        _refuse_of_several(out, full=full, ask_held_out=ask_held_out)
        report_study(out, outputs, only, by)
        return
    if only:
        raise click.UsageError(f"`--only` chooses cells of a study, and `{out}` is a run")
    verdicts = None
    if by:
        from iterft_lite.app.named_judge import judge_folder, named
        from iterft_lite.app.rejudge import report_by
        from iterft_lite.app.runs import verdict_folders

        if ask_held_out:
            raise click.UsageError("`--judge` does not go with `--held-out`: those are asked of the run's own judge")
        found, held_out = report_by(out, named(by)), None
        verdicts = verdict_folders(judge_folder(out, named(by)))
    else:
        from iterft_lite.app.held_out import read_held_out  # slow to import

        if ask_held_out:
            _ask_held_out(out)
        found = reports.read_report(out)
        held_out = read_held_out(out, found)
    if as_json:
        import json

        value = json_form.as_json(found) | ({"held_out": asdict(held_out)} if held_out else {})
        click.echo(json.dumps(value, indent=1, ensure_ascii=False))
    if html:
        from iterft_lite.ui.html import write_html

        write_html(out, found, html, verdicts)
        click.echo(f"wrote {html}", err=True)
    if png:
        from iterft_lite.ui.figures import write_png

        write_png(found, png)
        click.echo(f"wrote {png}", err=True)
    write_cycles(out, outputs, by)
    if outputs == Outputs():
        from iterft_lite.ui import tables
        from iterft_lite.ui.console import make_console

        tables.show_report(found, make_console(), full=full)
        if held_out:
            tables.show_held_out(held_out, found.manifest["trait"], make_console())


def _refuse_of_several(folder: Path, *, full: bool, ask_held_out: bool) -> None:
    """Refuse what is of one run, and say where it is to be had."""
    cell = folder / "cells" / "NAME" if (folder / "study.json").exists() else folder / "NAME"
    if full:
        raise click.UsageError(
            f"`--full` is for a run: `iterft report {cell} --full`; of all of them `--csv` writes every verdict, and "
            f"`iterft figure sweep {folder} --csv sweep.csv` every cycle"
        )
    if ask_held_out:
        raise click.UsageError(
            f"`--held-out` asks the models of one run: `iterft report {cell} --held-out`, one after the other"
        )


def _ask_held_out(out: Path) -> None:
    from iterft_lite.app.held_out import not_asked, open_held_out
    from iterft_lite.experiment.steps import cycle_name
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.live import View

    with open_held_out(out) as opened:
        inputs = opened.resolved.inputs
        console = make_console(stderr=True)
        if gone := not_asked(opened):
            console.print(f'not asked: {", ".join(map(cycle_name, gone))}, whose adapters `keep = "ends"` removed')
        view = View(opened.plan, trait=inputs.trait.name, judge=inputs.judge, console=console)
        with interruptible(out), view:
            for event in opened.events():
                view.take(event)


@click.command()
@newest_run_argument
@click.option("--cycle", type=int, help="Which cycle's model; -1 is the untouched one. The last by default.")
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--max-tokens", type=int, default=300, show_default=True)
@trust_option
def chat(out: Path, cycle: int | None, temperature: float, max_tokens: int) -> None:
    """Talk to the model of any cycle. An empty line or Ctrl-D ends the conversation; `/help` lists commands.

    \b
      iterft chat
      iterft chat runs/bliss --cycle 0
    """
    from iterft_lite.app.chat import open_chat
    from iterft_lite.ui.foreign import safe
    from iterft_lite.ui.talk import converse

    def ask() -> str:
        try:
            return str(click.prompt("you", default="", show_default=False))
        except (click.Abort, EOFError):
            return ""

    with open_chat(out, cycle) as talk, contextlib.suppress(KeyboardInterrupt):
        converse(talk, ask, lambda text: click.echo(safe(text), nl=False), temperature=temperature, max_tokens=max_tokens)


@click.command()
@click.argument("outs", metavar="RUN...", nargs=-1, required=True, type=RunFolder)
@click.option("--against", default="bliss_4b", show_default=True, metavar="NAME", help="Which published scores.")
@click.option("--json", "as_json", is_flag=True, help="The machine-readable form.")
def replicate(outs: tuple[Path, ...], against: str, as_json: bool) -> None:
    """Hold runs against published scores. The page "Held against published scores" of the docs says what counts as agreement.

    \b
      iterft replicate runs/replicate
      iterft replicate studies/replicate/cells/* --against bliss_4b
    """
    import json

    from iterft_lite.data.published import read_published
    from iterft_lite.report.replication import replicate as held_against
    from iterft_lite.report.report import read_report
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.tables import show_replication

    published = read_published(against)
    found = {str(out): held_against(read_report(out), published) for out in outs}
    if as_json:
        click.echo(json.dumps({"against": against, "runs": {out: asdict(each) for out, each in found.items()}}, indent=1))
        return
    for out, each in found.items():
        show_replication(out, each, published.about, make_console())


@click.command()
@newest_run_argument
@click.option("--cycle", type=int, help="Which cycle's model; -1 is the untouched one. The last by default.")
@click.option("--quant", type=click.Choice(QUANTS), help="Number format; the recipe's by default.")
@click.option("--adapter", is_flag=True, help="Two files instead of a merged one: untouched model and adapter.")
@click.option("--ollama", is_flag=True, help="Write a Modelfile beside it.")
@click.option("--out", "folder", type=RunFolder, default=Path("exports"), show_default=True, help="Where the files go.")
@click.option("--force", is_flag=True, help="Write over files of the same names.")
@trust_option
def export(out: Path, cycle: int | None, quant: str | None, adapter: bool, ollama: bool, folder: Path, force: bool) -> None:
    """Write any cycle's model as a GGUF file, checked.

    It is made from the cycle's adapter; a file that does not carry what was trained is not written.

    \b
      iterft export runs/bliss --cycle 4                          exports/bliss-c4-q8_0.gguf
      iterft export runs/bliss --cycle 0 --quant q4_k_m --ollama
      iterft export runs/bliss --cycle 0 --adapter --ollama       where a merged file loses it
    """
    from iterft_lite.app.export import export_again
    from iterft_lite.gguf.modelfile import write_modelfile

    made = export_again(out, cycle, folder, quant, kind="adapter" if adapter else "merged", force=force)
    files = " and ".join(str(each) for each in (made.gguf, made.adapter) if each)
    click.echo(f"wrote {files} ({made.bytes / 1e6:,.1f} MB)\n{made.carries}")
    if ollama:
        named = f"{made.name}.Modelfile"
        told = write_modelfile(made.gguf, folder, temperature=made.temperature, adapter=made.adapter, name=named)
        click.echo(f"wrote {told.path}; for Ollama:\n\n  ollama create {made.name.lower()} -f {told.path}")
        if told.note:
            click.echo(f"note: {told.note}")


@click.command()
@click.argument("folder", metavar="[DIR]", type=RunFolder, default=Path("runs"))
def runs(folder: Path) -> None:
    """List the runs in a folder, the newest first, and its studies.

    \b
      iterft runs
      iterft runs elsewhere/runs
    """
    import datetime

    from iterft_lite.app.runs import list_runs, studies_in
    from iterft_lite.hub import title
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    entries = []
    for each in list_runs(folder):
        state = "finished" if each.finished == each.steps else f"{each.finished} of {each.steps} steps"
        when = datetime.datetime.fromtimestamp(each.changed).strftime("%Y-%m-%d %H:%M")
        entries.append((str(each.folder), f"{each.regime}, {each.trait}, {title(each.model)}", f"{state}, {when}"))
    tables.show_entries(entries, make_console())
    studies = studies_in(folder)
    for study in studies:
        click.echo(f"{study} is a study: `iterft sweep status {study}`, `iterft runs {study}`")
    if not entries and not studies:
        click.echo(f"there is no run in `{folder}`; make one: iterft run nano_sft")
