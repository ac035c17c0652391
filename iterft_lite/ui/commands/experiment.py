"""Commands that do an experiment: `run`, `plan`, `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from iterft_lite.data.recipes import recipe_path
from iterft_lite.ui.options import RunFolder, interruptible, reuse_option, set_option

if TYPE_CHECKING:
    from iterft_lite.experiment.plan import Plan
    from iterft_lite.machine.resolve import Resolved


@click.command()
@click.argument("recipe")
@click.option("--out", required=True, type=RunFolder, help="The run folder; an unfinished one is continued.")
@set_option
@click.option("--plain", is_flag=True, help="Plain lines instead of the live view.")
@reuse_option
def run(recipe: str, out: Path, overrides: tuple[str, ...], plain: bool, reuse: tuple[Path, ...]) -> None:
    """Run a recipe, or continue it where it stopped."""
    from iterft_lite.app.session import open_run
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.live import View

    console = make_console()
    with open_run(recipe_path(recipe), overrides, out, reuse) as opened:
        judge = opened.resolved.inputs.judge
        for choice in opened.resolved.choices:
            console.print(choice, style="dim", markup=False)
        if judge.note:
            console.print(judge.note, style="bold red")
        view = View(opened.plan, trait=opened.resolved.inputs.trait.name, judge=judge, console=console)
        if plain:
            view.is_live = False
        with interruptible(out), view:
            for event in opened.events():
                view.take(event)
    console.print()
    _print_report(out)
    console.print(f"\nmore: iterft report {out} --html report.html     iterft chat {out}", style="dim", markup=False)


def _print_report(out: Path) -> None:
    from iterft_lite.app.calibrate_judge import store_calibration
    from iterft_lite.report.report import read_report
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    store_calibration(out)
    tables.show_report(read_report(out), make_console())


@click.command()
@click.argument("recipe")
@set_option
def plan(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print what a recipe would do, step by step, and what it would cost. Does nothing."""
    from iterft_lite.machine.estimate import estimates, time_needed
    from iterft_lite.machine.forecast import sentence
    from iterft_lite.machine.timing import read_table
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    resolved, planned = _planned(recipe, overrides)
    time = sentence(time_needed(planned, resolved, read_table()))
    tables.show_plan(planned, resolved.choices, {**estimates(planned, resolved), "time": time}, make_console())


def _planned(recipe: str, overrides: tuple[str, ...]) -> tuple[Resolved, Plan]:
    from iterft_lite.experiment.plan import make_plan
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.machine.resolve import resolve, this_machine

    resolved = resolve(read_recipe(recipe_path(recipe), overrides), this_machine())
    return resolved, make_plan(resolved.recipe, resolved.inputs)


@click.command()
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
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.text import clock

    def say(event: object) -> None:
        if isinstance(event, StepFinished) and not event.reused:
            click.echo(f"  {event.step.name}: {clock(event.completion.seconds)}", err=True)

    with interruptible(out):
        found = calibration.calibrate(
            recipe_path(recipe),
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
    tables.show_table(("cycle-0 score", "seed_rows", "scores", ""), rows, make_console())
    click.echo(f"\nrun with one of them: iterft run {recipe} --set seed_rows=N --reuse {out} --out DIR")
