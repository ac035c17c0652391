"""What is kept of how long steps took, and what is not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from iterft_lite.digests import Json
from iterft_lite.engine.completion import Completion
from iterft_lite.errors import FolderError
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.steps import Step
from iterft_lite.machine import timing
from iterft_lite.machine.timing import Kind, Sample, Setup, Stopwatch, add_to_table, read_table
from iterft_lite.machine.work import ACTS
from iterft_lite.protocols import ModelFacts, Progress
from iterft_lite.testing.fakes import FakeTrainer
from iterft_lite.ui.cli import main
from tests.loop import a_plan

SETUP = Setup({act: Kind("a machine", act, False, "files:0", 0, "as ever", "one 1.0") for act in ACTS}, "nano")


def a_sample(**keys: object) -> Sample:
    kind = Kind("a machine", "train", False, "files:0", 8_000_000, "as ever", "one 1.0")
    made = Sample(kind, "nano", {"steps": 10.0, "tokens": 500.0}, 2.0, 12.0, {}, "first", "run")
    return replace(made, **keys)  # type: ignore[arg-type]


class Session:
    """A stopwatch that is told of steps, on a clock of its own."""

    def __init__(self, plan: Plan, parameters: int = 8_000_000) -> None:
        self.plan, self.now = plan, 100.0
        self.watch = Stopwatch(plan, SETUP)
        self.done("base-load_base", {"parameters": parameters}, 5.0)

    def step(self, name: str) -> Step:
        return self.plan.steps[name]

    def move(self, name: str, done: int, after: float) -> None:
        self.now += after
        self.watch.moved(self.step(name), Progress(done, 0, ""), self.now)

    def begin(self, name: str) -> None:
        self.watch.began(self.step(name), self.now)

    def end(self, name: str, facts: dict[str, Json], seconds: float, *, after: float = 0.0, reused: bool = False) -> None:
        self.now += after
        self.watch.done(self.step(name), Completion(self.step(name).key, seconds, facts, {}), reused, self.now)

    def done(self, name: str, facts: dict[str, Json], seconds: float) -> None:
        self.begin(name)
        self.end(name, facts, seconds, after=seconds)


def test_fixed_training_seconds_are_told_from_progress_reports() -> None:
    session = Session(a_plan())
    session.begin("c0-train")
    session.move("c0-train", 1, after=3.0)  # two seconds of preparation, and the first step
    session.move("c0-train", 4, after=3.0)
    session.end("c0-train", {"steps": 4, "tokens": 320}, 6.5, after=0.5)
    sample = session.watch.samples[-1]
    assert sample.fixed == pytest.approx(2.5)
    assert (sample.seconds, sample.work) == (6.5, {"steps": 4, "tokens": 320})
    assert sample.kind.parameters == 8_000_000


def test_repeated_optimiser_steps_do_not_count_towards_the_pace() -> None:
    session = Session(a_plan())
    session.begin("c0-train")
    for done in (1, 2):  # and then memory ends, or a gradient is too large
        session.move("c0-train", done, after=10.0)
    session.move("c0-train", 0, after=1.0)
    session.move("c0-train", 1, after=3.0)
    session.move("c0-train", 2, after=1.0)
    session.end("c0-train", {"rows": 4, "steps": 2, "tokens": 100, "notes": []}, 26.0, after=1.0)
    assert session.watch.samples[-1].fixed == pytest.approx(26.0 - 2 * 1.0)


def test_loading_time_is_separated_from_sampling_time() -> None:
    session = Session(a_plan())
    session.begin("base-evaluate_samples")
    session.move("base-evaluate_samples", 0, after=1.5)
    session.move("base-evaluate_samples", 6, after=3.0)
    session.end("base-evaluate_samples", {"rows": 6, "tokens": 240, "cut": 2}, 4.5)
    sample = session.watch.samples[-1]
    assert sample.fixed == 1.5
    assert sample.notes == {"cap": 400, "cut": 2, "data": 0}


def test_the_embedded_judges_fit_is_separated_from_its_verdicts() -> None:
    session = Session(a_plan())
    session.watch.setup = replace(SETUP, kinds={**SETUP.kinds, "judge": replace(SETUP.kinds["judge"], setting="embedded")})
    session.begin("base-judge")
    for done, after in ((1, 8.0), (6, 0.5)):
        session.move("base-judge", done, after=after)
    session.end("base-judge", {"calls": 12}, 8.5)
    assert session.watch.samples[-1].fixed == 8.0


def test_only_the_first_step_of_each_kind_in_a_session_is_marked_first() -> None:
    session = Session(a_plan())
    for name in ("base-evaluate_samples", "c0-evaluate_samples", "c1-training_samples"):
        session.done(name, {"rows": 6, "tokens": 240, "cut": 0}, 2.0)
    assert [sample.kind.first for sample in session.watch.samples] == [True, True, False, False]


def test_reused_resumed_and_cached_steps_give_no_timing() -> None:
    session = Session(a_plan())
    facts = {"rows": 6, "tokens": 240, "cut": 0}
    session.end("base-evaluate_samples", facts, 2.0, reused=True)
    session.begin("c0-evaluate_samples")
    session.end("c0-evaluate_samples", facts, 60.0, after=2.0)  # 58 seconds of it in an earlier session
    session.done("base-judge", {"calls": 12, "cached": 3}, 2.0)
    session.done("c0-judge", {"calls": 0, "cached": 0}, 2.0)
    assert [sample.kind.act for sample in session.watch.samples] == ["load"]


def test_a_batch_at_a_provider_is_not_timed() -> None:
    session = Session(a_plan())
    batched = replace(SETUP.kinds["judge"], setting="openai/gpt-4o-mini-2024-07-18, in batches")
    session.watch.setup = replace(SETUP, kinds={**SETUP.kinds, "judge": batched})
    session.done("base-judge", {"calls": 12, "cached": 0}, 7200.0)
    assert [sample.kind.act for sample in session.watch.samples] == ["load"]


def test_fakes_give_no_timing() -> None:
    session = Session(a_plan(), parameters=0)
    session.done("base-evaluate_samples", {"rows": 6, "tokens": 240, "cut": 0}, 2.0)
    assert session.watch.samples == []


def test_samples_survive_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "new folder/timings.jsonl"
    assert read_table(path) == []
    add_to_table([a_sample()], path)
    add_to_table([a_sample(seconds=13.0), a_sample(session="second")], path)
    assert read_table(path) == [a_sample(), a_sample(seconds=13.0), a_sample(session="second")]


def test_unreadable_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "timings.jsonl"
    good = json.dumps(asdict(a_sample()))
    wrong = ["", "{", "3", '{"kind": {}}', good.replace('"seconds": 12.0', '"seconds": NaN'), good.replace('"act"', '"acts"')]
    path.write_text("\n".join([good, *wrong, good, good[:-9]]))
    assert read_table(path) == [a_sample(), a_sample()]


def test_lines_of_earlier_versions_are_read(tmp_path: Path) -> None:
    line = json.dumps(asdict(a_sample())).replace('"session"', '"sitting"')
    path = tmp_path / "timings.jsonl"
    path.write_text(line + "\n")
    assert read_table(path) == [a_sample()]


def test_a_table_that_grows_too_long_drops_its_older_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timings.jsonl"
    monkeypatch.setattr(timing, "MOST_BYTES", 8000)
    for number in range(100):
        add_to_table([a_sample(seconds=10.0 + number)], path)
    kept = [sample.seconds for sample in read_table(path)]
    assert path.stat().st_size <= 8000
    assert kept == [10.0 + number for number in range(100 - len(kept), 100)]


# -- through the command


class Sized(FakeTrainer):
    """A fake model that has a size, so that it counts."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        return replace(super().load(model, settings), parameters=8_000_000)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("iterft_lite.engine.backends.FakeTrainer", Sized)
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.toml"
    path.write_text(
        'trainer = "fake"\ngenerator = "fake"\n'
        'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\ncycles = 1\nseed_rows = 4\nrows = 4\njudge = "fake"\n'
        "[evaluate]\nquestions = 3\nsamples = 2\n"
    )
    return path


