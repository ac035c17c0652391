"""Commands of studies: `sweep`, `sweep plan`, `sweep status`, `sweep stop`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from iterft_lite.data.recipes import study_names, study_path
from iterft_lite.ui.options import RunFolder, interruptible, reuse_option, set_option, trust_option


def complete_study(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Shipped studies; the shell adds files."""
    names = [CompletionItem(name) for name in study_names() if name.startswith(begun)]
    return names or [CompletionItem(begun, type="file")]


class SweepGroup(click.Group):
    """`iterft sweep STUDY.toml --out DIR` is short for `iterft sweep run STUDY.toml --out DIR`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that is meant."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


@click.group(cls=SweepGroup, subcommand_metavar="STUDY.toml --out DIR | COMMAND [ARGS]...")
def sweep() -> None:
    """Run a study: a grid of recipes over one store. The same command goes on with it.

    \b
      iterft sweep plan nano_sft_grid           what it would do, cost and take
      iterft sweep study.toml --out studies/a   run it, or continue it
      iterft sweep status studies/a --watch     from any other terminal
      iterft sweep stop studies/a
      iterft report studies/a                   what came of it
    """


only_option = click.option(
    "--only", multiple=True, metavar="KEY=VALUE", help="Only cells with this value; several narrow it down."
)


@sweep.command("run")
@click.argument("study", shell_complete=complete_study)
@click.option("--out", required=True, type=RunFolder, help="The study's folder; an unfinished one is continued.")
@set_option
@only_option
@click.option("--limit", type=click.IntRange(1), help="At most so many cells this time.")
@click.option("--retry", multiple=True, metavar="failed|lost|NAME", help="Try these cells again, whatever they ended in.")
@click.option("--keep-going", is_flag=True, help="Go on although the first cells fail alike.")
@click.option("--chains", type=click.IntRange(1, 8), help="Cells side by side on each GPU [2] or CPU [1].")
@click.option(
    "--on",
    "where",
    default="local",
    show_default=True,
    metavar="local|ray[:HOST:PORT]",
    help="Here, or on a Ray cluster.",
)
@click.option("--plain", is_flag=True, help="Plain lines instead of the live view.")
@reuse_option
@trust_option
def run_study(
    study: str,
    out: Path,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    limit: int | None,
    retry: tuple[str, ...],
    keep_going: bool,
    chains: int | None,
    where: str,
    plain: bool,
    reuse: tuple[Path, ...],
) -> None:
    """Run a study, or continue it.

    \b
      iterft sweep study.toml --out studies/lucky
      iterft sweep study.toml --out studies/lucky --only rows=60 --limit 4
      iterft sweep study.toml --out studies/lucky --retry failed
      iterft sweep study.toml --out studies/luna --set judge=openai/gpt-6-luna --reuse studies/lucky
      iterft sweep study.toml --out /shared/lucky --on ray:head:6379
    """
    from iterft_lite.app.calibrate_judge import store_calibrations
    from iterft_lite.app.runs import runs_below
    from iterft_lite.app.study_plan import StudyPlan
    from iterft_lite.app.sweep import Asked, open_sweep
    from iterft_lite.app.sweep_places import places_on
    from iterft_lite.files import without_empty
    from iterft_lite.machine.resolve import this_machine
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.live_sweep import SweepView

    console, planned = make_console(), StudyPlan(study_path(study), overrides)
    asked = Asked(only, limit, retry, keep_going, reuse)
    with interruptible(), without_empty(out), contextlib.ExitStack() as stack:
        places, left_out = places_on(where, out, this_machine(), chains)
        opened = stack.enter_context(open_sweep(planned, out, places, asked, _say_probe))
        for choice in opened.choices:
            console.print(choice, style="dim", markup=False)
        for note in (*left_out, *opened.notes):
            console.print(note, style="bold", markup=False)
        view = SweepView(planned.study.name, opened.folder.cells(), opened.state, console)
        view.is_live = view.is_live and not plain
        with view:
            for event in opened.events():
                view.take(event)
        failed = opened.failed()
    with console.status("holding the judges against careful readers ..."):
        # a cluster's driver may have neither a GPU nor the model
        store_calibrations(runs_below(out), starts=("embedded", "base") if where == "local" else ("embedded",))
    if failed:
        _show_failed(failed)
        sys.exit(1)
    console.print(f"\nmore: iterft report {out}", style="dim")
    console.print(f"      iterft figure sweep {out} --png sweep.png", style="dim")


def _say_probe(name: str, event: Any) -> None:
    """A line for each model that a calibration tried."""
    from iterft_lite.engine.run import StepFinished

    if isinstance(event, StepFinished) and event.step.name == "c0-aggregate":
        score = (event.completion.results.get("trait") or {}).get("mean")
        rows = name.rpartition("rows")[2]
        click.echo(f"calibrating: {rows} seed rows come to {'no score' if score is None else f'{score:.1f}'}", err=True)


def _show_failed(failed: Any) -> None:
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    rows = [
        (name, str((state.failure or {}).get("kind", "")), state.step, str((state.failure or {}).get("message", "")))
        for name, state in failed.items()
    ]
    tables.show_table(("cell", "kind", "step", "reason"), rows, make_console(stderr=True))
    click.echo("\nthe same command tries them again; `--retry NAME` one of them", err=True)


@sweep.command("plan")
@click.argument("study", shell_complete=complete_study)
@set_option
@only_option
@click.option("--limit", type=click.IntRange(1), help="Only so many cells: the first that would be run.")
@click.option("--cells", "list_cells", is_flag=True, help="Every cell by name.")
@click.option("--gpu", type=click.FloatRange(0), metavar="GIB", help="As if an NVIDIA GPU with this much memory were here.")
@reuse_option
def plan_study(
    study: str,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    limit: int | None,
    list_cells: bool,
    gpu: float | None,
    reuse: tuple[Path, ...],
) -> None:
    """Print what a study would do, cost and take. Says what sharing saves too; does nothing.

    \b
      iterft sweep plan study.toml
      iterft sweep plan study.toml --cells
      iterft sweep plan study.toml --reuse studies/lucky        what is left to do beside it
    """
    from iterft_lite.app.study_estimate import estimate_study
    from iterft_lite.app.study_plan import StudyPlan
    from iterft_lite.engine.manifest import finished_in
    from iterft_lite.ui import tables
    from iterft_lite.ui.commands.experiment import machine_with
    from iterft_lite.ui.console import make_console

    machine = None if gpu is None else machine_with(gpu)
    finished = finished_in(reuse) if reuse else None
    found = estimate_study(StudyPlan(study_path(study), overrides, machine), only, machine, limit, finished)
    console = make_console()
    tables.show_table(("", ""), found.lines.items(), console)
    for note in found.notes:
        console.print(note, style="dim")
    if list_cells:
        for name in found.names:
            click.echo(name)


@sweep.command("status")
@click.argument("folder", metavar="DIR", type=RunFolder)
@click.option("--watch", is_flag=True, help="Redraw it every two seconds, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="The machine-readable form.")
def status(folder: Path, watch: bool, as_json: bool) -> None:
    """Say where a sweep is. Reads files only: from any terminal that sees the folder.

    \b
      iterft sweep status studies/lucky
      iterft sweep status studies/lucky --watch
    """
    import json
    from dataclasses import asdict

    from iterft_lite.engine.study import StudyFolder
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.live_sweep import show_state, watch_state

    opened = StudyFolder(folder)
    if as_json:
        click.echo(json.dumps(asdict(opened.state()), indent=1, ensure_ascii=False))
    elif watch:
        with interruptible():
            watch_state(opened, make_console())
    else:
        show_state(opened, make_console())


@sweep.command("stop")
@click.argument("folder", metavar="DIR", type=RunFolder)
def stop(folder: Path) -> None:
    """Ask the sweep in a folder to end; everything finished is kept.

    \b
      iterft sweep stop studies/lucky
    """
    from iterft_lite.app.sweep import ask_to_stop
    from iterft_lite.engine.study import StudyFolder

    asked = ask_to_stop(StudyFolder(folder))
    click.echo("it ends within a few seconds; the same `iterft sweep` goes on" if asked else "no sweep is going on there")
