"""Numbers in experiment trackers: TensorBoard's files are written and read for real, the others' calls are recorded."""

from __future__ import annotations

import json
import struct
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.app import tracking
from iterft_lite.app.session import open_run
from iterft_lite.app.tracking import MLflow, Point, Tracked, Trackio, Wandb
from iterft_lite.engine.run import Event, StepFinished, StepProgress
from tests.loop import small_recipe


def run_tracked(folder: Path, *trackers: str) -> list[Event]:
    recipe = folder / "study.toml"
    recipe.write_text(small_recipe(cycles=1).replace('judge = "fake"', f'judge = "fake"\ntrack = {json.dumps(trackers)}'))
    with open_run(recipe, (), folder / "run") as session:
        return list(session.events())


def notes(events: list[Event]) -> list[str]:
    """What was said of the tracker; steps that wait for a backend say so too."""
    said = [event.progress.note for event in events if isinstance(event, StepProgress)]
    return [note for note in said if "tensorboard" in note]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: by name, the numbers with their places. A record is a length, two checksums, and an event."""
    from tensorboardX.proto.event_pb2 import Event as Record

    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            record = Record.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in record.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag].append((record.step, value.simple_value))
    return found


def test_tensorboard_gets_each_score_once_even_in_a_resumed_run(tmp_path: Path) -> None:
    events = run_tracked(tmp_path, "tensorboard")
    assert notes(events) == []
    results = {event.step.name: event.completion.results for event in events if isinstance(event, StepFinished)}
    wanted = [(cycle, results[f"{name}-aggregate"]["trait"]["mean"]) for cycle, name in ((-1, "base"), (0, "c0"), (1, "c1"))]
    for _ in range(2):
        found = scalars(tmp_path / "run" / "tracking" / "tensorboard")
        assert [(at, pytest.approx(value)) for at, value in found["scores/trait"]] == wanted
        assert [at for at, _ in found["text/words"]] == [-1, 0, 1]
        run_tracked(tmp_path, "tensorboard")


def test_optimiser_steps_are_counted_across_trainings(tmp_path: Path) -> None:
    step = next(step for step in _plan(tmp_path) if step.verb == "train")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN, "grad_norm": 0.5}\n')
    assert list(tracking.points_of(step, {}, tmp_path, 10)) == [
        Point("step", 11, {"train/loss": 2.5}),
        Point("step", 12, {"train/grad_norm": 0.5}),
    ]


def _plan(folder: Path) -> Any:
    recipe = folder / "recipe.toml"
    recipe.write_text(small_recipe())
    with open_run(recipe, (), folder / "planned") as session:
        return session.plan


def test_a_missing_tracker_gives_one_note_and_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboardX.py").write_text("raise ImportError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    events = run_tracked(tmp_path, "tensorboard")
    assert isinstance([event for event in events if isinstance(event, StepFinished)][-1].completion.results, dict)
    (note,) = notes(events)
    assert "tensorboard is not told any more" in note
    assert "pip install 'iterft_lite[tensorboard]'" in note


def test_a_hanging_tracker_gives_one_note_and_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboardX.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tracking, "CLOSING", 0.2)
    (note,) = notes(run_tracked(tmp_path, "tensorboard"))
    assert "tensorboard is not done" in note


def test_trackers_change_no_step(tmp_path: Path) -> None:
    keys = [{event.step.key for event in run_tracked(tmp_path, *names)} for names in ((), ("tensorboard",))]
    assert keys[0] == keys[1]


class Recorder:
    """A stand-in for a library: notes what is called on it, and gives itself back."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], **answers: Any) -> None:
        self._name, self._calls, self._answers = name, calls, answers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **given: Any) -> Any:
            self._calls.append((name, args, given))
            return self._answers.get(name, self)

        return call


POINTS = [Point("step", 7, {"train/loss": 1.5}), Point("cycle", 0, {"scores/trait": 40.0})]


@pytest.fixture
def told(tmp_path: Path) -> Tracked:
    return Tracked("abc123", "cell_s1", "lucky", tmp_path / "tracking", {"rows": 60})


@pytest.mark.parametrize(("kind", "library"), [(Wandb, "wandb"), (Trackio, "trackio")])
def test_wandb_and_trackio_get_each_point_once_in_a_resumed_run(
    kind: type[Wandb | Trackio], library: str, told: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, library, Recorder(library, calls))  # type: ignore[arg-type]  # as much of a module as is used
    tracker = kind()
    tracker.begin(told)
    tracker.log(POINTS)
    tracker.finish()
    opened = calls[0][2]
    assert (calls[0][0], opened["project"], opened["resume"], opened["group"]) == ("init", "iterft_lite", "allow", "lucky")
    assert [args for name, args, _ in calls if name == "log"] == [
        ({"step": 7, "train/loss": 1.5},),
        ({"cycle": 0, "scores/trait": 40.0},),
    ]
    assert calls[-1][0] == "finish"


def test_mlflow_resumes_the_run_with_our_id(told: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(found: list[Any]) -> list[str]:
        calls: list[Any] = []
        info = type("Info", (), {"info": type("Run", (), {"run_id": "mlflow's"}), "experiment_id": "1"})
        client = Recorder("client", calls, search_runs=found and [info], create_run=info, get_experiment_by_name=info)
        entities = type("Entities", (), {"Metric": lambda *given: given})
        library = type("Library", (), {"MlflowClient": lambda: client, "entities": entities})
        monkeypatch.setitem(sys.modules, "mlflow", library)  # type: ignore[arg-type]  # as much of a module as is used
        tracker = MLflow()
        tracker.begin(told)
        tracker.log(POINTS)
        tracker.finish()
        sent = [given["metrics"][0][::3] for name, _, given in calls if name == "log_batch"]
        assert sent == [("train/loss", 7), ("scores/trait", 0)]
        return [name for name, *_ in calls]

    assert "create_run" in opened([])
    assert "create_run" not in opened([1])
