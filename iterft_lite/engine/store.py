"""The store: a step is kept once, under its key, whoever asks for it.

    STORE/steps/KEY/step.json        the step, as planned, and what its inputs had come to when it began
    STORE/steps/KEY/...              its files; JSONL rows are appended as they come
    STORE/steps/KEY/completion.json  the step is finished (`completion.py`)
    STORE/steps/KEY/lock             held while the step is being made
    STORE/steps/KEY/working          held by the process elsewhere that does it for the one that makes it

A step without a completion record is unfinished: the next session keeps its rows and makes the missing ones. A file that was
changed after completion is an error, not a result. So is a step whose input came to another result since. Finished steps need
no lock. A run waits for a step that another process is making. Runs are manifests over a store (`manifest.py`).

Who may write into a step's folder, and in which order:

1. Take `lock` (class `Making`). Only one process has it.
2. Look again whether the step is finished: the process before may have finished it.
3. Write `step.json` with the results of the inputs, then the files.
4. Flush the files to the disk, digest them, and write `completion.json` last. Only this makes the step finished: after a crash
   at any earlier point the folder is unfinished, never wrong. Merged models alone are not flushed (8 GB a cycle): one that is
   not as it was is as good as removed, and is written again from its adapter.
5. Remove `lock`. Whoever waited for it finds the step finished.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from iterft_lite.digests import PIECE, Json, digest_by_pieces, file_digest
from iterft_lite.engine.completion import (
    RECORD,
    Completion,
    read_completion,
    rows_digest,
    write_completion,
)
from iterft_lite.engine.results import refuse_strange
from iterft_lite.errors import Busy, FileError, FolderError, StoreError
from iterft_lite.experiment.steps import Step, checked
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.files import (
    ROWS,
    FolderLock,
    disk_errors,
    flush,
    link_file,
    read_bytes,
    read_object,
    read_rows,
    safe_member,
    write_json,
    write_text,
)

MODEL = ".gguf"
"""Ending of files whose digest is by pieces."""

ReadRecord = Callable[[Path], Completion | None]
"""Reads the completion record of a step's folder."""

STEP_FORMAT = 2
"""Format of step.json."""

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
"""File in a step's folder: the process that makes the step holds it."""

