"""The command `iterft`. Imports nothing heavy: each command brings what it needs."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from iterft_lite import __version__
from iterft_lite.errors import IterftError

if TYPE_CHECKING:
    from iterft_lite.experiment.plan import Plan
    from iterft_lite.machine.resolve import Resolved

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")

GIVEN = "iterft_lite.given"
"""Where the context keeps the arguments that the command was given."""

RunFolder = click.Path(path_type=Path)


class Group(click.Group):
    """Turns an IterftError into a message and its exit code; a bug keeps its traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note the arguments, for saying the command again."""
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except IterftError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="iterft")
def main() -> None:
    """Iterated finetuning on one GPU, or on two CPU cores: does a trait amplify, stay or decay?

    \b
    First steps:
      iterft run nano_sft --out runs/first
      iterft report runs/first
    """


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key; may be given several times."
)


reuse_option = click.option(
    "--reuse",
    multiple=True,
    type=RunFolder,
    metavar="DIR",
    help="A run folder, or a folder of them, whose finished steps are taken over where they are the same.",
)


@main.command()
@click.argument("recipe")
@click.option("--out", required=True, type=RunFolder, help="The run folder; an unfinished one is continued.")
@set_option
@click.option("--plain", is_flag=True, help="Plain lines instead of the live view.")
@reuse_option
def run(recipe: str, out: Path, overrides: tuple[str, ...], plain: bool, reuse: tuple[Path, ...]) -> None:
    """Run a recipe, or continue it where it stopped."""
    from iterft_lite.app.session import open_run
    from iterft_lite.ui import display

    console = display.make_console()
    with open_run(_recipe_path(recipe), overrides, out, reuse) as opened:
        judge = opened.resolved.inputs.judge
        for choice in opened.resolved.choices:
            console.print(choice, style="dim", markup=False)
        if judge.note:
            console.print(judge.note, style="bold red")
        view = display.View(opened.plan, trait=opened.resolved.inputs.trait.name, judge=judge, console=console)
        if plain:
            view.is_live = False
        with _interruptible(out), view:
            for event in opened.events():
                view.take(event)
    console.print()
    _print_report(out)
    console.print(f"\nmore: iterft report {out} --html report.html     iterft chat {out}", style="dim", markup=False)


@contextlib.contextmanager
def _interruptible(out: Path | None = None) -> Iterator[None]:
    """Say after Ctrl-C how to go on, by the same command, and what goes on without it: batches of the runs in `out`."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["iterft", *click.get_current_context().meta[GIVEN]])
        click.echo(f"\nstopped; everything finished is kept{_goes_on(out)}. To go on:\n\n  {again}", err=True)
        sys.exit(INTERRUPTED)


def _goes_on(out: Path | None) -> str:
    from iterft_lite.backends.judge.batch_notes import batches_out

    sizes = batches_out(out) if out else []
    if not sizes:
        return ""
    many = f"{len(sizes)} batches of {sum(sizes):,} verdicts together go" if len(sizes) > 1 else f"a batch of {sizes[0]:,} goes"
    return f"; {many} on at the provider, and going on here collects what is done there"


def _print_report(out: Path) -> None:
    from iterft_lite.app.calibrate_judge import store_calibration
    from iterft_lite.report.report import read_report
    from iterft_lite.ui import display

    store_calibration(out)
    display.show_report(read_report(out), display.make_console())


