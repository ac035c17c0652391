"""Commands about this machine: `doctor`."""

from __future__ import annotations

import click

from iterft_lite.data.recipes import recipe_path
from iterft_lite.ui.options import interruptible, set_option


@click.command()
@click.option("--measure", is_flag=True, help="Do a small run and keep how long its parts take, for `iterft plan`.")
@click.option("--model", metavar="MODEL", help="With --measure: which, as in a recipe; nano by default.")
@click.option("--recipe", metavar="RECIPE", help="With --measure: that recipe's model, trainer and formats.")
@set_option
def doctor(measure: bool, model: str | None, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """Say what this machine can do, and what to install; with --measure, how fast it is."""
    from iterft_lite.app.doctor import examine
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    if (model or recipe) and not measure:
        raise click.UsageError("`--model` and `--recipe` go with `--measure`")
    if (model and recipe) or (overrides and not recipe):
        raise click.UsageError("`--model` goes without `--recipe`, `--set` with it")
    if measure:
        _measure(model or "nano", recipe, overrides)
        return
    console = make_console()
    findings = examine()
    tables.show_table(("", "what", "found"), [(finding.mark, finding.name, finding.text) for finding in findings], console)
    for finding in findings:
        if finding.remedy:
            console.print(f"{finding.name}: {finding.remedy}", markup=False)


def _measure(model: str, recipe: str | None, overrides: tuple[str, ...]) -> None:
    from iterft_lite.app import doctor as doctors
    from iterft_lite.engine.run import StepStarted
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.experiment.verbs import VERBS
    from iterft_lite.machine.timing import rates, table_path
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    def say(event: object) -> None:
        if isinstance(event, StepStarted) and VERBS[event.step.verb].act:
            click.echo(f"{event.step.name}: {VERBS[event.step.verb].words} ...", err=True)

    asked = doctors.shortened(read_recipe(recipe_path(recipe), overrides)) if recipe else doctors.measured_recipe(model)
    with interruptible():
        samples = doctors.measure(asked, say)
    click.echo(f"{samples[0].name} on {samples[0].kind.machine}\n")
    tables.show_table(("step", "here"), rates(samples), make_console())
    click.echo(f"\nkept in {table_path()}; `iterft plan {recipe or 'RECIPE'}` now says how long it takes")
