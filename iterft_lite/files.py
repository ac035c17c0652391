"""Files: written whole or not at all, read with a size limit, locked. Errors of the system become `IterftError`s.

No function here follows a symbolic link in a name that the program made up, because a run folder may come from a stranger. Only
`write_output` writes through one: the user named its place on the command line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Literal, TypeVar

from iterft_lite.cache import cache_folder
from iterft_lite.digests import Json, digest_by_pieces
from iterft_lite.errors import Busy, FileError, FolderError, IterftError, StoreError

ROWS = "rows.jsonl"
"""The file of a step's rows."""

T = TypeVar("T")

MIB = 1 << 20

TEXT_LIMIT = 64 * MIB
"""Largest file of one value (JSON, TOML, a template), bytes."""

ROWS_LIMIT = 2048 * MIB
"""Largest file of rows, bytes: the program holds it in memory."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

REFUSED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP}
)
"""Errors that the user avoids by naming another place."""

WAYS_ON = {
    errno.EIO: "the drive, or the network that it is on, reports an error: `dmesg` says more",
    errno.EMFILE: "this process has too many files open: raise the limit with `ulimit -n 4096`",
    errno.ENFILE: "this machine has too many files open: end other programs",
    errno.ELOOP: "it is a symbolic link, which is not followed here: remove it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ESTALE: "the network drive was taken away meanwhile: mount it again",
}
"""What to do about an error, by its number."""

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""What `flock` says on a file system that has no locks."""

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)


def kind_of(mode: int) -> str:
    """The kind of a file in words, from its mode; "" for a regular file."""
    return next((words for test, words in KINDS if test(mode)), "")


# -- errors


def our_error(path: Path, error: OSError, *, doing: str = "written") -> IterftError:
    """Our error for an error of the file system.

    Args:
        path: The file or folder that it is about.
        doing: What was being done to it: "written" or "read".
    """
    number = error.errno or 0
    # numpy and safetensors report a full disk without an error number: numpy as a count, safetensors as a text
    if number in FULL or (not number and (" written" in str(error) or os.strerror(errno.ENOSPC) in str(error))):
        return StoreError(
            f"the disk is full: `{path}` could not be written",
            hint="free some space and repeat the command: it continues where it stopped" + _elsewhere(path, full=True),
        )
    reason = os.strerror(number).lower() if number else str(error)
    message = f"`{path}` cannot be {doing}: {reason}"
    if number in REFUSED and doing == "written":
        gone = number == errno.ENOENT and not path.parent.exists()
        way = f"make the folder `{path.parent}` first, or choose another" if gone else "choose another folder with `--out`"
        return FolderError(message, hint=WAYS_ON.get(number) or _elsewhere(path) or way)
    return (FileError if doing == "read" else StoreError)(message, hint=WAYS_ON.get(number))


def _elsewhere(path: Path, *, full: bool = False) -> str:
    """How to move the cache, if a path lies in it."""
    with contextlib.suppress(FolderError):
        if path.is_absolute() and path.is_relative_to(cache_folder().absolute()):
            return f"{'; ' if full else ''}ITERFT_CACHE names another folder for converted models"
    return ""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the file system's errors while writing into ours.

    Raises:
        StoreError: If the disk is full or fails.
        FolderError: If the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise our_error(path, error) from error


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the file system's errors while reading into ours. A missing file stays the caller's to explain.

    Raises:
        FileError: For every other error.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, FileError):
        raise
    except OSError as error:
        raise our_error(path, error, doing="read") from error


def user_path(text: str) -> Path:
    """The path that a user wrote: `~` is the home folder. A `~NAME` of nobody, or no home, stays as it is written."""
    path = Path(text)
    with contextlib.suppress(RuntimeError):
        return path.expanduser()
    return path


# -- reading


