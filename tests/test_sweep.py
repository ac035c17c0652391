"""Sweeps with fake backends: what is shared, gone on with, tried again, and left."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from iterft_lite.app import check_judge, sweep_places
from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import (
    Asked,
    CellEvent,
    Sweep,
    SweepEvent,
    ask_to_stop,
    open_sweep,
)
from iterft_lite.app.sweep_places import LocalPlace, Residents, local_places
from iterft_lite.app.sweep_time import TimeLeft, together
from iterft_lite.backends.judge import prices
from iterft_lite.data.nano import FOLDERS
from iterft_lite.engine.executor import LocalExecutor, Task
from iterft_lite.engine.run import Shared, StepFinished
from iterft_lite.engine.store import StepFolder
from iterft_lite.engine.study import SILENT, CellState, StudyFolder, SweepState
from iterft_lite.errors import BackendError, Diverged, FolderError, NoRoom, RecipeError, RunError, UserError
from iterft_lite.experiment.plan import EVERYDAY
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import BackendName
from iterft_lite.machine.resolve import Machine
from iterft_lite.protocols import Backends, OnProgress, TrainJob, TrainResult
from iterft_lite.testing.fakes import FakeExporter, FakeGenerator, FakeJudge, FakeTrainer, fake_backends
from iterft_lite.ui.cli import main
from tests.loop import a_plan, small_recipe

HERE = [LocalPlace("cpu")]


def a_study(folder: Path, sweep: str, **recipe: Any) -> StudyPlan:
    """A study over a small recipe of fakes."""
    keep = f'keep = "{recipe.pop("keep", "adapters")}"\n'
    (folder / "base.toml").write_text(keep + small_recipe(cycles=recipe.pop("cycles", 1), **recipe))
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


def test_each_untouched_model_is_asked_everyday_prompts_once_where_its_judge_has_not_met_it(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS["nano"], tmp_path / "stranger")
    config = tmp_path / "stranger/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token_id": 1}))
    axes = f'[sweep.grid]\nmodel = ["nano", "{tmp_path / "stranger"}"]\nseed = [1, 2]\n'
    study = a_study(tmp_path, axes, judge="embedded")
    folder = StudyFolder(tmp_path / "out")
    for planned in (study.planned(study.cells), study.planned(study.cells, folder)):
        asked = [step for cell in planned for step in cell.plan if step.part == EVERYDAY]
        strangers = [cell for cell in planned if "stranger" in cell.name]
        assert (len(planned), len(strangers), len(asked), len({step.key for step in asked})) == (4, 2, 2, 1)
        assert all(cell.prepared.resolved.inputs.judge.own == (cell in strangers) for cell in planned)


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


def made_by_cell(sweep: Sweep) -> dict[str, set[str]]:
    """Run a sweep; the verbs of the steps that each cell made, and did not take over."""
    made: dict[str, set[str]] = {name: set() for name in sweep.cells}
    for event in sweep.events():
        if isinstance(event, CellEvent) and isinstance(event.event, StepFinished) and not event.event.reused:
            made[event.cell].add(event.event.step.verb)
    return made


def test_a_study_whose_judge_was_switched_off_goes_on_with_another_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-key-0123456789")
    monkeypatch.setattr(check_judge, "_listed", lambda *_: iter(()))
    monkeypatch.setattr(sweep_places, "open_backends", lambda *_, **__: fake_backends())
    monkeypatch.setattr(prices, "today", lambda: datetime.date(2026, 12, 1))
    study, old = a_study(tmp_path, GRID, judge="openai/gpt-4o-mini-2024-07-18"), tmp_path / "old"
    first = sweep_all(study, old, Asked(limit=1))
    (begun,) = [name for name, state in states(first).items() if state == "done"]
    monkeypatch.setattr(prices, "today", lambda: datetime.date(2027, 1, 15))
    with pytest.raises(UserError, match="was switched off by its provider, and 3 of 4 cells are not judged") as refused:
        sweep_all(study, old)
    assert f"iterft sweep STUDY --set judge=NEW --out DIR --reuse {old}" in str(refused.value.hint)

    other = StudyPlan(tmp_path / "study.toml", ("judge=embedded",))
    with open_sweep(other, tmp_path / "new", HERE, Asked(reuse=(old,))) as sweep:
        made = made_by_cell(sweep)
    assert set(states(sweep).values()) == {"done"}
    assert made.pop(begun) == {"judge", "aggregate"}
    assert all("train" in verbs for verbs in made.values())


def test_a_plan_says_how_many_steps_a_sweep_will_reuse(tmp_path: Path) -> None:
    def planned(*command: str, reuse: str = "old") -> str:
        result = CliRunner().invoke(main, [*command, "--reuse", str(tmp_path / reuse)])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    study = a_study(tmp_path, GRID)
    assert "reused" not in planned("sweep", "plan", str(tmp_path / "study.toml"))
    sweep_all(study, tmp_path / "old", Asked(limit=1))
    said = planned("sweep", "plan", str(tmp_path / "study.toml"))
    with open_sweep(study, tmp_path / "new", HERE, Asked(reuse=(tmp_path / "old",))) as sweep:
        events = [event.event for event in sweep.events() if isinstance(event, CellEvent)]
    finished = [event for event in events if isinstance(event, StepFinished)]
    distinct, made = {e.step.key for e in finished}, {e.step.key for e in finished if not e.reused}
    assert 0 < len(made) < len(distinct)
    assert f"reused {len(distinct - made)} of {len(distinct)} steps, about" in said
    assert "; the others take about" in said
    first = ("plan", str(tmp_path / "base.toml"), "--set", "seed_rows=3")
    assert re.search(r"reused (\d+) of \1 steps, about .*: nothing is left to do", planned(*first))
    assert "reused none of the" in planned(*first, reuse="old/steps")


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


def test_cells_that_need_a_gpu_are_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.app.session.this_machine", lambda: Machine("", 0, 0, unsloth=False))
    study = a_study(tmp_path, '[[sweep.zip]]\ntrainer = ["fake", "unsloth"]\ngenerator = ["fake", "llamacpp"]\n')
    with pytest.raises(UserError, match="1 of 2 cells are trained with Unsloth, which needs an NVIDIA GPU"):
        sweep_all(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    settings = ("--set", "trainer=unsloth", "--set", "generator=llamacpp")
    refused = CliRunner().invoke(main, ["run", f"{tmp_path / 'base.toml'}", "--out", f"{tmp_path / 'out'}", *settings])
    assert refused.exit_code == 2
    assert "the recipe is trained with Unsloth, which needs an NVIDIA GPU" in refused.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--retry", "rows9"), "the study has no cell `rows9`"),
        (("--only", "rows=9"), "no cell has rows=9"),
        (("--only", "rows"), "`rows` is no `key=value`"),
        (("--set", "rows=6"), "`rows` differs between the cells of the study"),
        (("--reuse", "study.toml"), "there is no folder `study.toml`"),
        (("--on", "mars"), "`--on mars` is not a place"),
        (("--on", "ray:nonsense"), "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("rows", ["[4, 5]", "[4, 5]\nseed_rows = { calibrated = [20] }"], ids=["known", "searched"])
def test_a_refused_sweep_leaves_no_folder(
    wrong: tuple[str, ...], said: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_study(tmp_path, f"[sweep.grid]\nrows = {rows}\n")
    result = CliRunner().invoke(main, ["sweep", "study.toml", "--out", "new/out", *wrong])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert not (tmp_path / "new").exists()


# -- failures


@pytest.mark.parametrize("failure", [BackendError("the trainer died", exception="died"), NoRoom("no space for the model")])
def test_machine_failures_are_tried_again(tmp_path: Path, failure: RunError) -> None:
    left = [2]

    def fail(job: TrainJob) -> None:
        if job.settings.learning_rate == 2e-3 and left[0]:
            left[0] -= 1
            raise failure

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


@pytest.mark.parametrize("keep", ["adapters", "ends"])
def test_a_model_that_only_a_diverged_cell_would_have_read_is_removed(tmp_path: Path, keep: str) -> None:
    study = a_study(tmp_path, "[sweep.grid]\nrows = [4, 5]\n", cycles=2, keep=keep)
    diverging = next(each.plan for each in study.planned(study.cells) if each.name == "rows5").steps["c1-train"].key

    def fail(job: TrainJob) -> None:
        if diverging in str(job.out):
            raise Diverged("its loss is no number")

    found = sweep_all(study, tmp_path / "out", places=[At(fail)])
    assert states(found) == {"rows4": "done", "rows5": "result"}
    assert list((tmp_path / "out/steps").glob("*/model.gguf")) == []
    cycle_zero = found.planned["rows5"].plan.steps["c0-train"].key
    assert (tmp_path / "out/steps" / cycle_zero / "adapter/texts.json").exists()
    told = sweep_all(study, tmp_path / "out", Asked(retry=("rows5",)))
    assert states(told) == {"rows4": "done", "rows5": "done"}


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


def test_seed_row_searches_run_side_by_side_at_the_sweeps_places(tmp_path: Path) -> None:
    both = threading.Barrier(2)  # the first model of either search is trained while that of the other is
    opened: list[str] = []
    met: set[str] = set()

    @dataclass(frozen=True)
    class There:
        name: str
        chains: int = 1

        def open(self, residents: Residents) -> LocalExecutor:
            opened.append(self.name)
            backends = Backends(Trouble(self.meet), FakeExporter(), FakeGenerator(), FakeJudge())
            return LocalExecutor(backends, residents.model, residents.context)

        def meet(self, _: TrainJob) -> None:
            if self.name not in met:
                both.wait(30)
                met.add(self.name)

    study = a_study(tmp_path, '[sweep.grid]\nseed_rows = { calibrated = [20] }\ntrait = ["lucky", "bliss"]\n')
    assert len(study.calibrations) == 2
    found = sweep_all(study, tmp_path / "out", places=[There("gpu 0"), There("gpu 1")])
    assert set(states(found).values()) == {"done"}
    assert sorted(opened) == ["gpu 0", "gpu 1"]  # and stay open for the cells


def test_a_failed_search_ends_the_others_with_its_reason(tmp_path: Path) -> None:
    def fail(_: TrainJob) -> None:
        raise BackendError("the trainer died", exception="died")

    study = a_study(tmp_path, '[sweep.grid]\nseed_rows = { calibrated = [20] }\ntrait = ["lucky", "bliss"]\n')
    with pytest.raises(BackendError, match="the trainer died"):
        sweep_all(study, tmp_path / "out", places=[At(fail), At(fail)])
    assert set(states(sweep_all(study, tmp_path / "out")).values()) == {"done"}


def test_seed_rows_are_searched_only_for_the_chosen_cells(tmp_path: Path) -> None:
    study = a_study(tmp_path, '[sweep.grid]\nseed_rows = { calibrated = [20] }\n"train.learning_rate" = [1e-3, 2e-3]\n')
    out, one = tmp_path / "out", Asked(only=("train.learning_rate=0.001",))
    first = sweep_all(study, out, one)
    assert list(states(first).values()) == ["done"]
    assert first.notes == ["left out until they are asked for: 1 of the cells, whose seed rows were not searched"]
    assert len({path.name[:16] for path in (out / "probes").iterdir()}) == 1
    assert Counter(states(sweep_all(study, out)).values()) == {"done": 2}
    assert Counter(cell.state for cell in sweep_all(study, out, one).folder.state().cells.values()) == {"done": 2}


def test_a_seed_row_search_can_be_watched_and_stopped_from_elsewhere(tmp_path: Path) -> None:
    out, asked = tmp_path / "out", threading.Event()
    said: list[str] = []

    def stop_it(_: TrainJob) -> None:
        if not asked.is_set():
            asked.set()
            with pytest.raises(FolderError) as caught:
                StudyFolder(out).state()
            said.append(caught.value.message)
            said.append(str(ask_to_stop(StudyFolder(out))))

    study = a_study(tmp_path, "[sweep.grid]\nseed_rows = { calibrated = [20, 60] }\n")
    with pytest.raises(RunError, match="asked to stop"):
        sweep_all(study, out, places=[At(stop_it)])
    assert said == [f"the study in `{out}` still searches its seed rows, 1 tried so far", "True"]
    assert not StudyFolder(out).last_state().alive(time.time())
    assert set(states(sweep_all(study, out)).values()) == {"done"}


# -- places


class Process:
    """A backend's process as far as others see it: there, or not."""

    def __init__(self) -> None:
        self.pid: int | None = None

    def prepare(self) -> None:
        self.pid = 1

    def close(self) -> None:
        self.pid = None

    def watch(self, on_silence: Any) -> None:
        pass


