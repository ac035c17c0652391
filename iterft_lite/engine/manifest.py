"""A run: a manifest of names and keys over a store (`store.py`).

    RUN/run.json         the manifest: the recipe as asked and as resolved, name and key of every step
    RUN/lock             the session that writes here holds it
    RUN/logs/            output of the backends
    RUN/by-name/c1-train a link to that step's folder, for people; the program never reads it

A run has a store of its own unless the manifest names another one. The probes of a calibration, another judge's verdicts and
the cells of a study are manifests over one shared store.

Two formats are read. Format 2 names steps by key. Format 1 (version 0.1) kept each step in a folder by name: it is read for
reports, chats and exports, but never continued, because its steps have other keys. Reading it takes three translations: verbs
from their old names (`OLD_VERBS`), folders by old name (`_old_name`), and steps that its manifest did not list (`_beside`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from iterft_lite.digests import Json
from iterft_lite.engine.completion import OLD_RECORD, RECORD
from iterft_lite.engine.store import OLD_VERBS, StepFolder, folder_at
from iterft_lite.errors import FileError, FolderError, IterftError, RecipeError
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.experiment.steps import Step, checked, step_name
from iterft_lite.files import FolderLock, disk_errors, read_object, write_json

FORMAT = 2
"""Format of manifests."""

MANIFEST = "run.json"
BY_NAME = "by-name"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a run.

    Attributes:
        value: All of run.json.
        steps: In order, without parameters: those stand in each step's own folder.
        format: 1 for folders of version 0.1.
    """

    value: dict[str, Any]
    steps: tuple[Step, ...]
    format: int

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as resolved."""
        return dict(self.value["recipe"])

    @property
    def store(self) -> str:
        """The store: a path relative to the run folder, so that both can be moved together."""
        return str(self.value.get("store", "."))


def _manifest(path: Path, value: dict[str, Any]) -> Manifest:
    """The manifest in a file's value.

    Raises:
        FolderError: If it is of a newer format or of another shape.
    """
    number = value.get("format", 1)
    if not isinstance(number, int) or number > FORMAT:
        raise FolderError(
            f"`{path}` is of format {number}, this version reads up to {FORMAT}", hint="update iterft_lite to read this run"
        )
    try:
        steps = tuple(_step(row) for row in value.get("steps", ()))
        whole = _checked(value) if "recipe" in value else value
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FolderError(f"`{path}` is not the manifest of a run: {type(error).__name__} {error}") from None
    except RecipeError as error:
        raise FolderError(f"`{path}` is not the manifest of a run: {error.message}", hint=error.hint) from None
    return Manifest(whole, steps, number)


class _Judge(BaseModel):
    """Who judged, as far as it is shown."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    kind: str = ""
    note: str = ""


class _About(BaseModel):
    """What run.json says of a run beside its recipe and steps, whoever wrote it."""

    model_config = ConfigDict(strict=True)

    trait: str
    judge: _Judge
    summary: str = ""
    colour: str = Field("#000000", pattern="^#[0-9a-fA-F]{6}$")
    planned_usd: float | None = Field(None, ge=0, allow_inf_nan=False)
    model_identity: str = ""
    choices: list[str] = []
    created: str = ""


def _checked(value: Mapping[str, Any]) -> dict[str, Any]:
    """A run's manifest with every value of its kind; its recipes in today's words.

    Raises:
        RecipeError: If what should be a recipe is none.
        ValueError: If another value is of another kind.
    """
    recipe = _as_recipe(value["recipe"], "as resolved")
    unsaid = {"trait": recipe["trait"], "judge": {"name": recipe["judge"], "note": "the manifest does not say who judged"}}
    about = _About.model_validate({**unsaid, **value}).model_dump()
    asked = {"asked": _as_recipe(value["asked"], "as asked")} if "asked" in value else {}
    return {**value, **about, **asked, "recipe": recipe}


def _as_recipe(value: Any, which: str) -> dict[str, Any]:
    return make_recipe(value, source=which).model_dump(mode="json")