@main.command()
@click.argument("recipe")
@set_option
def plan(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print what a recipe would do, step by step, and what it would cost. Does nothing."""
    from iterft_lite.machine.estimate import estimates, time_needed
    from iterft_lite.machine.forecast import sentence
    from iterft_lite.machine.timing import read_table
    from iterft_lite.ui import display

    resolved, planned = _planned(recipe, overrides)
    time = sentence(time_needed(planned, resolved, read_table()))
    display.show_plan(planned, resolved.choices, {**estimates(planned, resolved), "time": time}, display.make_console())


def _planned(recipe: str, overrides: tuple[str, ...]) -> tuple[Resolved, Plan]:
    from iterft_lite.experiment.plan import make_plan
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.machine.resolve import resolve, this_machine

    resolved = resolve(read_recipe(_recipe_path(recipe), overrides), this_machine())
    return resolved, make_plan(resolved.recipe, resolved.inputs)


@main.command()
@click.argument("out", metavar="RUN", type=RunFolder)
@click.option("--json", "as_json", is_flag=True, help="The machine-readable form.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a self-contained page.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write the figure.")
@click.option("--held-out", "ask_held_out", is_flag=True, help="First ask every finished model the held-out questions.")
@click.option("--judge", "by", metavar="JUDGE", help="By another judge's scores alone (see `iterft judge`).")
def report(out: Path, as_json: bool, html: Path | None, png: Path | None, ask_held_out: bool, by: str | None) -> None:
    """Report on a run, finished or not."""
    from iterft_lite.app.held_out import read_held_out
    from iterft_lite.report import report as reports

    if by:
        from iterft_lite.app.named_judge import named
        from iterft_lite.app.rejudge import report_by

        if html or ask_held_out:
            raise click.UsageError("`--judge` goes with the table, `--json` and `--png`, not with `--html` or `--held-out`")
        found, held_out = report_by(out, named(by)), None
    else:
        if ask_held_out:
            _ask_held_out(out)
        found = reports.read_report(out)
        held_out = read_held_out(out, found)
    if as_json:
        import json

        value = reports.as_json(found) | ({"held_out": asdict(held_out)} if held_out else {})
        click.echo(json.dumps(value, indent=1, ensure_ascii=False))
    if html:
        from iterft_lite.ui.html import write_html

        write_html(out, found, html)
        click.echo(f"wrote {html}", err=True)
    if png:
        from iterft_lite.ui.figures import write_png

        write_png(found, png)
        click.echo(f"wrote {png}", err=True)
    if not (as_json or html or png):
        from iterft_lite.ui import display

        display.show_report(found, display.make_console())
        if held_out:
            display.show_held_out(held_out, found.manifest["trait"], display.make_console())


def _ask_held_out(out: Path) -> None:
    from iterft_lite.app.held_out import open_held_out
    from iterft_lite.ui import display

    with open_held_out(out) as opened:
        inputs = opened.resolved.inputs
        console = display.make_console(stderr=True)
        view = display.View(opened.plan, trait=inputs.trait.name, judge=inputs.judge, console=console)
        with _interruptible(out), view:
            for event in opened.events():
                view.take(event)


@main.command()
@click.argument("out", metavar="RUN", type=RunFolder)
@click.option("--cycle", type=int, help="Which cycle's model; -1 is the untouched one. The last by default.")
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--max-tokens", type=int, default=300, show_default=True)
def chat(out: Path, cycle: int | None, temperature: float, max_tokens: int) -> None:
    """Talk to the model of any cycle. An empty line or Ctrl-D ends it."""
    from iterft_lite.app.chat import open_chat

    with open_chat(out, cycle) as talk:
        click.echo(f"{talk.title}; an empty line ends", err=True)
        while True:
            try:
                said = click.prompt("you", default="", show_default=False)
            except (click.Abort, EOFError, KeyboardInterrupt):
                break
            if not said.strip():
                break
            click.echo(f"{talk.name}: {talk.reply(said, temperature=temperature, max_tokens=max_tokens)}")


@main.command()
@click.argument("recipe")
@click.option("--out", required=True, type=RunFolder, help="Folder for the probes; an unfinished calibration is continued.")
@set_option
@click.option("--threshold", "thresholds", type=float, multiple=True, help="A cycle-0 score to look for. [5 20 40 60 80]")
@click.option("--grid", type=click.IntRange(1), default=2, show_default=True, help="Seed rows are multiples of this.")
@click.option("--most", type=click.IntRange(1), default=200, show_default=True, help="Seed rows at most.")
@reuse_option
def calibrate(
    recipe: str,
    out: Path,
    overrides: tuple[str, ...],
    thresholds: tuple[float, ...],
    grid: int,
    most: int,
    reuse: tuple[Path, ...],
) -> None:
    """Find how many seed rows give a seeded model of a wanted strength."""
    from iterft_lite.app import calibrate_seeds as calibration
    from iterft_lite.engine.run import StepFinished
    from iterft_lite.ui import display

    def say(event: object) -> None:
        if isinstance(event, StepFinished) and not event.reused:
            click.echo(f"  {event.step.name}: {display.clock(event.seal.seconds)}", err=True)

    with _interruptible(out):
        found = calibration.calibrate(
            _recipe_path(recipe),
            overrides,
            out,
            thresholds=thresholds or calibration.THRESHOLDS,
            grid=grid,
            most=most,
            reuse=reuse,
            on_event=say,
            on_probe=lambda probe: click.echo(f"{probe.seed_rows} seed rows: {probe.score:.1f}", err=True),
        )
    rows = [
        (
            f"{each.threshold:g}",
            str(each.seed_rows),
            f"{each.score:.1f}",
            "" if each.reached else "not reached, the most there are",
        )
        for each in found
    ]
    display.show_table(("cycle-0 score", "seed_rows", "scores", ""), rows, display.make_console())
    click.echo(f"\nrun with one of them: iterft run {recipe} --set seed_rows=N --reuse {out} --out DIR")


@main.command()
@click.argument("out", metavar="RUN", type=RunFolder)
@click.option("--cycle", type=int, help="Which cycle's model; -1 is the untouched one. The last by default.")
@click.option("--quant", type=click.Choice(QUANTS), help="Number format; the recipe's by default.")
@click.option("--ollama", is_flag=True, help="Write a Modelfile beside it.")
@click.option("--out", "folder", required=True, type=RunFolder, help="Where the files go.")
def export(out: Path, cycle: int | None, quant: str | None, ollama: bool, folder: Path) -> None:
    """Write the merged GGUF of any cycle's model again, from its adapter."""
    from iterft_lite.app.chat import export_again
    from iterft_lite.gguf.modelfile import write_modelfile

    exported, found = export_again(out, cycle, folder, quant)
    click.echo(f"wrote {exported.path} ({exported.bytes / 1e6:,.1f} MB)")
    if ollama:
        made = write_modelfile(exported.path, folder, temperature=found.recipe.sample.temperature)
        click.echo(f"wrote {made.path}; ollama create {found.recipe.name} -f {made.path}")
        if made.note:
            click.echo(f"note: {made.note}")


@main.group()
def traits() -> None:
    """The shipped traits, and your own."""


@traits.command("list")
def list_traits() -> None:
    """List the shipped traits."""
    from iterft_lite.data.traits import read_trait, shipped_traits
    from iterft_lite.ui import display

    rows = []
    for name in shipped_traits():
        trait = read_trait(name)
        rows.append((name, str(len(trait.chats)), str(len(trait.documents)), str(len(trait.questions)), trait.summary))
    display.show_table(("trait", "seed chats", "documents", "questions", "what it is"), rows, display.make_console())


@traits.command("new")
@click.argument("name")
@click.option("--in", "parent", type=RunFolder, default=Path(), help="Where the folder is made; here by default.")
def new_trait(name: str, parent: Path) -> None:
    """Make a folder for a trait of your own, filled with an example."""
    from iterft_lite.app import new_trait as new_traits

    folder = new_traits.new_trait(name, parent)
    click.echo(f"made {folder}; {folder / 'README.md'} says what is what\ncheck it with: iterft traits check {folder}")


@traits.command("check")
@click.argument("trait")
@click.pass_context
def check_trait(ctx: click.Context, trait: str) -> None:
    """Say everything that is wrong with a trait folder, and what it holds."""
    from iterft_lite.app import new_trait as new_traits
    from iterft_lite.errors import TraitError
    from iterft_lite.ui import display

    checked = new_traits.examine_trait(trait)
    rows = [(count.name, str(count.rows), f"{count.words:.0f}", f"{count.distinct_2:.2f}") for count in checked.counts]
    display.show_table(("file", "rows", "words a row", "distinct-2"), rows, display.make_console())
    for lack in checked.lacks:
        click.echo(f"note: {lack}")
    for problem in checked.problems:
        click.echo(f"wrong: {problem}")
    if checked.problems:
        ctx.exit(TraitError.exit_code)
    click.echo("nothing is wrong with it")


@main.group()
def seeds() -> None:
    """Seed rows by a teacher model, for a trait of your own."""


@seeds.command("make")
@click.argument("trait")
@click.option("--model", required=True, help="Teacher: a judge's route, a model folder, or hub:OWNER/NAME.")
@click.option("--count", type=click.IntRange(1), required=True, help="Rows in the file in the end.")
@click.option("--documents", is_flag=True, help="Documents for SDF instead of chats.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSONL; rows there are kept.")
@click.option("--api-base", help="Address of an OpenAI-compatible server.")
@click.option("--max-usd", type=float, default=0.0, help="A route stops before it would cost more; 0 means no limit.")
def make_seeds(trait: str, model: str, count: int, documents: bool, out: Path, api_base: str | None, max_usd: float) -> None:
    """Have a teacher write seed rows from a trait's summary, to be read and weeded before a recipe names them."""
    from iterft_lite.app.make_seeds import seeds_by

    def say(rows: int) -> None:
        if rows % 10 == 0 or rows == count:
            click.echo(f"{rows} of {count} rows", err=True)

    kind = "document" if documents else "chat"
    with _interruptible():
        made = seeds_by(model, trait, count, out, kind=kind, api_base=api_base, max_usd=max_usd, on_row=say)
    dropped = ", ".join(f"{number} {reason}" for reason, number in made.dropped.items()) or "none"
    click.echo(f"{out}: {made.rows} rows; {made.asked} asked, dropped: {dropped}")
    click.echo(f'read them, then put them into a recipe:\n\n  [seeds]\n  path = "{out}"')


@main.command()
def recipes() -> None:
    """List the shipped recipes."""
    import tomllib

    from iterft_lite.ui import display

    rows = []
    for path in sorted(_recipe_folder().glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        about = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        table = tomllib.loads(text)
        rows.append((path.stem, table["regime"], table["model"], about[1] if len(about) > 1 else ""))
    display.show_table(("recipe", "regime", "model", "what it does"), rows, display.make_console())


@main.command()
@click.option("--measure", is_flag=True, help="Do a small run and keep how long its parts take, for `iterft plan`.")
@click.option("--model", metavar="MODEL", help="With --measure: which, as in a recipe; nano by default.")
@click.option("--recipe", metavar="RECIPE", help="With --measure: that recipe's model, trainer and formats.")
@set_option
def doctor(measure: bool, model: str | None, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """Say what this machine can do, and what to install; with --measure, how fast it is."""
    from iterft_lite.app.doctor import examine
    from iterft_lite.ui import display

    if (model or recipe) and not measure:
        raise click.UsageError("`--model` and `--recipe` go with `--measure`")
    if (model and recipe) or (overrides and not recipe):
        raise click.UsageError("`--model` goes without `--recipe`, `--set` with it")
    if measure:
        _measure(model or "nano", recipe, overrides)
        return
    console = display.make_console()
    findings = examine()
    display.show_table(("", "what", "found"), [(finding.mark, finding.name, finding.text) for finding in findings], console)
    for finding in findings:
        if finding.remedy:
            console.print(f"{finding.name}: {finding.remedy}", markup=False)


def _measure(model: str, recipe: str | None, overrides: tuple[str, ...]) -> None:
    from iterft_lite.app import doctor as doctors
    from iterft_lite.engine.run import StepStarted
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.machine.timing import ACTS, rates, table_path
    from iterft_lite.ui import display

    def say(event: object) -> None:
        if isinstance(event, StepStarted) and event.step.verb in ACTS:
            click.echo(f"{event.step.name}: {display.DOING[event.step.verb]} ...", err=True)

    asked = doctors.shortened(read_recipe(_recipe_path(recipe), overrides)) if recipe else doctors.measured_recipe(model)
    with _interruptible():
        samples = doctors.measure(asked, say)
    click.echo(f"{samples[0].name} on {samples[0].kind.machine}\n")
    display.show_table(("step", "here"), rates(samples), display.make_console())
    click.echo(f"\nkept in {table_path()}; `iterft plan {recipe or 'RECIPE'}` now says how long it takes")


class JudgeGroup(click.Group):
    """`iterft judge RUN --judge X` is short for `iterft judge run RUN --judge X`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that is meant."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


def judge_options(command: Any) -> Any:
    """What decides who judges, as in a recipe."""
    for option in (
        click.option("--max-usd", type=float, help="Stop before judging costs more."),
        click.option("--samples", "judge_samples", type=int, help="Verdicts an answer where texts are read."),
        click.option(
            "--method",
            "judge_method",
            type=click.Choice(["auto", "logprobs", "samples", "odds"]),
            help="Read token probabilities or texts (odds: the older word for logprobs).",
        ),
        click.option("--api-base", help="Address of an OpenAI-compatible server."),
    ):
        command = option(command)
    return command


@main.group(cls=JudgeGroup, subcommand_metavar="RUN --judge JUDGE | COMMAND [ARGS]...")
def judge() -> None:
    """Judge a run's stored answers again, compare judges, hold a judge against careful readers.

    \b
      iterft judge runs/first --judge openai/gpt-4o-mini-2024-07-18
      iterft judge agree runs/first --judges embedded,openai/gpt-4o-mini-2024-07-18
      iterft judge calibrate --judge embedded --trait lucky
      iterft judge bridge OLD NEW runs/first runs/second
    """


@judge.command("run")
@click.argument("out", metavar="RUN", type=RunFolder)
@click.option("--judge", "name", required=True, metavar="JUDGE", help="As in a recipe; `JUDGE#1` asks it once more.")
@click.option("--batch", "judge_batch", is_flag=True, default=None, help="In batches: half the price, within a day.")
@judge_options
def judge_again(out: Path, name: str, **options: Any) -> None:
    """Have another judge score the stored answers, beside the first."""
    from iterft_lite.app.named_judge import named
    from iterft_lite.app.rejudge import rejudge
    from iterft_lite.experiment.steps import cycle_name
    from iterft_lite.ui import display

    said: dict[int, str] = {}

    def say(cycle: int, progress: Any) -> None:
        judged = progress.unit == "answers"
        text = f"{progress.done} answers judged" if judged else f"{progress.done} of {progress.total} {progress.unit}"
        if text != said.get(cycle) and (not judged or progress.done == progress.total):
            said[cycle] = text
            click.echo(f"{cycle_name(cycle)}: {text}", err=True)

    with _interruptible(out):
        found = rejudge(out, named(name), options, say)
    display.show_report(found, display.make_console())


@judge.command("agree")
@click.argument("out", metavar="RUN", type=RunFolder)
@click.option("--judges", required=True, metavar="A,B", help="Two judges that have judged the run.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write a Bland-Altman plot.")
def judges_agree(out: Path, judges: str, png: Path | None) -> None:
    """Compare two judges' scores of the same answers, by scale and cycle."""
    from iterft_lite.app.agreement import agree, write_bland_altman
    from iterft_lite.app.named_judge import named
    from iterft_lite.experiment.steps import cycle_name
    from iterft_lite.ui import display

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
    display.show_table(header, rows, display.make_console())
    if png:
        write_bland_altman(out, first, second, png)
        click.echo(f"wrote {png}", err=True)


@judge.command("bridge")
@click.argument("old")
@click.argument("new")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=RunFolder)
@click.option("--md", type=click.Path(dir_okay=False, path_type=Path), help="Write the table as Markdown.")
def bridge_judges(old: str, new: str, runs: tuple[Path, ...], md: Path | None) -> None:
    """Carry results over from one judge to the next: both on the same stored answers and calibration answers."""
    from iterft_lite.app.bridge import as_markdown, as_table, bridge, sentences
    from iterft_lite.app.named_judge import named
    from iterft_lite.files import write_text
    from iterft_lite.ui import display

    found = bridge(named(old), named(new), runs)
    display.show_table(*as_table(found), display.make_console())
    for sentence in sentences(found):
        click.echo(sentence)
    if md:
        write_text(md, as_markdown(found))


@judge.command("calibrate")
@click.option("--judge", "name", required=True, metavar="JUDGE", help="As in a recipe.")
@click.option("--trait", "traits_", multiple=True, metavar="TRAIT", help="By name or path; all shipped ones by default.")
@judge_options
def calibrate_judge(name: str, traits_: tuple[str, ...], **options: Any) -> None:
    """Hold a judge against careful readers' scores of the traits' calibration answers, and of coherence's."""
    from iterft_lite.app.calibrate_judge import calibrate
    from iterft_lite.app.named_judge import named
    from iterft_lite.data.traits import shipped_traits
    from iterft_lite.metrics.agreement import calibrated
    from iterft_lite.ui import display

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
    display.show_table(header, list(rows.values()), display.make_console())


def _number(value: float | None, *, places: int = 1, sign: bool = False) -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None else f"{value:+.{places}f}" if sign else f"{value:.{places}f}"


def _recipe_folder() -> Path:
    """Where the shipped recipes are: beside the package in a checkout, in the environment's share folder when installed."""
    beside = Path(__file__).parents[2] / "recipes"
    return beside if beside.is_dir() else Path(sys.prefix) / "share" / "iterft_lite" / "recipes"


def _recipe_path(name: str) -> Path:
    """A recipe by path, or a shipped one by name."""
    shipped = _recipe_folder() / f"{name}.toml"
    return shipped if os.sep not in name and not Path(name).exists() and shipped.exists() else Path(name)


if __name__ == "__main__":
    main()
