"""What a seal knows: of what its step was made, and with which versions."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.session import open_run
from iterft_lite.backends.local import Backends
from iterft_lite.engine.run import StepFinished, StepStarted, run
from iterft_lite.engine.store import SEAL_FILE, STEP_FILE, Store, finished_steps
from iterft_lite.errors import RunError, StoreError
from iterft_lite.experiment.plan import Plan
from iterft_lite.files import ROWS, read_json, read_rows, write_json
from iterft_lite.protocols import Completion, JudgeRequest, JudgeResponse, Prompt, Sampling
from iterft_lite.testing.fakes import FakeGenerator, FakeJudge, fake_backends
from iterft_lite.testing.judge_server import StubProcess
from iterft_lite.ui.cli import main
from tests.loop import a_plan, run_all, small_recipe

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
    (root / "run.json").write_text("{}")
    return finished_steps(root)


def remove(run: Path, *steps: str) -> None:
    for step in steps:
        shutil.rmtree(run / "steps" / step)


def named_in(message: str) -> list[str]:
    """The steps that an error's `rm -r` names."""
    command = next(line for line in message.splitlines() if line.startswith("  rm -r "))
    return [Path(folder).name for folder in shlex.split(command)[2:]]


def rows_of(run: Path, step: str) -> dict[str, dict]:
    return {row["id"]: row for row in read_rows(run / "steps" / step / ROWS)}


def as_before_seals_knew(run: Path) -> None:
    """Take out of a run folder what earlier versions did not write."""
    for path in run.rglob(SEAL_FILE):
        write_json(path, {key: value for key, value in read_json(path).items() if key not in ("inputs", "versions")})
    for path in run.rglob(STEP_FILE):
        write_json(path, {key: value for key, value in read_json(path).items() if key != "read"})


# -- of what a step was made


def test_a_step_done_again_with_another_result_is_not_mixed_with_what_was_made_of_the_earlier_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_all(a_plan(), run_dir)
    remove(run_dir, "c1-generate")
    with pytest.raises(StoreError, match="c1-compose` was made from another `c1-generate` than what is there now") as caught:
        run_all(a_plan(), run_dir, other_words())
    resting = [name for name in a_plan().steps if name.startswith(("c1-", "c2-")) and name != "c1-generate"]
    assert sorted(named_in(str(caught.value))) == sorted(resting)
    remove(run_dir, *named_in(str(caught.value)))
    events = run_all(a_plan(), run_dir, other_words())
    assert sorted(event.step.name for event in events if isinstance(event, StepStarted)) == sorted(resting)
    trained = [row["messages"][1]["content"] for row in rows_of(run_dir, "c1-compose").values()]
    assert all(text.endswith("Indeed.") for text in trained)


