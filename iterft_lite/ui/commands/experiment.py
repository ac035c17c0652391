"""Commands of an experiment: `run`, `plan`, `calibrate`."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from iterft_lite.data import is_path
from iterft_lite.data.recipes import recipe_path
from iterft_lite.ui.options import RunFolder, complete_recipe, interruptible, reuse_option, set_option, trust_option

if TYPE_CHECKING:
    from iterft_lite.experiment.plan import Plan
    from iterft_lite.machine.resolve import Machine, Resolved


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--out", type=RunFolder, help="The run folder; an unfinished one is continued.  [default: runs/NAME]")
@set_option
@click.option("--plain", is_flag=True, help="Plain lines instead of the live view.")
@reuse_option
@trust_option
def run(recipe: str, out: Path | None, overrides: tuple[str, ...], plain: bool, reuse: tuple[Path, ...]) -> None:
    """Run a recipe, or continue a run where it stopped.

    \b
      iterft run nano_sft
      iterft run nano_sft --set trait=bliss --out runs/bliss
      iterft run mine.toml
    """
    from iterft_lite.app.calibrate_judge import store_calibration
    from iterft_lite.app.runs import default_out
    from iterft_lite.app.session import open_run
    from iterft_lite.app.watching import newest_text, step_seconds
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.live import View

    console, path = make_console(), recipe_path(recipe)
    out = out or default_out(read_recipe(path, overrides).name)
    with open_run(path, overrides, out, reuse) as opened, contextlib.closing(opened.executor()) as executor:
        judge = opened.resolved.inputs.judge
        for choice in opened.resolved.choices:
            console.print(choice, style="dim", markup=False)
        if judge.note:
            console.print(judge.note, style="bold red")
        forecast, guessed = step_seconds(opened)
        view = View(
            opened.plan,
            trait=opened.resolved.inputs.trait.name,
            judge=judge,
            console=console,
            forecast=forecast,
            guessed=guessed,
            latest=lambda step: newest_text(opened.run.folder(step).path),
        )
        if plain:
            view.is_live = False
        with interruptible(out), view:
            for event in opened.events(executor):
                view.take(event)
        console.print()
        with console.status("holding the judge against careful readers ..."):
            store_calibration(out, executor.backends)
    _print_report(out)
    console.print(f"\nmore: iterft report {out} --full", style="dim", markup=False)
    console.print(f"      iterft report {out} --html report.html", style="dim", markup=False)
    console.print(f"      iterft chat {out}", style="dim", markup=False)


def _print_report(out: Path) -> None:
    from iterft_lite.report.report import read_report
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    tables.show_report(read_report(out), make_console())


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@set_option
@click.option("--steps", is_flag=True, help="Every step, with what it reads and its key.")
@click.option("--gpu", type=click.FloatRange(0), metavar="GIB", help="As if an NVIDIA GPU with this much memory were here.")
@reuse_option
def plan(recipe: str, overrides: tuple[str, ...], steps: bool, gpu: float | None, reuse: tuple[Path, ...]) -> None:
    """Print what a recipe would do, cost and take. Runs nothing.

    \b
      iterft plan nano_sft
      iterft plan sft --gpu 12
      iterft plan nano_dpo --set cycles=6 --steps
      iterft plan nano_sft --set cycles=6 --reuse runs/nano_sft
    """
    print_plan(recipe, overrides, steps=steps, gpu=gpu, reuse=reuse)


def print_plan(
    recipe: str,
    overrides: tuple[str, ...],
    *,
    steps: bool = False,
    gpu: float | None = None,
    reuse: tuple[Path, ...] = (),
) -> None:
    """Print a plan (see `plan`)."""
    from iterft_lite.app.check_judge import check_judge
    from iterft_lite.app.study_estimate import reused_sentence
    from iterft_lite.engine.manifest import finished_in
    from iterft_lite.machine.estimate import step_costs, time_needed
    from iterft_lite.machine.plan_words import estimates, time_sentence
    from iterft_lite.machine.resolve import this_machine
    from iterft_lite.machine.timing import read_table
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    machine = this_machine() if gpu is None else machine_with(gpu)
    resolved, planned = _planned(recipe, overrides, machine)
    time = time_sentence(time_needed(planned, resolved, read_table(), machine))
    if gpu:
        time += "; most GPUs are slower than that one"
    numbers = {"time": time, **estimates(planned, resolved, machine)}
    if reuse:
        numbers["reused"] = reused_sentence(planned, finished_in(reuse), step_costs(planned, resolved, read_table(), machine))
    problems = [f"judge: {problem}" for problem in check_judge(resolved.inputs.judge, resolved.recipe).problems]
    tables.show_plan(planned, (*resolved.choices, *problems), numbers, make_console(), steps=steps)
    if not steps:
        click.echo("\nnothing was done; `--steps` lists every step")


def machine_with(gib: float) -> Machine:
    """A machine with Unsloth and a GPU of some size, a little of whose memory is taken; without a GPU for 0."""
    from iterft_lite.machine.fit import GIB, RESERVED
    from iterft_lite.machine.resolve import Machine

    name = f"a GPU of {gib:g} GiB" if gib else ""
    return Machine(name, int(gib * GIB * (1 - RESERVED)), int(gib * GIB), unsloth=bool(gib))


def _planned(recipe: str, overrides: tuple[str, ...], machine: Machine) -> tuple[Resolved, Plan]:
    from iterft_lite.experiment.plan import make_plan
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.machine.resolve import resolve

    resolved = resolve(read_recipe(recipe_path(recipe), overrides), machine)
    return resolved, make_plan(resolved.recipe, resolved.inputs)


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--out", required=True, type=RunFolder, help="Folder for the probes; an unfinished calibration is continued.")
@set_option
@click.option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(1, 100),
    multiple=True,
    help="A cycle-0 score to look for. [5 20 40 60 80]",
)
@click.option("--grid", type=click.IntRange(1), default=2, show_default=True, help="Seed rows are multiples of this.")
@click.option("--most", type=click.IntRange(1), default=200, show_default=True, help="Seed rows at most.")
@reuse_option
@trust_option
def calibrate(
    recipe: str,
    out: Path,
    overrides: tuple[str, ...],
    thresholds: tuple[float, ...],
    grid: int,
    most: int,
    reuse: tuple[Path, ...],
) -> None:
    """Find how many seed rows give a wanted cycle-0 score. Trains a few seeded models, by bisection.

    \b
      iterft calibrate nano_sft --out runs/how_many --threshold 40 --threshold 60
    """
    from iterft_lite.app import calibrate_seeds as calibration
    from iterft_lite.app.runs import seeded_score_of
    from iterft_lite.engine.run import StepStarted
    from iterft_lite.experiment.steps import cycle_title
    from iterft_lite.experiment.verbs import VERBS
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.text import score_text

    def say(event: object) -> None:
        if isinstance(event, StepStarted) and VERBS[event.step.verb].act:
            click.echo(f"  {cycle_title(event.step.cycle)}: {event.step.words} ...", err=True)

    def begin(seed_rows: int) -> None:
        click.echo(f"a model with {seed_rows} seed rows:", err=True)

    probes: dict[int, calibration.Probe] = {}

    def keep(probe: calibration.Probe) -> None:
        probes[probe.seed_rows] = probe
        click.echo(f"  scores {score_text(seeded_score_of(probe.folder)).strip()}", err=True)

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
            on_begin=begin,
            on_probe=keep,
        )
    rows = [
        (
            f"{each.threshold:g}",
            str(each.seed_rows),
            score_text(seeded_score_of(probes[each.seed_rows].folder)).strip()
            if each.seed_rows in probes
            else f"{each.score:.1f}",
            "" if each.reached else "not reached",
        )
        for each in found
    ]
    console = make_console()
    tables.show_table(("cycle-0 score", "seed_rows", "scores", ""), rows, console)
    if not all(each.reached for each in found):
        console.print(f"\n{_further(found[-1].seed_rows, most)}", markup=False)
    if reached := list(dict.fromkeys(each.seed_rows for each in found if each.reached)):
        click.echo("\nrun with one of them:\n")
    for number in reached:
        click.echo(f"  {_calibrated(recipe, overrides, number, out)}")


def _further(most_tried: int, most: int) -> str:
    """What may reach a score that no number of seed rows reached."""
    more = f"`--most` above {most}" if most_tried >= most else "more seed rows than these"
    return (
        f"{most_tried} seed rows are the most that were tried. Stronger: {more}, `--set train.epochs=...` or "
        "`--set train.learning_rate=...`, each with another `--out`; or a lower `--threshold`"
    )


def _calibrated(recipe: str, overrides: tuple[str, ...], seed_rows: int, out: Path) -> str:
    """The command that runs a recipe with a number of seed rows, on what the probes did already."""
    from iterft_lite.app.runs import default_out

    sets = [part for text in (*overrides, f"seed_rows={seed_rows}") for part in ("--set", text)]
    name = f"{out.name}-{seed_rows}" if is_path(recipe) else f"{recipe}-{seed_rows}"
    return shlex.join(["iterft", "run", recipe, *sets, "--reuse", str(out), "--out", str(default_out(name))])
