"""Files: whole or not at all, read with a limit, and every refusal of the system in our own words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from iterft_lite import files
from iterft_lite.digests import LEAST_PIECE, digest_by_pieces, file_digest
from iterft_lite.errors import FileError, FolderError, IterftError, StoreError
from iterft_lite.files import (
    FolderLock,
    RowLog,
    is_as_kept,
    keep_digest,
    link_file,
    need_writable,
    read_bytes,
    read_json,
    read_object,
    read_record,
    read_rows,
    safe_member,
    valid_text,
    write_json,
    write_output,
    write_rows,
    write_text,
    writing,
)

# -- written whole or not at all ------------------------------------------------------------------------------------------


def test_a_written_file_replaces_the_one_before_it_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "two"}


def test_a_block_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "before")

    def write_half() -> None:
        with writing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "before"}


def test_two_writers_of_one_file_do_not_interfere(tmp_path: Path) -> None:
    with writing(tmp_path / "a") as one, writing(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"


def test_a_planted_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run.json").symlink_to("precious")
    write_json(tmp_path / "run.json", {})
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "run.json").is_symlink()


def test_a_path_named_by_the_user_is_written_through_links_and_keeps_permissions(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    (tmp_path / "page").chmod(0o640)
    (tmp_path / "link").symlink_to("page")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page").read_text() == "new"
    assert (tmp_path / "page").stat().st_mode & 0o777 == 0o640


def test_a_named_pipe_chosen_by_the_user_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    taken: list[bytes] = []
    reader = threading.Thread(target=lambda: taken.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(tmp_path / "pipe", b"page" * 50_000)
    reader.join()
    assert taken == [b"page" * 50_000]
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_device_and_a_folder_are_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the disk is full"):
        write_output(Path("/dev/full"), "page")
    with pytest.raises(FolderError, match="is a directory"):
        write_output(tmp_path, "page")
    with pytest.raises(FolderError, match="no such file"):
        write_output(tmp_path / "not there/page.html", "page")


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, StoreError, "the disk is full"),
        (errno.EDQUOT, StoreError, "the disk is full"),
        (errno.EIO, StoreError, "input/output error"),
        (errno.EMFILE, StoreError, "too many open files"),
        (errno.EACCES, FolderError, "permission denied"),
        (errno.EROFS, FolderError, "read-only"),
    ],
)
def test_every_system_error_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[IterftError], words: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(kind, match=words) as caught:
        write_text(tmp_path / "a", "text")
    assert str(tmp_path / "a") in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_full_cache_is_reported_with_how_to_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path))
    assert "ITERFT_CACHE" in str(files.our_error(tmp_path / "a", OSError(errno.ENOSPC, "full")).hint)
    assert "ITERFT_CACHE" not in str(files.our_error(Path("/run/a"), OSError(errno.ENOSPC, "full")).hint)


def test_an_unwritable_folder_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_writable(tmp_path / "new/cache")
    assert list((tmp_path / "new/cache").iterdir()) == []
    monkeypatch.setenv("ITERFT_CACHE", "/proc/cache")
    with pytest.raises(FolderError) as caught:
        need_writable(Path("/proc/cache"))
    assert "ITERFT_CACHE" in str(caught.value.hint)


def test_a_lone_surrogate_is_written_as_the_replacement_character(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [{"text": "x\ud83dy"}])
    with RowLog(tmp_path / "a") as log:
        log.append({"text": "\udcff"})
    assert [row["text"] for row in read_rows(tmp_path / "a")] == ["x\ufffdy", "\ufffd"]
    assert valid_text("\ud83d\ude00") == "\U0001f600"


# -- read with a limit ----------------------------------------------------------------------------------------------------


def damages(folder: Path) -> dict[str, Path]:
    """Files that are none, or not what they should be."""
    made = {name: folder / name for name in ("pipe", "folder", "latin", "deep", "cut", "number", "list", "huge", "loop")}
    os.mkfifo(made["pipe"])
    made["folder"].mkdir()
    made["latin"].write_bytes(b'{"a": "\xe9"}')
    made["deep"].write_text("[" * 200_000)
    made["cut"].write_text('{"a": ')
    made["number"].write_text('{"a": ' + "9" * 10_000 + "}")
    made["list"].write_text("[1]")
    with made["huge"].open("wb") as file:
        file.truncate(files.TEXT_LIMIT + 1)
    made["loop"].symlink_to("loop")
    return made | {"zero": Path("/dev/zero"), "memory": Path("/proc/self/mem")}


@pytest.mark.parametrize("name", ["pipe", "folder", "latin", "deep", "cut", "number", "list", "huge", "loop", "zero", "memory"])
def test_damaged_and_special_files_are_reported_without_blocking(tmp_path: Path, name: str) -> None:
    path = damages(tmp_path)[name]
    with pytest.raises(FileError) as caught:
        read_object(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["pipe", "folder", "loop", "zero"])
def test_digests_are_taken_of_regular_files_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError):
        file_digest(damages(tmp_path)[name])


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    assert read_rows(tmp_path / "none") == []


@dataclass(frozen=True)
class Record:
    key: str
    inputs: list[tuple[str, str]]
    seconds: float = 0.0


def test_a_record_is_read_with_every_field_checked(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"key": "k", "inputs": [["role", "name"]], "of a later version": 1})
    assert read_record(tmp_path / "a", Record) == Record("k", [("role", "name")])
    write_json(tmp_path / "a", {"key": 7, "inputs": {"role": "name"}, "seconds": "soon"})
    with pytest.raises(FileError, match=r"`key`: .*; `inputs`: .*; `seconds`: "):
        read_record(tmp_path / "a", Record)


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"a": "\xff"}', b"{" * 100_000])
def test_a_damaged_row_is_named_by_its_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "rows").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(FileError, match="line 2"):
        read_rows(tmp_path / "rows")
    with pytest.raises(FileError, match="line 2"):
        RowLog(tmp_path / "rows")


def test_a_row_cut_off_by_a_kill_is_dropped_and_later_rows_are_whole(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'{"a": 1}\n{"a": ')
    with RowLog(tmp_path / "rows") as log:
        assert log.rows == [{"a": 1}]
        log.append({"a": 2})
    assert read_rows(tmp_path / "rows") == [{"a": 1}, {"a": 2}]


def test_a_users_file_is_never_truncated(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'{"a": 1}\n{"a": 2}')
    with RowLog(tmp_path / "rows", owner="user") as log:
        log.append({"a": 3})
    assert read_rows(tmp_path / "rows") == [{"a": 1}, {"a": 2}, {"a": 3}]
    (tmp_path / "rows").write_bytes(b'{"a": 1}\nnot a row')
    with pytest.raises(FileError, match="line 2"):
        RowLog(tmp_path / "rows", owner="user")
    assert (tmp_path / "rows").read_bytes() == b'{"a": 1}\nnot a row'


def test_rows_are_not_appended_through_a_link_or_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(IterftError):
            RowLog(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "mine"


# -- files that are kept for long -----------------------------------------------------------------------------------------


def test_a_changed_file_is_noticed_even_with_old_time_stamps(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    assert not is_as_kept(path)
    keep_digest(path)
    assert is_as_kept(path)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(500)
        file.write(b"damage")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_as_kept(path)
    (tmp_path / "model.gguf.pieces").unlink()
    assert not is_as_kept(path)


def test_a_digest_by_pieces_is_that_of_the_pieces_digests_and_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = random.Random(0).randbytes(2 * LEAST_PIECE + 5)
    pieces = (content[:LEAST_PIECE], content[LEAST_PIECE : 2 * LEAST_PIECE], content[2 * LEAST_PIECE :])
    path.write_bytes(content)
    whole = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()
    assert digest_by_pieces(path, LEAST_PIECE) == whole
    path.write_bytes(pieces[0])
    assert digest_by_pieces(path) == hashlib.sha256(hashlib.sha256(pieces[0]).digest()).hexdigest()
    path.write_bytes(b"")
    assert digest_by_pieces(path) == hashlib.sha256().hexdigest()
    with pytest.raises(FileNotFoundError):
        digest_by_pieces(tmp_path / "none")


# -- names from files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../../b",
        "/etc/passwd",
        "a//b",
        "a/",
        "./a",
        "a\0b",
        "\ud800",
        None,
        7,
        ["a"],
        "link",
        "link/a",
        "pipe",
        "sub",
        "file/a",
    ],
)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    root = tmp_path / "step"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to("..")
    os.mkfifo(root / "pipe")
    (root / "file").touch()
    with pytest.raises(FileError):
        safe_member(root, name)


def test_a_plain_name_is_accepted_whether_or_not_the_file_exists(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_text("a")
    for name in ("sub/a", "sub/b", "none/b", "model.gguf", "a b", "..a"):
        assert safe_member(tmp_path, name) == tmp_path / name


def test_linking_overwrites_nothing_and_follows_no_link(tmp_path: Path) -> None:
    for name in ("source", "precious"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("precious")
    link_file(tmp_path / "source", tmp_path / "new/target")
    assert (tmp_path / "new/target").read_text() == "source"
    for target in ("precious", "link"):
        with pytest.raises(FolderError):
            link_file(tmp_path / "source", tmp_path / target)
    with pytest.raises(FileError):
        link_file(tmp_path / "link", tmp_path / "other")
    assert (tmp_path / "precious").read_text() == "precious"


def test_without_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(files.os, "link", refuse)
    (tmp_path / "source").write_text("source")
    link_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "source"
    with pytest.raises(IterftError):
        link_file(tmp_path / "source", tmp_path / "target")


# -- locks ----------------------------------------------------------------------------------------------------------------


def no_flock(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.parametrize("locks", [True, False])
def test_one_process_at_a_time_holds_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    first, second = (FolderLock(tmp_path / "lock", "another run is going on") for _ in range(2))
    first.acquire()
    with pytest.raises(FolderError, match=rf"another run is going on \(process {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_without_file_locks_a_dead_processs_lock_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    lock, held = FolderLock(tmp_path / "lock", "another run"), tmp_path / "lock.held"
    held.write_text(json.dumps({"host": files.socket.gethostname(), "process": int(gone.stdout), "since": "1"}))
    lock.acquire()
    lock.release()
    held.write_text(json.dumps({"host": "another machine", "process": 1, "since": "1"}))
    with pytest.raises(FolderError, match="another machine") as caught:
        lock.acquire()
    assert str(held) in str(caught.value.hint)


def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(FolderError):
            FolderLock(tmp_path / name, "another run").acquire()
    assert (tmp_path / "precious").read_text() == "mine"


def test_bytes_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(FileError, match="larger than"):
        read_bytes(tmp_path / "a", limit=4)


def test_only_what_cannot_be_made_again_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(files, "flush", lambda path: waited.append(path.suffix))
    for flushed, expected in ((False, []), (True, [".part"])):
        with files.writing(tmp_path / "model.gguf", flushed=flushed) as temporary:
            temporary.write_text("weights")
        assert (tmp_path / "model.gguf").read_text() == "weights"
        assert [suffix for suffix in waited if suffix] == expected
