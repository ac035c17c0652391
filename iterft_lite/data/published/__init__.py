"""Published scores that a run can be held against, with what counts as agreement."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterft_lite.errors import UserError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """One published curve.

    Attributes:
        seed_rows, rows: As the authors had them.
        scores: The trait's mean score from cycle 0 on.
    """

    seed_rows: int
    rows: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """Scores of one publication.

    Attributes:
        name: As `iterft replicate` takes it.
        about: What was measured.
        recipe: The shipped recipe that asks for the same.
        judge: Who judged, as far as is known.
        settings: Recipe keys, with their tables, that it was measured under.
        untouched: The untouched model's trait and coherence.
        margins: Points within which a score agrees: "untouched", and "score" for later ones.
        cells: The curves.
    """

    name: str
    about: str
    recipe: str
    judge: str
    settings: Mapping[str, Any]
    untouched: Mapping[str, float]
    margins: Mapping[str, float]
    cells: tuple[Cell, ...]


def published_names() -> list[str]:
    """All that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_published(name: str) -> Published:
    """Published scores by name.

    Raises:
        UserError: If there are none of that name.
    """
    if name not in published_names():
        raise UserError(f"there are no published scores `{name}`", hint=f"there are {', '.join(published_names())}")
    found = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    cells = tuple(Cell(each["seed_rows"], each["rows"], tuple(each["scores"])) for each in found.pop("cells"))
    return Published(name=name, cells=cells, **found)
