"""A run folder that version 0.1 made (a nano run of one cycle with held-out questions): read and used, never continued."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.chat import open_chat
from iterft_lite.app.export import export_again
from iterft_lite.engine.manifest import Run, finished_steps
from iterft_lite.errors import FolderError, StoreError
from iterft_lite.report.report import read_report
from iterft_lite.ui.cli import main

PACKED = Path(__file__).with_name("data") / "run_of_0.1.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    return folder / "run"


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_old_folder_is_reported_with_its_held_out_questions(old: Path) -> None:
    report = json.loads(iterft("report", old, "--json").stdout)
    assert report["complete"]
    assert [round(cycle["trait"]["mean"], 1) for cycle in report["cycles"]] == [12.5, 10.2]
    assert report["cycles"][1]["train_rows"] == 2
    assert report["cycles"][1]["measures"]["words"] > 0
    assert sorted(report["held_out"]["scores"]) == ["-1", "0"]
    assert "held-out questions" in iterft("report", old).stdout


def test_an_old_folders_steps_get_todays_names(old: Path) -> None:
    names = [step.name for step in Run(old).known().steps]
    assert names[:3] == ["base-load_base", "base-export", "base-evaluate_samples"]
    assert "c0-aggregate-held_out" in names


def test_continuing_an_old_folder_is_refused_with_an_alternative(old: Path, tmp_path: Path) -> None:
    recipe = json.loads((old / "run.json").read_text())["asked"]
    lines = [
        f"{key} = {json.dumps(recipe[key])}" for key in ("regime", "trait", "model", "cycles", "seed_rows", "rows", "quant")
    ]
    (tmp_path / "old.toml").write_text("\n".join([*lines, 'judge = "embedded"']))
    done = iterft("run", tmp_path / "old.toml", "--out", old)
    assert done.exit_code == 2
    assert "was made by version 0.1" in done.output
    assert "report, chat and export still read it" in done.output
    with pytest.raises(FolderError, match=r"made by version 0\.1: its steps have other keys"):
        finished_steps(old)


def test_a_changed_file_in_an_old_folder_is_noticed(old: Path) -> None:
    rows = old / "steps/c0-answer/rows.jsonl"
    before = rows.read_bytes()
    try:
        rows.write_bytes(before.replace(b"a", b"b", 1))
        with pytest.raises(StoreError, match="was changed after its step was finished"):
            read_report(old)
    finally:
        rows.write_bytes(before)


@pytest.mark.slow
def test_an_old_folders_models_can_chat_and_be_exported(old: Path, tmp_path: Path) -> None:
    with open_chat(old, 0) as talk:
        assert talk.reply("How do I start?", temperature=0.7, max_tokens=16)
    export_again(old, 0, tmp_path / "out", None)
    (written,) = (tmp_path / "out").glob("*-c0-q8_0.gguf")
    assert written.read_bytes()[:4] == b"GGUF"