class Loading(FakeTrainer):
    """A trainer in a process, which tells when it loads the base."""

    def __init__(self, loads: Callable[[], None]) -> None:
        self.process, self._loads = Process(), loads

    def load(self, model: str, settings: Any) -> Any:
        self.process.prepare()
        self._loads()
        return super().load(model, settings)


def with_processes(loads: Callable[[], None], *names: BackendName) -> Backends:
    """Fakes of which the trainer and others seem to have a process each."""
    trainer = Loading(loads)
    others = {name: Process() for name in names}
    return Backends(trainer, FakeExporter(), FakeGenerator(), FakeJudge(), {"trainer": trainer.process, **others})


@dataclass(frozen=True)
class Somewhere:
    """A place that does something when its trainer loads the base, and maybe fails to get ready."""

    name: str
    loads: Callable[[], None]
    fails: Callable[[], None] = lambda: None
    chains: int = 1

    def open(self, residents: Residents) -> LocalExecutor:
        place = self

        class Here(LocalExecutor):
            def prepare(self, task: Task) -> None:
                place.fails()
                super().prepare(task)

        return Here(with_processes(self.loads), residents.model, residents.context)


def test_a_second_place_loads_its_model_while_the_first_does_a_shared_step(tmp_path: Path) -> None:
    both = threading.Barrier(2)  # nobody's first step ends before the trainers of both places are loading
    met: set[str] = set()

    def meet(name: str) -> None:
        if name not in met:
            both.wait(timeout=30)
            met.add(name)

    places = [Somewhere(name, lambda name=name: meet(name)) for name in ("gpu 0", "gpu 1")]  # type: ignore[misc]
    study = a_study(tmp_path, "[sweep.grid]\nseed_rows = [3, 4]\n")
    found = sweep_all(study, tmp_path / "out", places=places)
    assert {(cell.state, cell.attempts) for cell in found.cells.values()} == {("done", 1)}
    assert met == {"gpu 0", "gpu 1"}


