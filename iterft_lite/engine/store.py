"""The store: a step is kept once, under its key, whoever asks for it.

    STORE/steps/KEY/step.json        the step, as planned, and what its inputs had come to when it began
    STORE/steps/KEY/...              its files; JSONL rows are appended as they come
    STORE/steps/KEY/completion.json  the step is finished (`completion.py`)
    STORE/steps/KEY/lock             held while the step is being made
    STORE/steps/KEY/working          held by the process elsewhere that does it for the one that makes it

A step without a completion record is unfinished: its rows are kept and the missing ones made. A file that was changed since is
an
error, not a result; so is a step that was made of another result than the one that its input holds now. Finished steps need no
lock; a step that another process is making is waited for. Runs are manifests over a store (`manifest.py`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from iterft_lite.digests import Json, file_digest
from iterft_lite.engine.completion import (
    Completion,
    read_completion,
    rows_digest,
    write_completion,
)
from iterft_lite.errors import Busy, FileError, FolderError, StoreError
from iterft_lite.experiment.steps import Step, checked
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.files import (
    ROWS,
    FolderLock,
    disk_errors,
    flush,
    link_file,
    read_object,
    read_rows,
    safe_member,
    write_json,
    write_text,
)

STEP_FORMAT = 2
"""Of step.json."""

STEP_FILE = "step.json"
AGAIN_FILE = "again.json"

OLD_VERBS: Mapping[str, str] = {
    "base": "load_base",
    "seed": "seed_rows",
    "generate": "training_samples",
    "compose": "build_dataset",
    "answer": "evaluate_samples",
    "measure": "text_metrics",
    "score": "aggregate",
}
"""Verbs as version 0.1 called them."""

LOCK = "lock"
"""In a step's folder: held while it is being made."""

WORKING = "working"
"""In a step's folder: held by a worker on another machine for as long as its process may write there."""


