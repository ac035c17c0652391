"""A study's cells, resolved and planned: what it comes to before anything is done, and what its folder must agree with."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from iterft_lite.app.calibrate_seeds import GRID
from iterft_lite.app.session import Prepared, differences, prepare
from iterft_lite.data.recipes import ENDING, recipe_names, recipe_path
from iterft_lite.digests import Json, canonical
from iterft_lite.engine.study import StudyCell, StudyFolder
from iterft_lite.errors import FolderError, RecipeError, UserError
from iterft_lite.experiment.grid import Cell, Study, Threshold, cells, chosen, read_study, with_rows
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import MACHINE_KEYS, Recipe, make_recipe, read_keys, with_overrides, with_values
from iterft_lite.experiment.steps import Step
from iterft_lite.machine.resolve import Machine

SHOWN_CELLS = 3
"""Cells that an error names."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell, ready to run."""

    cell: StudyCell
    prepared: Prepared

    @property
    def name(self) -> str:
        """Also of its folder."""
        return self.cell.name

    @property
    def plan(self) -> Plan:
        """Its steps."""
        return self.prepared.plan


@dataclass(frozen=True)
class Calibration:
    """Cells whose seed rows are found together: they differ in nothing that cycle 0 knows of.

    Attributes:
        name: Of the folder of its probes.
        cells: The cells, each with a threshold for a value.
        recipe: Gives the recipe of a probe for a number of seed rows.
        thresholds: Trait scores at cycle 0 that are looked for, rising.
    """

    name: str
    cells: tuple[Cell, ...]
    recipe: Callable[[int], Recipe]
    thresholds: tuple[float, ...]


