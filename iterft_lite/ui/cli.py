"""The command `iterft`. Imports nothing heavy: each command brings what it needs."""

from __future__ import annotations

import click

from iterft_lite import __version__
from iterft_lite.ui.commands.experiment import calibrate, plan, run
from iterft_lite.ui.commands.judge import judge
from iterft_lite.ui.commands.machine import doctor
from iterft_lite.ui.commands.recipes import recipes
from iterft_lite.ui.commands.results import chat, export, report
from iterft_lite.ui.commands.traits import seeds, traits
from iterft_lite.ui.options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="iterft")
def main() -> None:
    """Iterated finetuning on one GPU, or on two CPU cores: does a trait amplify, stay or decay?

    \b
    First steps:
      iterft run nano_sft --out runs/first
      iterft report runs/first
    """


for command in (run, plan, report, chat, export, calibrate, judge, recipes, traits, seeds, doctor):
    main.add_command(command)


if __name__ == "__main__":
    main()
