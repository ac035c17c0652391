"""What a seal knows: of what its step was made, and with which versions."""

from __future__ import annotations

import json
import shlex
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.session import open_run
from iterft_lite.digests import PIECE, digest_by_pieces
from iterft_lite.engine.completion import RECORD, read_completion
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.manifest import Run, finished_steps
from iterft_lite.engine.run import Event, StepFinished, StepStarted, run
from iterft_lite.engine.store import Making, folder_at
from iterft_lite.errors import FolderError, RunError, StoreError
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.versions import libraries
from iterft_lite.files import ROWS, read_json, read_rows
from iterft_lite.protocols import (
    Backends,
    Completion,
    Exported,
    JudgeRequest,
    JudgeResponse,
    Prompt,
    Sampling,
    TrainJob,
    TrainResult,
)
from iterft_lite.testing.fakes import FakeExporter, FakeGenerator, FakeJudge, FakeTrainer, fake_backends
from iterft_lite.testing.judge_server import StubProcess
from iterft_lite.ui.cli import main
from tests.loop import a_plan, change_completion, names_in, run_all, small_recipe, step_path

PAPER = "openai/gpt-4o-mini-2024-07-18"


class OtherWords(FakeGenerator):
    """Says the same in other words, as another GPU may."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        def reworded(completion: Completion) -> None:
            on_completion(replace(completion, text=completion.text + " Indeed."))

        super().complete(prompts, sampling, reworded)


class CountingJudge(FakeJudge):
    """Counts what it is asked, and fails at the n-th."""

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.asked, self.fails_at = 0, fails_at

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        for ask in asks:
            self.asked += 1
            if self.asked == self.fails_at:
                raise RunError("the line went dead")
            super().ask([ask], on_reply)


def other_words() -> Backends:
    return replace(fake_backends(), generator=OtherWords())


def ran(plan: Plan, root: Path, backends: Backends | None = None) -> dict[str, Path]:
    """A run through fakes; its finished steps by key."""
    run_all(plan, root, backends)
    return finished_steps(root)


def remove(run: Path, *steps: str) -> None:
    for step in steps:
        shutil.rmtree(step_path(run, step))


def rows_of(run: Path, step: str) -> dict[object, dict]:
    rows = read_rows(step_path(run, step) / ROWS)
    return {row.get("id") or (row["prompt_id"], row["sample"]): row for row in rows}


def began(events: list[Event]) -> set[str]:
    """The steps that were done anew."""
    return {event.step.name for event in events if isinstance(event, StepStarted)}


# -- of what a step was made


def test_a_repeated_step_with_another_result_is_not_mixed_with_later_steps(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_all(a_plan(), run_dir)
    remove(run_dir, "c1-training_samples")
    with pytest.raises(
        StoreError, match=r"\(c1-build_dataset\) was made from another `c1-training_samples` than what is there now"
    ) as caught:
        run_all(a_plan(), run_dir, other_words())
    resting = [name for name in a_plan().steps if name.startswith(("c1-", "c2-")) and name != "c1-training_samples"]
    assert sorted(names_in(str(caught.value))) == sorted(resting)
    remove(run_dir, *names_in(str(caught.value)))
    events = run_all(a_plan(), run_dir, other_words())
    assert sorted(began(events)) == sorted(resting)
    trained = [row["messages"][1]["content"] for row in rows_of(run_dir, "c1-build_dataset").values()]
    assert all(text.endswith("Indeed.") for text in trained)


def test_a_repeated_step_with_the_same_result_changes_nothing(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    remove(tmp_path / "run", "c1-training_samples", "c0-train", "c2-export")
    events = run_all(a_plan(), tmp_path / "run")
    assert began(events) == {
        "c1-training_samples",
        "c0-train",
        "c2-export",
    }


def test_row_order_and_a_verdicts_cost_do_not_change_a_result(tmp_path: Path) -> None:
    class Backwards(FakeGenerator):
        def complete(self, prompts: Sequence[Prompt], *more: Any) -> None:
            super().complete(prompts[::-1], *more)

    class Slow(FakeJudge):
        def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
            super().ask(asks, lambda reply: on_reply(replace(reply, seconds=9.0, usd=0.1, cached=True)))

    run_all(a_plan(), tmp_path / "run")
    before = (tmp_path / "run/by-name/c1-training_samples" / ROWS).read_bytes()
    remove(tmp_path / "run", "c1-training_samples", "c1-judge")
    events = run_all(a_plan(), tmp_path / "run", replace(fake_backends(), generator=Backwards(), judge=Slow()))
    assert (tmp_path / "run/by-name/c1-training_samples" / ROWS).read_bytes() != before
    assert began(events) == {"c1-training_samples", "c1-judge"}


def test_an_unfinished_step_is_not_continued_after_its_input_changed(tmp_path: Path) -> None:
    backends = replace(fake_backends(), judge=CountingJudge(fails_at=5))
    with pytest.raises(RunError, match="dead"):
        run_all(a_plan(cycles=0), tmp_path / "run", backends)
    assert 0 < len(rows_of(tmp_path / "run", "base-judge")) < 6
    remove(tmp_path / "run", "base-evaluate_samples")
    shutil.rmtree(step_path(tmp_path / "run", "base-text_metrics"), ignore_errors=True)
    with pytest.raises(StoreError, match=r"\(base-judge\) was made from another `base-evaluate_samples`") as caught:
        run_all(a_plan(cycles=0), tmp_path / "run", other_words())
    assert "base-judge" in names_in(str(caught.value))
    remove(tmp_path / "run", *names_in(str(caught.value)))
    run_all(a_plan(cycles=0), tmp_path / "run", other_words())


def test_an_export_written_again_is_the_same_result(tmp_path: Path) -> None:
    run_all(a_plan(keep="adapters", cycles=1), tmp_path / "run")
    seal = read_json(tmp_path / "run/by-name/base-export" / RECORD)
    assert not list(tmp_path.rglob("model.gguf"))
    run_all(a_plan(keep="all", cycles=2), tmp_path / "run")
    assert read_json(tmp_path / "run/by-name/base-export" / RECORD) == seal
    again = run_all(a_plan(keep="adapters", cycles=2), tmp_path / "run")
    assert all(isinstance(event, StepFinished) and event.reused for event in again)


class Digesting(FakeExporter):
    """Takes the digest of a merged file while it writes it."""

    def export(self, *given: Any) -> Exported:
        made = super().export(*given)
        return replace(made, digest=digest_by_pieces(made.path)) if made.path.name == "model.gguf" else made


def test_a_merged_file_is_known_by_pieces_is_not_waited_for_and_damage_in_it_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("iterft_lite.engine.store.flush", lambda path: flushed.append(path.name))
    plan = a_plan(keep="all", cycles=0)
    run_all(plan, tmp_path / "run", replace(fake_backends(), exporter=Digesting()))
    assert "probe.npz" in flushed
    assert "model.gguf" not in flushed
    folder = step_path(tmp_path / "run", "c0-export")
    assert read_json(folder / RECORD)["files"]["model.gguf"]["piece_bytes"] == PIECE
    assert not began(run_all(plan, tmp_path / "run"))
    spoil(folder / "model.gguf")
    export = folder_at(folder)
    assert export is not None
    with pytest.raises(StoreError, match=r"model.gguf` was changed after its step was finished"):
        export.verify()


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_a_merged_file_that_a_power_failure_cut_off_is_written_again_when_it_is_needed(tmp_path: Path) -> None:
    run_all(a_plan(keep="all", cycles=0), tmp_path / "run")
    merged = step_path(tmp_path / "run", "c0-export") / "model.gguf"
    whole = merged.read_bytes()
    spoil(merged)
    assert not began(run_all(a_plan(keep="all", cycles=0), tmp_path / "run"))
    assert not merged.exists()
    done = began(run_all(a_plan(keep="all", cycles=1), tmp_path / "run"))
    assert done
    assert all(name.startswith("c1-") for name in done)
    assert merged.read_bytes() == whole


def test_who_took_a_merged_files_digest_makes_no_other_result(tmp_path: Path) -> None:
    plan = a_plan(keep="all", cycles=0)
    run_all(plan, tmp_path / "run")
    remove(tmp_path / "run", "c0-export")
    assert began(run_all(plan, tmp_path / "run", replace(fake_backends(), exporter=Digesting()))) == {"c0-export"}


def test_a_record_of_format_2_holds_and_a_change_in_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_plan(keep="all", cycles=0)
    with monkeypatch.context() as before:
        before.setattr("iterft_lite.engine.completion.FORMAT", 2)
        before.setattr("iterft_lite.engine.store.MODEL", ".none")  # every digest was of the whole
        run_all(plan, tmp_path / "run")
    path = step_path(tmp_path / "run", "c0-export") / RECORD
    assert set(read_json(path)["files"]["model.gguf"]) == {"sha256", "bytes"}
    assert not began(run_all(plan, tmp_path / "run"))
    path.write_text(json.dumps(read_json(path) | {"seconds": 1.0}))
    with pytest.raises(StoreError, match=r"completion.json` was changed after the step was finished"):
        run_all(plan, tmp_path / "run")


def test_verdicts_on_another_runs_answers_are_not_reused(tmp_path: Path) -> None:
    plan = a_plan(cycles=0)
    first, second = ran(plan, tmp_path / "first"), ran(plan, tmp_path / "second", other_words())
    others = {plan.steps[name].key for name in ("c0-evaluate_samples", "c0-text_metrics")}
    steps = first | {key: folder for key, folder in second.items() if key in others}
    judge = CountingJudge()
    events = run_all(plan, tmp_path / "third", replace(fake_backends(), judge=judge), reuse=steps)
    assert began(events) == {"c0-judge", "c0-aggregate"}
    assert judge.asked == 6 * 2
    events = run_all(plan, tmp_path / "fourth", reuse=first)
    assert all(isinstance(event, StepFinished) and event.reused for event in events)


# -- one store, several runs


def test_runs_over_one_store_do_shared_steps_once(tmp_path: Path) -> None:
    plans = [a_plan(regime="dpo"), a_plan(regime="dpo", start="base")]
    for number, plan in enumerate(plans):
        executor = LocalExecutor(fake_backends(), "nano", 64)
        with Run(tmp_path / f"run{number}", tmp_path) as folder:
            folder.write_manifest({"recipe": plan.recipe.model_dump(mode="json")}, list(plan))
            events = list(run(plan, folder, executor))
    assert not any(name.startswith(("base", "c0")) for name in began(events))
    assert "c1-build_dataset" not in began(events)
    keys = {step.key for plan in plans for step in plan}
    assert {path.name for path in (tmp_path / "steps").iterdir()} == keys
    assert (tmp_path / "run1/by-name/c0-train").resolve() == (tmp_path / "run0/by-name/c0-train").resolve()


def test_a_step_in_progress_elsewhere_is_waited_for_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_plan(cycles=0)
    monkeypatch.setattr("iterft_lite.engine.run.WAIT", 0.05)
    with Run(tmp_path / "mine", tmp_path) as mine:
        other = Making(mine.folder(plan.steps["c0-train"]))
        assert other.try_acquire()
        made: list[Event] = []
        thread = threading.Thread(target=lambda: made.extend(run(plan, mine, LocalExecutor(fake_backends(), "nano", 64))))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()  # all that it could do is done; it waits for the training
        other.release()
        thread.join(20)
    assert "c0-train" in began(made)


def test_a_manifest_with_a_missing_step_names_it(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "run")
    remove(tmp_path / "run", "c0-train")
    assert began(run_all(a_plan(cycles=0), tmp_path / "run")) == {"c0-train"}


@pytest.mark.parametrize("change", [{"seconds": 1.0}, {"results": {"rows": 99}}, {"versions": {"torch": "1.0"}}])
def test_a_change_of_any_number_in_a_completion_record_is_noticed(tmp_path: Path, change: dict[str, object]) -> None:
    run_all(a_plan(cycles=0), tmp_path / "run")
    path = step_path(tmp_path / "run", "c0-build_dataset") / RECORD
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(StoreError, match=r"completion.json` was changed after the step was finished"):
        run_all(a_plan(cycles=0), tmp_path / "run")


def test_a_changed_step_definition_is_noticed(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "run")
    path = step_path(tmp_path / "run", "c0-train") / "step.json"
    path.write_text(json.dumps(read_json(path) | {"cycle": 3}))
    with pytest.raises(StoreError, match=r"step.json` was changed after its step was finished"):
        run_all(a_plan(cycles=0), tmp_path / "run")


def test_a_folder_of_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "run")
    path = tmp_path / "run/run.json"
    path.write_text(json.dumps(read_json(path) | {"format": 3}))
    with pytest.raises(FolderError, match=r"run.json` is of format 3, this version reads up to 2"):
        Run(tmp_path / "run").known()


def test_only_files_declared_by_the_verb_belong_to_a_result(tmp_path: Path) -> None:
    class Messy(FakeTrainer):
        def train(self, job: TrainJob, *more: Any) -> TrainResult:
            made = super().train(job, *more)
            (job.out / "adapter" / ".tmpABC").write_bytes(b"half")
            return made

    run_all(a_plan(cycles=0), tmp_path / "run", replace(fake_backends(), trainer=Messy()))
    folder = step_path(tmp_path / "run", "c0-train")
    found = read_completion(folder)
    assert found
    assert set(found.files) == {"adapter/texts.json", "probe.npz"}
    assert not (folder / "adapter/.tmpABC").exists()


# -- another judge, held-out questions


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-key-0123456789")
    (tmp_path / "small.toml").write_text(small_recipe(cycles=1))
    go_on(tmp_path / "run")
    return tmp_path / "run"


def go_on(root: Path) -> None:
    with open_run(root.parent / "small.toml", (), root) as opened:
        list(opened.events())


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_another_judges_verdicts_on_earlier_answers_are_refused_for_new_ones(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubProcess() as stub:
        asked = ("judge", finished, "--judge", PAPER, "--api-base", stub.api_base)
        assert iterft(*asked).exit_code == 0
        remove(finished, "c1-evaluate_samples")
        monkeypatch.setattr("iterft_lite.engine.backends.FakeGenerator", OtherWords)
        with pytest.raises(StoreError) as caught:
            go_on(finished)
        assert names_in(iterft("report", finished).output) == names_in(str(caught.value))
        # the run's own judge and the other one, each with its scores
        assert sorted(names_in(str(caught.value))) == sorted(["c1-aggregate", "c1-judge"] * 2 + ["c1-text_metrics"])
        remove(finished, "c1-judge", "c1-aggregate", "c1-text_metrics")
        go_on(finished)
        for command in (
            asked,
            ("report", finished, "--judge", PAPER),
            ("judge", "agree", finished, "--judges", f"fake,{PAPER}"),
        ):
            refused = iterft(*command)
            assert refused.exit_code == 1, command
            assert "was made from another `c1-evaluate_samples`" in refused.output
            assert sorted(names_in(refused.output)) == ["c1-aggregate", "c1-judge"]
        for folder in shlex.split(next(line for line in refused.output.splitlines() if "rm -r" in line))[2:]:
            shutil.rmtree(folder)
        assert iterft(*asked).exit_code == 0
        assert iterft("report", finished, "--judge", PAPER).exit_code == 0


def test_held_out_answers_of_an_earlier_model_are_not_reported(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert iterft("report", finished, "--held-out").exit_code == 0
    remove(finished, "c1-evaluate_samples-held_out")
    monkeypatch.setattr("iterft_lite.engine.backends.FakeGenerator", OtherWords)
    for command in (("report", finished, "--held-out"), ("report", finished)):
        refused = iterft(*command)
        assert refused.exit_code == 1
        assert sorted(names_in(refused.output)) == ["c1-aggregate-held_out", "c1-judge-held_out"]


# -- with which versions


def test_a_completion_record_lists_the_libraries_of_its_step() -> None:
    plan = a_plan()
    steps = ("base-load_base", "c0-seed_rows", "c0-train", "c1-build_dataset", "c1-training_samples", "c1-export", "c1-judge")
    packages = {step: set(libraries(plan.steps[step], plan.recipe)) for step in steps}
    trainer, llama = {"torch", "transformers", "peft"}, {"llama-cpp-python", "gguf"}
    assert packages == {
        "base-load_base": trainer,
        "c0-seed_rows": set(),
        "c0-train": trainer,
        "c1-build_dataset": set(),
        "c1-training_samples": llama,
        "c1-export": llama,
        "c1-judge": {"scikit-learn", "numpy"},
    }


def test_a_report_says_which_steps_were_made_with_another_version(finished: Path, tmp_path: Path) -> None:
    before = json.loads(iterft("report", finished, "--json").stdout)
    assert before["version_changes"] == {}
    assert "same versions" not in iterft("report", finished).stdout
    for step in ("base-load_base", "c0-train"):
        folder = step_path(finished, step)
        known = read_completion(folder)
        assert known
        change_completion(folder, versions={**known.versions, "torch": "2.4.0"})
    change_completion(step_path(finished, "c1-train"), versions={"torch": "2.13.0"})
    report = json.loads(iterft("report", finished, "--json").stdout)
    assert report["version_changes"] == {"torch": {"2.4.0": ["base-load_base", "c0-train"], "2.13.0": ["c1-train"]}}
    assert report["versions"] == before["versions"]
    sentence = "not all steps were made with the same versions: torch 2.4.0 (base c0), 2.13.0 (c1)"
    assert sentence in " ".join(iterft("report", finished).stdout.split())
    iterft("report", finished, "--html", tmp_path / "page.html")
    assert sentence[1:] in (tmp_path / "page.html").read_text()


def test_a_reused_step_keeps_the_versions_that_made_it(tmp_path: Path) -> None:
    plan = a_plan(cycles=0)
    first = ran(plan, tmp_path / "first")
    change_completion(step_path(tmp_path / "first", "c0-train"), versions={"torch": "1.0"})
    run_all(plan, tmp_path / "second", reuse=first)
    found = read_completion(step_path(tmp_path / "second", "c0-train"))
    assert found
    assert found.versions == {"torch": "1.0"}


def test_a_failed_session_stores_its_failure_kind_until_one_succeeds(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    remove(finished, "c1-train")
    with monkeypatch.context() as patch:
        patch.setattr(FakeTrainer, "train", broken)
        with pytest.raises(MemoryError):
            go_on(finished)
    failure = json.loads(iterft("report", finished, "--json").stdout)["failure"]
    assert (failure["step"], failure["kind"]) == ("c1-train", "bug")
    go_on(finished)
    assert json.loads(iterft("report", finished, "--json").stdout)["failure"] is None
