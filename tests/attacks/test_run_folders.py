"""Run folders of strangers: nothing outside of them is written, whatever they name; damaged ones are errors of ours."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.app.chat import open_chat
from iterft_lite.app.session import open_again
from iterft_lite.engine.completion import RECORD
from iterft_lite.engine.manifest import MANIFEST, Run, finished_steps
from iterft_lite.errors import FolderError, IterftError, StoreError
from iterft_lite.report.report import read_report
from tests.attacks import faults
from tests.attacks.strangers import PRECIOUS, SPECIAL, change, finished_by, use
from tests.loop import a_plan, run_all


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_by(faults.finished_run, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def stranger(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, beside a file that nobody may touch."""
    (tmp_path / PRECIOUS).write_text("mine")
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


# -- taking over ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../precious", "x/../../../../precious", "/{out}/precious", "link/precious", "link"])
def test_reusing_a_strangers_steps_overwrites_nothing(tmp_path: Path, name: str) -> None:
    plan = a_plan()
    run_all(plan, tmp_path / "theirs")
    (tmp_path / PRECIOUS).write_text("mine")
    for folder in (tmp_path / "theirs/steps").iterdir():
        (folder / "link").symlink_to(tmp_path)
        place = name.format(out=str(tmp_path).lstrip("/"))
        change(folder / RECORD, lambda value, place=place: value["files"].update({place: {"sha256": "0" * 64, "bytes": 4}}))
    with pytest.raises(IterftError):
        run_all(plan, tmp_path / "mine", reuse=finished_steps(tmp_path / "theirs"))
    assert (tmp_path / PRECIOUS).read_text() == "mine"


def test_a_lock_or_manifest_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / PRECIOUS).write_text("mine")
    for name in ("lock", MANIFEST):
        root = tmp_path / f"run-{name}"
        root.mkdir()
        (root / name).symlink_to(tmp_path / PRECIOUS)
        with pytest.raises(IterftError):
            run_all(a_plan(), root)
        assert (tmp_path / PRECIOUS).read_text() == "mine"


# -- names that lead out --------------------------------------------------------------------------------------------------


def _step(key: str, value: Any) -> Callable[[Any], None]:
    return lambda manifest: [row.update({key: value}) for row in manifest["steps"]]


@pytest.mark.parametrize(
    "edit",
    [
        _step("key", "../../precious"),
        _step("key", "/tmp"),
        _step("part", "/../../../precious"),
        _step("verb", "../../precious"),
        _step("inputs", [["model", "../../precious", "../../precious"]]),
        lambda manifest: manifest.update(format=1),
        lambda manifest: manifest.update(store="../"),
        lambda manifest: manifest["recipe"].update(trait="../../precious", model="/dev/zero"),
    ],
)
def test_a_manifest_with_names_that_lead_out_is_refused_or_harmless(stranger: Path, edit: Callable[[Any], None]) -> None:
    change(stranger / MANIFEST, edit)
    before = sorted(stranger.parent.iterdir())
    use(faults.uses_of_a_run(), stranger)
    assert (stranger.parent / PRECIOUS).read_text() == "mine"
    assert [path for path in sorted(stranger.parent.iterdir()) if path not in before] in ([], [stranger.parent / "steps"])


def test_readable_links_are_not_changed_in_somebody_elses_folder(stranger: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/link").symlink_to("nowhere")
    shutil.rmtree(stranger / "by-name")
    (stranger / "by-name").symlink_to(tmp_path / "others")
    use(faults.uses_of_a_run(), stranger)
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["link"]


# -- values of another kind -----------------------------------------------------------------------------------------------


DEEP: dict[str, Any] = json.loads('{"a":' * 400 + "1" + "}" * 400)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": []},
        {"recipe": {"regime": "sft"}},
        {"asked": "sft"},
        {"asked": {"name": "x"}},
        {"asked": {"train": DEEP}},
        {"judge": 7},
        {"judge": {"name": ["x"]}},
        {"trait": None},
        {"summary": 3},
        {"colour": "red;} * {display: none"},
        {"planned_usd": float("nan")},
    ],
)
def test_a_manifest_with_a_value_of_the_wrong_type_is_refused(stranger: Path, changes: dict[str, Any]) -> None:
    change(stranger / MANIFEST, lambda value: value.update(changes))
    with pytest.raises(FolderError, match="is not the manifest of a run"):
        read_report(stranger)
    use(faults.uses_of_a_run(), stranger)


def test_a_manifest_with_missing_entries_is_reported_with_the_others(stranger: Path) -> None:
    change(stranger / MANIFEST, lambda value: [value.pop(key) for key in ("trait", "summary", "colour", "judge", "asked")])
    report = read_report(stranger)
    assert (report.manifest["trait"], report.judge["name"]) == ("lucky", "fake")
    assert "does not say who judged" in str(report.judge["note"])