def _step(row: Mapping[str, Json]) -> Step:
    """A step in a manifest, its inputs by role with name and key. Version 0.1 wrote no keys."""
    inputs = [(str(role), _new_name(str(name)), *map(str, key)) for role, name, *key in row["inputs"]]
    named = tuple((role, name) for role, name, *_ in inputs)
    keys = tuple((role, key[0]) for role, _, *key in inputs if key)
    verb = OLD_VERBS.get(row["verb"], row["verb"])
    return checked(Step(verb, int(row["cycle"]), str(row["part"]), {}, named, str(row["key"]), keys))


def _new_name(name: str) -> str:
    """A step's name with today's name of its verb."""
    cycle, _, rest = name.partition("-")
    verb, _, part = rest.partition("-")
    return "-".join(filter(None, (cycle, OLD_VERBS.get(verb, verb), part)))


class Run:
    """A run folder: a manifest over a store.

    Args:
        root: The folder.
        store: The store's folder; if None the one that the manifest names, else the run's own.
    """

    def __init__(self, root: Path, store: Path | None = None) -> None:
        self.root = root
        self._store = store
        self._named_as_before: bool | None = None
        self._lock: FolderLock | None = None

    @property
    def _by_name(self) -> bool:
        """Whether step folders are named as in version 0.1."""
        if self._named_as_before is None:
            known = self.manifest()
            self._named_as_before = known is not None and known.format == 1
        return self._named_as_before

    @property
    def logs(self) -> Path:
        """Folder of the backends' output."""
        return self.root / "logs"

    @property
    def store(self) -> Path:
        """The store's folder."""
        if self._store is None:
            self.manifest()
        if self._store is None:
            self._store = self.root
        return self._store

    def folder(self, step: Step) -> StepFolder:
        """The folder of a step."""
        return StepFolder(self.store / "steps" / (_old_name(step) if self._by_name else step.key), step)

    def manifest(self) -> Manifest | None:
        """The manifest, or None in a new folder.

        Raises:
            FolderError: If it cannot be read.
        """
        path = self.root / MANIFEST
        try:
            found = _manifest(path, read_object(path))
            self._note(found)
            return found if found.format > 1 else replace(found, steps=(*found.steps, *_beside(self.root, found.steps)))
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise FolderError(f"`{self.root}` is not a folder", hint="choose another folder with `--out`") from None
        except FileError as error:
            raise FolderError(error.message, hint=error.hint or damaged_hint(self.root)) from None

    def _note(self, found: Manifest) -> None:
        """Remember where the steps are: a manifest of many steps is long, and they are asked for one by one."""
        self._named_as_before = found.format == 1
        if self._store is None:
            self._store = Path(os.path.normpath(self.root / found.store))

    def known(self) -> Manifest:
        """The manifest of an existing run.

        Raises:
            FolderError: If the folder is not a run folder.
        """
        manifest = self.manifest()
        if manifest is None or "recipe" not in manifest.value:
            below = next(itertools.chain(self.root.glob(f"*/{MANIFEST}"), self.root.glob(f"*/*/{MANIFEST}")), None)
            hint = "`iterft run RECIPE --out DIR` makes one" if below is None else f"`{below.parent}` in it is one"
            raise FolderError(f"`{self.root}` is not a run folder", hint=hint)
        return manifest

    def write_manifest(self, value: Mapping[str, Json], steps: Sequence[Step]) -> None:
        """Write the manifest, and the links for people."""
        place = "." if self.store == self.root else os.path.relpath(self.store, self.root)
        rows = [
            {
                "verb": step.verb,
                "cycle": step.cycle,
                "part": step.part,
                "inputs": _inputs(step),
                "key": step.key,
            }
            for step in steps
        ]
        write_json(self.root / MANIFEST, {**value, "format": FORMAT, "store": place, "steps": rows})
        self._link_names(steps)

    def add_steps(self, steps: Sequence[Step]) -> None:
        """Add steps to the manifest: answers to questions that the recipe does not ask."""
        known = self.known()
        there = {step.name for step in known.steps}
        added = [step for step in steps if step.name not in there]
        if added:
            self.write_manifest(known.value, [*known.steps, *added])

    def _link_names(self, steps: Sequence[Step]) -> None:
        """Make by-name/ with a link for each step. Does nothing on a file system without links."""
        folder = self.root / BY_NAME
        target = Path(os.path.relpath(self.store / "steps", folder))
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            if folder.is_symlink():  # a stranger may have pointed it at another folder: change nothing there
                return
            for old in folder.iterdir():
                if old.is_symlink():
                    old.unlink()
            for step in steps:
                (folder / step.name).symlink_to(target / step.key)

    def acquire(self) -> None:
        """Make the folder if it is missing, and keep other sessions out until `release`.

        Raises:
            FolderError: If it cannot be written, or is a folder of something else or of version 0.1.
            Busy: If another session holds it.
        """
        if self.root.exists() and not self.root.is_dir():
            raise FolderError(f"`{self.root}` is a file", hint="choose another folder with `--out`")
        if self.root.is_dir() and any(self.root.iterdir()) and not (self.root / "lock").exists():
            raise FolderError(
                f"`{self.root}` holds other files and is not a run folder", hint="choose a new or empty folder with `--out`"
            )
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        # the lock first: it tells a folder of ours, whatever happens next, from one that holds other files
        lock = FolderLock(self.root / "lock", f"another run is going on in `{self.root}`")
        lock.acquire()
        self._lock = lock
        try:
            with disk_errors(self.store):
                (self.store / "steps").mkdir(parents=True, exist_ok=True)
        except IterftError:
            self.release()
            raise

    def release(self) -> None:
        """Let other sessions in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Run:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _beside(root: Path, steps: Sequence[Step]) -> list[Step]:
    """Steps in a folder of version 0.1 that its manifest does not list: held-out questions, another judge's verdicts."""
    names = {step.name for step in steps}
    folders = filter(None, map(folder_at, sorted((root / "steps").glob("*-*"))))
    return [step for folder in folders if (step := replace(folder.step, params={})).name not in names]


