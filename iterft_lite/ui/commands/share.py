"""`iterft share`: a run or a study in a form that others can use."""

from __future__ import annotations

from pathlib import Path

import click

from iterft_lite.ui.options import RunFolder


@click.command()
@click.argument("root", metavar="RUN|STUDY", type=RunFolder)
@click.option("--to", required=True, type=RunFolder, help="The folder to write; it must be new or empty.")
@click.option("--push", "repository", metavar="OWNER/NAME", help="Send it to the Hugging Face hub too, where only you see it.")
@click.option("--public", is_flag=True, help="With --push: where everybody sees it.")
def share(root: Path, to: Path, repository: str | None, public: bool) -> None:
    """Write a run or a study in a form for others. That is: adapters, a model card, recipes, and answers with their verdicts
    as a dataset. Sends nothing unless told to.

    \b
      iterft share runs/bliss --to shared/bliss
      iterft share studies/lucky --to shared/lucky --push me/lucky-study
    """
    from iterft_lite.app.share import push
    from iterft_lite.ui import card

    if public and not repository:
        raise click.UsageError("`--public` goes with `--push`")
    card.share(root, to)
    click.echo(f"wrote {to}: look at {to / 'README.md'} before it goes anywhere")
    if repository:
        for address in push(to, repository, public=public):
            click.echo(f"sent to {address}")
