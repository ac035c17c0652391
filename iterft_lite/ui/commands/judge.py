"""Commands about judges: `judge run`, `judge agree`, `judge bridge`, `judge calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from iterft_lite.ui.options import NewFile, RunFolder, interruptible


class JudgeGroup(click.Group):
    """`iterft judge RUN --judge X` is short for `iterft judge run RUN --judge X`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command of a name; `run` for a folder."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


def judge_options(command: Any) -> Any:
    """The options that decide who judges, as recipe keys."""
    for option in (
        click.option("--max-usd", type=float, help="Stop before judging costs more."),
        click.option("--samples", "judge_samples", type=int, help="Verdicts an answer where texts are read."),
        click.option(
            "--method",
            "judge_method",
            type=click.Choice(["auto", "logprobs", "samples"]),
            help="Read token probabilities or texts.",
        ),
        click.option("--api-base", help="Address of an OpenAI-compatible server."),
    ):
        command = option(command)
    return command


@click.group(cls=JudgeGroup, subcommand_metavar="RUN --judge JUDGE | COMMAND [ARGS]...")
def judge() -> None:
    """Judge stored answers again, and compare judges. Also a judge with careful readers.

    \b
      iterft judge runs/first --judge openai/gpt-4o-mini-2024-07-18
      iterft judge agree runs/first --judges embedded,openai/gpt-4o-mini-2024-07-18
      iterft judge calibrate --judge embedded --trait lucky
      iterft judge bridge OLD NEW runs/first runs/second
    """


@judge.command("run")
@click.argument("out", metavar="RUN|STUDY", type=RunFolder)
@click.option("--judge", "name", required=True, metavar="JUDGE", help="As in a recipe; `JUDGE#1` asks it once more.")
@click.option("--batch", "judge_batch", is_flag=True, default=None, help="In batches: half the price, within a day.")
@judge_options
def judge_again(out: Path, name: str, **options: Any) -> None:
    """Have another judge score the stored answers. The first one's verdicts stay.

    Of a study it scores the cells one after the other, answers that they share once; `iterft report STUDY --judge JUDGE`
    reads them.

    \b
      iterft judge run runs/first --judge openai/gpt-4o-mini-2024-07-18
      iterft judge run runs/first --judge ollama/qwen3:8b --samples 3
    """
    from iterft_lite.app.named_judge import named
    from iterft_lite.app.rejudge import rejudge
    from iterft_lite.app.runs import runs_below
    from iterft_lite.experiment.steps import cycle_name
    from iterft_lite.ui import tables
    from iterft_lite.ui.commands.study_results import holds_several
    from iterft_lite.ui.console import make_console

    said: dict[int, str] = {}

    def say(cycle: int, progress: Any) -> None:
        done = {"answers": "answers judged", "rows": "everyday prompts answered, for the judge to be fitted on"}
        counted = done.get(progress.unit)  # said once, where others are minutes apart
        text = f"{progress.done} {counted}" if counted else f"{progress.done} of {progress.total} {progress.unit}"
        if text != said.get(cycle) and (not counted or progress.done == progress.total):
            said[cycle] = text
            click.echo(f"{cycle_name(cycle)}: {text}", err=True)

    if not holds_several(out):
        with interruptible(out):
            found = rejudge(out, named(name), options, say)
        tables.show_report(found, make_console())
        return
    for cell in runs_below(out):
        click.echo(cell.name, err=True)
        with interruptible(cell):
            rejudge(cell, named(name), options, say)
        said.clear()
    click.echo(f"iterft report {out} --judge '{name}'", err=True)


