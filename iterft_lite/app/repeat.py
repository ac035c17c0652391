"""The command that repeats a run, from the manifest in its folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from iterft_lite.data.recipes import recipe_folder, recipe_names
from iterft_lite.digests import Json
from iterft_lite.experiment.recipe import Recipe, make_recipe, read_recipe
from iterft_lite.experiment.recipe_keys import flat


def repeat_command(manifest: Mapping[str, Any]) -> str:
    """`iterft run nano_sft --set trait=bliss`: with a shipped recipe if the run has the name of one, else a file of that name.

    Args:
        manifest: The run's manifest.
    """
    asked = dict(manifest.get("asked") or manifest["recipe"])
    name = str(asked.get("name") or "")
    if name in recipe_names():
        shipped = read_recipe(recipe_folder() / f"{name}.toml")
        changes = settings_beside(asked, shipped)
        return shlex.join(["iterft", "run", name, *(part for change in changes for part in ("--set", change))])
    return shlex.join(["iterft", "run", f"{name or 'recipe'}.toml"])


def settings_beside(asked: Mapping[str, Json], recipe: Recipe) -> list[str]:
    """The settings that turn one recipe into another: `key=value` for each key that differs."""
    before = flat(recipe.model_dump(mode="json"))
    return [
        f"{key}={toml_value(value)}" for key, value in flat(asked).items() if value != before.get(key) and value is not None
    ]


def as_toml(asked: Mapping[str, Json]) -> str:
    """A recipe file that asks for the same: what it has beside the defaults and the regime's settings."""
    least = make_recipe({key: asked[key] for key in ("regime", "trait", "model")}, source="defaults")
    default = flat(least.model_dump(mode="json"))
    given = {key: value for key, value in flat(asked).items() if value != default.get(key) and value is not None}
    given = {key: asked[key] for key in ("regime", "trait", "model")} | {k: v for k, v in given.items() if k != "name"}
    return "\n".join(_lines(given)) + "\n"


def _lines(given: Mapping[str, Json]) -> Iterator[str]:
    """The keys without a table first, then each table's."""
    yield from (f"{key} = {toml_value(value)}" for key, value in given.items() if "." not in key)
    tables = dict.fromkeys(key.partition(".")[0] for key in given if "." in key)
    for table in tables:
        yield ""
        yield f"[{table}]"
        for key, value in given.items():
            if key.startswith(f"{table}."):
                yield f"{key.partition('.')[2]} = {toml_value(value)}"


def toml_value(value: Json) -> str:
    """A value as TOML has it; JSON's texts, finite numbers and booleans are TOML's too."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {toml_value(each)}' for key, each in value.items() if each is not None)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