def read_bytes(path: Path, *, limit: int = TEXT_LIMIT, links: bool = True) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        limit: Largest size, bytes.
        links: Follow a symbolic link.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        FileError: If it is not a regular file, too large, or cannot be read.
    """
    with read_errors(path), open_regular(path, links=links) as file:
        # A file on a disk shows its size before it is read. One of the kernel's shows none: count what it gave.
        too_large = os.fstat(file.fileno()).st_size > limit
        found = b"" if too_large else file.read(limit + 1)
    if too_large or len(found) > limit:
        raise FileError(
            f"`{path}` is larger than {limit // MIB:,} MiB: it is not what it should be",
            hint="see what wrote it, and remove it",
        )
    return found


def open_regular(path: Path, *, links: bool = True) -> IO[bytes]:
    """Open a regular file for reading. Anything else raises at once: a named pipe would block.

    Raises:
        OSError: As the system says.
        FileError: If it is something else.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if links else os.O_NOFOLLOW))
    try:
        other = kind_of(os.fstat(handle).st_mode)
        if other:
            raise FileError(f"`{path}` is {other}, not a file", hint="remove it, or name another one")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: Path, *, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file, line ends unchanged.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        FileError: If it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"`{path}` is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from None


def read_json(path: Path, *, limit: int = TEXT_LIMIT) -> Json:
    """The value in a JSON file.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        FileError: If it cannot be read, or is not JSON.
    """
    return parse_json(read_text(path, limit=limit), f"`{path}`")


def parse_json(text: str, what: str) -> Json:
    """A JSON text's value.

    Args:
        text: Any text.
        what: Its name in the error.

    Raises:
        FileError: If it is not JSON, or nested or numbered beyond reason.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " if "\n" in text else ""  # of one line the caller knows the number
        raise FileError(f"{what} is not JSON: {error.msg}: {place}column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise FileError(f"{what} is not JSON: {error}") from None
    except RecursionError:
        raise FileError(f"{what} is not JSON that iterft wrote: it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Json]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        FileError: If it cannot be read, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"`{path}` holds {json_kind(value)} where an object belongs")
    return value


def read_record(path: Path, kind: type[T], given: Mapping[str, object] | None = None) -> T:
    """A record that this program wrote, from its JSON file: a dataclass or pydantic model, with every field's type checked.

    Ignores fields that the kind does not know: a later version wrote them.

    Args:
        path: The file.
        kind: Of the record.
        given: Fields that the file does not hold.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        FileError: If it cannot be read, or a field is missing or holds something else; with the fields named.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, and `iterft --help` reads no records

    value = read_object(path)
    try:
        return TypeAdapter(kind).validate_python({**value, **(given or {})})
    except ValidationError as error:
        wrong = [f"`{'.'.join(map(str, item['loc']))}`: {item['msg'].lower()}" for item in error.errors(include_url=False)]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FileError(f"`{path}` is not what it should be: {'; '.join(wrong[:3])}{more}") from None
    except RecursionError:
        raise FileError(f"`{path}` is not what it should be: it is nested too deeply") from None


def json_kind(value: Json) -> str:
    """What kind of JSON value this is, in words."""
    if value is None:
        return "null"
    kinds = ((bool, "true or false"), (int | float, "a number"), (str, "a text"), (list, "a list"), (dict, "an object"))
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a value of type {type(value).__name__}")


def read_rows(path: Path) -> list[dict[str, Json]]:
    """The rows of a JSONL file; none if it is missing. Ignores a last line without a line end: a killed process left it.

    Raises:
        FileError: If it cannot be read, or another line is not a JSON object.
    """
    try:
        return _rows(path, read_bytes(path, limit=ROWS_LIMIT))
    except FileNotFoundError:
        return []


