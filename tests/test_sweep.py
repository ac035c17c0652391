"""Sweeps with fake backends: what is shared, gone on with, tried again, and left."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import (
    Asked,
    CellEvent,
    LocalPlace,
    Residents,
    Sweep,
    SweepEvent,
    ask_to_stop,
    local_places,
    open_sweep,
)
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.run import Shared, StepFinished
from iterft_lite.engine.study import SILENT, CellState, StudyFolder, SweepState
from iterft_lite.errors import BackendError, FolderError, RecipeError, RunError
from iterft_lite.machine.resolve import Machine
from iterft_lite.protocols import Backends, OnProgress, TrainJob, TrainResult
from iterft_lite.testing.fakes import FakeExporter, FakeGenerator, FakeJudge, FakeTrainer
from tests.loop import small_recipe

HERE = [LocalPlace("cpu")]


def a_study(folder: Path, sweep: str, **recipe: Any) -> StudyPlan:
    """A study over a small recipe of fakes."""
    (folder / "base.toml").write_text(small_recipe(cycles=recipe.pop("cycles", 1), **recipe))
    (folder / "study.toml").write_text(f'base = "base.toml"\n{sweep}')
    return StudyPlan(folder / "study.toml")


def sweep_all(study: StudyPlan, out: Path, asked: Asked | None = None, places: Sequence[Any] = HERE) -> Sweep:
    """Run a sweep to its end."""
    with open_sweep(study, out, places, asked) as sweep:
        sweep._pause = 0.01
        for _ in sweep.events():
            pass
    return sweep


def stop_soon(sweep: Sweep, out: Path) -> Iterator[SweepEvent]:
    """The events of a sweep that is asked to stop as soon as anything has happened in a cell."""
    for event in sweep.events():
        if isinstance(event, CellEvent):
            (out / "stop").touch()
        yield event


def states(sweep: Sweep) -> dict[str, str]:
    return {name: state.state for name, state in sweep.cells.items()}


class Trouble(FakeTrainer):
    """Fails as it is told, by its learning rate, before it trains."""

    def __init__(self, fail: Callable[[TrainJob], None]) -> None:
        self.fail = fail

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        self.fail(job)
        return super().train(job, on_progress)


class At:
    """A place whose trainer fails as it is told."""

    name, chains = "cpu", 1

    def __init__(self, fail: Callable[[TrainJob], None], chains: int = 1) -> None:
        self.fail, self.chains = fail, chains

    def open(self, residents: Residents) -> LocalExecutor:
        backends = Backends(Trouble(self.fail), FakeExporter(), FakeGenerator(), FakeJudge())
        return LocalExecutor(backends, residents.model, residents.context)


GRID = "[sweep.grid]\nseed_rows = [3, 4]\nrows = [4, 5]\n"
RATES = '[sweep.grid]\n"train.learning_rate" = [1e-3, 2e-3, 3e-3]\n'


def test_a_sweep_does_shared_steps_once(tmp_path: Path) -> None:
    done: Counter[str] = Counter()
    with open_sweep(a_study(tmp_path, GRID), tmp_path / "out", HERE) as sweep:
        for event in sweep.events():
            if isinstance(event, CellEvent) and isinstance(event.event, StepFinished) and not event.event.reused:
                done[event.event.step.key] += 1
    assert set(states(sweep).values()) == {"done"}
    assert set(done.values()) == {1}
    trained = [step for step in sweep.state().cells and sweep._steps.values() if step.verb == "train"]
    assert Counter(step.cycle for step in trained) == {0: 2, 1: 4}
    assert sweep.state().finished == sweep.state().steps == len(done)


def test_a_cell_is_an_ordinary_run_folder(tmp_path: Path) -> None:
    from iterft_lite.report.report import read_report

    sweep_all(a_study(tmp_path, GRID), tmp_path / "out")
    found = read_report(tmp_path / "out/cells/seed_rows3_rows4")
    assert found.complete
    assert [cycle.trait["mean"] for cycle in found.cycles if cycle.trait] == [10.0, 90.0, 90.0]


def test_the_same_command_continues_a_sweep_and_a_longer_axis_adds_cells(tmp_path: Path) -> None:
    sweep_all(a_study(tmp_path, GRID), tmp_path / "out", Asked(limit=1))
    first = StudyFolder(tmp_path / "out").state()
    assert Counter(cell.state for cell in first.cells.values()) == {"done": 1, "queued": 3}
    grown = sweep_all(a_study(tmp_path, GRID.replace("[4, 5]", "[4, 5, 6]")), tmp_path / "out")
    assert Counter(states(grown).values()) == {"done": 6}


def test_cells_removed_from_the_study_are_kept_and_listed_as_outside(tmp_path: Path) -> None:
    sweep_all(a_study(tmp_path, GRID), tmp_path / "out")
    sweep_all(a_study(tmp_path, GRID.replace("[4, 5]", "[4]")), tmp_path / "out")
    found = StudyFolder(tmp_path / "out").state().cells
    assert {name: cell.state for name, cell in found.items()} == {
        "seed_rows3_rows4": "done",
        "seed_rows4_rows4": "done",
        "seed_rows3_rows5": "outside",
        "seed_rows4_rows5": "outside",
    }
    assert (tmp_path / "out/cells/seed_rows4_rows5/run.json").exists()


def test_a_changed_base_is_refused_with_the_difference(tmp_path: Path) -> None:
    sweep_all(a_study(tmp_path, GRID), tmp_path / "out")
    with pytest.raises(FolderError, match="`trait` is 'lucky' in the folder and 'bliss' here"):
        sweep_all(a_study(tmp_path, GRID, trait="bliss"), tmp_path / "out")


def test_only_runs_the_chosen_cells(tmp_path: Path) -> None:
    found = states(sweep_all(a_study(tmp_path, GRID), tmp_path / "out", Asked(only=("rows=5",))))
    assert found == {
        "seed_rows3_rows4": "queued",
        "seed_rows3_rows5": "done",
        "seed_rows4_rows4": "queued",
        "seed_rows4_rows5": "done",
    }


def test_all_planning_problems_of_cells_are_reported_before_anything_runs(tmp_path: Path) -> None:
    study = a_study(tmp_path, "[sweep.grid]\nrows = [4, 99999]\ncycles = [1, 9999]\n")
    with pytest.raises(RecipeError) as caught:
        sweep_all(study, tmp_path / "out")
    said = "\n".join(caught.value.problems)
    assert "cells rows4_cycles9999, rows99999_cycles9999: `cycles = 9999`" in said
    assert "cell rows99999_cycles1:" in said
    assert not (tmp_path / "out").exists()


# -- failures


def test_machine_failures_are_tried_again(tmp_path: Path) -> None:
    left = [2]

    def fail(job: TrainJob) -> None:
        if job.settings.learning_rate == 2e-3 and left[0]:
            left[0] -= 1
            raise BackendError("the trainer died", exception="died")

    found = sweep_all(a_study(tmp_path, RATES), tmp_path / "out", places=[At(fail)])
    assert set(states(found).values()) == {"done"}
    assert found.cells["learning_rate0.002"].attempts == 3
    assert found.folder.failure("learning_rate0.002") is None


def test_a_cell_is_given_up_after_three_machine_failures(tmp_path: Path) -> None:
    def fail(job: TrainJob) -> None:
        if job.settings.learning_rate == 2e-3:
            raise BackendError("the trainer died", exception="died")

    found = sweep_all(a_study(tmp_path, RATES), tmp_path / "out", places=[At(fail)])
    assert states(found)["learning_rate0.002"] == "failed"
    assert found.cells["learning_rate0.002"].attempts == 3
    assert list(found.failed()) == ["learning_rate0.002"]


def test_a_diverged_cell_is_a_result_and_is_retried_only_on_request(tmp_path: Path) -> None:
    sweep = '[sweep.grid]\n"train.learning_rate" = [1e-3, 1.0]\n'
    found = sweep_all(a_study(tmp_path, sweep), tmp_path / "out")
    assert states(found) == {"learning_rate0.001": "done", "learning_rate1": "result"}
    failure = found.cells["learning_rate1"].failure
    assert failure is not None
    assert (failure["kind"], failure["step"]) == ("result", "c0-train")
    assert found.failed() == {}
    again = sweep_all(a_study(tmp_path, sweep), tmp_path / "out")
    assert again.cells["learning_rate1"].attempts == 0
    told = sweep_all(a_study(tmp_path, sweep), tmp_path / "out", Asked(retry=("failed",)))
    assert (told.cells["learning_rate1"].attempts, states(told)["learning_rate1"]) == (1, "result")


def test_cells_sharing_a_diverged_step_get_its_result_without_training(tmp_path: Path) -> None:
    trained: list[float] = []
    study = a_study(tmp_path, '[sweep.grid]\n"train.learning_rate" = [1e-3, 1.0]\nrows = [4, 5]\n')
    found = sweep_all(study, tmp_path / "out", places=[At(lambda job: trained.append(job.settings.learning_rate))])
    assert Counter(states(found).values()) == {"done": 2, "result": 2}
    assert trained.count(1.0) == 1


def test_a_bug_stops_its_cell_and_the_others_go_on(tmp_path: Path) -> None:
    def fail(job: TrainJob) -> None:
        if job.settings.learning_rate == 1e-3:
            raise ZeroDivisionError("a slip")

    found = sweep_all(a_study(tmp_path, RATES), tmp_path / "out", places=[At(fail)])
    assert Counter(states(found).values()) == {"failed": 1, "done": 2}
    assert found.cells["learning_rate0.001"].attempts == 1


def test_equal_failures_of_the_first_cells_stop_the_sweep_unless_keep_going(tmp_path: Path) -> None:
    def fail(job: TrainJob) -> None:
        raise ZeroDivisionError("a slip")

    with pytest.raises(RunError, match="the first 2 cells failed alike"):
        sweep_all(a_study(tmp_path, RATES), tmp_path / "out", places=[At(fail)])
    assert Counter(cell.state for cell in StudyFolder(tmp_path / "out").state().cells.values()) == {"failed": 2, "queued": 1}
    found = sweep_all(a_study(tmp_path, RATES), tmp_path / "out", Asked(keep_going=True), places=[At(fail)])
    assert set(states(found).values()) == {"failed"}


def test_a_failing_cell_does_not_disturb_the_cell_beside_it(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def fail(job: TrainJob) -> None:
        if job.settings.learning_rate == 2e-3:
            raise ZeroDivisionError("a slip")

    class Together(At):
        def open(self, residents: Residents) -> LocalExecutor:
            executor = super().open(residents)
            load = executor.backends.trainer.load

            def meet(*args: Any) -> Any:
                if not met:
                    both.wait(timeout=20)
                    met.append(True)
                return load(*args)

            met: list[bool] = []
            executor.backends.trainer.load = meet  # type: ignore[method-assign]
            return executor

    study = a_study(tmp_path, '[sweep.grid]\n"train.learning_rate" = [1e-3, 2e-3]\n')
    at = At(fail, chains=2)
    found = sweep_all(study, tmp_path / "out", places=[at])
    assert states(found) == {"learning_rate0.001": "done", "learning_rate0.002": "failed"}


# -- what is kept


def test_models_are_removed_after_the_last_cell_that_reads_them(tmp_path: Path) -> None:
    plans = [each.plan for each in a_study(tmp_path, GRID, cycles=2).planned(a_study(tmp_path, GRID, cycles=2).cells)]
    shared, gone = Shared(plans), {}
    for number, plan in enumerate(plans):
        for step in plan:
            for key, _ in shared.finish(step.key, "ends"):
                gone.setdefault(key, number)
    first, other = ([plan.steps[name].key for plan in plans] for name in ("c0-export", "c1-train"))
    # cells 0 and 1 have other seed rows than 2 and 3: a cycle 0 is needed until the second cell that shares it is done
    last_reader = {key: number for number, key in enumerate(first)}
    assert {key: gone[key] for key in first} == last_reader
    assert set(other) <= gone.keys()
    kept = {plan.steps[name].key for plan in plans for name in ("c0-train", "c2-train")}
    assert not kept & gone.keys()


# -- from other terminals


def test_a_stopped_sweep_ends_and_keeps_finished_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.app.sweep.WRITE_EVERY", 0.01)
    with open_sweep(a_study(tmp_path, GRID), tmp_path / "out", HERE) as sweep, pytest.raises(RunError, match="asked to stop"):
        list(stop_soon(sweep, tmp_path / "out"))
    assert "running" not in states(sweep).values()
    assert set(states(sweep_all(a_study(tmp_path, GRID), tmp_path / "out")).values()) == {"done"}


def test_running_cells_of_a_silent_sweep_count_as_lost(tmp_path: Path) -> None:
    sweep_all(a_study(tmp_path, GRID), tmp_path / "out", Asked(limit=1))
    folder = StudyFolder(tmp_path / "out")
    folder.write_state(SweepState({"seed_rows3_rows5": CellState("running", worker="gpu 0")}, written=1000.0))
    assert folder.state(1000.0 + SILENT / 2).cells["seed_rows3_rows5"].state == "running"
    gone = folder.state(1000.0 + 2 * SILENT)
    assert (gone.cells["seed_rows3_rows5"].state, gone.ended) == ("lost", True)
    assert not ask_to_stop(folder)


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    study = a_study(tmp_path, GRID)
    with open_sweep(study, tmp_path / "out", HERE), pytest.raises(FolderError, match="another sweep is going on"):
        sweep_all(study, tmp_path / "out")


@pytest.mark.parametrize(("name", "said"), [("notes.txt", "holds other files"), ("run.json", "is a run folder")])
def test_a_folder_that_holds_no_study_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(FolderError, match=said):
        sweep_all(a_study(tmp_path, GRID), tmp_path / "out")


# -- seed rows that are found


def test_target_scores_become_seed_rows_and_unreached_ones_are_reported(tmp_path: Path) -> None:
    study = a_study(tmp_path, "[sweep.grid]\nseed_rows = { calibrated = [20, 60, 99] }\nrows = [4, 5]\n")
    found = sweep_all(study, tmp_path / "out")
    assert set(states(found).values()) == {"done"}
    assert len(found.cells) == 2
    one, other = found.notes
    assert "a score of 99 at cycle 0 is not reached" in one
    assert "2 cells are left out" in one
    assert "20 and 60 at cycle 0 both come to" in other
    probes = {path.name for path in (tmp_path / "out/probes").iterdir()}
    again = sweep_all(study, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out/probes").iterdir()} == probes
    assert set(states(again).values()) == {"done"}


# -- places


def test_without_a_gpu_one_chain_runs_at_a_time() -> None:
    assert local_places(Machine("", 0, 0, unsloth=False)) == [LocalPlace("cpu", chains=1)]


def test_every_gpu_runs_two_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.app.sweep.visible_gpus", lambda: ["0", "3"])
    assert local_places(Machine("H100", 1, 1, unsloth=True)) == [LocalPlace("gpu 0", "0", 2), LocalPlace("gpu 1", "3", 2)]