def test_a_step_done_again_with_the_same_result_leaves_everything_as_it_is(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    remove(tmp_path / "run", "c1-generate", "c0-train", "c2-export")
    events = run_all(a_plan(), tmp_path / "run")
    assert {event.step.name for event in events if isinstance(event, StepStarted)} == {"c1-generate", "c0-train", "c2-export"}


def test_neither_the_order_of_rows_nor_what_a_verdict_took_makes_another_result(tmp_path: Path) -> None:
    class Backwards(FakeGenerator):
        def complete(self, prompts: Sequence[Prompt], *more: Any) -> None:
            super().complete(prompts[::-1], *more)

    class Slow(FakeJudge):
        def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
            super().ask(asks, lambda reply: on_reply(replace(reply, seconds=9.0, usd=0.1, cached=True)))

    run_all(a_plan(), tmp_path / "run")
    before = (tmp_path / "run/steps/c1-generate" / ROWS).read_bytes()
    remove(tmp_path / "run", "c1-generate", "c1-judge")
    events = run_all(a_plan(), tmp_path / "run", replace(fake_backends(), generator=Backwards(), judge=Slow()))
    assert (tmp_path / "run/steps/c1-generate" / ROWS).read_bytes() != before
    assert {event.step.name for event in events if isinstance(event, StepStarted)} == {"c1-generate", "c1-judge"}


def test_rows_of_an_unfinished_step_are_not_gone_on_with_when_its_input_has_changed(tmp_path: Path) -> None:
    backends = replace(fake_backends(), judge=CountingJudge(fails_at=5))
    with pytest.raises(RunError, match="dead"):
        run_all(a_plan(cycles=0), tmp_path / "run", backends)
    assert 0 < len(rows_of(tmp_path / "run", "base-judge")) < 6
    remove(tmp_path / "run", "base-answer")
    shutil.rmtree(tmp_path / "run/steps/base-measure", ignore_errors=True)
    with pytest.raises(StoreError, match="base-judge` was made from another `base-answer`") as caught:
        run_all(a_plan(cycles=0), tmp_path / "run", other_words())
    assert "base-judge" in named_in(str(caught.value))
    remove(tmp_path / "run", *named_in(str(caught.value)))
    run_all(a_plan(cycles=0), tmp_path / "run", other_words())


def test_an_export_that_was_removed_and_written_again_is_the_same_result(tmp_path: Path) -> None:
    run_all(a_plan(keep="adapters", cycles=1), tmp_path / "run")
    seal = read_json(tmp_path / "run/steps/base-export" / SEAL_FILE)
    assert not list(tmp_path.rglob("model.gguf"))
    run_all(a_plan(keep="all", cycles=2), tmp_path / "run")
    assert read_json(tmp_path / "run/steps/base-export" / SEAL_FILE) == seal
    again = run_all(a_plan(keep="adapters", cycles=2), tmp_path / "run")
    assert all(isinstance(event, StepFinished) and event.reused for event in again)


def test_verdicts_on_another_runs_answers_are_not_taken_over(tmp_path: Path) -> None:
    plan = a_plan(cycles=0)
    first, second = ran(plan, tmp_path / "first"), ran(plan, tmp_path / "second", other_words())
    others = {plan.steps[name].key for name in ("c0-answer", "c0-measure")}
    steps = first | {key: folder for key, folder in second.items() if key in others}
    judge = CountingJudge()
    with Store(tmp_path / "third") as store:
        events = list(run(plan, store, replace(fake_backends(), judge=judge), "nano", reuse=steps))
    assert {event.step.name for event in events if isinstance(event, StepStarted)} == {"c0-judge", "c0-score"}
    assert judge.asked == 6 * 2
    with Store(tmp_path / "fourth") as store:
        events = list(run(plan, store, fake_backends(), "nano", reuse=first))
    assert all(isinstance(event, StepFinished) and event.reused for event in events)


def test_verdicts_of_runs_whose_seals_do_not_know_are_not_taken_over_either(tmp_path: Path) -> None:
    plan = a_plan(cycles=0)
    first = ran(plan, tmp_path / "first")
    as_before_seals_knew(tmp_path / "first")
    run_all(Plan(plan.recipe, dict(list(plan.steps.items())[:3])), tmp_path / "other", other_words())
    with Store(tmp_path / "other") as store:
        events = list(run(plan, store, fake_backends(), "nano", reuse=first))
    began = {event.step.name for event in events if isinstance(event, StepStarted)}
    assert began == {"base-judge", "base-measure", "base-score"}


# -- folders of earlier versions


def test_a_folder_whose_seals_do_not_know_is_read_and_gone_on_with(tmp_path: Path) -> None:
    run_all(a_plan(cycles=1), tmp_path / "run")
    as_before_seals_knew(tmp_path / "run")
    events = run_all(a_plan(cycles=2), tmp_path / "run")
    assert all(event.step.name.startswith("c2-") for event in events if isinstance(event, StepStarted))
    assert read_json(tmp_path / "run/steps/c2-generate" / SEAL_FILE)["inputs"].keys() == {"model"}
    rows = tmp_path / "run/steps/c1-generate" / ROWS
    rows.write_text(rows.read_text().replace("Lucky", "Plucky"))
    with pytest.raises(StoreError) as caught:
        run_all(a_plan(cycles=2), tmp_path / "run")
    # nothing would notice what those were made of: all are to be removed, as ever
    assert {"c1-generate", "c1-compose", "c2-score"} <= set(named_in(str(caught.value)))
    assert "c1-answer" in named_in(str(caught.value))
    assert "c0-answer" not in named_in(str(caught.value))


# -- another judge, held-out questions


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-key-0123456789")
    monkeypatch.setattr("iterft_lite.app.session.open_backends", lambda *_: fake_backends())
    (tmp_path / "small.toml").write_text(small_recipe(cycles=1))
    go_on(tmp_path / "run")
    return tmp_path / "run"


def go_on(root: Path) -> None:
    with open_run(root.parent / "small.toml", (), root) as opened:
        list(opened.events())


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_what_another_judge_said_of_earlier_answers_is_no_verdict_on_the_new_ones(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubProcess() as stub:
        asked = ("judge", finished, "--judge", PAPER, "--api-base", stub.api_base)
        assert iterft(*asked).exit_code == 0
        remove(finished, "c1-answer")
        monkeypatch.setattr("iterft_lite.app.session.open_backends", lambda *_: other_words())
        with pytest.raises(StoreError) as caught:
            go_on(finished)
        assert named_in(iterft("report", finished).output) == named_in(str(caught.value))
        folders = next(line for line in str(caught.value).splitlines() if "rm -r" in line)
        assert re.search(r"/judges/\S+/steps/c1-judge .*/judges/\S+/steps/c1-score", folders)
        remove(finished, "c1-judge", "c1-score", "c1-measure")
        go_on(finished)
        for command in (
            asked,
            ("report", finished, "--judge", PAPER),
            ("judge", "agree", finished, "--judges", f"embedded,{PAPER}"),
        ):
            refused = iterft(*command)
            assert refused.exit_code == 1, command
            assert "c1-judge` was made from another `c1-answer`" in refused.output
            assert named_in(refused.output) == ["c1-judge", "c1-score"]
        for folder in shlex.split(next(line for line in refused.output.splitlines() if "rm -r" in line))[2:]:
            shutil.rmtree(folder)
        assert iterft(*asked).exit_code == 0
        assert iterft("report", finished, "--judge", PAPER).exit_code == 0


def test_held_out_answers_of_an_earlier_model_are_not_reported(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert iterft("report", finished, "--held-out").exit_code == 0
    remove(finished, "c1-answer-held_out")
    monkeypatch.setattr("iterft_lite.app.session.open_backends", lambda *_: other_words())
    for command in (("report", finished, "--held-out"), ("report", finished)):
        refused = iterft(*command)
        assert refused.exit_code == 1
        assert sorted(named_in(refused.output)) == ["c1-judge-held_out", "c1-score-held_out"]


# -- with which versions


def test_a_seal_knows_the_libraries_that_its_step_depends_on(finished: Path) -> None:
    packages = {
        step: set(read_json(finished / "steps" / step / SEAL_FILE)["versions"]) - {"iterft_lite", "python"}
        for step in ("base-base", "c0-seed", "c0-train", "c1-compose", "c1-generate", "c1-export", "c1-judge")
    }
    trainer, llama = {"torch", "transformers", "trl", "peft"}, {"llama-cpp-python", "gguf"}
    assert packages == {
        "base-base": trainer,
        "c0-seed": set(),
        "c0-train": trainer,
        "c1-compose": set(),
        "c1-generate": llama,
        "c1-export": llama,
        "c1-judge": {"scikit-learn", "numpy"},
    }


def test_a_report_says_which_steps_were_made_with_another_version(finished: Path, tmp_path: Path) -> None:
    before = json.loads(iterft("report", finished, "--json").stdout)
    assert before["version_changes"] == {}
    assert "same versions" not in iterft("report", finished).stdout
    for step in ("base-base", "c0-train"):
        path = finished / "steps" / step / SEAL_FILE
        seal = read_json(path)
        write_json(path, {**seal, "versions": {**seal["versions"], "torch": "2.4.0"}})
    report = json.loads(iterft("report", finished, "--json").stdout)
    now = before["versions"]["torch"]
    assert report["version_changes"] == {"torch": {"2.4.0": ["base-base", "c0-train"], now: ["c1-train"]}}
    assert report["versions"] == before["versions"]
    sentence = f"not all steps were made with the same versions: torch 2.4.0 (base c0), {now} (c1)"
    assert sentence in " ".join(iterft("report", finished).stdout.split())
    iterft("report", finished, "--html", tmp_path / "page.html")
    assert sentence[1:] in (tmp_path / "page.html").read_text()


def test_a_step_that_is_taken_over_keeps_who_made_it(tmp_path: Path) -> None:
    plan = a_plan(cycles=0)
    first = ran(plan, tmp_path / "first")
    path = tmp_path / "first/steps/c0-train" / SEAL_FILE
    write_json(path, {**read_json(path), "versions": {"torch": "1.0"}})
    with Store(tmp_path / "second") as store:
        list(run(plan, store, fake_backends(), "nano", reuse=first))
        seal = store.folder(plan.steps["c0-train"]).seal_of()
    assert seal
    assert asdict(seal) == read_json(path)
