"""Recipes of the user's own: a copy of a shipped one, or a new one for a machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.backends.judge.identity import PAPER_JUDGE
from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.kinds import LOCAL, kind_of, local_file
from iterft_lite.backends.judge.providers import key_of, server_of, unknown_provider
from iterft_lite.data.recipes import SCHEMA, recipe_folder, shipped_path
from iterft_lite.data.traits import Trait, read_trait, shipped_traits
from iterft_lite.errors import FolderError, UserError
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.files import write_output
from iterft_lite.machine.fit import largest_that_fits
from iterft_lite.machine.memory import shape_of
from iterft_lite.machine.resolve import model_place, this_machine

SMALL = 50_000_000
"""Parameters below which a recipe begins from the nano models' settings: fewer weights need more and larger steps."""


@dataclass(frozen=True)
class Own:
    """A new recipe.

    Attributes:
        name: Its name.
        text: The file's text without the first line.
    """

    name: str
    text: str


def copy_shipped(name: str, to: Path, *, force: bool = False) -> None:
    """Copy a shipped recipe.

    Raises:
        UserError: If there is no such recipe, or there is such a file already.
    """
    _free(to, force)
    write_output(to, _headed(shipped_path(name).read_text(encoding="utf-8"), to))


def traits_for(regime: str) -> list[str]:
    """Shipped traits that have seed rows of the regime's kind; what is usually begun with comes first."""
    names = sorted(shipped_traits(), key=lambda name: name != "lucky")
    return [name for name in names if _seed_rows(read_trait(name), regime)]


def _seed_rows(trait: Trait, regime: str) -> int:
    return len(trait.documents if REGIMES[regime].rows == "document" else trait.chats)


def begin(regime: str, gib: float, *, judge: str, trait: str, model: str | None = None) -> Own:
    """A recipe for a machine: with a given model, else with the largest of a short list that fits its GPU; the nano model
    without a GPU.

    Args:
        gib: GPU memory; 0 for none.
        model: As in a recipe.

    Raises:
        UserError: If there is no such trait, judge or model, or the trait has no rows to begin with.
    """
    need_judge(judge)
    small = model is not None and _small(model_place(model))
    found = read_trait(trait)
    there = _seed_rows(found, regime)
    if not there:
        raise UserError(
            f"trait `{found.name}` has no seed rows for {regime.upper()}", hint=f"these have: {', '.join(traits_for(regime))}"
        )
    model = model or largest_that_fits(regime, gib)
    template = f"nano_{regime}" if model is None or small else regime
    shipped = read_recipe(recipe_folder() / f"{template}.toml")
    text = (recipe_folder() / f"{template}.toml").read_text(encoding="utf-8")
    text = _with(text, "trait", f'"{trait}"')
    text = _with(text, "judge", f'"{judge}"')
    if model is not None:
        text = _with(text, "model", f'"{model}"')
    if there < shipped.seed_rows:
        text = _with(text, "seed_rows", str(there))
    machine = f"a GPU of {gib:g} GiB" if gib else "a machine without a GPU"
    text = _about(text, f"{found.name} by {regime.upper()}, made for {machine}.")
    return Own(f"{found.name}_{regime}", text)


def _small(place: str) -> bool:
    """Whether a model learns at the nano models' pace; one that is not on this machine is taken to be large."""
    shape = shape_of(place)
    return shape is not None and shape.parameters < SMALL


def _about(text: str, sentence: str) -> str:
    """A recipe with another sentence on what it does: its second comment."""
    lines = text.split("\n")
    lines[1] = f"# {sentence}"
    return "\n".join(lines)


def write_own(own: Own, to: Path, *, force: bool = False) -> None:
    """Write a recipe.

    Raises:
        FolderError: If there is such a file already, or it cannot be written.
    """
    _free(to, force)
    write_output(to, _headed(own.text, to))


def suggested_gib() -> float:
    """GPU memory of this machine, GiB; 0 without a GPU."""
    return this_machine().vram_total / 2**30


def need_judge(name: str) -> None:
    """Check that a text can name a judge, and that a local one's file is there: one on the hub is fetched.

    Raises:
        UserError: If it cannot, or is not.
    """
    if name.startswith(LOCAL):
        local_file(name)
    if name != "auto" and kind_of(name).remote and (unknown := unknown_provider(name)):
        raise UserError(unknown, hint=f'for example "{PAPER_JUDGE}"')


def judge_choices() -> list[str]:
    """Judges that work here, the best first: the paper's if there is a key."""
    variables = environment(Path.cwd())
    key = key_of(PAPER_JUDGE, server_of(PAPER_JUDGE, None, variables).address, variables)
    return [*([PAPER_JUDGE] if key else []), "embedded"]


def _free(to: Path, force: bool) -> None:
    if to.exists() and not force:
        raise FolderError(f"`{to}` already exists", hint="give another name, or `--force` to write over it")


def _headed(text: str, to: Path) -> str:
    """A recipe or a study with the command that runs it on top, and the schema where this machine has it."""
    text = re.sub(r"^# iterft (run|sweep) .*$", lambda match: f"# iterft {match[1]} {to}", text, count=1, flags=re.MULTILINE)
    schema = (recipe_folder() / SCHEMA).resolve()
    return re.sub(r"^#:schema .*$", lambda _: f"#:schema {schema.as_uri()}", text, count=1, flags=re.MULTILINE)


def _with(text: str, key: str, value: str) -> str:
    """A recipe's text with another value of a key of no table, in its place; after `rows` where it has none."""
    line = f"{key} = {value}"
    found = re.compile(rf"^{key} = [^#\n]*?( *#.*)?$", re.MULTILINE)
    head, bracket, rest = text.partition("\n[")
    if found.search(head):
        return found.sub(lambda _: line, head, count=1) + bracket + rest
    # beside the other plain keys, above what is said below them
    return re.sub(r"^rows = .*$", lambda match: f"{match[0]}\n{line}", head, count=1, flags=re.MULTILINE) + bracket + rest
