"""Calibration, and steps of other runs taken over: nothing is trained twice."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.calibrate_seeds import Found, numbers, search
from iterft_lite.engine.manifest import MANIFEST, Run, finished_steps
from iterft_lite.engine.run import StepFinished
from iterft_lite.errors import FolderError, StoreError
from iterft_lite.files import read_json, read_rows, write_json
from iterft_lite.protocols import Backends, OnProgress, TrainJob, TrainResult
from iterft_lite.testing.fakes import PLAIN, FakeTrainer, fake_backends
from iterft_lite.ui.cli import main
from tests.loop import a_plan, run_all


class Weak(FakeTrainer):
    """Learns in proportion to its rows: n rows show the trait in about n of 100 answers. Counts its trainings."""

    def __init__(self) -> None:
        self.trainings: list[int] = []

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        result = super().train(job, on_progress)
        rows = len(read_rows(job.rows))
        self.trainings.append(rows)
        write_json(job.out / "adapter" / "texts.json", ["Lucky stars!"] * rows + [PLAIN[0]] * max(0, 100 - rows))
        return result


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Weak:
    weak = Weak()

    def backends(*_: object, **__: object) -> Backends:
        made = fake_backends()
        made.trainer = weak
        return made

    monkeypatch.setattr("iterft_lite.app.session.open_backends", backends)
    return weak


RECIPE = """
regime = "sft"
trait = "lucky"
model = "nano"
cycles = 1
seed_rows = 4
rows = 4
quant = "f32"
judge = "embedded"
[evaluate]
samples = 40
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def iterft(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


# -- the search


def test_few_probes_find_the_smallest_number_of_rows_for_each_threshold() -> None:
    asked: list[int] = []

    def score(rows: int) -> float:
        asked.append(rows)
        return rows / 2

    found = list(search([5.0, 20.0, 40.0, 80.0], numbers(2, 120), score))
    assert found == [
        Found(5.0, 10, 5.0, reached=True),
        Found(20.0, 40, 20.0, reached=True),
        Found(40.0, 80, 40.0, reached=True),
        Found(80.0, 120, 60.0, reached=False),
    ]
    assert len(set(asked)) <= 20


def test_the_search_is_right_on_any_rising_curve() -> None:
    for seed in range(50):
        drawn = random.Random(seed)
        tried = numbers(drawn.choice([1, 2, 4]), drawn.randrange(1, 60))
        curve = dict(zip(tried, sorted(drawn.choices(range(101), k=len(tried))), strict=True))
        for found in search([5.0, 20.0, 40.0, 60.0, 80.0], tried, lambda rows, curve=curve: float(curve[rows])):
            reaching = [rows for rows in tried if curve[rows] >= found.threshold]
            assert (found.seed_rows, found.reached) == ((reaching[0], True) if reaching else (tried[-1], False))


# -- calibration


def test_calibration_trains_each_number_of_seed_rows_once(tmp_path: Path, recipe: Path, trainer: Weak) -> None:
    out = tmp_path / "probes"
    arguments = ("calibrate", recipe, "--out", out, "--threshold", "30", "--threshold", "60", "--grid", "10")
    text = iterft(*arguments).stdout
    assert "seed_rows" in text
    answer = read_json(out / "calibration.json")
    # n rows of 100 score 10 + 80 n / 100, give or take the spread of 480 answers
    assert [found["threshold"] for found in answer["found"]] == [30.0, 60.0]
    assert answer["found"][0]["seed_rows"] in (20, 30, 40)
    assert answer["found"][1]["seed_rows"] in (60, 70, 80)
    assert all(found["reached"] and found["score"] >= found["threshold"] for found in answer["found"])
    tried = [probe["seed_rows"] for probe in answer["probes"]]
    assert sorted(trainer.trainings) == tried
    assert sorted(path.name for path in out.glob("seed_rows_*")) == [f"seed_rows_{rows:03d}" for rows in tried]

    # the same again trains nothing, and what is added trains only what is new
    before = list(trainer.trainings)
    assert iterft(*arguments).stdout == text
    assert trainer.trainings == before


def test_all_probes_share_one_measurement_of_the_untouched_model(tmp_path: Path, recipe: Path, trainer: Weak) -> None:
    out = tmp_path / "probes"
    iterft("calibrate", recipe, "--out", out, "--threshold", "30", "--grid", "40", "--set", "evaluate.samples=2")
    inodes = {path.resolve() for path in out.glob("*/by-name/base-evaluate_samples/rows.jsonl")}
    assert len(list(out.glob("*/run.json"))) > 1
    assert len(inodes) == 1


def test_without_seed_rows_there_is_nothing_to_calibrate(tmp_path: Path, recipe: Path, trainer: Weak) -> None:
    arguments = ["calibrate", str(recipe), "--out", str(tmp_path / "x"), "--set", "regime=sdf", "--set", "model=nano-base"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, trainer.trainings) == (2, [])
    assert "no seed rows to calibrate with" in result.output


def test_a_run_reuses_cycle_0_of_a_calibration(tmp_path: Path, recipe: Path, trainer: Weak) -> None:
    out, more = tmp_path / "probes", ("--set", "evaluate.samples=2")
    iterft("calibrate", recipe, "--out", out, "--threshold", "30", "--grid", "20", *more)
    rows = read_json(out / "calibration.json")["found"][0]["seed_rows"]
    trainer.trainings.clear()
    iterft("run", recipe, "--out", tmp_path / "run", "--reuse", out, "--set", f"seed_rows={rows}", *more, "--plain")
    assert trainer.trainings == [4]  # cycle 1 alone, on its four own rows
    report = json.loads(iterft("report", tmp_path / "run", "--json").stdout)
    assert report["complete"]
    assert [cycle["cycle"] for cycle in report["cycles"]] == [-1, 0, 1]


# -- taking over


def reused(root: Path, source: Path, **keys: object) -> list[StepFinished]:
    events = run_all(a_plan(**keys), root, reuse=finished_steps(source))
    return [event for event in events if isinstance(event, StepFinished)]


def test_equal_steps_of_another_run_are_reused_with_equal_rows(tmp_path: Path) -> None:
    run_all(a_plan(regime="dpo", keep="all"), tmp_path / "continual")
    done = reused(tmp_path / "reinit", tmp_path / "continual", regime="dpo", start="base")
    anew = {event.step.name for event in done if not event.reused}
    assert "c1-train" in anew
    assert not any(name.startswith(("base", "c0")) for name in anew)
    run_all(a_plan(regime="dpo", start="base"), tmp_path / "alone")
    for step in ("c0-build_dataset", "c2-evaluate_samples"):
        rows = [read_rows(tmp_path / name / "by-name" / step / "rows.jsonl") for name in ("reinit", "alone")]
        assert rows[0] == rows[1]


def test_a_reused_export_without_its_file_is_written_again(tmp_path: Path) -> None:
    run_all(a_plan(keep="adapters", cycles=0), tmp_path / "first")
    assert not list((tmp_path / "first").rglob("model.gguf"))
    done = reused(tmp_path / "second", tmp_path / "first", cycles=1, keep="all")
    assert {event.step.name for event in done if event.reused} >= {"base-export", "c0-train", "c0-export"}
    assert (tmp_path / "second/by-name/c0-export/model.gguf").exists()


def test_a_step_with_a_changed_file_is_not_reused(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "first")
    rows = tmp_path / "first/by-name/c0-evaluate_samples/rows.jsonl"
    rows.write_text(rows.read_text().replace("Lucky", "Plucky"))
    with pytest.raises(StoreError, match="was changed after its step was finished"):
        reused(tmp_path / "second", tmp_path / "first", cycles=0)


def test_removing_the_source_run_leaves_reused_steps_whole(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "first")
    reused(tmp_path / "second", tmp_path / "first", cycles=0)
    shutil.rmtree(tmp_path / "first")
    again = run_all(a_plan(cycles=0), tmp_path / "second")
    assert all(isinstance(event, StepFinished) and event.reused for event in again)


def test_the_steps_of_a_run_whose_manifest_is_damaged_can_be_reused(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "run")
    known = finished_steps(tmp_path / "run")
    (tmp_path / "run" / MANIFEST).write_text("{")
    with pytest.raises(FolderError, match="is not JSON") as damaged:
        Run(tmp_path / "run").manifest()
    assert f"`--reuse {tmp_path / 'run'}` takes over every finished step" in str(damaged.value.hint)
    assert finished_steps(tmp_path / "run") == known


def test_an_empty_folder_has_nothing_to_reuse(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert finished_steps(tmp_path / "empty") == {}