def _rows(path: Path, data: bytes) -> list[dict[str, Json]]:
    # Split at newlines only: `splitlines` also splits at characters that model output contains.
    return [_row(path, number, line) for number, line in enumerate(data.split(b"\n")[:-1], 1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Json]:
    what = f"`{path}`, line {number},"
    try:
        row = parse_json(line.decode(), what)
    except UnicodeDecodeError:
        raise FileError(f"{what} is not UTF-8 text") from None
    if not isinstance(row, dict):
        raise FileError(f"{what} is not a row: it holds {json_kind(row)}")
    return row


# -- writing


def valid_text(text: str) -> str:
    """A text that can be written as UTF-8: halves of surrogate pairs (JSON can hold them alone) become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def write_json(path: Path, value: Json) -> None:
    """Write a file as a whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        StoreError, FolderError: As `writing`.
    """
    with writing(path) as temporary:
        temporary.write_bytes(valid_text(text).encode())


def write_rows(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """Write JSONL as a whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def writing(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Give an empty temporary file beside `path`. It replaces `path` if the block succeeds; otherwise it is removed.

    Its random name ends in `.part`, so two processes can write the same file at once: the later one stays. A symbolic link at
    `path` is replaced, never written through.

    Args:
        flushed: Wait until it is on the disk; without that a power failure can leave it cut off.

    Raises:
        StoreError: If the disk is full or fails.
        FolderError: If the place cannot be written to.
    """
    # The order makes a crash harmless: flush the new content to the disk, rename over the old file (atomic), then flush the
    # folder, whose entry is what points at the new content.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        yield temporary
        if flushed:
            flush(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(path.parent)):
            raise  # the block failed to read another file
        raise our_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_output(path: Path, data: str | bytes) -> None:
    """Write a file that the user named. A regular file is written whole or not at all, and keeps its permissions.

    Writes into a device or named pipe, and to the target of a symbolic link.

    Raises:
        StoreError, FolderError: As `writing`.
    """
    content = valid_text(data).encode() if isinstance(data, str) else data
    with disk_errors(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = 0
        if mode and not stat.S_ISREG(mode):
            with path.open("wb", buffering=0) as file:  # raises for a folder
                _write_all(file, content)
            return
        place = path.resolve()
        place.parent.stat()  # raises for a missing folder, which is probably a typing error: do not make it
    with writing(place) as temporary:
        temporary.write_bytes(content)
        if mode:
            temporary.chmod(stat.S_IMODE(mode))


def _write_all(file: IO[bytes], data: bytes) -> None:
    while data:  # a disk that becomes full accepts a part without an error; writing the rest then raises
        data = data[file.write(data) :]


def flush(path: Path) -> None:
    """Wait until the system has written a file or folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def need_writable(folder: Path) -> None:
    """Make a folder if it is missing, and check that it can be written to.

    Raises:
        StoreError, FolderError: As `writing`.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(6)}.part"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        trial.unlink()


@contextlib.contextmanager
def without_empty(folder: Path) -> Iterator[None]:
    """Leave no folder behind that was not there before and is empty in the end; nor one above it."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in missing:
            with contextlib.suppress(OSError):  # it was never made, or holds something now
                each.rmdir()


def _flush_folder(folder: Path) -> None:
    try:
        flush(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EACCES):  # this system syncs no folders
            raise


def open_append(path: Path) -> int:
    """A descriptor that adds to a file, made if missing. Follows no link and waits for no pipe: the folder may be a stranger's.

    Raises:
        OSError: As the system says.
        FileError: If something else than a file is there.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    if other := kind_of(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError(f"`{path}` is {other}, not a file", hint="remove it")
    return handle


class RowLog:
    """An open JSONL file. Appends each row in one write.

    On opening, a last line without a line end gets one if it is a row (a person's editor may end a file so). Otherwise a killed
    process left half a row.

    Args:
        path: Made if missing.
        owner: "program": cut half a row off and follow no link. "user": never cut anything off.

    Raises:
        FileError: If the file holds something else than rows.
        StoreError, FolderError: If it cannot be written.
    """

    def __init__(self, path: Path, *, owner: Literal["program", "user"] = "program") -> None:
        self.path = path
        with disk_errors(path):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            flags |= os.O_NOFOLLOW if owner == "program" else 0
            self._file: IO[bytes] = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            self.rows = self._whole(owner)
        except BaseException:
            self._file.close()
            raise

    def _whole(self, owner: Literal["program", "user"]) -> list[dict[str, Json]]:
        other = kind_of(os.fstat(self._file.fileno()).st_mode)
        if other:
            raise FileError(f"`{self.path}` is {other}, not a file of rows", hint="remove it")
        data = read_bytes(self.path, limit=ROWS_LIMIT, links=owner == "user")
        rows, end = _rows(self.path, data), data.rfind(b"\n") + 1
        if data[end:].strip():
            try:
                rows.append(_row(self.path, len(rows) + 1, data[end:]))
            except FileError:
                if owner == "user":
                    raise
                with disk_errors(self.path):
                    self._file.truncate(end)
            else:
                with disk_errors(self.path):
                    _write_all(self._file, b"\n")
        return rows

    def append(self, row: Mapping[str, Json]) -> None:
        """Add one row."""
        line = valid_text(json.dumps(row, ensure_ascii=False)).encode() + b"\n"
        with disk_errors(self.path):
            _write_all(self._file, line)
        self.rows.append(dict(row))

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_: object) -> None:
        with disk_errors(self.path):
            self._file.close()


# -- files kept for long, which a disk or a person may change without a word


def keep_digest(path: Path, digest: str = "") -> None:
    """Write a file's digest by pieces beside it, for `is_as_kept`; computed if it is not given."""
    write_text(digest_path(path), (digest or digest_by_pieces(path)) + "\n")


def kept_digest(path: Path) -> str:
    """What `keep_digest` wrote, or ""."""
    try:
        return read_text(digest_path(path), limit=256).strip()
    except (OSError, FileError):
        return ""


def is_as_kept(path: Path) -> bool:
    """Whether a file is unchanged since `keep_digest`. Reads it once a process."""
    try:
        kept, mark = kept_digest(path), file_mark(path)
        if _as_kept.get(mark) != kept and digest_by_pieces(path) == kept:
            _as_kept[mark] = kept
    except (OSError, FileError):
        return False
    return _as_kept.get(mark) == kept


_as_kept: dict[str, str] = {}
"""Digests of files that this process has read, by mark."""


def digest_path(path: Path) -> Path:
    """Where `keep_digest` writes."""
    return path.with_name(path.name + ".pieces")


def file_mark(path: Path) -> str:
    """What changes when a file is written to: its place, size and times. The kernel's own time (ctime) cannot be set back."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


# -- names from files, and links


def safe_member(root: Path, name: object) -> Path:
    """The place of a file that a record, manifest or step file names: relative, inside of `root`, no link on the way.

    It may be missing; what is there is a regular file.

    Raises:
        FileError: Otherwise.
    """
    if not _is_plain(name):
        raise FileError(f"`{root}` names a file `{name}`: not a plain name inside of the folder", hint="do not use this folder")
    path = root
    for part in PurePosixPath(str(name)).parts:
        path = path / part
        with read_errors(path):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                return root / str(name)
            except NotADirectoryError:
                raise FileError(f"`{path.parent}` is a file where a folder of the run belongs", hint="remove it") from None
        if stat.S_ISLNK(mode):
            raise FileError(f"`{path}` is a symbolic link where a file of the run belongs", hint="remove it")
    if not stat.S_ISREG(mode):
        raise FileError(f"`{path}` is {kind_of(mode)} where a file of the run belongs", hint="remove it")
    return path


def _is_plain(name: object) -> bool:
    """Whether this is a relative path of plain parts, written the one way there is."""
    if not isinstance(name, str) or not name or "\0" in name or valid_text(name) != name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name != "."


def link_file(source: Path, target: Path) -> None:
    """Have a file in a second place: a hard link, or a copy on another file system. What is at `target` is never replaced.

    Raises:
        FileNotFoundError: If there is no source.
        FileError: If the source is not a regular file.
        FolderError, StoreError: If the target is there, or cannot be written.
    """
    with read_errors(source), open_regular(source, links=False) as opened, disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
            return
        except OSError as error:  # another file system, or one without links, or too many of them
            if error.errno == errno.EEXIST:
                raise FolderError(f"`{target}` already exists and is not overwritten") from None
        _copy_new(opened, target)


def _copy_new(source: IO[bytes], target: Path) -> None:
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb") as file:
        try:
            shutil.copyfileobj(source, file, MIB)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise


# -- locks


class FolderLock:
    """A lock file: one process at a time holds it, and the file names that process.

    Uses `flock` if the file system supports it: the system releases the lock when the process ends, however it ends. Otherwise
    makes a file `NAME.held`, which only one process can create, and takes the file over from a process that no longer runs on
    this machine.

    Args:
        path: The file; its folder must exist.
        what: What the holder is doing, for the error: "another run is going on in `DIR`".
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._file: IO[bytes] | None = None
        self._held: Path | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            Busy: If another process holds it.
            FolderError: If it cannot be written.
            StoreError: If the disk is full.
        """
        with disk_errors(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
        try:
            self._take(file)
            with disk_errors(self.path):
                file.truncate(0)
                file.seek(0)
                _write_all(file, str(os.getpid()).encode())
        except BaseException:
            file.close()
            self.release()
            raise
        self._file = file

    def _take(self, file: IO[bytes]) -> None:
        """Lock the open file; by name where the file system has no locks."""
        other = kind_of(os.fstat(file.fileno()).st_mode)
        if other:
            raise FolderError(f"`{self.path}` is {other}, not a lock", hint="remove it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self._take_by_name()
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise our_error(self.path, error) from error
            holder = file.read(32).decode("ascii", "replace").strip()
            raise self._taken(f" (process {holder})" if holder.isdigit() else "") from None

    def _take_by_name(self) -> None:
        """Make `NAME.held`, which fails if it exists (O_EXCL).

        Two tries: the first may find the file of a dead process and remove it. If a third process makes the file between that
        removal and the second try, this one gives up.
        """
        held = self.path.with_name(self.path.name + ".held")
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": _started(os.getpid())}
        for _ in range(2):
            with disk_errors(held):
                try:
                    handle = os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                except FileExistsError:
                    self._take_over(held)
                    continue
                with os.fdopen(handle, "wb") as file:
                    file.write(json.dumps(me).encode())
                self._held = held
                return
        raise self._taken("")

    def _take_over(self, held: Path) -> None:
        """Remove `NAME.held` if its process has ended.

        Process numbers are used again: the same number with another start time is another process. A process on another machine
        cannot be looked at, so its file is never removed.
        """
        try:
            holder = read_object(held)
        except (FileNotFoundError, FileError):
            holder = {}
        here = holder.get("host") == socket.gethostname()
        process = holder.get("process")
        if not (here and isinstance(process, int) and _started(process) != holder.get("since")):
            where = f" (process {process} on {holder.get('host')})" if process else ""
            raise self._taken(where, f"; if it is not, remove `{held}`")
        held.unlink(missing_ok=True)

    def _taken(self, holder: str, more: str = "") -> Busy:
        return Busy(f"{self.what}{holder}", hint="wait for it, or choose another folder with `--out`" + more)

    def release(self) -> None:
        """Let others in."""
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.unlink(missing_ok=True)
            self._held = None
        if self._file is not None:
            self._file.close()
            self._file = None


def _started(process: int) -> str:
    """The start time of a process on this machine, in the kernel's ticks; "" if there is no such process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return fields[19]
    except (OSError, IndexError):
        return ""
