"""Which server a judge is asked at, with which key, and what of that is told and kept."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from iterft_lite.app import check_judge as checks
from iterft_lite.app import doctor
from iterft_lite.app.check_judge import JudgeCheck, check_judge, require_judge
from iterft_lite.app.session import open_run
from iterft_lite.backends.judge import identity as identities
from iterft_lite.backends.judge import prices
from iterft_lite.backends.judge.cache import VerdictCache
from iterft_lite.backends.judge.identity import PAPER_JUDGE, judge_identity
from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.backends.judge.probe import LitellmProbe, Probed
from iterft_lite.backends.judge.provider import LitellmJudge
from iterft_lite.backends.judge.providers import key_of, providers, server_of
from iterft_lite.data.traits import read_trait
from iterft_lite.errors import BackendError, RecipeError, UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.protocols import JudgeResponse
from iterft_lite.report.report import read_report
from iterft_lite.testing.judge_server import StubProcess
from tests.loop import small_recipe
from tests.test_judging import KEY, a_judge, ask_all, asks, clean

__all__ = ["clean"]  # a cache and a folder of its own for each test


def recipe(**given: object) -> Recipe:
    return make_recipe({"regime": "sft", "trait": "lucky", "model": "nano", **given}, source="test")


def identity(**given: object) -> tuple[JudgeIdentity, str]:
    return judge_identity(recipe(**given), Material(read_trait("lucky")))


# -- addresses


@pytest.mark.parametrize("name", sorted(providers()))
def test_every_redirecting_variable_is_reported_and_changes_the_judges_identity(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = identity(judge=f"{name}/m")
    for variable in providers()[name].redirects:
        with monkeypatch.context() as patched:
            patched.setenv(variable, "http://127.0.0.1:9/v1/")
            found, said = identity(judge=f"{name}/m")
        assert found.address == "http://127.0.0.1:9/v1"
        assert found.revision not in (plain.revision, "")
        assert f"asked at http://127.0.0.1:9/v1 (from {variable})" in said


def test_redirected_and_pinned_judges_do_not_share_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubProcess() as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.api_base)
        redirected, _ = identity(judge=PAPER_JUDGE)
        judge = LitellmJudge(asdict(redirected))
        ask_all(judge, asks(1))
        assert stub.count()["answers"] == 1
        monkeypatch.delenv("OPENAI_BASE_URL")
        pinned, said = identity(judge=PAPER_JUDGE)
        assert pinned.address == "https://api.openai.com/v1"
        assert "asked at https://api.openai.com/v1" in said
        key = LitellmJudge(asdict(pinned)).key(asks(1)[0])
    assert key != judge.key(asks(1)[0])
    assert VerdictCache().get(key, "a") is None


def test_variables_changed_after_planning_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubProcess() as stub, StubProcess() as thief:
        monkeypatch.setenv("OPENAI_BASE_URL", thief.api_base)
        monkeypatch.setenv("OPENAI_API_BASE", thief.api_base)
        ask_all(a_judge(stub), asks(2))
        assert (stub.count()["answers"], thief.count()["calls"]) == (2, 0)


def test_the_recipes_address_overrides_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://variable/v1")
    found, _ = identity(judge="openai/m", api_base="http://recipe/v1")
    assert found.address == "http://recipe/v1"


@pytest.mark.parametrize("address", ["file:///etc/passwd", "localhost:8000", "http://"])
def test_an_invalid_judge_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not the address"):
        server_of("openai/m", address, {})


def test_a_password_in_a_variables_address_is_refused_and_not_printed() -> None:
    with pytest.raises(UserError, match="holds a user or a password") as caught:
        server_of("openai/m", None, {"OPENAI_BASE_URL": "https://me:pass1word@host/v1"})
    assert "pass1word" not in str(caught.value)


# -- keys


def test_a_key_is_sent_to_its_providers_own_server_only() -> None:
    known = {"OPENAI_API_KEY": "sk-1", "ITERFT_KEY_HOST_8000": "sk-2", "AZURE_API_KEY": "az"}
    assert key_of("openai/m", "https://api.openai.com/v1", known) == "sk-1"
    assert key_of("openai/m", "http://api.openai.com/v1", known) is None  # nobody vouches for it without encryption
    assert key_of("openai/m", "https://api.openai.com.evil.net/v1", known) is None
    assert key_of("openai/m", "http://host:8000/v1", known) == "sk-2"
    assert key_of("azure/m", "https://mine.openai.azure.com", known) == "az"
    assert key_of("azure/m", "https://mine.evil.net", known) is None


@pytest.mark.parametrize("written", [f"{KEY}\r\n", f"  {KEY} ", f"\t{KEY}"])
def test_blanks_around_a_key_are_removed(written: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", written)
    assert environment(tmp_path)["OPENAI_API_KEY"] == KEY


def test_a_key_of_blanks_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " \r\n")
    assert identity(judge="auto")[0].name == "embedded"
    with pytest.raises(BackendError, match="there is no key for"):
        LitellmJudge(asdict(identity(judge=PAPER_JUDGE)[0]))


def test_only_api_keys_are_taken_from_a_dotenv_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = (
        "OPENAI_BASE_URL=http://evil/v1\nHTTPS_PROXY=http://evil\nANTHROPIC_API_KEY='sk-ant-1 '\nITERFT_KEY_HOST=k\nPATH=/evil"
    )
    (tmp_path / ".env").write_text(lines)
    found = environment(tmp_path)
    assert (found["ANTHROPIC_API_KEY"], found["ITERFT_KEY_HOST"]) == ("sk-ant-1", "k")
    assert not {"OPENAI_BASE_URL", "HTTPS_PROXY"} & (found.keys() - os.environ.keys())
    assert found["PATH"] == os.environ["PATH"]
    assert identity(judge=PAPER_JUDGE)[0].address == "https://api.openai.com/v1"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_dotenv_file_from_windows_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GEMINI_API_KEY=abc-def\n", encoding=encoding)
    assert environment(tmp_path)["GEMINI_API_KEY"] == "abc-def"


def test_a_binary_dotenv_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"OPENAI_API_KEY=\xe9\xff")
    with pytest.raises(UserError, match=r"\.env` cannot be read"):
        environment(tmp_path)


# -- before the first step


def test_a_reachable_judge_has_no_problem() -> None:
    with StubProcess() as stub:
        found, _ = identity(judge=PAPER_JUDGE, api_base=stub.api_base)
        assert check_judge(found, recipe()).problems == ()
        assert stub.count()["calls"] == 0  # nothing is asked that costs


def test_a_missing_key_is_reported_with_its_variable_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    found, _ = identity(judge=PAPER_JUDGE)
    (problem,) = check_judge(found, recipe()).problems
    assert problem == "there is no key for https://api.openai.com/v1: set OPENAI_API_KEY in the environment or .env"
    with pytest.raises(UserError, match="cannot judge: there is no key"):
        require_judge(found, recipe())


def test_a_judge_without_an_address_is_reported_with_where_to_set_it() -> None:
    (problem,) = check_judge(identity(judge="hosted_vllm/mine")[0], recipe()).problems
    assert problem == "`hosted_vllm` has no server of its own: set `api_base`, or HOSTED_VLLM_API_BASE"


def test_a_refused_key_is_reported_with_its_variable() -> None:
    with StubProcess(key="sk-another") as stub:
        found, _ = identity(judge=PAPER_JUDGE, api_base=stub.api_base)
        (problem,) = check_judge(found, recipe()).problems
    assert problem == f"{stub.api_base} refuses the key (401): set {stub.key_variable}"


def test_a_model_missing_on_a_server_is_reported_with_the_available_ones() -> None:
    with StubProcess(model="llama3") as stub:
        found, _ = identity(judge="openai/lama3", api_base=stub.api_base)
        (problem,) = check_judge(found, recipe()).problems
    assert problem == f"{stub.api_base} has no model `lama3`; it has llama3"


def test_an_unreachable_server_is_reported_with_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = identity(judge="ollama/llama3", api_base="http://127.0.0.1:9")
    (problem,) = check_judge(found, recipe()).problems
    assert problem.startswith("no answer from http://127.0.0.1:9: ")
    assert "refused" in problem
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:7")
    (problem,) = check_judge(found, recipe()).problems
    assert problem.endswith("through the proxy http://127.0.0.1:7")


def test_the_reason_for_a_failed_connection_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.backends.judge.provider.TRIES", 1)
    who = JudgeIdentity("openai/m", "llm", "a test", "logprobs", address="http://127.0.0.1:9/v1")
    with pytest.raises(BackendError, match=r"no connection: .*(refused|[Cc]onnect)"):
        ask_all(LitellmJudge(asdict(who), first_wait=0.001), asks(1))


@pytest.mark.parametrize("name", ["gpt4", "gpt-4o-mini", "embeded", "openai/"])
def test_an_invalid_judge_name_is_refused_when_planning(name: str) -> None:
    with pytest.raises(RecipeError, match=f'judge = "{name}"` is not a judge'):
        identity(judge=name)


@pytest.mark.parametrize(("name", "meant"), [("gpt4/x", "a server of your own"), ("opnai/gpt-4o", "did you mean `openai`?")])
def test_an_unknown_provider_is_reported_when_planning(name: str, meant: str) -> None:
    (problem,) = check_judge(identity(judge=name)[0], recipe()).problems
    assert problem.startswith(f"there is no provider `{name.split('/')[0]}`: ")
    assert meant in problem


def test_a_provider_that_only_litellm_knows_is_tried_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = identity(judge="huggingface/some/model")
    monkeypatch.setattr(checks, "_probed", lambda who, _: JudgeCheck(who, ("was tried",)))
    assert check_judge(found, recipe()).problems == ()
    assert check_judge(found, recipe(), live=True).problems == ("was tried",)


def test_a_server_that_is_not_running_is_reported_with_the_command_that_starts_it() -> None:
    (problem,) = check_judge(identity(judge="ollama/llama3", api_base="http://127.0.0.1:9")[0], recipe()).problems
    assert problem.endswith(": `ollama serve` starts it")


def test_a_server_without_any_model_is_reported_with_the_command_that_fetches_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_get", lambda *_: [])
    (problem,) = check_judge(identity(judge="ollama/llama3")[0], recipe()).problems
    assert problem == "http://localhost:11434 has no model `llama3`; it has none; `ollama pull llama3` fetches it"


# -- judges that end


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that day."""
    monkeypatch.setattr(prices, "today", lambda: prices.datetime.date.fromisoformat(day))