class StudyPlan:
    """A study with its base recipe.

    Args:
        path: The study's file.
        overrides: `key=value`, laid over the base recipe.
        machine: Where it would run; this one if None.

    Raises:
        RecipeError: If the file is wrong, or an override is of a key that every cell has a value of its own for.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = (), machine: Machine | None = None) -> None:
        self._machine = machine
        self.study: Study = read_study(path)
        # a merged file of every cell would fill the disk: it is written again where somebody wants to talk to a model
        self.given = {"keep": "adapters", **_base(self.study, path.parent, overrides)}
        self.cells = cells(self.study)
        _refuse_axes(self.cells, overrides)

    @cached_property
    def calibrations(self) -> tuple[Calibration, ...]:
        """What has to be found before the cells are known: a search for all cells that share their cycle 0.

        The random seed does not count: it is found with the first one, so that cells that differ in it alone stay comparable.
        """
        groups: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if isinstance(cell.values.get("seed_rows"), Threshold):
                groups[self._cycle_zero(cell)].append(cell)
        return tuple(self._calibration(key, found) for key, found in groups.items())

    def searches(self, only: Sequence[str], limit: int | None) -> tuple[Calibration, ...]:
        """The calibrations of the cells that are asked for; all where `only` names seed rows, which nobody knows before.

        Args:
            only: `key=value` texts.
            limit: The first cells alone.

        Raises:
            RecipeError: If no cell has what `only` says.
        """
        if not self.calibrations or any(text.partition("=")[0].strip() == "seed_rows" for text in only):
            return self.calibrations
        asked = {cell.identity for cell in (chosen(self.cells, only) if only else self.cells)[:limit]}
        return tuple(each for each in self.calibrations if any(cell.identity in asked for cell in each.cells))

    def guessed(self) -> list[Cell]:
        """The cells with a few seed rows in the place of each threshold: for a plan before anything is done."""
        open_ = {cell.values["seed_rows"].score for cell in self.cells if isinstance(cell.values.get("seed_rows"), Threshold)}
        few = {score: GRID * (place + 1) for place, score in enumerate(sorted(open_))}
        return [
            with_rows(cell, few[rows.score]) if isinstance(rows := cell.values.get("seed_rows"), Threshold) else cell
            for cell in self.cells
        ]

    def _calibration(self, key: str, found: Sequence[Cell]) -> Calibration:
        scores = {cell.values["seed_rows"].score for cell in found}
        return Calibration(key[:16], tuple(found), lambda rows: self._probe(found[0], rows), tuple(sorted(scores)))

    def _probe(self, cell: Cell, seed_rows: int) -> Recipe:
        """The recipe of a calibration's model: a cell without later cycles, with the study's first seed."""
        seed = self.study.axes.get("seed", ())[:1]
        values = {**cell.values, "seed_rows": seed_rows, "cycles": 0, **({"seed": seed[0]} if seed else {})}
        return self._recipe(values, f"{cell.name}, a probe")

    def _cycle_zero(self, cell: Cell) -> str:
        """The key of a cell's cycle 0 at some number of seed rows."""
        return prepare(self._probe(cell, 1), machine=self._machine, purpose="plan").plan.steps["c0-aggregate"].key

    def _recipe(self, values: Mapping[str, Json], name: str) -> Recipe:
        return make_recipe({**with_values(self.given, values), "name": name}, source=f"cell `{name}`")

    def recipe(self, cell: Cell) -> Recipe:
        """A cell's recipe.

        Raises:
            RecipeError: If its values make none.
        """
        return self._recipe(cell.overrides(), cell.name)

    def planned(self, found: Iterable[Cell], folder: StudyFolder | None = None) -> list[PlannedCell]:
        """Cells, resolved and planned.

        Args:
            folder: Where they are to be run; without one nothing is going to be, and no judge is tried out.

        Raises:
            RecipeError: If some cannot be: every problem of every cell at once.
        """
        problems: dict[str, list[str]] = defaultdict(list)
        judges: dict[str, Mapping[str, Any]] = {}
        planned = []
        asked = list(found)
        for cell in asked:
            try:
                planned.append(PlannedCell(StudyCell.of(cell), self._prepared(cell, folder, judges)))
            except RecipeError as error:
                for problem in error.problems:
                    problems[problem].append(cell.name)
            except UserError as error:
                problems[str(error).replace("\n\nhint: ", "; ")].append(cell.name)
        if problems:
            lines = [f"{_names(names, len(asked))}: {problem}" for problem, names in problems.items()]
            raise RecipeError(lines, source=self.study.source)
        return planned

    def _prepared(self, cell: Cell, folder: StudyFolder | None, judges: dict[str, Mapping[str, Any]]) -> Prepared:
        """A cell as `prepare` has it. A judge is tried out once for all cells that ask for it."""
        recipe = self.recipe(cell)
        if folder is None:
            return prepare(recipe, machine=self._machine, purpose="plan")
        known = folder.run(cell.name).manifest()
        asked = [recipe.judge, recipe.judge_method, recipe.judge_samples, recipe.api_base]
        who = canonical([*asked, recipe.judge_fit, recipe.model])  # on whose own answers a judge may be fitted
        made = prepare(recipe, known, known.value.get("judge") if known else judges.get(who))
        judges.setdefault(who, asdict(made.resolved.inputs.judge))
        return made

    def base(self) -> dict[str, Json]:
        """The base recipe as every cell has it: without the keys that vary, and those that are free to change."""
        first = next(cell for cell in self.cells)
        values = {key: 1 if isinstance(value, Threshold) else value for key, value in first.values.items()}
        dumped = self._recipe(values, "base").model_dump(mode="json")
        return without(dumped, {*self.study.keys, *MACHINE_KEYS, *(key for cell in self.cells for key in cell.values)})


def without(recipe: Mapping[str, Json], keys: Iterable[str]) -> dict[str, Json]:
    """A recipe's dump without some keys, each with its table."""
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for key in keys:
        table, _, last = key.rpartition(".")
        holder = found.get(table) if table else found
        if isinstance(holder, dict):
            holder.pop(last, None)
    return found


