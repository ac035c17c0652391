"""Commands about recipes: `recipes`, `keys`, `init`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from iterft_lite.errors import IterftError
from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.ui.options import complete_recipe, complete_trait


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the shipped recipes and studies; show or copy one.

    \b
      iterft recipes
      iterft recipes show nano_sft
      iterft recipes copy nano_sft mine.toml
    """
    if ctx.invoked_subcommand is None:
        from iterft_lite.data.recipes import shipped_recipes, shipped_studies
        from iterft_lite.ui import tables
        from iterft_lite.ui.console import make_console

        tables.show_entries(
            [(each.name, f"{each.regime}, {each.model}", each.about) for each in shipped_recipes()], make_console()
        )
        click.echo("\nstudies, for `iterft sweep`:\n")
        tables.show_entries([(name, "study", about) for name, about in shipped_studies()], make_console())


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipe)
def show_recipe(name: str) -> None:
    """Print a recipe.

    \b
      iterft recipes show nano_sft
    """
    from iterft_lite.data.recipes import shipped_path

    click.echo(shipped_path(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
@click.argument("name", shell_complete=complete_recipe)
@click.argument("to", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def copy_recipe(name: str, to: Path | None, force: bool) -> None:
    """Copy a shipped recipe into a file of your own. NAME.toml here by default.

    \b
      iterft recipes copy nano_sft mine.toml
    """
    from iterft_lite.app.own_recipe import copy_shipped
    from iterft_lite.data.recipes import study_names

    to = to or Path(f"{name}.toml")
    copy_shipped(name, to, force=force)
    if name in study_names():
        click.echo(f"wrote {to}; change it, then:\n\n  iterft sweep plan {to}\n  iterft sweep {to} --out studies/{to.stem}")
    else:
        click.echo(f"wrote {to}; change it, then:\n\n  iterft plan {to}\n  iterft run {to}")


@click.command()
@click.argument("word", required=False, default="")
def keys(word: str) -> None:
    """List the keys of a recipe, all or those with a word. The word is looked for in names and descriptions.

    \b
      iterft keys
      iterft keys learning
      iterft keys mix
    """
    from iterft_lite.app.recipe_reference import recipe_keys
    from iterft_lite.errors import UserError
    from iterft_lite.experiment.recipe_keys import near_key
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    found = recipe_keys(word)
    if not found:
        near = near_key(word, [key.name for key in recipe_keys()])
        raise UserError(f"no recipe key has `{word}`", hint=f"did you mean `{near}`?" if near else "`iterft keys` lists all")
    entries = [(key.name, key.kind + (f"; {key.default}" if key.default else ""), key.about) for key in found]
    tables.show_entries(entries, make_console())


@click.command()
@click.argument("name", required=False, default="")
@click.option("--regime", type=click.Choice(list(REGIMES)), default="sft", show_default=True, help="What is trained on.")
@click.option(
    "--gpu",
    type=click.FloatRange(0),
    metavar="GIB",
    help="For a GPU with this much memory; 0 for none; this machine by default.",
)
@click.option("--judge", help="As in a recipe.")
@click.option("--trait", help="A shipped trait, or the path of a folder.", shell_complete=complete_trait)
@click.option("--model", help="A model of the hub, or a folder; one that fits the machine by default.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def init(
    name: str, regime: str, gpu: float | None, judge: str | None, trait: str | None, model: str | None, force: bool
) -> None:
    """Write a commented recipe for this machine, and plan it. Asks for what the options do not say.

    \b
      iterft init
      iterft init mine --trait bliss --judge embedded
      iterft init mine --trait ./pirate --model ./my_model
    """
    from iterft_lite.app.own_recipe import begin, judge_choices, need_judge, suggested_gib, traits_for, write_own
    from iterft_lite.backends.judge.identity import PAPER_JUDGE
    from iterft_lite.data.traits import read_trait
    from iterft_lite.ui.commands.experiment import print_plan
    from iterft_lite.ui.console import make_console

    console, asks, here = make_console(stderr=True), _can_ask(), round(suggested_gib(), 1)
    traits = traits_for(regime)
    if gpu is None:
        gpu = click.prompt("GPU memory in GiB (0: no GPU)", default=here, type=click.FloatRange(0)) if asks else here
    if judge is None and asks:
        console.print(f"judges: embedded (no key, for trying out), {PAPER_JUDGE} (with a key), ollama/NAME, local:FILE.gguf")
        judge = click.prompt("judge", default=judge_choices()[0], value_proc=_accepted(need_judge))
    if trait is None and asks:
        console.print(f"traits: {', '.join(sorted(traits))}; or the path of a folder, as ./pirate")
        trait = click.prompt("trait", default=traits[0], value_proc=_accepted(read_trait))
    wanted = begin(regime, gpu, judge=judge or judge_choices()[0], trait=trait or traits[0], model=model)
    to = Path(f"{name.removesuffix('.toml') or wanted.name}.toml")
    write_own(wanted, to, force=force)
    click.echo(f"wrote {to}\n")
    print_plan(str(to), (), gpu=None if gpu == here else gpu)
    click.echo(f"\nnext: iterft run {to}")


def _can_ask() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty()


def _accepted(check: Callable[[str], object]) -> Callable[[str], str]:
    """An answer that passes a check; what is wrong with another one is shown, and the question asked again."""

    def accept(answer: str) -> str:
        try:
            check(answer)
        except IterftError as error:
            raise click.UsageError(str(error)) from None
        return answer

    return accept
