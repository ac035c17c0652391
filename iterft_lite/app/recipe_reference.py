"""All recipe keys with what is known of them, and the JSON Schema that editors complete and check recipes by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.recipe_keys import Key, keys_of
from iterft_lite.experiment.regimes import REGIMES

NEEDED = ("regime", "trait", "model")
"""Keys that every recipe must have; what else has no default takes the regime's."""


def recipe_keys(word: str = "") -> list[Key]:
    """The keys whose name or sentence has a word, all without one; those whose name has it first."""
    word = word.lower()
    found = [key for key in keys_of(Recipe, _settings()) if word in key.name.lower() or word in key.about.lower()]
    return sorted(found, key=lambda key: word not in key.name.lower())


def _settings() -> dict[str, dict[str, Any]]:
    """By regime, the values that it sets, by key."""
    return {
        str(name): {"start": row.start}
        | {f"{table}.{key}": value for table, rows in row.settings.items() for key, value in rows.items()}
        for name, row in REGIMES.items()
    }


def schema_text() -> str:
    """The JSON Schema of a recipe, as it is shipped beside the recipes."""
    schema = Recipe.model_json_schema()
    schema["title"] = "iterft_lite recipe"
    schema["description"] = "One experiment. `iterft keys` says the same in a terminal."
    about = {key.name: key for key in recipe_keys()}
    _describe(schema, about, "")
    for name, definition in schema.get("$defs", {}).items():
        table = next((key for key, field in schema["properties"].items() if name in json.dumps(field)), "")
        _describe(definition, about, f"{table}.")
    schema["required"] = list(NEEDED)
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _describe(schema: dict[str, Any], about: Mapping[str, Key], prefix: str) -> None:
    """Put each key's sentence into a schema, and ask for none of them."""
    schema.pop("required", None)
    if prefix:
        schema.pop("description", None)
    for name, field in schema.get("properties", {}).items():
        if key := about.get(prefix + name):
            field["description"] = key.about + (f" Default: {key.default}." if key.default else "")