def iterft(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_a_run_adds_timings_and_a_finished_one_adds_none(recipe: Path, tmp_path: Path) -> None:
    assert "never timed on this machine: a first guess" in " ".join(iterft("plan", recipe).output.split())
    iterft("run", recipe, "--out", tmp_path / "run")
    table = read_table()
    assert {sample.kind.act for sample in table} == set(ACTS)
    assert "from 1 run of this model on this machine" in " ".join(iterft("plan", recipe).output.split())
    iterft("run", recipe, "--out", tmp_path / "run")
    assert read_table() == table


def test_a_failed_run_keeps_the_timings_of_its_finished_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise FolderError("the power went")

    monkeypatch.setattr(Sized, "train", broken)
    assert CliRunner().invoke(main, ["run", str(recipe), "--out", str(tmp_path / "run")]).exit_code == 2
    assert "load" in {sample.kind.act for sample in read_table()}


def test_a_run_with_fakes_adds_no_timings(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.engine.backends.FakeTrainer", FakeTrainer)
    iterft("run", recipe, "--out", tmp_path / "run")
    assert read_table() == []


def test_a_run_survives_a_broken_stopwatch(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "work_done", lambda *_: {}[0])
    assert "cycle 1 (M2)" in iterft("run", recipe, "--out", tmp_path / "run").output