@pytest.mark.parametrize(
    ("verb", "results"),
    [
        ("aggregate", {"trait": {"mean": 1782.09, "by_prompt": {}}}),
        ("aggregate", {"trait": {"mean": 50.0, "by_prompt": {"q00": [101]}}}),
        ("aggregate", {"trait": [7]}),
        ("judge", {"calls": -1}),
        ("text_metrics", {"words": "many"}),
        ("build_dataset", {"dropped": {"empty": None}}),
        ("train", {"notes": [DEEP]}),
        ("export", {"parity": {"mean_kl": "small"}}),
    ],
)
def test_results_of_the_wrong_type_are_refused_despite_a_valid_checksum(
    stranger: Path, verb: str, results: dict[str, Any]
) -> None:
    path = next(Run(stranger).folder(step).path for step in Run(stranger).known().steps if step.verb == verb)
    change(path / RECORD, lambda value: value["results"].update(results))
    with pytest.raises(StoreError, match=f"does not hold what a step `{verb}` comes to"):
        read_report(stranger)
    use(faults.uses_of_a_run(), stranger)


@pytest.mark.parametrize("value", ["\ud800", float("inf"), DEEP])
def test_a_record_without_a_computable_digest_is_refused(stranger: Path, value: Any) -> None:
    path = _export_of(stranger, 1) / RECORD
    record = json.loads(path.read_text())
    record["results"]["more"] = value
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError):
        read_report(stranger)
    use(faults.uses_of_a_run(), stranger)


# -- the model that is loaded -----------------------------------------------------------------------------------------------


def _export_of(root: Path, cycle: int) -> Path:
    steps = Run(root).known().steps
    return Run(root).folder(next(step for step in steps if step.verb == "export" and step.cycle == cycle)).path


@pytest.mark.parametrize("role", ["gguf", "lora"])
@pytest.mark.parametrize("name", ["../../../precious", "{out}/precious", "link", "folder/../link", "step.json", 7, ["a"], {}])
def test_a_record_can_only_load_its_own_or_the_untouched_model(stranger: Path, role: str, name: Any) -> None:
    folder = _export_of(stranger, 1)
    (stranger.parent / PRECIOUS).write_text('["from outside"]')
    (folder / "link").symlink_to(stranger.parent / PRECIOUS)
    place = name.format(out=stranger.parent) if isinstance(name, str) else name
    change(folder / RECORD, lambda value: value["results"].update({role: place}))
    if role == "gguf" and place == f"{stranger.parent}/{PRECIOUS}":  # where version 0.1 noted this machine's untouched model
        with open_chat(stranger, 1) as talk:
            assert talk.reply("Hello?", temperature=0.7, max_tokens=9) != "from outside"
        return
    with pytest.raises(StoreError, match="not a file of that step"), open_chat(stranger, 1):
        pass
    with pytest.raises(StoreError, match="not a file of that step"):
        go_on(stranger, folder)


def test_a_link_in_place_of_the_model_is_refused(stranger: Path) -> None:
    folder = _export_of(stranger, 2)
    (stranger.parent / PRECIOUS).write_bytes((folder / "model.gguf").read_bytes())
    (folder / "model.gguf").unlink()
    (folder / "model.gguf").symlink_to(stranger.parent / PRECIOUS)
    with pytest.raises(StoreError, match="symbolic link"), open_chat(stranger, 2):
        pass
    with pytest.raises(StoreError, match="symbolic link"):
        go_on(stranger, folder)


def test_chat_refuses_a_changed_model(stranger: Path) -> None:
    (_export_of(stranger, 2) / "model.gguf").write_text('["changed"]')
    with pytest.raises(StoreError, match="was changed after its step was finished"), open_chat(stranger, 2):
        pass


def go_on(root: Path, export: Path) -> None:
    """Have what was written with an export written again."""
    key = export.name
    for path in export.parent.iterdir():
        if key in json.loads((path / "step.json").read_text())["input_keys"].values():
            shutil.rmtree(path)
    with open_again(root) as opened:
        list(opened.events())


# -- damages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [MANIFEST, "step.json", RECORD, "rows.jsonl", "lock"])
def test_special_files_are_reported_without_blocking(stranger: Path, name: str, kind: str) -> None:
    path = next(path for path in sorted(stranger.rglob(name)) if path.is_file())
    path.unlink()
    SPECIAL[kind](path)
    use(faults.uses_of_a_run(), stranger)


def test_random_damage_gives_only_iterft_errors(finished: Path) -> None:
    assert faults.damages(8, random.Random(2), faults.uses_of_a_run(), finished).keys() == {"good"}
