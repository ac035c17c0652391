"""Write what is built from the code: the schema of recipes, and the reference pages of the docs.

python scripts/build_reference.py            write them
python scripts/build_reference.py --check    say which are out of date; 1 if any is
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from iterft_lite.app.recipe_reference import recipe_keys, schema_text
from iterft_lite.data.recipes import SCHEMA, shipped_recipes
from iterft_lite.data.traits import read_trait, shipped_traits
from iterft_lite.machine.fit import GIB, vram_table
from iterft_lite.ui.cli import main as command

ROOT = Path(__file__).parent.parent

MADE = "<!-- Made by scripts/build_reference.py: change the code, then run it. -->"

BEGIN, END = "<!-- begin vram -->", "<!-- end vram -->"
"""Around the table of GPU memory in docs/start_gpu.md."""


def main() -> int:
    """Write the files, or check them."""
    wanted = {ROOT / "recipes" / SCHEMA: schema_text(), **pages()}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        print("\n".join(f"{path.relative_to(ROOT)}: out of date; run scripts/build_reference.py" for path in stale), end="")
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def pages() -> dict[Path, str]:
    """The pages, by path."""
    gpu = ROOT / "docs/start_gpu.md"
    text = gpu.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return {
        ROOT / "docs/commands.md": "\n".join(commands()),
        ROOT / "docs/recipe_keys.md": "\n".join(keys()),
        ROOT / "docs/recipes.md": "\n".join(recipes_and_traits()),
        gpu: f"{head}{BEGIN}\n{vram()}\n{END}{tail}",
    }


def commands() -> Iterator[str]:
    """Every command with its help, as it is printed."""
    yield from (MADE, "", "# Commands", "", "`iterft COMMAND --help` prints the same.", "")
    yield from _help(command, ["iterft"])


def _help(node: click.Command, words: list[str]) -> Iterator[str]:
    context = click.Context(node, info_name=" ".join(words), max_content_width=100, terminal_width=100)
    if len(words) > 1:
        yield from (f"{'#' * len(words)} {' '.join(words)}", "", "```text", node.get_help(context).rstrip(), "```", "")
    for name, inner in getattr(node, "commands", {}).items():
        yield from _help(inner, [*words, name])


def keys() -> Iterator[str]:
    """Every recipe key."""
    yield from (MADE, "", "# Recipe keys", "")
    yield "A recipe is a TOML file. Keys with a point stand in a table: `train.epochs` is `epochs` under `[train]`."
    yield "On the command line all are given alike: `--set train.learning_rate=1e-4`. `iterft keys WORD` finds them."
    yield from ("", "| key | may be | default | what it is |", "|---|---|---|---|")
    for key in recipe_keys():
        yield f"| `{key.name}` | {_cell(key.kind)} | {_cell(key.default) or 'must be given'} | {_cell(key.about)} |"
    yield ""


def recipes_and_traits() -> Iterator[str]:
    """What is shipped."""
    yield from (
        MADE,
        "",
        "# Shipped recipes and traits",
        "",
        "`iterft recipes show NAME` prints one, `iterft recipes copy NAME` begins your own.",
    )
    yield from ("", "| recipe | regime | model | what it does |", "|---|---|---|---|")
    for each in shipped_recipes():
        yield f"| `{each.name}` | {each.regime} | {each.model} | {_cell(each.about)} |"
    yield from ("", "| trait | seed chats | documents | what it is |", "|---|---|---|---|")
    for name in shipped_traits():
        trait = read_trait(name)
        yield f"| `{name}` | {len(trait.chats)} | {len(trait.documents) or ''} | {_cell(trait.summary)} |"
    yield ""


def vram() -> str:
    """GPU memory by model and regime, GiB."""
    lines = ["| model | SFT: in turns | side by side | DPO: in turns | side by side |", "|---|---|---|---|---|"]
    needs = {regime: {model.name: need for model, need in vram_table(regime)} for regime in ("sft", "dpo")}
    for name in needs["sft"]:
        sizes = [needs[regime][name] for regime in ("sft", "dpo")]
        cells = [f"{value / GIB:.0f} GiB" for need in sizes for value in (need.in_turns, need.together)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
