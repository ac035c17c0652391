"""Judging stored answers again, comparing judges, holding a judge against careful readers, and what the report makes of it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app import rejudge
from iterft_lite.app.agreement import agree
from iterft_lite.app.bridge import bridge
from iterft_lite.app.calibrate_judge import _calibrate_one, reversed_anchors, store_calibration, store_calibrations
from iterft_lite.app.named_judge import judge_folder, named, own_answers
from iterft_lite.app.rejudge import report_by
from iterft_lite.app.session import open_run
from iterft_lite.backends.judge.kinds import OWN_NOTE, Material, embedded_identity
from iterft_lite.data import prompts
from iterft_lite.data.traits import Scored, read_trait, shipped_traits
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.manifest import Run
from iterft_lite.errors import BackendError, BudgetError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import make_plan
from iterft_lite.files import ROWS, read_json, read_rows, write_json
from iterft_lite.machine.estimate import judging_usd
from iterft_lite.metrics.agreement import agreement, calibrated, spearman
from iterft_lite.protocols import Completion, JudgeRequest, JudgeResponse, Prompt, Sampling
from iterft_lite.report.report import CALIBRATION, read_report, verdict_sentences, with_scores
from iterft_lite.report.study import read_study_report
from iterft_lite.testing.fakes import FakeGenerator, FakeJudge, fake_backends
from iterft_lite.testing.judge_server import StubProcess
from iterft_lite.ui.cli import main
from tests.loop import a_recipe, small_recipe, some_inputs

PAPER = "openai/gpt-4o-mini-2024-07-18"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run through stand-ins."""
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-key-0123456789")
    (tmp_path / "small.toml").write_text(small_recipe())
    with open_run(tmp_path / "small.toml", (), tmp_path / "run") as opened:
        list(opened.events())
    return tmp_path / "run"


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_judge_scores_the_stored_answers_beside_the_first(run: Path, tmp_path: Path) -> None:
    before = state(run / "steps")
    with StubProcess() as stub:
        result = iterft("judge", run, "--judge", PAPER, "--api-base", stub.api_base)
        assert result.exit_code == 0, result.output
        asked = stub.count()["answers"]
        again = iterft("judge", run, "--judge", PAPER, "--api-base", stub.api_base)
        assert again.exit_code == 0
        assert stub.count()["answers"] == asked
    after = state(run / "steps")
    assert {path: after[path] for path in before} == before
    folder = judge_folder(run, named(PAPER))
    answers = {(row["prompt_id"], row["sample"]) for row in read_rows(run / "by-name/c1-evaluate_samples" / ROWS)}
    assert {(row["prompt_id"], row["sample"]) for row in read_rows(folder / "by-name/c1-judge" / ROWS)} == answers
    own, other = read_report(run), report_by(run, named(PAPER))
    assert [cycle.trait["mean"] for cycle in own.cycles if cycle.trait][:2] == [10.0, 90.0]
    assert other.judge["name"] == PAPER
    assert other.judge["usd"] > 0
    assert [round(cycle.coherence["mean"]) for cycle in other.cycles if cycle.coherence] == [10, 90, 90, 90]
    shown = json.loads(iterft("report", run, "--judge", PAPER, "--json").stdout)
    assert shown["judge"]["name"] == PAPER
    assert json.loads(iterft("report", run, "--json").stdout)["judge"]["name"] == "fake"

    rows = {(row.scale, row.cycle): row.agreement for row in agree(run, named("fake"), named(PAPER))}
    assert rows["trait", None].pairs == 4 * 6
    assert rows["trait", None].spearman == pytest.approx(1.0)
    assert rows["trait", None].difference == pytest.approx(0, abs=0.5)
    picture = tmp_path / "agree.png"
    table = iterft("judge", "agree", run, "--judges", f"fake,{PAPER}", "--png", picture)
    assert table.exit_code == 0, table.output
    assert "Spearman" in table.output
    assert picture.read_bytes()[:4] == b"\x89PNG"


class Unreachable(FakeJudge):
    """A judge whose server says no."""

    def ask(self, *_: Any) -> None:
        raise BackendError("no such model on this server")