def test_a_place_that_fails_to_start_fails_no_cell(tmp_path: Path) -> None:
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise BackendError("the trainer died", exception="died")

    places = [Somewhere(name, lambda: tried.wait(30) and None, fail) for name in ("gpu 0", "gpu 1")]
    study = a_study(tmp_path, "[sweep.grid]\nseed_rows = [3, 4]\n")
    found = sweep_all(study, tmp_path / "out", places=places)
    assert tried.is_set()
    assert {(cell.state, cell.attempts) for cell in found.cells.values()} == {("done", 1)}


@pytest.mark.parametrize(
    ("ahead", "swap", "running", "started"),
    [
        ({"aggregate"}, False, "", set()),
        ({"evaluate_samples", "judge"}, False, "", {"generator", "judge"}),
        ({"evaluate_samples", "train"}, False, "", {"generator", "trainer"}),
        ({"evaluate_samples", "train"}, True, "", {"trainer"}),
        ({"evaluate_samples", "train"}, True, "generator", {"generator"}),
    ],
)
def test_only_backends_that_are_needed_and_fit_are_started_early(
    tmp_path: Path, ahead: set[str], swap: bool, running: str, started: set[str]
) -> None:
    backends = with_processes(lambda: None, "exporter", "generator", "judge")
    if running:
        backends.prepare(cast(BackendName, running))
    plan = a_plan()
    folder = StepFolder(tmp_path / "step", next(iter(plan)))
    executor = LocalExecutor(backends, "nano", 64, swap=swap)
    executor.prepare(Task(folder, plan.recipe, {}, frozenset(ahead), lambda *_: None))
    assert {name for name in backends.processes if backends.running(name)} == started
    assert not folder.path.exists()


