"""A study: one recipe and the keys that vary, as a TOML file. The grid is unrolled into cells, each a recipe of its own.

    base = "sft"                                     # a shipped or own recipe; or a table of keys, over such a `recipe`
    [sweep]
    arms = ["no_seed"]                               # null arms beside the cells
    [sweep.grid]                                     # every combination
    seed_rows = { calibrated = [20, 60] }            # as many as it takes to reach these scores at cycle 0
    rows = [30, 60]
    [[sweep.zip]]                                    # keys that move together
    "train.dpo_beta" = [0.01, 0.1]
    "train.learning_rate" = [3e-6, 1e-5]
    [[sweep.add]]                                    # a cell beside the grid
    rows = 200
    [[sweep.skip]]                                   # cells that are left out
    rows = 30

A cell is what its keys say: no number, no order. Nothing here reads a recipe's material; `app/sweep.py` does.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterft_lite.data.texts import read_user_text
from iterft_lite.digests import Json, canonical, digest
from iterft_lite.errors import RecipeError
from iterft_lite.experiment.null_arms import NULL_ARMS
from iterft_lite.experiment.recipe import ALIASES, LIMIT, Recipe
from iterft_lite.experiment.recipe_keys import key_names, near_key

MOST_CELLS = 10_000

MOST_SKIPS = 1_000

MOST_GUESSES = 20
"""Unknown keys that are compared with all known ones: that takes a while."""

SHORT: Mapping[str, str] = {"seed": "s"}
"""Keys that a cell's name writes otherwise."""

NAME_LENGTH = 90
"""Characters of a cell's name at most; a longer one ends in a digest."""


@dataclass(frozen=True)
class Threshold:
    """A number of seed rows that is not known yet: as many as it takes to reach a trait score (1-100) at cycle 0."""

    score: float


Value = Json | Threshold


@dataclass(frozen=True)
class Cell:
    """One recipe of a study.

    Attributes:
        values: By recipe key, what the cell has otherwise than the base recipe.
        arm: The null arm that it belongs to; "" for the others.
        threshold: The score at cycle 0 that its number of seed rows was found for, if any.
    """

    values: Mapping[str, Value]
    arm: str = ""
    threshold: float | None = None

    @property
    def name(self) -> str:
        """`seed_rows22_rows60_s42`: how people call it, and its folder. Tells cells of one study apart."""
        return cell_name(self.values, self.arm)

    @property
    def identity(self) -> str:
        """One text for one cell: what it is, whatever it is called."""
        return canonical(sorted([key, _plain(value)] for key, value in self.values.items()))

    def overrides(self) -> dict[str, Json]:
        """The values as they are laid over the base recipe.

        Raises:
            ValueError: If a threshold has not become a number of rows yet.
        """
        if any(isinstance(value, Threshold) for value in self.values.values()):
            raise ValueError(f"the seed rows of `{self.name}` are not known yet")
        return dict(self.values)


@dataclass(frozen=True)
class Study:
    """A study as its file has it.

    Attributes:
        name: The file's stem, unless given.
        base: The base recipe: its name or path, or its keys; `recipe` among them names one that the others are laid over.
        axes: By key, the values it takes in the grid, in order; what moves together is in `zips`.
        zips: Tables of keys that move together, each key with as many values as the others of its table.
        adds, skips: Single cells beside the grid; what cells have that are left out.
        arms: Names of null arms.
        source: The file, for errors.
    """

    name: str
    base: str | Mapping[str, Json]
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    zips: tuple[Mapping[str, tuple[Value, ...]], ...] = ()
    adds: tuple[Mapping[str, Value], ...] = ()
    skips: tuple[Mapping[str, Value], ...] = ()
    arms: tuple[str, ...] = ()
    source: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that vary, in the order in which the file has them."""
        zipped = [key for table in self.zips for key in table]
        return tuple(dict.fromkeys([*self.axes, *zipped, *(key for cell in self.adds for key in cell)]))


# -- reading


def read_study(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        RecipeError: With every problem at once.
    """
    source = str(path)
    try:
        given = tomllib.loads(read_user_text(path, limit=LIMIT).text)
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError([f"there is no file `{path}`"], source=source, hint="docs/study.md has an example") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError([f"is not TOML: {error}"], source=source) from None
    except ValueError as error:
        raise RecipeError([f"cannot be read: {getattr(error, 'message', error)}"], source=source) from None
    if "regime" in given and "sweep" not in given:
        raise RecipeError(["is a recipe, not a study"], source=source, hint=f"`iterft plan {path}` plans it")
    given.setdefault("name", path.stem)
    return make_study(given, source=source)