def _inputs(step: Step) -> list[list[str]]:
    """Role, name and key of each input."""
    keys = dict(step.input_keys)
    return [[role, name, keys[role]] for role, name in step.inputs]


def _old_name(step: Step) -> str:
    """The name of a step's folder in version 0.1."""
    verbs = {new: old for old, new in OLD_VERBS.items()}
    return step_name(verbs.get(step.verb, step.verb), step.cycle, step.part)


def damaged_hint(root: Path) -> str:
    """What to do about a run or a study whose manifest is damaged: its steps need none."""
    return f"bring it back from a copy; or begin in another folder: `--reuse {root}` takes over every finished step"


def finished_in(roots: Iterable[Path]) -> dict[str, Path]:
    """Folders of finished steps by key, in several folders as `finished_steps` takes them.

    Raises:
        FolderError: As `finished_steps`.
    """
    return {key: folder for root in roots for key, folder in finished_steps(root).items()}


def finished_steps(root: Path) -> dict[str, Path]:
    """Folders of finished steps by key, in a run folder, a store, or a folder of run folders.

    Raises:
        FolderError: If there is no such folder, or it is of version 0.1, whose keys are others.
    """
    if not root.is_dir():
        raise FolderError(f"there is no folder `{root}`", hint="`--reuse` takes what `iterft run --out` made")
    stores = {path for run in (*root.glob(MANIFEST), *root.glob(f"*/{MANIFEST}")) if (path := _steps_of(run.parent))}
    stores |= {path for path in (root / "steps", *root.glob("*/steps")) if path.is_dir()}
    if any(path.glob(f"*/{OLD_RECORD}") and next(path.glob(f"*/{OLD_RECORD}"), None) for path in stores):
        raise FolderError(
            f"`{root}` was made by version 0.1: its steps have other keys and cannot be reused",
            hint="it can still be reported, chatted with and exported",
        )
    return {path.parent.name: path.parent for steps in stores for path in steps.glob(f"*/{RECORD}")}


def _steps_of(root: Path) -> Path | None:
    """The steps' folder that a run's manifest names; None where it cannot be read: steps beside it are found without."""
    with contextlib.suppress(FolderError):
        return Run(root).store / "steps"
    return None