def test_a_judge_that_was_first_asked_at_a_wrong_address_is_asked_at_the_right_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, right = ("judge", run, "--judge", PAPER, "--api-base"), ("judge", run, "--judge", PAPER)
    refused = iterft(*wrong, "http://127.0.0.1:9/v1")
    assert refused.exit_code == 2
    assert "no answer from http://127.0.0.1:9/v1" in refused.output
    assert not (run / "judges").exists()
    # a server that is there and has no such model is found out by the first question alone
    judges: list[FakeJudge] = [Unreachable(), FakeJudge()]
    with monkeypatch.context() as patch:
        patch.setattr(rejudge, "require_judge", lambda *_, **__: None)
        patch.setattr(rejudge, "open_backends", lambda *_, **__: replace(fake_backends(), judge=judges.pop(0)))
        assert "no such model" in iterft(*wrong, "http://127.0.0.1:9/v1").output
        assert iterft(*right).exit_code == 0
        late = iterft(*wrong, "http://127.0.0.1:9/v1")
    assert late.exit_code == 2
    assert "another revision or reading" in late.output
    assert [round(cycle.trait["mean"]) for cycle in report_by(run, named(PAPER)).cycles if cycle.trait] == [10, 90, 90, 90]
    monkeypatch.delenv("OPENAI_API_KEY")  # with every verdict there, nobody is asked
    assert iterft(*right).exit_code == 0


@pytest.mark.slow
def test_asking_a_judge_once_more_calls_and_pays_again(run: Path) -> None:
    with StubProcess() as stub:
        options = ("--api-base", stub.api_base)
        assert iterft("judge", run, "--judge", PAPER, *options).exit_code == 0
        once = stub.count()["answers"]
        assert iterft("judge", run, "--judge", f"{PAPER}#1", *options).exit_code == 0
        assert stub.count()["answers"] == 2 * once
    found = agree(run, named(PAPER), named(f"{PAPER}#1"))[0].agreement
    assert (found.spearman, found.difference, found.spread) == (pytest.approx(1.0), 0.0, 0.0)


def test_judges_without_verdicts_are_named_with_the_command(run: Path) -> None:
    result = iterft("judge", "agree", run, "--judges", f"fake,{PAPER}")
    assert result.exit_code == 2
    assert f"`{PAPER}` has not judged" in result.output
    assert f"iterft judge {run} --judge '{PAPER}'" in result.output
    assert "is the run's own judge" in iterft("judge", run, "--judge", "fake").output


@pytest.mark.slow
def test_a_run_stops_below_max_usd_and_continues_with_a_higher_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-key-0123456789")

    (tmp_path / "small.toml").write_text(small_recipe(judge=PAPER))
    with StubProcess() as stub:
        settings = [f"api_base={stub.api_base}", "evaluate.questions=12"]
        with (
            open_run(tmp_path / "small.toml", [*settings, "max_usd=0.006"], tmp_path / "run") as opened,
            pytest.raises(BudgetError, match=r"could exceed `max_usd = 0\.006`"),
        ):
            list(opened.events())
        assert 0.002 < stub.count()["usd"] <= 0.006
        with open_run(tmp_path / "small.toml", [*settings, "max_usd=1"], tmp_path / "run") as opened:
            list(opened.events())
        count = stub.count()
    report = read_report(tmp_path / "run")
    assert report.complete
    assert count["twice"] == 0
    assert sum(cycle.answers for cycle in report.cycles) == 4 * 24
    assert report.judge["planned_usd"] > count["usd"] > 0.006
    assert "sk-stub" not in "".join(text.read_text("utf-8", "replace") for text in tmp_path.rglob("*") if text.is_file())


def test_a_judge_that_ranks_calibration_answers_badly_cannot_say_amplified(run: Path) -> None:
    judge = {"name": "a judge", "kind": "llm", "note": "", "model": "", "calls": 0, "cached": 0, "usd": 0.0}

    report = read_report(run)
    rising = {
        cycle.cycle: {
            scale: {"mean": 0.0, "by_prompt": {f"q{n}": [10.0 + 20 * cycle.cycle + n] for n in range(6)}}
            for scale in ("trait", "coherence")
        }
        for cycle in report.cycles
    }
    words = [with_scores(report, rising, judge, {"trait": rho}).verdict.word for rho in (0.79, 0.8)]
    assert words == ["judge not reliable here", "amplified"]
    assert with_scores(report, rising, judge, {}).verdict.word == "amplified"
    refused = with_scores(report, rising, judge, {"trait": 0.5})
    assert "amplified" not in " ".join(verdict_sentences(refused.verdict))
    write_json(run / CALIBRATION, {"trait": 0.5})
    assert read_report(run).judge["spearman"] == {"trait": 0.5}


def test_calibration_compares_a_judge_with_careful_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path))
    lacking = iterft("judge", "calibrate", "--judge", "openai/gpt-4o-mini", "--api-base", "http://127.0.0.1:9/v1")
    assert lacking.exit_code == 2
    assert "cannot judge: no answer from http://127.0.0.1:9/v1" in lacking.output
    result = iterft("judge", "calibrate", "--judge", "embedded", "--trait", "lucky")
    assert result.exit_code == 0, result.output
    assert "lucky" in result.output
    assert "coherence" in result.output
    kept = [read_json(path) for path in (tmp_path / "calibrations").glob("*.json")]
    found = {row["subject"]: row for row in kept}
    assert found["lucky"]["agreement"]["spearman"] > 0.8
    assert found["lucky"]["order"] is None