def make_study(given: Mapping[str, Any], *, source: str) -> Study:
    """The study that a mapping describes.

    Raises:
        RecipeError: With every problem at once.
    """
    reader = _Reader(given)
    study = reader.study(source)
    if not reader.problems and not any((study.axes, study.zips, study.adds, study.arms)):
        reader.problems.append("there are no cells: `[sweep.grid]` names the keys that vary")
    if reader.problems:
        raise RecipeError(reader.problems, source=source, hint="docs/study.md describes the file of a study")
    return study


class _Reader:
    """Reads a study's mapping and collects what is wrong with it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.problems: list[str] = []
        self._known = frozenset(key_names(Recipe))

    def study(self, source: str) -> Study:
        sweep = self._table(self.given.get("sweep", {}), "sweep")
        self._refuse_others(self.given, ("name", "base", "sweep"), "")
        self._refuse_others(sweep, ("grid", "zip", "add", "skip", "arms"), "sweep.")
        axes = {
            self._key(key): self._values(key, given) for key, given in self._table(sweep.get("grid", {}), "sweep.grid").items()
        }
        zips = tuple(filter(None, (self._zip(table) for table in self._tables(sweep, "zip"))))
        self._refuse_twice([*axes, *(key for table in zips for key in table)])
        return Study(
            name=self._name(),
            base=self._base(),
            axes=axes,
            zips=zips,
            adds=self._single(sweep, "add"),
            skips=self._single(sweep, "skip"),
            arms=self._arms(sweep.get("arms", [])),
            source=source,
        )

    def _name(self) -> str:
        name = self.given.get("name", "study")
        if not isinstance(name, str):
            self.problems.append("`name` is not a text")
        return str(name)

    def _base(self) -> str | Mapping[str, Json]:
        base = self.given.get("base")
        if isinstance(base, str) and base:
            return base
        if isinstance(base, Mapping) and base:
            return dict(base)
        self.problems.append("`base` is missing: the name or the path of a recipe, or a table `[base]` of recipe keys")
        return {}

    def _refuse_others(self, table: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
        for name in table:
            if name not in known and len(self.problems) < MOST_GUESSES:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"did you mean `{prefix}{near[0]}`?" if near else f"known are {', '.join(known)}"
                self.problems.append(f"`{prefix}{name}` does not belong in a study; {meant}")

    def _refuse_twice(self, keys: Sequence[str]) -> None:
        for key in (key for key, many in Counter(keys).items() if many > 1):
            self.problems.append(f"`{key}` varies twice: in `sweep.grid` or one `sweep.zip` alone")

    def _table(self, given: Any, place: str) -> Mapping[str, Any]:
        if isinstance(given, Mapping):
            return given
        self.problems.append(f"`{place}` is not a table: write `[{place}]`")
        return {}

    def _tables(self, sweep: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
        given = sweep.get(name, [])
        if isinstance(given, list) and all(isinstance(table, Mapping) for table in given):
            return given
        self.problems.append(f"`sweep.{name}` is a list of tables: write `[[sweep.{name}]]`")
        return []

    def _key(self, key: str) -> str:
        """A recipe's key as it is called today."""
        key = ALIASES.get(key, key)
        if key not in self._known:
            near = near_key(key, sorted(self._known)) if len(self.problems) < MOST_GUESSES else None
            self.problems.append(
                f"`{key}` is not a recipe key" + (f"; did you mean `{near}`?" if near else "; see `iterft keys`")
            )
        elif key == "name":
            self.problems.append("`name` cannot vary: a cell is named after its values")
        return key

    def _values(self, key: str, given: Any) -> tuple[Value, ...]:
        if isinstance(given, Mapping):
            return self._calibrated(key, given)
        if not isinstance(given, list) or not given:
            self.problems.append(f"`{key}` of the grid needs a list of at least one value, not {given!r:.60}")
            return ()
        plain = [value for value in given if self._is_plain(key, value)]
        for text in (text for text, many in Counter(map(canonical, plain)).items() if many > 1):
            self.problems.append(f"`{key}` has the value {text} twice")
        return tuple(plain)

    def _is_plain(self, key: str, value: Any) -> bool:
        """Whether JSON can hold a value: TOML has dates, and numbers that are none."""
        try:
            canonical(value)
        except (TypeError, ValueError, RecursionError):
            self.problems.append(f"`{key}` has a value that no recipe has: {value!r:.60}")
            return False
        return True

    def _calibrated(self, key: str, given: Mapping[str, Any]) -> tuple[Value, ...]:
        scores = given.get("calibrated")
        if key != "seed_rows" or set(given) != {"calibrated"} or not isinstance(scores, list) or not scores:
            self.problems.append(f"`{key} = {dict(given)!r:.60}`: only `seed_rows = {{ calibrated = [20, 60] }}` is known")
            return ()
        wrong = [
            score for score in scores if isinstance(score, bool) or not isinstance(score, (int, float)) or not 1 <= score <= 100
        ]
        if wrong:
            self.problems.append(f"`seed_rows.calibrated`: {wrong[0]!r:.60} is not a score from 1 to 100")
            return ()
        return tuple(Threshold(float(score)) for score in dict.fromkeys(scores))

    def _zip(self, table: Mapping[str, Any]) -> dict[str, tuple[Value, ...]]:
        found = {self._key(key): self._values(key, given) for key, given in table.items()}
        if len({len(values) for values in found.values()}) > 1:
            lengths = ", ".join(f"`{key}` has {len(values)}" for key, values in found.items())
            self.problems.append(f"keys of one `[[sweep.zip]]` move together and need as many values each: {lengths}")
            return {}
        return found

    def _single(self, sweep: Mapping[str, Any], name: str) -> tuple[Mapping[str, Value], ...]:
        given = self._tables(sweep, name)
        most = MOST_SKIPS if name == "skip" else MOST_CELLS
        if len(given) > most:
            self.problems.append(f"there are {len(given):,} `[[sweep.{name}]]`: at most {most:,}")
            return ()
        tables = [{self._key(key): value for key, value in table.items() if self._is_plain(key, value)} for table in given]
        if any(not table for table in tables):
            self.problems.append(f"an empty `[[sweep.{name}]]` names no cell")
        return tuple(tables)

    def _arms(self, given: Any) -> tuple[str, ...]:
        if not isinstance(given, list):
            self.problems.append(f"`sweep.arms` is a list of {', '.join(NULL_ARMS)}")
            return ()
        for name in given:
            if not isinstance(name, str) or name not in NULL_ARMS:
                self.problems.append(f"there is no null arm {name!r:.60}; there are {', '.join(NULL_ARMS)}")
        return tuple(str(name) for name in given)