WORKING = "working"
"""File in a step's folder: a worker on another machine holds it as long as its process may write there."""


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
        if found is None:
            return None
        if found.key != self.step.key:
            raise FolderError(f"`{self.path}` was made by another recipe", hint="choose another folder with `--out`")
        refuse_strange(self.path / RECORD, self.step.verb, found.results)
        return found

    @property
    def finished(self) -> bool:
        """Whether there is a completion record."""
        return self.completion() is not None

    def inputs(self, read: ReadRecord = read_completion) -> dict[str, str]:
        """The present `result` of each finished step that this one reads, by role."""
        return _results(input_folders(self.path, self.step), read)

    def begin(self) -> None:
        """Make the folder, or continue in an unfinished one.

        Raises:
            StoreError: If it was begun from other results than its inputs have now.
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

    def check_inputs(self, read: ReadRecord = read_completion) -> None:
        """Compare the results that the step was made from with the present results of its inputs.

        Args:
            read: How records are read; who checks a whole store reads each once.

        Raises:
            StoreError: If an input was done again and came to another result. The hint names all folders that rest on the
                earlier result: the user removes them, because verdicts among them may have cost money.
        """
        changed = _changed(_recorded(self.path, read), self.inputs(read))
        if changed:
            names = dict(self.step.inputs)
            others = " and ".join(f"`{names[role]}`" for role in changed)
            raise StoreError(
                f"`{self.path}` ({self.step.name}) was made from another {others} than what is there now",
                hint="remove the steps made from the earlier one, to have them done again, or put that one back:\n\n  "
                + _removal(_outdated(self.path.parent)),
            )

    def clean_temp_files(self) -> None:
        """Remove temporary files of a killed process; that of a GGUF can be as large as the model."""
        if not self.finished:
            for path in self.path.rglob("*.part"):
                path.unlink(missing_ok=True)

    def spent(self) -> float:
        """Seconds of earlier sessions on this unfinished step."""
        with contextlib.suppress(OSError, ValueError, FileError):  # only a note
            seconds = float(read_bytes(self.path / "seconds", links=False))
            return seconds if 0 <= seconds < math.inf else 0.0
        return 0.0

    def spend(self, seconds: float) -> None:
        """Note the seconds of a session that did not finish."""
        with contextlib.suppress(OSError, StoreError, FolderError):  # only a note: no result depends on it
            write_text(self.path / "seconds", f"{self.spent() + seconds:.3f}\n")

    def complete(
        self,
        seconds: float,
        results: Mapping[str, Json],
        known: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Completion:
        """Declare the step finished: flush and digest the files that its verb declares, remove all others, write the record.

        Args:
            known: Digests by pieces (`digests.py`), by file name, taken while files were written. Such files can be made again:
                they are not flushed.
            versions: Versions of the libraries that made the step.
        """
        known = known or {}
        total = self.spent() + seconds
        files: dict[str, dict[str, Json]] = {}
        for name, path in self._own_files():
            if name not in known:
                with disk_errors(path):
                    flush(path)
            files[name] = _as_written(path, known.get(name))
            if name == ROWS and VERBS[self.step.verb].any_order:
                files[name]["rows"] = rows_digest(read_rows(path))
        read = read_object(self.path / STEP_FILE)["read"]
        definition = file_digest(self.path / STEP_FILE)
        made = Completion(self.step.key, round(total, 3), dict(results), files, read, dict(versions or {}), definition)
        write_completion(self.path, made)
        return made

    def _own_files(self) -> Iterator[tuple[str, Path]]:
        """Name and place of the step's result files, in order. Removes every other file."""
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

    def verify(self, *, pruned: bool = False, mend: bool = False, read: ReadRecord | None = None) -> Completion:
        """Check every file against the completion record, and the inputs against the results that the step was made from.

        Args:
            pruned: Accept missing files (the `keep` policy removed them).
            mend: Remove GGUF files that are not as they were (a power failure cut them off): they are written again, as those
                are that `keep` removed.
            read: As of `check_inputs`; the step's own record too, which was looked at before.

        Returns:
            The record.

        Raises:
            StoreError: If a file is missing or was changed, or an input has another result now.
        """
        found = read(self.path) if read else self.completion()
        assert found is not None, "only finished steps can be verified"
        self.check_inputs(read or read_completion)
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
            if not _is_one_of(path, known, again.get(name)):
                if mend and known.get("piece_bytes"):
                    with disk_errors(path):
                        path.unlink(missing_ok=True)
                    continue
                raise StoreError(f"`{path}` was changed after its step was finished (checksum)", hint=_redo(self.path))
        return found

    def take_again(self, taken: Mapping[str, str]) -> None:
        """Accept the present files of a finished step, which were written again and checked.

        A merge rounds as the processor and its libraries do: another machine may come to other bytes of the same model.

        Args:
            taken: Digests by pieces, by file name, taken while files were written.
        """
        found = self.completion()
        assert found is not None, "only finished steps are done again"
        other = {}
        for name, known in found.files.items():
            path = safe_member(self.path, name)
            if path.exists() and (entry := _as_written(path, taken.get(name)))["sha256"] != known["sha256"]:
                other[name] = entry
        if other:
            write_json(self.path / AGAIN_FILE, other)

    def whole(self) -> bool:
        """Whether the step is finished and all its files are still there."""
        found = self.completion()
        return found is not None and all(safe_member(self.path, name).exists() for name in found.files)

    def reuse(self, source: Path) -> Completion | None:
        """Take the same step over from another store: link its files, or copy them to another file system.

        Skips files that the other run's `keep` removed. Does nothing and returns None if the other step was made from other
        results than the inputs here have: verdicts on one run's answers do not hold for another's.

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


def _as_written(path: Path, by_pieces: str | None) -> dict[str, Json]:
    """A file's entry in a record.

    Args:
        by_pieces: Its digest by pieces, if that was taken while it was written.
    """
    size = path.stat().st_size
    if path.suffix == MODEL:
        return {"sha256": by_pieces or digest_by_pieces(path), "piece_bytes": PIECE, "bytes": size}
    return {"sha256": file_digest(path), "bytes": size}


def _is_one_of(path: Path, *entries: Json) -> bool:
    """Whether a file is that of an entry. Reads it once for each way of taking a digest, and not if its size is another."""
    size = path.stat().st_size

    @cache
    def found(piece: int | None) -> str:
        return file_digest(path) if piece is None else digest_by_pieces(path, piece)

    def fits(entry: Json) -> bool:
        if not isinstance(entry, dict) or entry.get("bytes") != size:
            return False
        piece = entry.get("piece_bytes")
        return bool(entry.get("sha256") == found(piece if isinstance(piece, int) else None))

    return any(map(fits, entries))


def _digest(path: Path) -> str:
    """SHA-256 of a small file; "" where there is none. A huge one is refused, not read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except FileNotFoundError:
        return ""


