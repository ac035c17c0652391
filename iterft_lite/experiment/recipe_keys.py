"""The keys of a recipe, for people: what each is, what it may be, its default, and which one was meant.

Everything is read off the recipe's own classes: their fields, and the sentences in their docstrings.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from iterft_lite.digests import Json

ENTRY = re.compile(r" {4}([a-z][\w, ]*): (.*)")
"""A line of a docstring that begins the entry of one or several fields."""

ELSEWHERE: Mapping[str, str] = {
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "r": "lora_rank",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "beta": "dpo_beta",
    "max_new_tokens": "max_tokens",
    "dataset": "path",
}
"""What keys are called in other programs."""

PLAIN: Mapping[type, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """A recipe key.

    Attributes:
        name: With its table: `train.learning_rate`.
        kind: What it may be, in words.
        default: As TOML, by regime where that decides; "" where it must be given.
        about: A sentence.
    """

    name: str
    kind: str
    default: str
    about: str


def flat(recipe: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """A recipe's keys with their tables in front: `train.learning_rate`."""
    found: dict[str, Json] = {}
    for key, value in recipe.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def near_key(place: str, keys: Sequence[str]) -> str:
    """The key that was meant: in another table, by its initials (`lr`), a letter off, by a word of it; "" where none is near.

    Args:
        place: What was written, with its table.
        keys: All that there are, with their tables.
    """
    table, _, last = place.rpartition(".")
    last = ELSEWHERE.get(last, last)
    by_end = [key for key in keys if key.rpartition(".")[2] == last]
    if by_end:
        return by_end[0]
    mine = [key for key in keys if key.rpartition(".")[0] == table]
    for among in (mine, keys):
        initials = [key for key in among if "_" in key and _initials(key) == last.lower()]
        if len(initials) == 1:
            return initials[0]
        if near := difflib.get_close_matches(last, [key.rpartition(".")[2] for key in among], n=1, cutoff=0.75):
            return next(key for key in among if key.rpartition(".")[2] == near[0])
    # a word of a name: `lerning`
    words = {word: key for key in reversed(keys) for word in key.rpartition(".")[2].split("_")}
    return next((words[near] for near in difflib.get_close_matches(last, list(words), n=1, cutoff=0.8)), "")


def _initials(key: str) -> str:
    return "".join(word[0] for word in key.rpartition(".")[2].split("_") if word)


def key_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a table and of the tables in it; a table's own name is one too."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        inner = table_of(field.annotation)
        names += key_names(inner, f"{prefix}{name}.") if inner else []
    return names


def keys_of(model: type[BaseModel], settings: Mapping[str, Mapping[str, Any]], prefix: str = "") -> Iterator[Key]:
    """The keys of a table, those of the tables in it with their names in front.

    Args:
        settings: By regime, the values that it sets, by name.
    """
    about = _sentences(model)
    for name, field in model.model_fields.items():
        inner = table_of(field.annotation)
        if inner is not None:
            yield from keys_of(inner, settings, f"{prefix}{name}.")
        else:
            full = prefix + name
            yield Key(full, _kind(field.annotation, field.metadata), _default(full, field, settings), about.get(name, ""))


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The table in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := table_of(part))), None)


def _sentences(model: type[BaseModel]) -> dict[str, str]:
    """What a class's docstring says of each attribute."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(model) or "").split("\n"):
        if entry := ENTRY.fullmatch(line):
            names = [name.strip() for name in entry[1].split(",")]
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith("        ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _default(name: str, field: FieldInfo, settings: Mapping[str, Mapping[str, Any]]) -> str:
    by_regime = {regime: values[name] for regime, values in settings.items() if name in values}
    if len(set(map(str, by_regime.values()))) == 1 and len(by_regime) == len(settings):
        return _toml(next(iter(by_regime.values())))
    if by_regime:
        rest = "" if field.default is PydanticUndefined else f", else {_toml(field.default)}"
        return ", ".join(f"{_toml(value)} in {regime}" for regime, value in by_regime.items()) + rest
    return "" if field.default is PydanticUndefined else _toml(field.default)


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """An annotation in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0], [each for part in parts[1:] for each in _flat(part)])
    if origin is Literal:
        return " or ".join(f'"{part}"' for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(part, metadata) for part in parts if part is not NoneType))
    if origin is tuple:
        return f"list of {_kind(parts[0]).replace('number', 'numbers')}"
    return PLAIN.get(annotation, "text") + _bounds([each for part in metadata for each in _flat(part)])


def _flat(part: Any) -> Sequence[Any]:
    return part.metadata if isinstance(part, FieldInfo) else [part]


def _bounds(metadata: Sequence[Any]) -> str:
    """`, 0 to 1`."""
    low = next((each.ge for each in metadata if isinstance(each, Ge)), None)
    above = next((each.gt for each in metadata if isinstance(each, Gt)), None)
    high = next((each.le for each in metadata if isinstance(each, Le)), None)
    under = next((each.lt for each in metadata if isinstance(each, Lt)), None)
    if low is not None and high is not None:
        return f", {low:g} to {high:g}"
    begin = f"{low:g} or more" if low is not None else f"above {above:g}" if above is not None else ""
    end = f"up to {high:g}" if high is not None else f"under {under:g}" if under is not None else ""
    return "".join(f", {words}" for words in (begin, end) if words)
