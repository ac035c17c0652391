"""What commands share: the group that turns errors into messages, options, and what Ctrl-C says."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from iterft_lite.errors import IterftError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

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


@contextlib.contextmanager
def interruptible(out: Path | None = None) -> Iterator[None]:
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