def _base(study: Study, beside: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of the base recipe."""
    if isinstance(study.base, str):
        return read_keys(_recipe_file(study.base, beside), overrides)
    given = dict(study.base)
    recipe = given.pop("recipe", None)
    known = {} if recipe is None else read_keys(_recipe_file(str(recipe), beside))
    return with_overrides(_over(known, given), overrides)


def _refuse_axes(every: Sequence[Cell], overrides: Sequence[str]) -> None:
    """Refuse overrides of the base recipe that no cell would have."""
    given = dict.fromkeys(text.partition("=")[0].strip() for text in overrides)
    axes = [key for key in given if all(key in cell.values for cell in every)]
    if axes:
        raise RecipeError(
            [
                f"`{key}` differs between the cells of the study: a value of the base recipe would be used by none"
                for key in axes
            ],
            source="--set",
            hint=f"`--only {axes[0]}=VALUE` chooses cells; other values belong in a file of your own: `iterft recipes copy`",
        )


def _over(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys with others laid over them, table by table."""
    found = dict(known)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = {**found[key], **value} if both else value
    return found


def _recipe_file(name: str, beside: Path) -> Path:
    """A recipe beside the study's file, or a shipped one, or one of the user's own."""
    own = beside / name
    if own.is_file():
        return own
    shipped = name.removesuffix(ENDING)
    return recipe_path(shipped if shipped in recipe_names() else name)


def _names(names: Sequence[str], of: int) -> str:
    """`cells a, b and 3 more`, or `all 25 cells`."""
    if len(names) == of:
        return "all cells" if of > 1 else f"cell {names[0]}"
    more = f" and {len(names) - SHOWN_CELLS} more" if len(names) > SHOWN_CELLS else ""
    return f"cell{'s' * (len(names) > 1)} {', '.join(names[:SHOWN_CELLS])}{more}"


# -- what a study's folder must agree with


def refuse_other(plan: StudyPlan, folder: StudyFolder) -> None:
    """Refuse a folder that another study made.

    Raises:
        FolderError: With the difference.
    """
    known = folder.manifest()
    if known is None:
        _refuse_strange(folder.root)
        return
    varied = {key for cell in folder.cells() for key in cell.values} | {*plan.study.keys}
    before, now = without(known["base"], varied), without(plan.base(), varied)
    found = list(differences(before, now))
    if found:
        raise FolderError(
            f"`{folder.root}` is the folder of a study with another base:\n" + "\n".join(f"  - {each}" for each in found),
            hint="choose another folder with `--out`, or make the difference an axis of the study",
        )


def _refuse_strange(root: Path) -> None:
    """Refuse a folder that holds something else."""
    if (root / "run.json").exists():
        raise FolderError(f"`{root}` is a run folder, not a study's", hint="choose another folder with `--out`")
    if root.is_dir() and any(root.iterdir()) and not (root / "lock").exists():
        raise FolderError(f"`{root}` holds other files and is not the folder of a study", hint="choose a new one with `--out`")


def write_study(plan: StudyPlan, planned: Sequence[PlannedCell], folder: StudyFolder, calibrations: Json) -> None:
    """Write the manifest: the cells of the file, and behind them those that only an earlier form of it had."""
    known = folder.manifest() or {}
    inside = [each.cell for each in planned]
    names = {cell.name for cell in inside}
    outside = [replace(cell, inside=False) for cell in (folder.cells() if known else []) if cell.name not in names]
    created = known.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    value = {
        "name": plan.study.name,
        "base": plan.base(),
        "keys": list(plan.study.keys),
        "calibrations": calibrations,
        "created": created,
    }
    folder.write_manifest(value, [*inside, *outside])


# -- steps of many plans


@dataclass(frozen=True)
class StepsOfAll:
    """The steps of many plans, each once.

    Attributes:
        distinct: By key.
        asked: How many there would be if nothing was shared.
    """

    distinct: Mapping[str, Step] = field(default_factory=dict)
    asked: int = 0


def steps_of(plans: Iterable[Plan]) -> StepsOfAll:
    """The steps of some plans."""
    every = [step for plan in plans for step in plan]
    return StepsOfAll({step.key: step for step in reversed(every)}, len(every))
