"""The command `iterft`. Imports nothing heavy: each command imports what it needs when it runs."""

from __future__ import annotations

import click

from iterft_lite import __version__
from iterft_lite.ui.commands.experiment import calibrate, plan, run
from iterft_lite.ui.commands.judge import judge
from iterft_lite.ui.commands.machine import cache, completion, doctor, models
from iterft_lite.ui.commands.recipes import init, keys, recipes
from iterft_lite.ui.commands.results import chat, export, replicate, report, runs
from iterft_lite.ui.commands.share import share
from iterft_lite.ui.commands.study import sweep
from iterft_lite.ui.commands.study_results import compare, figure
from iterft_lite.ui.commands.traits import seeds, traits
from iterft_lite.ui.options import Group


@click.group(
    cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="iterft")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Iterated finetuning on one GPU, or on two CPU cores: does a trait amplify, stay or decay?

    \b
    First steps:
      iterft run nano_sft      a real run without GPU, key or download, in a few minutes
      iterft report            what came of it
      iterft chat --cycle 0    talk to the seeded model
      iterft init              a recipe of your own, for this machine
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


COMMANDS = (
    *(run, plan, report, replicate, chat, export, runs, share),
    *(sweep, figure, compare),
    *(init, recipes, keys, traits, seeds, calibrate, judge),
    *(doctor, models, cache, completion),
)

for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