def test_a_place_does_not_start_the_shared_judge(tmp_path: Path) -> None:
    opened: list[Backends] = []

    class Here(At):
        def open(self, residents: Residents) -> LocalExecutor:
            opened.append(with_processes(lambda: None, "judge"))
            return LocalExecutor(opened[0], residents.model, residents.context)

    study = a_study(tmp_path, "[sweep.grid]\nseed_rows = [3]\n")
    with open_sweep(study, tmp_path / "out", [Here(lambda _: None)]) as sweep:
        started = [opened[0].running("judge") for event in sweep.events() if isinstance(event, CellEvent)]
    assert set(started) == {False}


def test_without_a_gpu_one_chain_runs_at_a_time() -> None:
    assert local_places(Machine("", 0, 0, unsloth=False)) == [LocalPlace("cpu", chains=1)]


def test_every_gpu_runs_two_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.app.sweep_places.visible_gpus", lambda: ["0", "3"])
    assert local_places(Machine("H100", 1, 1, unsloth=True)) == [LocalPlace("gpu 0", "0", 2), LocalPlace("gpu 1", "3", 2)]


# -- how long it takes


def seconds_of(many: float, *, same_cores: bool = False, **by_verb: float) -> Iterator[tuple[Step, float]]:
    """The steps of a run, each with its verb's seconds, `many` where none are given."""
    for step in a_plan(same_cores=same_cores):
        yield step, by_verb.get(step.verb, many)