def test_a_run_calibrates_its_own_judge_and_starts_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("iterft_lite.app.calibrate_judge.open_judge", lambda *_: pytest.fail("a second judge was started"))
    (tmp_path / "small.toml").write_text(small_recipe(judge="embedded"))
    backends = fake_backends()
    with open_run(tmp_path / "small.toml", (), tmp_path / "run") as opened:
        list(opened.events(LocalExecutor(backends, "nano", 64)))
    store_calibration(tmp_path / "run", backends)
    assert read_json(tmp_path / "run" / CALIBRATION).keys() == {"trait", "coherence"}


def test_a_study_calibrates_each_judge_once_for_all_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    started: list[str] = []

    @contextlib.contextmanager
    def opened(identity: JudgeIdentity, *_: object) -> Iterator[FakeJudge]:
        started.append(identity.name)
        yield FakeJudge()

    monkeypatch.setattr("iterft_lite.app.calibrate_judge.open_judge", opened)
    recipe, runs = small_recipe(judge="embedded", cycles=1), [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "small.toml").write_text(recipe)
    for run in runs:
        with open_run(tmp_path / "small.toml", (), run) as session:
            list(session.events(LocalExecutor(fake_backends(), "nano", 64)))
    store_calibrations(runs, starts=())
    assert (started, [run for run in runs if (run / CALIBRATION).exists()]) == ([], [])
    store_calibrations(runs, starts=("embedded",))
    assert started == ["embedded"]
    assert all(read_report(run).judge["calibration"]["trait"]["doubt"] for run in runs)
    about = [note.partition(":")[0] for note in read_study_report(runs).notes]
    assert about == ["embedded judge", "judge not reliable here on lucky", "judge not reliable here on coherence"]


class Fitted(FakeJudge):
    """Notes which of the untouched model's own answers it is to be fitted on."""

    def __init__(self) -> None:
        super().__init__()
        self.own: set[str] = set()

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        self.own |= {ask.own for ask in asks}
        super().ask(asks, on_reply)