# -- unrolling


def cells(study: Study) -> list[Cell]:
    """All cells, corners of the grid first, so that a first figure shows its whole width early; other seeds come last.

    Raises:
        RecipeError: If there are none, or more than `MOST_CELLS`.
    """
    places = list(_places(study))
    grid = [values for _, values in sorted(places, key=lambda place: place[0])]
    kept = [values for values in grid if not any(_matches(values, skip) for skip in study.skips)]
    found = [Cell(values) for values in [*kept, *study.adds]]
    found += [Cell({**NULL_ARMS[arm].keys, **seed}, arm) for arm in study.arms for seed in _seeds(study)]
    unique: dict[str, Cell] = {}
    for cell in found:
        unique.setdefault(cell.identity, cell)
    if not unique:
        raise RecipeError(["every cell of the grid is skipped"], source=study.source)
    _refuse_one_name(list(unique.values()), study.source)
    return list(unique.values())


def _refuse_one_name(found: Sequence[Cell], source: str) -> None:
    """Refuse cells that would share a folder.

    Raises:
        RecipeError: With the names.
    """
    shared = [name for name, many in Counter(cell.name for cell in found).items() if many > 1]
    if shared:
        raise RecipeError(
            [f"several cells would be called `{name}`: their values are written alike" for name in shared[:3]],
            source=source,
            hint="a cell's folder is named after the last part of a path, and after numbers as they are written",
        )