def test_a_judges_shutdown_date_is_shown_with_the_days_left(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2027-01-04", monkeypatch)
    assert f"switch {PAPER_JUDGE} off on 2027-01-14, in 10 days" in identity(judge=PAPER_JUDGE)[1]


def test_a_judge_past_its_shutdown_is_refused_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2027-01-15", monkeypatch)
    found, said = identity(judge=PAPER_JUDGE)
    assert "was switched off on 2027-01-14" in said
    assert "iterft judge bridge" in check_judge(found, recipe()).problems[0]
    with pytest.raises(BackendError, match=r"(?s)was switched off by its provider.*iterft judge bridge"):
        LitellmJudge(asdict(found))


def test_shutdown_dates_do_not_apply_to_ones_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2030-01-01", monkeypatch)
    with StubProcess() as stub:
        found, said = identity(judge=PAPER_JUDGE, api_base=stub.api_base)
        assert "switched off" not in said
        assert len(ask_all(LitellmJudge(asdict(found)), asks(2))) == 2
    assert prices.price_of("azure/gpt-4o-mini") == prices.Price(0.15, 0.075, 0.60, "2027-04-14")


def test_auto_takes_a_successor_after_the_papers_judge_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity(judge="auto")[0].name == PAPER_JUDGE
    on("2027-02-01", monkeypatch)
    found, said = identity(judge="auto")
    assert (found.name, found.method, found.effort) == ("openai/gpt-6-luna", "logprobs", "none")
    assert f"{PAPER_JUDGE} was switched off on 2027-01-14" in said


def test_auto_without_a_key_takes_the_untouched_model_if_it_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    for size, judge in ((4.02e9, "base"), (1.35e8, "embedded"), (None, "embedded")):
        monkeypatch.setattr(identities, "instruct_parameters", lambda _, size=size: size)
        found, said = identity(judge="auto")
        assert found.name == judge
        assert "no OPENAI_API_KEY" in said
    monkeypatch.setattr(identities, "instruct_parameters", lambda _: 4.02e9)
    assert "judge and subject are relatives" in identity(judge="auto")[0].note


def test_a_run_begun_before_its_judges_shutdown_is_refused_after_it_with_the_way_to_another_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.toml").write_text(small_recipe(judge="auto"))
    monkeypatch.setattr(checks, "_listed", lambda *_: iter(()))
    on("2026-12-01", monkeypatch)
    with open_run(tmp_path / "small.toml", (), tmp_path / "run") as opened:
        assert opened.resolved.inputs.judge.name == PAPER_JUDGE
        assert any("off on 2027-01-14, in 44 days" in choice for choice in opened.resolved.choices)
    on("2027-01-15", monkeypatch)
    with pytest.raises(UserError, match="switched off") as refused, open_run(tmp_path / "small.toml", (), tmp_path / "run"):
        pass
    assert f"--reuse {tmp_path / 'run'}" in str(refused.value.hint)


def test_doctor_says_when_the_papers_judge_is_gone_and_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2027-01-15", monkeypatch)
    found = next(finding for finding in doctor._judges() if finding.name == "paper's judge")
    assert "was switched off on 2027-01-14" in found.text
    assert "its successor" in found.remedy


# -- the probe


def probed(stub: StubProcess, samples: int = 5) -> Probed:
    who = JudgeIdentity("openai/gpt-6-luna", "llm", "a test", "logprobs", address=stub.api_base, effort="none")
    return LitellmProbe(asdict(who), first_wait=0.001).probe(samples)


def test_a_successor_is_asked_with_the_reasoning_effort_that_gives_probabilities() -> None:
    with StubProcess(model="gpt-6-luna", effort="none") as stub:
        found = probed(stub)
        assert '"reasoning_effort": "none"' in next(iter(stub.count()["bodies"].values()))
    assert (found.identity.method, found.identity.effort, found.identity.tops) == ("logprobs", "none", 0)
    assert "gives 7 candidates a token" in found.notes[0]
    assert found.usd > 0


def test_a_successor_is_asked_for_no_more_candidates_than_it_gives() -> None:
    with StubProcess(model="gpt-6-luna", tops=5) as stub:
        found = probed(stub)
    assert (found.identity.method, found.identity.tops) == ("logprobs", 5)
    assert "gives 5 candidates" in found.notes[0]


@pytest.mark.parametrize("quirk", ["none", "placeholders", "zeros", "digits"])
def test_a_successor_without_probabilities_is_sampled_with_a_note(quirk: str) -> None:
    with StubProcess(model="gpt-6-luna", logprobs=quirk) as stub:
        found = probed(stub)
        assert (found.identity.method, found.identity.samples, found.identity.effort) == ("samples", 5, "")
        assert any("scores are means of 5 sampled verdicts" in note for note in found.notes)
        with pytest.raises(BackendError, match=r"no token probabilities|digit by digit"):
            probed(stub, samples=0)


def test_a_judge_that_cannot_tell_high_from_low_is_refused() -> None:
    said = "fails a simple test: it said '50', '50'"
    with StubProcess(model="gpt-6-luna", says="50", logprobs="none") as stub, pytest.raises(BackendError, match=said):
        probed(stub)


@pytest.mark.slow
def test_a_runs_judge_is_probed_in_its_own_process() -> None:
    with StubProcess(model="gpt-6-luna", effort="none", tops=5) as stub:
        found = require_judge(identity(judge="openai/gpt-6-luna", api_base=stub.api_base)[0], recipe())
    assert found.identity.tops == 5


# -- two at once


def test_two_runs_that_ask_the_same_questions_at_once_pay_once() -> None:
    got: dict[str, list[JudgeResponse]] = {"one": [], "other": []}
    with StubProcess(latency=0.4) as stub:
        who = asdict(JudgeIdentity(PAPER_JUDGE, "llm", "a test", "logprobs", address=stub.api_base))

        def ask(name: str) -> None:
            LitellmJudge(who).ask(asks(12), got[name].append)

        both = [threading.Thread(target=ask, args=(name,)) for name in got]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert stub.count()["answers"] == 12
    assert [len(replies) for replies in got.values()] == [12, 12]
    assert sum(reply.usd > 0 for replies in got.values() for reply in replies) == 12


def test_the_next_process_asks_what_a_dead_one_left_unanswered() -> None:
    cache, other = VerdictCache(), VerdictCache()
    assert cache.claim("k", 60)
    assert cache.claim("k", 60)
    assert not other.claim("k", 60)
    host = cache._me.split(" ")[0]
    cache._file.execute("UPDATE claims SET owner = ?", (f"{host} 999999999 0",))
    assert other.claim("k", 60)
    assert not cache.claim("k", 60)
    other.put("k", JudgeResponse("a", "9", failure="timeout"))
    assert cache.claim("k", -1)
    time.sleep(0.01)
    assert other.claim("k", 60)  # no word of it for too long


def test_a_cache_being_created_by_another_process_is_waited_for() -> None:
    path = Path("verdicts.sqlite")
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.1, other.execute, ["COMMIT"])
    timer.start()
    assert VerdictCache(path).claim("k", 60)
    timer.join()
    other.close()


