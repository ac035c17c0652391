"""Files written whole or not at all, and rows that outlive a killed process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from iterft_lite.digests import Json
from iterft_lite.errors import ExportError, FolderError, StoreError

ROWS = "rows.jsonl"
"""The file of a step's rows."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in words what the file system refused."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"the disk is full: `{path}` could not be written",
                hint="free some space and issue the same command again: it goes on where it stopped",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise FolderError(
                f"`{path}` cannot be written: {os.strerror(error.errno).lower()}", hint="choose another folder with `--out`"
            ) from error
        raise


def write_json(path: Path, value: Json) -> None:
    """Write a file as a whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all: a temporary neighbour, synced, then renamed."""
    with disk_errors(path):
        temporary = path.with_name(path.name + ".part")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def read_json(path: Path) -> Json:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """Write JSONL as a whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Json]]:
    """The rows of a JSONL file; none if it is missing. A last line without its end is no row.

    Raises:
        StoreError: If another line is not JSON.
    """
    try:
        # split on the newline only: model output holds other characters that end lines elsewhere
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise StoreError(f"`{path}`, line {number}, is not JSON: {error}") from None
    return rows


class RowLog:
    """An open JSONL file that rows are appended to, each whole in one write.

    What a killed process left behind its last newline is cut off first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)
        with disk_errors(path):
            self._file: IO[bytes] = path.open("ab", buffering=0)
            whole = path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(whole)

    def append(self, row: Mapping[str, Json]) -> None:
        """Add one row."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with disk_errors(self.path):
            while line:  # a disk that fills up takes a part of it without an error: the rest then meets one
                line = line[self._file.write(line) :]
        self.rows.append(dict(row))

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_: object) -> None:
        with disk_errors(self.path):
            self._file.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once the block ends well, and is removed otherwise.

    Raises:
        ExportError: If the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        # numpy's own writing reports a full disk as a count, without a number of the error
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and " written" in str(error)):
            raise ExportError(
                f"the disk is full: `{path}` could not be written",
                hint='free some space, choose a smaller `quant`, or `export = "adapter"`; then run again',
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ExportError(
                f"`{path}` cannot be written: {error.strerror}", hint="ITERFT_CACHE names another folder for converted models"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file's or folder's contents written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
