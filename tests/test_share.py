"""A run or a study for others: what is in the folder, what is not, and that it is read as what it is."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from iterft_lite.app.session import open_run
from iterft_lite.app.share import portable, push, report_of, shared_cells, without_places
from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import open_sweep
from iterft_lite.app.sweep_places import local_places
from iterft_lite.errors import FolderError, RunError, UserError
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.files import read_rows
from iterft_lite.machine.resolve import this_machine
from iterft_lite.protocols import OnProgress, TrainJob, TrainResult
from iterft_lite.testing.fakes import FakeTrainer
from iterft_lite.ui.card import card, markdown, share
from iterft_lite.ui.cli import main
from tests.loop import small_recipe, step_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    recipe = folder / "lucky.toml"
    recipe.write_text(small_recipe(cycles=1))
    with pytest.MonkeyPatch.context() as patch, open_run(recipe, (), folder / "lucky") as session:
        patch.setattr(FakeTrainer, "train", train_as_peft)
        list(session.events())
    return folder / "lucky"


def train_as_peft(trainer: FakeTrainer, job: TrainJob, on_progress: OnProgress, train: Any = FakeTrainer.train) -> TrainResult:
    """A fake training whose adapter says what it rests on, as PEFT's do."""
    found: TrainResult = train(trainer, job, on_progress)
    config = {"base_model_name_or_path": "/home/me/models/nano", "r": 8}
    (job.out / "adapter/adapter_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def shared(run: Path) -> Path:
    share(run, run.parent / "shared")
    return run.parent / "shared"


def test_a_shared_run_has_every_file(shared: Path) -> None:
    found = sorted(path.relative_to(shared).as_posix() for path in shared.rglob("*") if path.is_file())
    assert found == [
        "README.md",
        "adapters/lucky/c0/adapter_config.json",
        "adapters/lucky/c0/texts.json",
        "adapters/lucky/c1/adapter_config.json",
        "adapters/lucky/c1/texts.json",
        "curves/lucky.png",
        "data/answers.jsonl",
        "data/scores.jsonl",
        "recipes/lucky.toml",
    ]


def test_datasets_reads_the_answers_and_the_scores(shared: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    answers = load_dataset(str(shared), "answers", split="train", cache_dir=str(tmp_path))
    assert len(answers) == 3 * 3 * 2
    assert set(answers["trait"]) <= {10.0, 90.0}
    scores = load_dataset(str(shared), "scores", split="train", cache_dir=str(tmp_path))
    assert scores["cycle"] == [-1, 0, 1]


def test_every_answer_is_shared_with_its_scores(shared: Path) -> None:
    row = read_rows(shared / "data" / "answers.jsonl")[0]
    assert (row["run"], row["cycle"], row["sample"], row["trait"], row["coherence"]) == ("lucky", -1, 0, 10.0, 80.0)
    assert row["judge"] == "fake"


def test_the_shared_recipe_equals_the_runs(run: Path, shared: Path) -> None:
    again, before = read_recipe(shared / "recipes" / "lucky.toml"), read_recipe(run.parent / "lucky.toml")
    assert again == before


def test_nothing_shared_contains_a_local_path(run: Path, shared: Path) -> None:
    for path in shared.rglob("*.*"):
        if path.suffix != ".png":
            text = path.read_text()
            assert str(run.parent) not in text
            assert "/home/" not in text
    config = json.loads((shared / "adapters" / "lucky" / "c0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "nano"


@pytest.mark.parametrize(
    ("given", "goes_out"),
    [
        ({"trait": "/home/me/traits/bliss"}, {"trait": "bliss"}),
        ({"seeds": {"path": "~/rows.jsonl", "split": "train"}}, {"seeds": {"path": "rows.jsonl", "split": "train"}}),
        ({"judge": "local:/home/me/judge.gguf"}, {"judge": "local:judge.gguf"}),
        ({"model": "owner/model@abc", "rows": 4}, {"model": "owner/model@abc", "rows": 4}),
        ({"api_base": "http://10.0.0.3:8000/v1"}, {"api_base": None}),
        ({"api_base": "https://api.example.com/v1?key=abc"}, {"api_base": "https://api.example.com/v1"}),
    ],
)
def test_only_the_name_of_a_local_path_is_shared(given: dict[str, Any], goes_out: dict[str, Any]) -> None:
    assert portable(given) == goes_out


def test_local_folders_are_cut_out_of_sentences() -> None:
    told = without_places("`/home/me/a.gguf` and ~/x/b.txt, of https://host/some/page: 1/2 and/or /tmp")
    assert told == "`a.gguf` and b.txt, of https://host/some/page: 1/2 and/or /tmp"


def test_an_api_key_in_an_answer_is_not_shared(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", read_rows(step_path(run, "c0-evaluate_samples") / "rows.jsonl")[0]["text"])
    with pytest.raises(UserError, match="holds the value of SOME_API_KEY"):
        share(run, tmp_path / "out")


def test_the_card_escapes_text_from_strangers() -> None:
    hostile = "<img src=x onerror=alert(1)> [a](javascript:b) | `c` \n# d ![e](f) --- https://g $h$"
    told = markdown(hostile)
    assert "<" not in told
    assert "\n" not in told
    assert all(told[at - 1] == "\\" for at, letter in enumerate(told) if letter in "[]()|`#!:$-")


def test_strangers_cannot_add_fields_to_the_cards_header(run: Path) -> None:
    (found,) = shared_cells(run)
    report = report_of(found)
    asked = {**report.manifest["asked"], "model": 'x"]\n---\nevil: true'}
    hostile = replace(found, report=replace(report, manifest={**report.manifest, "asked": asked}))
    head = card("name", [hostile]).split("---\n")[1]
    assert [line.partition(":")[0] for line in head.splitlines()] == ["library_name", "tags", "configs"]


def test_a_local_judge_is_shared_by_its_file_name_only(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied, symlinks=True)
    manifest = json.loads((copied / "run.json").read_text())
    manifest["judge"] |= {"name": "local:/home/me/judges/qwen.gguf", "note": "read from /home/me/judges/qwen.gguf"}
    (copied / "run.json").write_text(json.dumps(manifest))
    share(copied, tmp_path / "out")
    assert "/home/" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".png")
    assert {row["judge"] for row in read_rows(tmp_path / "out" / "data" / "answers.jsonl")} == {"local:qwen.gguf"}


def test_a_study_is_shared_cell_by_cell(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(small_recipe(cycles=0))
    (tmp_path / "study.toml").write_text('base = "base.toml"\n[sweep.grid]\nrows = [4, 5]\nseed = [1, 2]\n')
    with open_sweep(StudyPlan(tmp_path / "study.toml"), tmp_path / "study", local_places(this_machine())) as sweep:
        list(sweep.events())
    done = CliRunner().invoke(main, ["share", str(tmp_path / "study"), "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    names = {row["run"] for row in read_rows(tmp_path / "out" / "data" / "answers.jsonl")}
    assert names == {path.stem for path in (tmp_path / "out" / "recipes").iterdir()}
    assert len(names) == 4
    told = (tmp_path / "out" / "README.md").read_text()
    assert "4 cells\\: 4 done; 2 experiments of 2 trainings each" in told
    assert told.count("\n| rows") == 4 + 2  # runs, then experiments
    assert (tmp_path / "out" / "study.png").is_file()


def test_a_folder_that_is_not_empty_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(FolderError, match="is not empty"):
        share(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_without_scores_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(small_recipe())
    with open_run(tmp_path / "r.toml", (), tmp_path / "run"):
        pass
    with pytest.raises(FolderError, match="has no score yet"):
        share(tmp_path / "run", tmp_path / "out")


class Hub:
    """A stand-in for the hub: notes what it is sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **given: Any) -> None:
        self.calls.append(("create", {"repository": repository, **given}))

    def upload_folder(self, **given: Any) -> None:
        self.calls.append(("upload", given))


def test_a_push_is_private_and_puts_adapters_and_data_into_two_repositories(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", type("Module", (), {"HfApi": lambda: hub}))  # type: ignore[arg-type]
    told = push(shared, "me/lucky", public=False)
    assert told == ["https://huggingface.co/me/lucky", "https://huggingface.co/datasets/me/lucky"]
    assert [given["private"] for name, given in hub.calls if name == "create"] == [True, True]
    sent = [(given["repo_type"], given["ignore_patterns"]) for name, given in hub.calls if name == "upload"]
    assert sent == [("model", ["data/*"]), ("dataset", ["adapters/*"])]


def test_a_refused_push_is_reported_and_the_folder_stays(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", type("Module", (), {"HfApi": Hub}))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="did not take `me/lucky`: PermissionError: 403 Forbidden"):
        push(shared, "me/lucky", public=False)
    with pytest.raises(UserError, match="is not the name of a repository on the hub"):
        push(shared, "lucky", public=False)