def folder_at(path: Path) -> StepFolder | None:
    """A step's folder, as its step.json describes it; None if there is none."""
    try:
        known = read_object(path / STEP_FILE)
        inputs = tuple((str(role), str(name)) for role, name in dict(known["inputs"]).items())
        keys = tuple((str(role), str(key)) for role, key in dict(known.get("input_keys", {})).items())
        verb = OLD_VERBS.get(known["verb"], known["verb"])
        step = checked(Step(verb, int(known["cycle"]), str(known["part"]), known["params"], inputs, str(known["key"]), keys))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError) as error:
        # do not ask which steps rest on it: that would read all these files
        raise StoreError(
            f"`{path / STEP_FILE}` is not the file of a step: {getattr(error, 'message', error)}",
            hint=f"remove the folder `{path}` to have it done again",
        ) from None
    return StepFolder(path, step)


def _redo(folder: Path) -> str:
    """How the user has a finished step done again."""
    resting = _resting_on(folder.parent, {folder})
    rest = "; if it then comes to another result, the folders that rest on it are named"
    return f"remove the folder `{folder}` to have it done again" + (rest if resting else "")


# -- what rests on what


def input_folders(folder: Path, step: Step) -> dict[str, Path]:
    """By role, the folders of the steps that a step reads: beside its own, by key; by name in folders of version 0.1."""
    if step.input_keys:
        return {role: folder.parent / key for role, key in step.input_keys}
    own = {role: folder.parent / name for role, name in step.inputs}
    # version 0.1 kept another judge's steps in a folder inside the run that it judged
    run = folder.parent.parent.parent.parent / "steps"
    return {role: path if path.exists() or not (run / path.name).exists() else run / path.name for role, path in own.items()}


def _results(folders: Mapping[str, Path], read: ReadRecord = read_completion) -> dict[str, str]:
    """The `result` of each finished step, by role."""
    found = {role: read(folder) for role, folder in folders.items()}
    return {role: completion.result for role, completion in found.items() if completion is not None}


def _recorded(folder: Path, read: ReadRecord = read_completion) -> dict[str, str]:
    """The `result` of each input, by role, at the time when a step read it; empty if that was not noted."""
    completion = read(folder)
    known = completion.inputs if completion else None
    noted = known or _peek(folder / STEP_FILE).get("read")
    return {str(role): str(result) for role, result in noted.items()} if isinstance(noted, dict) else {}


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Roles whose results differ. Ignores inputs that are not here to be compared."""
    return [role for role, result in before.items() if now.get(role, result) != result]


def _readers(steps: Path) -> dict[Path, dict[str, Path]]:
    """For each step folder of a store, the folders that it reads, by role; empty for a folder that cannot be read."""
    found: dict[Path, dict[str, Path]] = {}
    for path in _step_folders(steps):
        with contextlib.suppress(StoreError):
            folder = folder_at(path)
            found[path] = input_folders(path, folder.step) if folder else {}
    return found


def _outdated(steps: Path) -> list[Path]:
    """Folders of the steps that were made from another result than their input has now, and of all steps that rest on them."""
    stale = {folder for folder, reads in _readers(steps).items() if _changed(_recorded(folder), _results(reads))}
    return _in_order([*stale, *_resting_on(steps, stale)])


def _resting_on(steps: Path, folders: set[Path]) -> list[Path]:
    """Folders of the steps that read one of these, directly or through others."""
    readers = {folder: set(reads.values()) for folder, reads in _readers(steps).items()}
    found: set[Path] = set()
    while more := {folder for folder, read in readers.items() if read & (folders | found)} - folders - found:
        found |= more
    return _in_order(list(found))


def _step_folders(steps: Path) -> list[Path]:
    """Folders of all steps in a store."""
    try:
        # another process may make or remove folders at the same time
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
    """The object of a JSON file; empty if there is none or it cannot be read."""
    with contextlib.suppress(OSError, FileError):
        return read_object(path)
    return {}


# -- who makes a step


class Making:
    """The right to make a step. One process has it at a time, and must first look whether the step is finished by now.

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
        if Working(self._folder).busy():  # the worker of an earlier process still writes here
            self._lock.release()
            return False
        return True

    def release(self) -> None:
        """Give the right back. Removes the lock file only after completion: whoever waited for it finds the step finished."""
        with contextlib.suppress(OSError, StoreError):
            if self._folder.finished:
                (self._folder.path / LOCK).unlink(missing_ok=True)
        self._lock.release()


class Working:
    """The lock of a worker on another machine, which does a step for the process that has its `Making`.

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