# -- a run and its judge


def test_a_run_with_an_unreachable_judge_ends_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(small_recipe(judge="ollama/llama3"))
    with (
        pytest.raises(UserError, match=r"cannot judge: no answer from http://127\.0\.0\.1:9"),
        open_run(tmp_path / "small.toml", ("api_base=http://127.0.0.1:9",), tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_judges_settings_without_another_probe(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(small_recipe(judge="openai/gpt-6-luna"))
    with StubProcess(model="gpt-6-luna", effort="none", tops=5) as stub:
        for cycles in (0, 1):
            given = (f"api_base={stub.api_base}", f"cycles={cycles}")
            with open_run(tmp_path / "small.toml", given, tmp_path / "run") as opened:
                assert opened.resolved.inputs.judge.tops == 5
                list(opened.events())
        probes = sum("station leaves at nine" in body for body in stub.count()["bodies"].values())
    assert probes == 1
    report = read_report(tmp_path / "run")
    assert report.complete
    assert all(cycle.trait and cycle.trait["unscored"] == 0 for cycle in report.cycles)


def test_auto_skips_a_successor_that_the_server_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on("2027-02-01", monkeypatch)
    (tmp_path / "small.toml").write_text(small_recipe(judge="auto"))
    with StubProcess(model="gpt-5.6-luna") as stub:
        monkeypatch.setenv(stub.key_variable, KEY)
        monkeypatch.setattr(checks, "_probed", lambda identity, _: JudgeCheck(identity))
        with open_run(tmp_path / "small.toml", (f"api_base={stub.api_base}",), tmp_path / "run") as opened:
            assert opened.resolved.recipe.judge == opened.resolved.inputs.judge.name == "openai/gpt-5.6-luna"
            assert any("has no model `gpt-6-luna`" in choice for choice in opened.resolved.choices)