@judge.command("agree")
@click.argument("out", metavar="RUN", type=RunFolder)
@click.option("--judges", required=True, metavar="A,B", help="Two judges that have judged the run.")
@click.option("--png", type=NewFile(), help="Write a Bland-Altman plot.")
def judges_agree(out: Path, judges: str, png: Path | None) -> None:
    """Compare two judges' scores of the same answers. By scale and cycle.

    \b
      iterft judge agree runs/first --judges embedded,openai/gpt-4o-mini-2024-07-18 --png agree.png
    """
    from iterft_lite.app.agreement import agree, write_bland_altman
    from iterft_lite.app.named_judge import named
    from iterft_lite.experiment.steps import cycle_name
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    if judges.count(",") != 1:
        raise click.UsageError("`--judges` takes two judges with a comma between them")
    first, second = (named(text.strip()) for text in judges.split(","))
    rows = []
    for row in agree(out, first, second):
        found = row.agreement
        numbers = [_number(value, sign=True) for value in (found.difference, found.low, found.high)]
        cycle = "all" if row.cycle is None else cycle_name(row.cycle)
        rows.append((row.scale, cycle, str(found.pairs), _number(found.spearman, places=2), *numbers))
    header = ("scale", "cycle", "answers", "Spearman", f"{first} - {second}", "95 % from", "to")
    tables.show_table(header, rows, make_console())
    if png:
        write_bland_altman(out, first, second, png)
        click.echo(f"wrote {png}", err=True)


@judge.command("bridge")
@click.argument("old")
@click.argument("new")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=RunFolder)
@click.option("--md", type=NewFile(), help="Write the table as Markdown.")
def bridge_judges(old: str, new: str, runs: tuple[Path, ...], md: Path | None) -> None:
    """Compare a judge with its successor. On the same stored answers and calibration answers.

    \b
      iterft judge bridge openai/gpt-4o-mini-2024-07-18 openai/gpt-6-luna runs/first --md bridge.md
    """
    from iterft_lite.app.bridge import as_markdown, as_table, bridge, sentences
    from iterft_lite.app.named_judge import named
    from iterft_lite.files import write_text
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    found = bridge(named(old), named(new), runs)
    tables.show_table(*as_table(found), make_console())
    for sentence in sentences(found):
        click.echo(sentence)
    if md:
        write_text(md, as_markdown(found))


@judge.command("calibrate")
@click.option("--judge", "name", required=True, metavar="JUDGE", help="As in a recipe.")
@click.option("--trait", "traits_", multiple=True, metavar="TRAIT", help="By name or path; all shipped ones by default.")
@click.option("--model", help="The untouched model, as in a recipe: who judges with `--judge base`.  [default: nano]")
@judge_options
def calibrate_judge(name: str, traits_: tuple[str, ...], **options: Any) -> None:
    """Compare a judge with careful readers. On the traits' calibration answers, and on coherence's.

    \b
      iterft judge calibrate --judge embedded --trait lucky
      iterft judge calibrate --judge base --model smollm2
    """
    from iterft_lite.app.calibrate_judge import calibrate
    from iterft_lite.app.named_judge import named
    from iterft_lite.data.traits import shipped_traits
    from iterft_lite.metrics.agreement import calibrated
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    rows: dict[str, tuple[str, ...]] = {}
    for trait in traits_ or shipped_traits():
        for found in calibrate(named(name), trait, options):
            rho = found.agreement.spearman
            rows[found.subject] = (
                found.subject,
                f"{found.agreement.pairs}/{found.agreement.pairs + found.unscored}",
                _number(rho, places=2),
                "no" if calibrated(found.agreement).doubt else "yes",
                _number(found.agreement.difference, sign=True),
                _number(found.agreement.spread),
                _number(found.order),
                _number(found.length, places=2, sign=True),
                f"{found.usd:.4f}" if found.usd else "-",
            )
    header = ("subject", "scored", "Spearman", "reliable", "bias", "spread", "order", "length", "$")
    tables.show_table(header, list(rows.values()), make_console())


def _number(value: float | None, *, places: int = 1, sign: bool = False) -> str:
    """A number in a table; a dash for None."""
    return "-" if value is None else f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
