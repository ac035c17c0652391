"""The shipped recipes, and the file that a name means.

A bare name (`nano_sft`) always means a shipped recipe, whatever the working folder holds. A path has a separator or ends in
`.toml`.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from iterft_lite.data import is_path
from iterft_lite.errors import UserError
from iterft_lite.files import user_path

ENDING = ".toml"

STUDIES = "studies"
"""Folder of the shipped studies, among the recipes."""

SCHEMA = "recipe.schema.json"
"""JSON Schema of a recipe, beside the shipped ones; editors read it from the line `#:schema` at the top of a recipe."""


@dataclass(frozen=True)
class ShippedRecipe:
    """One line of the list of shipped recipes.

    Attributes:
        name: Its name for `iterft run`.
        about: A sentence on what it does.
    """

    name: str
    regime: str
    model: str
    about: str


OTHERWISE = {
    "recipe": "it is a study: `iterft sweep plan {name}`, `iterft sweep {name} --out DIR`",
    "study": "it is a recipe: `iterft plan {name}`, `iterft run {name}`",
}
"""What to do with a name of the other kind, by the kind that was looked for."""


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside the package if installed, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, in alphabetical order."""
    return sorted(path.stem for path in recipe_folder().glob(f"*{ENDING}"))


def shipped_recipes() -> list[ShippedRecipe]:
    """The shipped recipes, in alphabetical order."""
    return [_shipped(recipe_folder() / f"{name}{ENDING}") for name in recipe_names()]


def _shipped(path: Path) -> ShippedRecipe:
    text = path.read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return ShippedRecipe(path.stem, table["regime"], table["model"], _comments(text))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe given by name, or of the user's own given by path.

    Raises:
        UserError: If there is no shipped recipe of that name, or the path is a folder.
    """
    return _file(name, recipe_folder(), "recipe")


def study_names() -> list[str]:
    """Names of the shipped studies, in alphabetical order."""
    return sorted(path.stem for path in (recipe_folder() / STUDIES).glob(f"*{ENDING}"))


def study_path(name: str) -> Path:
    """The file of a shipped study given by name, or of the user's own given by path.

    Raises:
        UserError: If there is no shipped study of that name, or the path is a folder.
    """
    return _file(name, recipe_folder() / STUDIES, "study")


def shipped_path(name: str) -> Path:
    """The file of a shipped recipe or study.

    Raises:
        UserError: If there is none of that name.
    """
    return study_path(name) if name in study_names() else recipe_path(name)


def _file(name: str, folder: Path, kind: Literal["recipe", "study"]) -> Path:
    """The file behind a name."""
    lists = f"`iterft recipes` lists the shipped {'recipes' if kind == 'recipe' else 'studies'}"
    if is_path(name) or name.endswith(ENDING):
        path = user_path(name)
        if path.is_dir():
            raise UserError(f"`{name}` is a folder, not a {kind}", hint=lists)
        return path
    shipped = folder / f"{name}{ENDING}"
    if shipped.is_file():
        return shipped
    other = study_names() if kind == "recipe" else recipe_names()
    hint = OTHERWISE[kind].format(name=name) if name in other else _hint(name, folder, lists)
    raise UserError(f"there is no shipped {kind} `{name}`", hint=hint)


def _hint(name: str, folder: Path, lists: str) -> str:
    if Path(name).is_file():
        return f"a file of your own is given as a path: ./{name}"
    if Path(f"{name}{ENDING}").is_file():
        return f"a file of your own is given with its ending: {name}{ENDING}"
    names = [path.stem for path in folder.glob(f"*{ENDING}")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(f'`{each}`' for each in near)}? " if near else ""
    return f"{meant}{lists}; a file of your own ends in `{ENDING}`"


def shipped_studies() -> list[tuple[str, str]]:
    """Name of each shipped study, and what it does in a sentence."""
    return [
        (name, _comments((recipe_folder() / STUDIES / f"{name}{ENDING}").read_text(encoding="utf-8"))) for name in study_names()
    ]


def _comments(text: str) -> str:
    """What a shipped file does: its second comment; the first is the command that runs it."""
    comments = [line[2:].strip() for line in text.splitlines() if line.startswith("# ")]
    return comments[1] if len(comments) > 1 else ""