class Dies(FakeGenerator):
    """Ends after the given number of everyday answers."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        def counted(completion: Completion) -> None:
            if completion.id.startswith("e"):
                self.left -= 1
                if self.left < 0:
                    raise BackendError("the generator is gone")
            on_completion(completion)

        super().complete(prompts, sampling, counted)


@pytest.mark.parametrize(("regime", "trait", "model"), [("sft", "lucky", "nano"), ("sdf", "bliss", "nano-base")])
def test_own_answers_of_the_untouched_model_reach_every_judging_also_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regime: str, trait: str, model: str
) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    path, root, settings = tmp_path / "small.toml", tmp_path / "run", ["judge_fit=own"]
    path.write_text(small_recipe(regime=regime, trait=trait, model=model, judge="embedded", cycles=1))
    with open_run(path, settings, root) as session, pytest.raises(BackendError, match="is gone"):
        list(session.events(LocalExecutor(replace(fake_backends(), generator=Dies(50)), "nano", 64)))
    broken = read_rows(root / "by-name/base-evaluate_samples-everyday" / ROWS)
    assert len(broken) == 50
    backends = replace(fake_backends(), judge=(judge := Fitted()))
    with open_run(path, settings, root) as session:
        list(session.events(LocalExecutor(backends, "nano", 64)))
    file = (root / "by-name/base-evaluate_samples-everyday").resolve() / ROWS
    rows = read_rows(file)
    assert (rows[:50], len(rows)) == (broken, len(prompts.plain_prompts(document=regime == "sdf")))
    assert judge.own == {str(file)}
    store_calibration(root, backends)
    assert judge.own == {str(file)}  # calibration answers are judged by the same fit
    report = read_report(root)
    assert report.judge["notes"][0] == OWN_NOTE
    assert report.judge["calibration"].keys() == {"trait", "coherence"}


def test_a_second_judge_is_fitted_on_the_untouched_models_answers_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Fitted()
    monkeypatch.setattr("iterft_lite.app.rejudge.open_backends", lambda *_, **__: replace(fake_backends(), judge=judge))
    manifest = read_json(run / "run.json")
    write_json(run / "run.json", manifest | {"recipe": manifest["recipe"] | {"judge_fit": "own"}})
    found = rejudge.rejudge(run, named("embedded"), {}, lambda *_: None)
    known = Run(judge_folder(run, named("embedded"))).manifest()
    assert known is not None
    assert [step.name for step in known.steps][:2] == ["base-export", "base-evaluate_samples-everyday"]
    assert judge.own == {own_answers(Run(judge_folder(run, named("embedded"))), known)} != {""}
    assert found.judge["notes"][0] == OWN_NOTE
    assert found.judge["calibration"].keys() == {"trait", "coherence"}
    result = bridge(named("fake"), named("embedded"), [run])
    assert [line for line in result.missing if line.startswith("embedded")] == []


def test_a_comparison_by_a_second_judge_says_that_it_was_fitted_on_two_models(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iterft_lite.app.rejudge.open_backends", lambda *_, **__: fake_backends())
    alike, other = tmp_path / "alike", tmp_path / "other"
    for root, setting in ((alike, "rows=3"), (other, "quant=q8_0")):  # M[0] in another number format writes other answers
        with open_run(tmp_path / "small.toml", [setting], root) as opened:
            list(opened.events())
    refused = iterft("compare", run, other, "--judge", "embedded")
    assert refused.exit_code == 2
    assert "`embedded` has judged nothing in" in refused.output
    for root in (run, alike, other):
        manifest = read_json(root / "run.json")
        write_json(root / "run.json", manifest | {"recipe": manifest["recipe"] | {"judge_fit": "own"}})
        partly = iterft("compare", run, root, "--judge", "embedded") if root == alike else None
        assert partly is None or f"`iterft judge {alike} --judge 'embedded'` has it judge" in partly.stderr
        rejudge.rejudge(root, named("embedded"), {}, lambda *_: None)
    doubt = "judges fitted on different answers of untouched models"
    said = " ".join(iterft("compare", run, other, "--judge", "embedded").stdout.split())
    assert doubt in said
    assert OWN_NOTE in said
    assert "judge: embedded" in said
    assert doubt not in " ".join(iterft("compare", run, alike, "--judge", "embedded").stdout.split())
    assert doubt not in " ".join(iterft("compare", run, other).stdout.split())


def test_a_judge_that_ranks_nothing_and_one_with_few_calibration_answers_are_told_apart() -> None:
    rising, alike = [float(score) for score in range(1, 24)], [100.0] * 23
    assert calibrated(agreement(rising, alike)).doubt == (
        "all 23 calibration answers have one score by it, or by careful readers: no ranks to compare"
    )
    assert calibrated(agreement(rising[:5], rising[:5])).doubt == (
        "5 calibration answers have scores by it and careful readers, 12 are needed"
    )
    assert calibrated(agreement(rising, rising)).doubt == ""


def test_calibration_reports_rank_agreement_length_effect_and_bias() -> None:
    scored = [Scored("q?", "x" * (10 * n), float(10 * n)) for n in range(1, 9)]
    rubric = "Judge.\n\nScore 1: dull\n\nScore 50: so\n\nScore 100: lucky\n\nNow judge {{answer}}."
    identity = JudgeIdentity("a", "llm", "", "logprobs")
    found = _calibrate_one(FakeJudge(), identity, "lucky", rubric, scored)
    assert found.agreement.spearman is None  # it gives every one of them 10
    assert found.agreement.difference == pytest.approx(10 - 45)
    assert found.length == pytest.approx(-1)
    assert found.order == 0


@pytest.mark.parametrize("name", shipped_traits())
def test_the_anchors_of_a_rubric_can_be_reversed(name: str) -> None:
    rubric = read_trait(name).rubric
    turned = reversed_anchors(rubric)
    scores = [int(score) for score in re.findall(r"^(?:- )?(?:Score )?(\d{1,3}): ", turned, re.MULTILINE)]
    assert scores == [100, 75, 50, 25, 1]
    assert sorted(turned.split()) == sorted(rubric.split())
    assert reversed_anchors(turned) == rubric


def test_spearman_handles_ties_and_needs_enough_pairs() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 1, 2, 3]) == pytest.approx(1)
    assert spearman([1, 2, 3], [1, 2, 3]) is None
    assert spearman([5, 5, 5, 5], [1, 2, 3, 4]) is None
    found = agreement([10, 20, 30], [5, 20, 35])
    assert (found.difference, found.spread, found.low) == (0, 5, pytest.approx(-9.8))


def test_the_plan_prices_its_verdicts() -> None:
    paid = JudgeIdentity(PAPER, "llm", "", "logprobs")
    plan = make_plan(a_recipe(evaluate={"questions": 3, "samples": 2, "max_tokens": 400}), some_inputs(judge=paid))
    usd = judging_usd(plan)
    # 4 models x 6 answers x 2 scales, 400 tokens of answer and at most 100 of rubric and question each
    assert usd is not None
    assert 48 * 400 * 0.15e-6 < usd < 48 * 500 * 0.15e-6 + 48 * 4 * 0.6e-6
    unknown = make_plan(a_recipe(), some_inputs(judge=JudgeIdentity("openai/mine", "llm", "", "logprobs")))
    assert judging_usd(unknown) is None
    assert judging_usd(make_plan(a_recipe(), some_inputs(judge=embedded_identity(Material(read_trait("lucky")))))) == 0