def _places(study: Study) -> Iterator[tuple[tuple[int, ...], dict[str, Value]]]:
    """Each combination of the grid, with what it is sorted by."""
    movers: list[list[dict[str, Value]]] = [[{key: value} for value in values] for key, values in study.axes.items()]
    for table in study.zips:
        movers.append([dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])
    if not movers:
        return
    count = 1
    for mover in movers:
        count *= len(mover)
    if count > MOST_CELLS:
        raise RecipeError([f"the grid has {count:,} cells: at most {MOST_CELLS:,}"], source=study.source)
    for indices in itertools.product(*(range(len(mover)) for mover in movers)):
        values: dict[str, Value] = {}
        seed = inside = 0
        for mover, index in zip(movers, indices, strict=True):
            values |= mover[index]
            if set(mover[index]) == {"seed"}:
                seed = index
            else:
                inside += 0 < index < len(mover) - 1
        yield (seed, inside, *indices), values


def _matches(values: Mapping[str, Value], wanted: Mapping[str, Value]) -> bool:
    return all(key in values and _plain(values[key]) == _plain(value) for key, value in wanted.items())


def _seeds(study: Study) -> list[dict[str, Value]]:
    """What the cells of a null arm differ in: the seeds of the grid."""
    return [{"seed": seed} for seed in study.axes.get("seed", ())] or [{}]


def with_rows(cell: Cell, seed_rows: int) -> Cell:
    """A cell whose threshold has become a number of seed rows."""
    threshold = cell.values["seed_rows"]
    assert isinstance(threshold, Threshold), "only a cell with a threshold is calibrated"
    return Cell({**cell.values, "seed_rows": seed_rows}, cell.arm, threshold.score)


def chosen(among: Iterable[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that have what `--only 'rows=50'` says, all of several.

    Raises:
        RecipeError: If one has no `key=value`, or no cell is left.
    """
    among = list(among)
    wanted: dict[str, Value] = {}
    for text in only:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError([f"`{text}` is no `key=value`"], source="--only", hint="such as `--only rows=50`")
        try:
            wanted[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):  # no TOML, or a number or nesting beyond reason: a text
            wanted[key.strip()] = value.strip()
    kept = [cell for cell in among if _matches(cell.values, wanted)]
    if not kept:
        raise RecipeError([f"no cell has {', '.join(only)}"], source="--only", hint=_what_there_is(among, wanted))
    return kept


def _what_there_is(among: Sequence[Cell], wanted: Mapping[str, Value]) -> str:
    """The values that cells have of the keys that are asked for; the keys in which they differ, where those are others."""
    keys = list(dict.fromkeys(key for cell in among for key in cell.values))
    known = [key for key in wanted if key in keys]
    if len(known) < len(wanted):
        return f"cells differ in {', '.join(keys)}"
    values = {key: dict.fromkeys(_shown(cell.values[key]) for cell in among if key in cell.values) for key in known}
    return "; ".join(f"`{key}` is {', '.join(there)}" for key, there in values.items())


def _shown(value: Value) -> str:
    return f"searched for a score of {value.score:g}" if isinstance(value, Threshold) else json.dumps(value, ensure_ascii=False)


# -- names


def cell_name(values: Mapping[str, Value], arm: str = "") -> str:
    """What a cell is called: its keys without their tables, each with its value."""
    shown = [key for key in values if not (arm and key in NULL_ARMS[arm].keys)]
    lasts = [key.rpartition(".")[2] for key in shown]
    parts = [arm] if arm else []
    for key, last in zip(shown, lasts, strict=True):
        word = SHORT.get(key, last if lasts.count(last) == 1 else key.replace(".", "-"))
        parts.append(f"{word}{_word(values[key])}")
    name = "_".join(parts) or "base"
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 9]}-{digest(name)[:8]}"


def _word(value: Value) -> str:
    """A value in a file's name."""
    if isinstance(value, Threshold):
        return f"-at{value.score:g}"
    if isinstance(value, bool) or value is None:
        return f"-{str(value).lower()}"
    if isinstance(value, (int, float)):
        short = f"{value:g}" if isinstance(value, float) else str(value)
        return (short if float(short) == value else repr(value)).replace("+", "")  # a folder's name has none
    if isinstance(value, str):
        return "-" + re.sub(r"[^A-Za-z0-9.-]+", "-", value.rpartition("/")[2]).strip("-.")[:40]
    return "-" + digest(value)[:8]


def _plain(value: Value) -> Json:
    return {"calibrated": value.score} if isinstance(value, Threshold) else value
