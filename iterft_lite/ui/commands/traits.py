"""Commands of traits and their seed rows: `traits`, `seeds`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from iterft_lite.ui.options import RunFolder, interruptible

SHOWN_ROWS = 3
"""New seed rows that are shown as they come."""


@click.group()
def traits() -> None:
    """The shipped traits, and your own.

    \b
      iterft traits list
      iterft traits new pirate
      iterft traits check ./pirate
    """


@traits.command("list")
def list_traits() -> None:
    """List the shipped traits.

    \b
      iterft traits list
    """
    from iterft_lite.data.traits import read_trait, shipped_traits
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    entries = []
    for trait in map(read_trait, shipped_traits()):
        documents = f", {len(trait.documents)} documents" if trait.documents else ""
        entries.append((trait.name, f"{len(trait.chats)} chats{documents}, {len(trait.questions)} questions", trait.summary))
    tables.show_entries(entries, make_console())


@traits.command("new")
@click.argument("name")
@click.option("--in", "parent", type=RunFolder, default=Path(), help="Where the folder is made; here by default.")
def new_trait(name: str, parent: Path) -> None:
    """Make a folder for a trait of your own, filled with an example.

    \b
      iterft traits new pirate
      iterft traits new pirate --in traits
    """
    from iterft_lite.app import new_trait as new_traits

    folder = new_traits.new_trait(name, parent)
    # a path has a separator: a bare name is a shipped trait's
    place = folder if "/" in str(folder) else f"./{folder}"
    click.echo(f"made {folder}; {folder / 'README.md'} says what is what\ncheck it with: iterft traits check {place}")


@traits.command("check")
@click.argument("trait")
@click.pass_context
def check_trait(ctx: click.Context, trait: str) -> None:
    """Check a trait folder. Prints its problems, what is unusual, and the size of each file.

    \b
      iterft traits check ./pirate
    """
    from iterft_lite.app import new_trait as new_traits
    from iterft_lite.errors import TraitError
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    checked = new_traits.examine_trait(trait)
    console = make_console()
    rows = [(count.name, str(count.rows), f"{count.words:.0f}", f"{count.distinct_2:.2f}") for count in checked.counts]
    tables.show_table(("file", "rows", "words a row", "distinct-2"), rows, console)
    for lack in checked.lacks:
        console.print(f"note: {lack}")
    for problem in checked.problems:
        console.print(f"wrong: {problem}")
    if checked.problems:
        ctx.exit(TraitError.exit_code)
    for doubt in checked.doubts:
        console.print(f"unusual: {doubt}")
    console.print("nothing is wrong with it" + (", but read what is unusual" if checked.doubts else ""))


@click.group()
def seeds() -> None:
    """Seed rows by a teacher model, for a trait of your own.

    \b
      iterft seeds make ./pirate --model openai/gpt-4o-mini --count 60 --out pirate.jsonl
    """


@seeds.command("make")
@click.argument("trait")
@click.option("--model", required=True, help="Teacher: a judge's route, a model folder, or hub:OWNER/NAME.")
@click.option("--count", type=click.IntRange(1), required=True, help="Rows in the file in the end.")
@click.option("--documents", is_flag=True, help="Documents for SDF instead of chats.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSONL; rows there are kept.")
@click.option("--api-base", help="Address of an OpenAI-compatible server.")
@click.option("--max-usd", type=float, default=0.0, help="A route stops before it would cost more; 0 means no limit.")
def make_seeds(trait: str, model: str, count: int, documents: bool, out: Path, api_base: str | None, max_usd: float) -> None:
    """Have a teacher write seed rows from a trait's summary. Read and weed them before a recipe names them.

    \b
      iterft seeds make ./pirate --model openai/gpt-4o-mini --count 60 --out pirate.jsonl
      iterft seeds make ./pirate --model hub:Qwen/Qwen3-4B-Instruct-2507 --count 60 --out pirate.jsonl
    """
    from iterft_lite.app.make_seeds import seeds_by
    from iterft_lite.ui.console import make_console
    from iterft_lite.ui.text import time_left

    console, began, shown = make_console(stderr=True), time.monotonic(), 0

    def say(rows: int, text: str) -> None:
        nonlocal shown
        if shown < SHOWN_ROWS:  # enough to stop early where they are not what was meant
            console.print(f"\n{text}\n")
        shown += 1
        if rows % 10 == 0 or rows == count:
            left = (time.monotonic() - began) / shown * (count - rows)
            click.echo(f"{rows} of {count} rows" + (f", {time_left(left)}" if rows < count else ""), err=True)

    kind = "document" if documents else "chat"
    with interruptible():
        made = seeds_by(model, trait, count, out, kind=kind, api_base=api_base, max_usd=max_usd, on_row=say)
    dropped = ", ".join(f"{number} {reason}" for reason, number in made.dropped.items()) or "none"
    click.echo(f"{out}: {made.rows} rows; {made.asked} asked, dropped: {dropped}")
    if made.unchecked:
        console.print(f"note: {made.unchecked}")
    click.echo(f'read them, then put them into a recipe:\n\n  [seeds]\n  path = "{out}"')
