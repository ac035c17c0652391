"""The run folder: atomic rows, sealed steps, a lock.

    DIR/run.json                what was asked and how it was resolved
    DIR/lock                    held by the run that writes here
    DIR/logs/                   what the backends printed
    DIR/steps/NAME/step.json    the step, as planned, and what its inputs had come to when it began
    DIR/steps/NAME/...          its files; JSONL rows are appended as they come
    DIR/steps/NAME/sealed.json  the step is finished: its key, seconds, facts, a SHA-256 of each file, and what made it of what
    DIR/judges/NAME/            another judge's verdicts on the run's answers: a folder of steps like the run's own

A step without `sealed.json` is unfinished: its rows are kept and the missing ones made. A line that a killed process left
half-written is dropped. A sealed file that was changed since is an error, not a result; so is a step that was made of
another result than the one that its input holds now.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from iterft_lite.digests import Json, digest, file_digest
from iterft_lite.errors import FolderError, StoreError
from iterft_lite.experiment.steps import Step, Verb
from iterft_lite.files import ROWS, disk_errors, read_json, read_rows, write_json, write_text

STEP_FILE = "step.json"
SEAL_FILE = "sealed.json"
AGAIN_FILE = "again.json"

APPENDED: frozenset[Verb] = frozenset({"training_samples", "evaluate_samples", "judge"})
"""Verbs whose rows stand in the order in which they finished; who reads them goes by their names."""

BOOKKEEPING = frozenset({"tokens_in", "tokens_out", "usd", "seconds", "cached", "calls"})
"""What a verdict says of itself beside the score; no step reads it."""


def rows_digest(rows: Iterable[Mapping[str, Json]]) -> str:
    """SHA-256 of rows in any order, without the bookkeeping of verdicts."""
    plain = [
        {key: _without(value, BOOKKEEPING) if isinstance(value, dict) else value for key, value in row.items()} for row in rows
    ]
    lines = sorted(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in plain)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _without(value: Mapping[str, Json], keys: frozenset[str]) -> dict[str, Json]:
    return {key: each for key, each in value.items() if key not in keys}


@dataclass(frozen=True)
class Seal:
    """What is known of a finished step.

    Attributes:
        key: The step's.
        seconds: Spent on it, all sittings together.
        facts: What the step found out, for the report; JSON.
        files: Relative path to SHA-256 and bytes; of rows that were appended also `rows`, a digest without their order.
        inputs: By role, the `result` of each step that was read, as it was then; None where an earlier version, which did not
            note it, made the seal.
        versions: Of the libraries that made the step (`versions.py`); empty in such seals.
    """

    key: str
    seconds: float
    facts: dict[str, Json]
    files: dict[str, dict[str, Json]]
    inputs: dict[str, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def result(self) -> str:
        """What tells this result from another of the same step, 64 hex digits: the key, and what the files hold.

        Times, prices, versions and the order in which rows finished are left out: no step goes by them. A file that `keep`
        removed counts as it was, and a step that was done again and came to the same is the same.
        """
        return digest([self.key, {name: known.get("rows", known["sha256"]) for name, known in self.files.items()}])


class StepFolder:
    """The folder of one step."""

    def __init__(self, path: Path, step: Step) -> None:
        self.path = path
        self.step = step

    def seal_of(self) -> Seal | None:
        """The seal, or None while the step is unfinished.

        Raises:
            FolderError: If the step was sealed with another key.
        """
        try:
            seal = _read_seal(self.path / SEAL_FILE)
        except FileNotFoundError:
            return None
        if seal.key != self.step.key:
            raise FolderError(f"`{self.path}` was made by another recipe", hint="choose another folder with `--out`")
        return seal

    def inputs(self) -> dict[str, str]:
        """By role, the `result` of each step that this one reads, as it is now; those that are not finished are left out."""
        return _results({role: _input_folder(self.path, role, name) for role, name in self.step.inputs})

    def begin(self) -> None:
        """Make the folder, or take up an unfinished one; its rows count if the step's key is the same.

        Raises:
            StoreError: If they were made of other results than those that are there now.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            definition = self.path / STEP_FILE
            known = read_json(definition) if definition.exists() else {}
            if known.get("key") != self.step.key:
                shutil.rmtree(self.path)
                self.path.mkdir()
                known = {}
            self.check_inputs()
            if "read" not in known:
                write_json(definition, {**asdict(self.step), "read": self.inputs()})
        self.sweep()

    def check_inputs(self) -> None:
        """Hold what the step was made of, finished or not, against what its inputs hold now.

        Raises:
            StoreError: If an input was done again since and came to another result. With the folders that rest on the earlier
                one, all of them: to be removed by hand, because verdicts among them may have been paid for.
        """
        changed = _changed(_recorded(self.path), self.inputs())
        if changed:
            names = dict(self.step.inputs)
            others = " and ".join(f"`{names[role]}`" for role in changed)
            raise StoreError(
                f"`{self.path}` was made from another {others} than what is there now",
                hint="remove what rests on the earlier one, to have it done again, or put that one back:\n\n  "
                + _removal(_outdated(_root(self.path))),
            )

    def sweep(self) -> None:
        """Remove files that a killed process was still writing; a GGUF's can be as large as the model."""
        seal = self.seal_of()
        for path in self.path.rglob("*.part"):
            if seal is None or path.relative_to(self.path).as_posix() not in seal.files:
                path.unlink(missing_ok=True)

    def spent(self) -> float:
        """Seconds that earlier sittings spent on this unfinished step."""
        try:
            return float((self.path / "seconds").read_text())
        except (OSError, ValueError):
            return 0.0

    def spend(self, seconds: float) -> None:
        """Note the seconds of a sitting that did not finish."""
        with contextlib.suppress(OSError, StoreError):  # a note: losing it loses no result
            write_text(self.path / "seconds", f"{self.spent() + seconds:.3f}\n")

    def seal(
        self,
        seconds: float,
        facts: Mapping[str, Json],
        known: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Seal:
        """Declare the step finished: everything in the folder is synced, digested and named in the seal.

        Args:
            known: SHA-256 of files, by name, that was taken while they were written.
            versions: Of the libraries that made it.
        """
        known = known or {}
        total = self.spent() + seconds
        (self.path / "seconds").unlink(missing_ok=True)
        files = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and path.name not in (SEAL_FILE, STEP_FILE):
                with disk_errors(path), path.open("rb") as file:
                    os.fsync(file.fileno())
                name = path.relative_to(self.path).as_posix()
                files[name] = {
                    "sha256": known.get(name) or file_digest(path),
                    "bytes": path.stat().st_size,
                }
                if name == ROWS and self.step.verb in APPENDED:
                    files[name]["rows"] = rows_digest(read_rows(path))
        read = read_json(self.path / STEP_FILE)["read"]
        seal = Seal(self.step.key, round(total, 3), dict(facts), files, read, dict(versions or {}))
        write_json(self.path / SEAL_FILE, asdict(seal))
        return seal

    def verify(self, *, pruned: bool = False) -> None:
        """Check every file against the seal, and what the step was made of against what is there now.

        Args:
            pruned: Missing files are no error (the `keep` policy removed them).

        Raises:
            StoreError: If a file is missing or was changed, or an input is another one.
        """
        seal = self.seal_of()
        assert seal is not None, "only sealed steps can be verified"
        self.check_inputs()
        again = _peek(self.path / AGAIN_FILE)
        for name, known in seal.files.items():
            path = self.path / name
            if not path.exists():
                if pruned:
                    continue
                raise StoreError(f"`{path}` is missing from a finished step", hint=_redo(self.path))
            now = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            if now not in ({key: known[key] for key in now}, again.get(name)):
                raise StoreError(f"`{path}` was changed after its step was finished (checksum)", hint=_redo(self.path))

    def take_again(self, taken: Mapping[str, str]) -> None:
        """Accept the files of a finished step as they are: they were written again and checked anew.

        A merge rounds as the processor and its libraries do: elsewhere it may come to other bytes of the same model.

        Args:
            taken: SHA-256 of files, by name, that was taken while they were written.
        """
        seal = self.seal_of()
        assert seal is not None, "only sealed steps are done again"
        other = {}
        for name, known in seal.files.items():
            path = self.path / name
            if path.exists() and (digest := taken.get(name) or file_digest(path)) != known["sha256"]:
                other[name] = {"bytes": path.stat().st_size, "sha256": digest}
        if other:
            write_json(self.path / AGAIN_FILE, other)

    def adopt(self, source: Path) -> Seal | None:
        """Take over the same step as another run finished it: its files are linked, or copied to another file system.

        Files that the other run's `keep` removed stay away. None, and nothing done, where the other run made it of other
        results than those that are here: verdicts on one run's answers are none on another's.
        """
        seal = _read_seal(source / SEAL_FILE)
        if _changed(_results(_reads(source)) if seal.inputs is None else seal.inputs, self.inputs()):
            return None
        with disk_errors(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            for name in (*seal.files, AGAIN_FILE):
                with contextlib.suppress(FileNotFoundError):
                    _link(source / name, self.path / name)
            write_json(self.path / STEP_FILE, asdict(self.step))
            write_json(self.path / SEAL_FILE, asdict(seal))
        return seal

    def complete(self) -> bool:
        """Whether the step is sealed and all its files are still there."""
        seal = self.seal_of()
        return seal is not None and all((self.path / name).exists() for name in seal.files)


def folder_at(path: Path) -> StepFolder | None:
    """A step's folder, by its own word on what it is; None where there is none."""
    try:
        known = read_json(path / STEP_FILE)
    except (FileNotFoundError, ValueError):
        return None
    inputs = tuple((role, name) for role, name in known["inputs"])
    return StepFolder(path, Step(known["verb"], known["cycle"], known["part"], known["params"], inputs, known["key"]))


def _read_seal(path: Path) -> Seal:
    try:
        return Seal(**read_json(path))
    except (ValueError, TypeError) as error:
        raise StoreError(f"`{path}` cannot be read: {error}", hint=_redo(path.parent)) from None


def _redo(folder: Path) -> str:
    """How to have a finished step done again."""
    resting = _resting_on(_root(folder), {folder})
    if all(_peek(path / SEAL_FILE).get("inputs") is not None for path in resting if (path / SEAL_FILE).exists()):
        rest = "; if it then comes to another result, the folders that rest on it are named"
        return f"remove the folder `{folder}` to have it done again" + (rest if resting else "")
    # seals of an earlier version do not know what they were made of
    return "remove the folder, and those of the steps that rest on it, to have them done again:\n\n  " + _removal(
        [folder, *resting]
    )


# -- what rests on what


def _root(folder: Path) -> Path:
    """The folder of steps' own, a run or another judge's, that a step is in."""
    return folder.parent.parent


def _input_folder(folder: Path, role: str, name: str) -> Path:
    """The folder of an input: beside the step's own, but that another judge reads the answers of the run that it judges."""
    own, run = folder.parent / name, _root(folder).parent.parent / "steps" / name
    return run if role == "answers" and not own.exists() and run.exists() else own


def _reads(folder: Path) -> dict[str, Path]:
    """By role, the folders of a step's inputs, as its own file names them."""
    return {role: _input_folder(folder, role, name) for role, name in _peek(folder / STEP_FILE).get("inputs", [])}


def _results(folders: Mapping[str, Path]) -> dict[str, str]:
    """By role, the `result` of steps; those that are not finished are left out."""
    found = {}
    for role, folder in folders.items():
        with contextlib.suppress(FileNotFoundError):
            found[role] = _read_seal(folder / SEAL_FILE).result
    return found


def _recorded(folder: Path) -> dict[str, str]:
    """By role, the `result` of each input as it was when a step, finished or not, read it; empty where that was not noted."""
    known = _peek(folder / SEAL_FILE).get("inputs") or _peek(folder / STEP_FILE).get("read")
    return dict(known or {})


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Roles whose results differ; an input that is not there to be compared is not among them."""
    return [role for role, result in before.items() if now.get(role, result) != result]


def _outdated(root: Path) -> list[Path]:
    """Folders of the steps that were made of another result than their input's present one, and of all that rests on them."""
    stale = {folder for folder in _step_folders(root) if _changed(_recorded(folder), _results(_reads(folder)))}
    return _in_order([*stale, *_resting_on(root, stale)])


def _resting_on(root: Path, folders: set[Path]) -> list[Path]:
    """Folders of the steps that read one of these, or read what reads it, by other judges too."""
    readers = {folder: set(_reads(folder).values()) for folder in _step_folders(root)}
    found: set[Path] = set()
    while more := {folder for folder, read in readers.items() if read & (folders | found)} - folders - found:
        found |= more
    return _in_order(found)


def _step_folders(root: Path) -> list[Path]:
    """Folders of all steps in a folder, another judge's too."""
    # os.walk passes over folders that another lane makes or removes meanwhile, pathlib stumbles over them
    return [Path(place) for place, _, names in os.walk(root) if STEP_FILE in names and Path(place).parent.name == "steps"]


def _in_order(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: (_peek(folder / STEP_FILE).get("cycle", 0), str(folder)))


def _removal(folders: Sequence[Path]) -> str:
    """The command that removes folders."""
    return shlex.join(["rm", "-r", *map(str, folders)])


def _peek(path: Path) -> dict[str, Json]:
    """A JSON object; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def finished_steps(root: Path) -> dict[str, Path]:
    """Folders of finished steps by key: of a run folder, or of all run folders in a folder.

    Raises:
        FolderError: If it is neither.
    """
    runs = [root] if (root / "run.json").is_file() else sorted(path.parent for path in root.glob("*/run.json"))
    if not runs:
        raise FolderError(f"`{root}` is no run folder and holds none", hint="`--reuse` takes what `iterft run --out` made")
    seals = [path for run in runs for path in sorted(run.glob(f"steps/*/{SEAL_FILE}"))]
    return {_read_seal(path).key: path.parent for path in seals}


class Store:
    """A run folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: IO[str] | None = None

    @property
    def logs(self) -> Path:
        """Where the backends' output goes."""
        return self.root / "logs"

    def folder(self, step: Step) -> StepFolder:
        """The folder of a step."""
        return StepFolder(self.root / "steps" / step.name, step)

    def manifest(self) -> dict[str, Any] | None:
        """What `write_manifest` wrote, or None in a new folder.

        Raises:
            FolderError: If it cannot be read.
        """
        path = self.root / "run.json"
        try:
            value = read_json(path)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise FolderError(f"`{self.root}` is not a folder", hint="choose another folder with `--out`") from None
        except (OSError, ValueError) as error:
            raise FolderError(f"`{path}` cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise FolderError(f"`{path}` is not the manifest of a run")
        return value

    def run_manifest(self) -> dict[str, Any]:
        """The manifest of a run that is there.

        Raises:
            FolderError: If the folder is none.
        """
        manifest = self.manifest()
        if manifest is None or "steps" not in manifest:
            raise FolderError(f"`{self.root}` is not a run folder", hint="`iterft run RECIPE --out DIR` makes one")
        return manifest

    def write_manifest(self, manifest: Mapping[str, Json]) -> None:
        """Note what was asked."""
        write_json(self.root / "run.json", dict(manifest))

    def acquire(self) -> None:
        """Make the folder if it is not there, and keep other runs out of it until `release`.

        Raises:
            FolderError: If it cannot be written, is a folder of something else, or another run is in it.
        """
        if self.root.exists() and not self.root.is_dir():
            raise FolderError(f"`{self.root}` is a file", hint="choose another folder with `--out`")
        if self.root.is_dir() and any(self.root.iterdir()) and not (self.root / "lock").exists():
            raise FolderError(
                f"`{self.root}` holds other files and is not a run folder", hint="choose a new or empty folder with `--out`"
            )
        with disk_errors(self.root):
            (self.root / "steps").mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise FolderError(
                f"another run is going on in `{self.root}`" + (f" (process {holder})" if holder else ""),
                hint="wait for it, or choose another folder with `--out`",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Store:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
