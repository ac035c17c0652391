"""Shared by all commands: the group that turns errors into messages, options, and the message after Ctrl-C."""

from __future__ import annotations

import contextlib
import difflib
import errno
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from iterft_lite.errors import IterftError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

GIVEN = "iterft_lite.given"
"""Key of the command's arguments in click's context."""

RunFolder = click.Path(path_type=Path)


class NewFile(click.Path):
    """A file to be written: its folder is there before anything is computed for it."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The file's path."""
        path = Path(value)
        if value == "-":
            self.fail("`-` is not a file: give a name", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"there is no folder `{path.parent}`: make it first", param, ctx)
        return super().convert(value, param, ctx)


class Group(click.Group):
    """Turns an IterftError into a message and its exit code; a bug keeps its traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note the arguments: the message after Ctrl-C repeats the command."""
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The commands, in the order in which a user needs them."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of a name. An unknown name raises with the names that are spelt alike."""
        if not ctx.resilient_parsing and args and args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            meant = f"; did you mean `iterft {near[0]}`?" if near else "; `iterft --help` lists all"
            raise click.UsageError(f"there is no command `{args[0]}`{meant}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if sys.platform == "win32":
            click.echo("error: native Windows is not supported (file locks and processes are POSIX ones): use WSL2", err=True)
            ctx.exit(2)
        from iterft_lite.files import our_error
        from iterft_lite.ui.foreign import silence_output, tolerate_terminals

        tolerate_terminals()
        try:
            done = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
        except IterftError as error:
            _say_error(error)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader has gone (`| head`): end without a message
                raise
            if error.filename is None:
                silence_output()
            told = our_error(Path(error.filename or "standard output"), error)
            _say_error(told)
            ctx.exit(told.exit_code)
        return done


def _say_error(error: IterftError) -> None:
    """Print an error and its hint, on a terminal with lines that end at words."""
    from iterft_lite.ui.foreign import safe
    from iterft_lite.ui.wrap import wrapped

    text = f"error: {safe(error)}"
    click.echo(wrapped(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text, err=True)


# -- completion: what a shell offers after the tab key


def complete_recipe(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Shipped recipes; the shell adds files."""
    from iterft_lite.data.recipes import shipped_recipes

    names = [CompletionItem(each.name, help=each.about) for each in shipped_recipes() if each.name.startswith(begun)]
    return names or [CompletionItem(begun, type="file")]


def complete_trait(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Shipped traits; the shell adds folders."""
    from iterft_lite.data.traits import shipped_traits

    return [CompletionItem(name) for name in shipped_traits() if name.startswith(begun)] or [CompletionItem(begun, type="dir")]


def complete_key(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Recipe keys, and after `trait=` the traits."""
    from iterft_lite.app.recipe_reference import recipe_keys
    from iterft_lite.data.traits import shipped_traits

    key, equals, value = begun.partition("=")
    if equals:
        names = shipped_traits() if key == "trait" else []
        return [CompletionItem(f"{key}={name}") for name in names if name.startswith(value)]
    return [CompletionItem(f"{each.name}=", help=each.about) for each in recipe_keys() if each.name.startswith(begun)]


def complete_run(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Run folders."""
    from iterft_lite.app.runs import RUNS, run_folders

    parent = Path(begun).parent if "/" in begun else RUNS
    found = [str(folder) for folder in run_folders(parent) if str(folder).startswith(begun)]
    return [CompletionItem(folder) for folder in found] or [CompletionItem(begun, type="dir")]


# -- arguments and options


def _run_or_newest(ctx: click.Context, _: click.Parameter, given: Path | None) -> Path | None:
    """The named run, or the newest."""
    if given is not None or ctx.resilient_parsing:
        return given
    from iterft_lite.app.runs import newest_run

    found = newest_run()
    click.echo(f"{found}, the newest run:", err=True)
    return found


newest_run_argument = click.argument(
    "out", metavar="[RUN]", required=False, type=RunFolder, callback=_run_or_newest, shell_complete=complete_run
)


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe key; may be given several times.",
    shell_complete=complete_key,
)


def _with_something(_: click.Context, __: click.Parameter, given: tuple[Path, ...]) -> tuple[Path, ...]:
    """Folders that are not empty: the first run of a shell loop has nothing to reuse yet."""
    empty = [folder for folder in given if not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))]
    for folder in empty:
        click.echo(f"note: there is nothing in `{folder}` yet", err=True)
    return tuple(folder for folder in given if folder not in empty)


reuse_option = click.option(
    "--reuse",
    multiple=True,
    type=RunFolder,
    callback=_with_something,
    metavar="DIR",
    help="A run folder, a study, or a folder of them, whose finished steps are reused where they are the same.",
)


def _trust(_: click.Context, __: click.Parameter, models: tuple[str, ...]) -> None:
    if models:
        from iterft_lite.model_code import trust

        for model in models:
            trust(model)


trust_option = click.option(
    "--trust-remote-code",
    multiple=True,
    metavar="MODEL",
    callback=_trust,
    expose_value=False,
    help="Run the Python code that this very model brings. Read it first.",
)


@contextlib.contextmanager
def interruptible(out: Path | None = None) -> Iterator[None]:
    """After Ctrl-C, print the command that continues, and the judge's batches in `out` that go on without it."""
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