class StepFolder:
    """The folder of one step."""

    def __init__(self, path: Path, step: Step) -> None:
        self.path = path
        self.step = step

    def completion(self) -> Completion | None:
        """The completion record, or None while the step is unfinished.

        Raises:
            StoreError: If it is damaged.
            FolderError: If it is another step's.
        """
        found = read_completion(self.path, lambda: _redo(self.path))
        if found is not None and found.key != self.step.key:
            raise FolderError(f"`{self.path}` was made by another recipe", hint="choose another folder with `--out`")
        return found

    @property
    def finished(self) -> bool:
        """Whether there is a completion record."""
        return self.completion() is not None

    def inputs(self) -> dict[str, str]:
        """By role, the `result` of each step that this one reads, as it is now; those that are not finished are left out."""
        return _results(input_folders(self.path, self.step))

    def begin(self) -> None:
        """Make the folder, or take up an unfinished one.

        Raises:
            StoreError: If it was begun from other results than those that are there now.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        known = _peek(self.path / STEP_FILE)
        if known and known.get("key") != self.step.key:
            with disk_errors(self.path):
                shutil.rmtree(self.path)
                self.path.mkdir()
            known = {}
        self.check_inputs()
        if "read" not in known:
            write_json(self.path / STEP_FILE, {**self._definition(), "read": self.inputs()})
        self.clean_temp_files()

    def _definition(self) -> dict[str, Json]:
        step = self.step
        return {
            "format": STEP_FORMAT,
            "verb": step.verb,
            "cycle": step.cycle,
            "part": step.part,
            "params": step.params,
            "inputs": dict(step.inputs),
            "input_keys": dict(step.input_keys),
            "key": step.key,
        }

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
                f"`{self.path}` ({self.step.name}) was made from another {others} than what is there now",
                hint="remove what rests on the earlier one, to have it done again, or put that one back:\n\n  "
                + _removal(_outdated(self.path.parent)),
            )

    def clean_temp_files(self) -> None:
        """Remove files that a killed process was still writing; a GGUF's can be as large as the model."""
        if not self.finished:
            for path in self.path.rglob("*.part"):
                path.unlink(missing_ok=True)

    def spent(self) -> float:
        """Seconds that earlier sessions spent on this unfinished step."""
        try:
            return float((self.path / "seconds").read_text())
        except (OSError, ValueError):
            return 0.0

    def spend(self, seconds: float) -> None:
        """Note the seconds of a session that did not finish."""
        with contextlib.suppress(OSError, StoreError, FolderError):  # a note: losing it loses no result
            write_text(self.path / "seconds", f"{self.spent() + seconds:.3f}\n")

    def complete(
        self,
        seconds: float,
        results: Mapping[str, Json],
        known: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Completion:
        """Declare the step finished: what its verb declares as its files is synced, digested and named; the rest goes.

        Args:
            known: SHA-256 of files, by name, that was taken while they were written.
            versions: Of the libraries that made it.
        """
        known = known or {}
        total = self.spent() + seconds
        files: dict[str, dict[str, Json]] = {}
        for name, path in self._own_files():
            with disk_errors(path):
                flush(path)
            files[name] = {"sha256": known.get(name) or file_digest(path), "bytes": path.stat().st_size}
            if name == ROWS and VERBS[self.step.verb].any_order:
                files[name]["rows"] = rows_digest(read_rows(path))
        read = read_object(self.path / STEP_FILE)["read"]
        definition = file_digest(self.path / STEP_FILE)
        made = Completion(self.step.key, round(total, 3), dict(results), files, read, dict(versions or {}), definition)
        write_completion(self.path, made)
        return made

    def _own_files(self) -> Iterator[tuple[str, Path]]:
        """Name and place of the step's result files, in order; whatever else is there is removed."""
        patterns = VERBS[self.step.verb].files
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_dir() and not path.is_symlink():
                continue
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not path.is_symlink():
                yield name, path
            elif name not in (STEP_FILE, LOCK, f"{LOCK}.held"):
                with disk_errors(path):
                    path.unlink(missing_ok=True)

    def verify(self, *, pruned: bool = False) -> Completion:
        """Check every file against the completion record, and what the step was made of against what is there now.

        Args:
            pruned: Missing files are no error (the `keep` policy removed them).

        Returns:
            The record.

        Raises:
            StoreError: If a file is missing or was changed, or an input is another one.
        """
        found = self.completion()
        assert found is not None, "only finished steps can be verified"
        self.check_inputs()
        if found.step and found.step != _digest(self.path / STEP_FILE):
            raise StoreError(
                f"`{self.path / STEP_FILE}` was changed after its step was finished (checksum)", hint=_redo(self.path)
            )
        again = _peek(self.path / AGAIN_FILE)
        for name, known in found.files.items():
            path = safe_member(self.path, name)
            if not path.exists():
                if pruned:
                    continue
                raise StoreError(f"`{path}` is missing from a finished step", hint=_redo(self.path))
            size, taken = path.stat().st_size, ({key: known[key] for key in ("bytes", "sha256")}, again.get(name))
            sizes = [each["bytes"] for each in taken if isinstance(each, dict) and "bytes" in each]
            # a file of another size need not be read, however large it is
            if size not in sizes or {"bytes": size, "sha256": file_digest(path)} not in taken:
                raise StoreError(f"`{path}` was changed after its step was finished (checksum)", hint=_redo(self.path))
        return found

    def take_again(self, taken: Mapping[str, str]) -> None:
        """Accept the files of a finished step as they are: they were written again and checked anew.

        A merge rounds as the processor and its libraries do: elsewhere it may come to other bytes of the same model.

        Args:
            taken: SHA-256 of files, by name, that was taken while they were written.
        """
        found = self.completion()
        assert found is not None, "only finished steps are done again"
        other = {}
        for name, known in found.files.items():
            path = safe_member(self.path, name)
            if path.exists() and (sha256 := taken.get(name) or file_digest(path)) != known["sha256"]:
                other[name] = {"bytes": path.stat().st_size, "sha256": sha256}
        if other:
            write_json(self.path / AGAIN_FILE, other)

    def whole(self) -> bool:
        """Whether the step is finished and all its files are still there."""
        found = self.completion()
        return found is not None and all(safe_member(self.path, name).exists() for name in found.files)

    def reuse(self, source: Path) -> Completion | None:
        """Take over the same step as another store has it: its files are linked, or copied to another file system.

        Files that the other's `keep` removed stay away. None, and nothing done, where the other was made of other results than
        those that are here: verdicts on one run's answers are none on another's.

        Raises:
            StoreError: If the other's record is damaged or names files outside of its folder.
        """
        found = read_completion(source, lambda: _redo(source))
        if found is None or found.key != self.step.key or found.inputs is None:
            return None
        if _changed(found.inputs, self.inputs()):
            return None
        names = [(name, safe_member(source, name)) for name in (*found.files, STEP_FILE, AGAIN_FILE)]
        with disk_errors(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        for name, path in names:
            with contextlib.suppress(FileNotFoundError):
                link_file(path, self.path / name)
        write_completion(self.path, found)
        return found


def _digest(path: Path) -> str:
    """SHA-256 of a file; "" where there is none."""
    try:
        return file_digest(path)
    except FileNotFoundError:
        return ""


def folder_at(path: Path) -> StepFolder | None:
    """A step's folder, by its own word on what it is; None where there is none."""
    try:
        known = read_object(path / STEP_FILE)
        inputs = tuple((str(role), str(name)) for role, name in dict(known["inputs"]).items())
        keys = tuple((str(role), str(key)) for role, key in dict(known.get("input_keys", {})).items())
        verb = OLD_VERBS.get(known["verb"], known["verb"])
        step = checked(Step(verb, int(known["cycle"]), str(known["part"]), known["params"], inputs, str(known["key"]), keys))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError) as error:
        # which steps rest on it cannot be asked here: to find out, all these files are read
        raise StoreError(
            f"`{path / STEP_FILE}` is not the file of a step: {getattr(error, 'message', error)}",
            hint=f"remove the folder `{path}` to have it done again",
        ) from None
    return StepFolder(path, step)


def _redo(folder: Path) -> str:
    """How to have a finished step done again."""
    resting = _resting_on(folder.parent, {folder})
    rest = "; if it then comes to another result, the folders that rest on it are named"
    return f"remove the folder `{folder}` to have it done again" + (rest if resting else "")


# -- what rests on what


def input_folders(folder: Path, step: Step) -> dict[str, Path]:
    """By role, the folders of the steps that a step reads: beside its own, by key; by name in folders of version 0.1."""
    if step.input_keys:
        return {role: folder.parent / key for role, key in step.input_keys}
    own = {role: folder.parent / name for role, name in step.inputs}
    # there, another judge's steps were in a folder inside of the run that it judged
    run = folder.parent.parent.parent.parent / "steps"
    return {role: path if path.exists() or not (run / path.name).exists() else run / path.name for role, path in own.items()}


def _results(folders: Mapping[str, Path]) -> dict[str, str]:
    """By role, the `result` of steps; those that are not finished are left out."""
    found = {role: read_completion(folder) for role, folder in folders.items()}
    return {role: completion.result for role, completion in found.items() if completion is not None}


def _recorded(folder: Path) -> dict[str, str]:
    """By role, the `result` of each input as it was when a step, finished or not, read it; empty where that was not noted."""
    completion = read_completion(folder)
    known = completion.inputs if completion else None
    noted = known or _peek(folder / STEP_FILE).get("read")
    return {str(role): str(result) for role, result in noted.items()} if isinstance(noted, dict) else {}


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Roles whose results differ; an input that is not there to be compared is not among them."""
    return [role for role, result in before.items() if now.get(role, result) != result]


def _readers(steps: Path) -> dict[Path, dict[str, Path]]:
    """By folder of a store's steps, the folders that it reads by role; what cannot be read reads nothing."""
    found: dict[Path, dict[str, Path]] = {}
    for path in _step_folders(steps):
        with contextlib.suppress(StoreError):
            folder = folder_at(path)
            found[path] = input_folders(path, folder.step) if folder else {}
    return found


def _outdated(steps: Path) -> list[Path]:
    """Folders of the steps that were made of another result than their input's present one, and of all that rests on them."""
    stale = {folder for folder, reads in _readers(steps).items() if _changed(_recorded(folder), _results(reads))}
    return _in_order([*stale, *_resting_on(steps, stale)])


def _resting_on(steps: Path, folders: set[Path]) -> list[Path]:
    """Folders of the steps that read one of these, or read what reads it."""
    readers = {folder: set(reads.values()) for folder, reads in _readers(steps).items()}
    found: set[Path] = set()
    while more := {folder for folder, read in readers.items() if read & (folders | found)} - folders - found:
        found |= more
    return _in_order(list(found))


def _step_folders(steps: Path) -> list[Path]:
    """Folders of all steps in a store."""
    try:
        # another process may make or remove folders meanwhile
        return [path for path in steps.iterdir() if (path / STEP_FILE).exists()]
    except OSError:
        return []


def _in_order(folders: Sequence[Path]) -> list[Path]:
    def place(folder: Path) -> tuple[int, str]:
        cycle = _peek(folder / STEP_FILE).get("cycle", 0)
        return cycle if isinstance(cycle, int) else 0, str(folder)

    return sorted(folders, key=place)


def _removal(folders: Sequence[Path]) -> str:
    """The command that removes folders."""
    return shlex.join(["rm", "-r", *map(str, folders)])


def _peek(path: Path) -> dict[str, Json]:
    """A JSON object; empty where there is none that can be read."""
    with contextlib.suppress(OSError, FileError):
        return read_object(path)
    return {}


# -- who makes a step


class Making:
    """The right to make a step: one process has it at a time. Who gets it looks first whether the step is finished by now.

    Args:
        folder: The step's.
    """

    def __init__(self, folder: StepFolder) -> None:
        self._folder = folder
        self._lock = FolderLock(folder.path / LOCK, f"another process is making `{folder.step.name}`")

    def try_acquire(self) -> bool:
        """Take the right, if no other process has it."""
        with disk_errors(self._folder.path):
            self._folder.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Busy:
            return False
        if Working(self._folder).busy():  # a worker that outlives who sent it, or that was lost sight of
            self._lock.release()
            return False
        return True

    def release(self) -> None:
        """Give it back. The lock's file goes after the step's completion: who waited for it finds the step finished."""
        with contextlib.suppress(OSError, StoreError):
            if self._folder.finished:
                (self._folder.path / LOCK).unlink(missing_ok=True)
        self._lock.release()


class Working:
    """What a worker on another machine holds while it does a step for the process that has its `Making`.

    Args:
        folder: The step's.
    """

    def __init__(self, folder: StepFolder) -> None:
        self.path = folder.path / WORKING
        self._lock = FolderLock(self.path, f"another worker is in `{folder.step.name}`")

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def busy(self) -> bool:
        """Whether a worker holds it."""
        if not self.path.exists():
            return False
        try:
            self._lock.acquire()
        except Busy:
            return True
        self._lock.release()
        return False