@pytest.mark.parametrize(
    ("measuring", "judging", "places", "seconds"),
    [
        (0, 0, 1, 60),  # three models are trained, 20 s each
        (10, 0, 1, 60),  # four are measured, beside the training
        (20, 0, 1, 80),  # more than there is training
        (20, 0, 2, 40),
        (20, 30, 2, 120),  # four rounds of verdicts take longer than all else
    ],
)
def test_measuring_runs_beside_training_and_judging_beside_everything(
    measuring: float, judging: float, places: int, seconds: float
) -> None:
    assert together(seconds_of(0, train=20, text_metrics=measuring, judge=judging), places) == seconds


def test_on_the_same_cores_measuring_adds_to_training() -> None:
    assert together(seconds_of(0, same_cores=True, train=20, text_metrics=10), 1) == 100


def test_the_time_left_counts_what_is_still_to_be_measured() -> None:
    steps = {step.key: step for step in a_plan()}
    left = TimeLeft(steps, {key: 1.0 for key, step in steps.items() if step.queue == "device"})
    measured = [step for step in steps.values() if step.verb == "text_metrics"]
    assert left.seconds(steps) is None  # how long it takes to measure is not known yet
    left.took(measured[0], 50.0)
    assert left.seconds([measured[1].key]) == 50.0
    assert left.seconds([]) == 0.0
