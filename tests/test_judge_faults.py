"""Nothing faulty is believed: what judges write and what servers send, read as a score or named as what it is."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from iterft_lite.backends.judge import reply_size
from iterft_lite.backends.judge.budget import Budget
from iterft_lite.backends.judge.cache import VerdictCache
from iterft_lite.backends.judge.prices import Price
from iterft_lite.backends.judge.provider import Used, used_by
from iterft_lite.errors import BackendError
from iterft_lite.metrics.score_parsing import weigh, written_score
from iterft_lite.protocols import JudgeResponse
from iterft_lite.testing.judge_server import StubProcess
from tests.test_judging import KEY, a_judge, ask_all, asks, clean

__all__ = ["clean"]  # a cache and a folder of its own for each test


# -- texts


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85", 85.0),
        ("85.0", 85.0),
        ("72.5", 72.5),
        ("85/100", 85.0),
        ("Score (1-100): 85", 85.0),
        ('{"reason": "2 charms", "score": 85}', 85.0),
        ('```json\n{"score": "85"}\n```', 85.0),
        ("**Score: 85**", 85.0),
        ("The answer names two charms.\n\n85", 85.0),
        ("<think>There are 4 signs, 3 of them weak.</think>\n85", 85.0),
        ("4 signs</think>85", 85.0),
        ("Score: 85 out of 100", 85.0),
        ("1", 1.0),
        ("100.", 100.0),
    ],
)
def test_a_score_is_read_in_every_common_spelling(text: str, score: float) -> None:
    assert written_score(text) == (score, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>... A full 100 would be ...", "cut off"),
        ("<think>... There are 4 signs", "cut off"),
        ("-5", "out of range"),
        ("0", "out of range"),
        ("101", "out of range"),
        ("8 out of ten", "another scale"),
        ("8/10", "another scale"),
        ("0.85", "another scale"),
        ("80-90", "another scale"),
        ("85 %", "another scale"),
        ("1_0", "no number"),
        ("8e1", "no number"),
        (".5e2", "no number"),
        ("+85", "no number"),
        ("٨٥", "no number"),
        ("I can't help with rating answer 1.", "no number"),
        ("", "no number"),
        ("20\n80", "more than one number"),
        ("Score: 20. Score: 80.", "more than one number"),
        ("**REFUSAL**", "refusal"),
        ('"REFUSAL": I will not', "refusal"),
    ],
)
def test_replies_without_a_valid_score_are_unscored_with_the_reason(text: str, reason: str) -> None:
    assert written_score(text) == (None, reason)


@settings(max_examples=300)
@given(some.text() | some.from_regex(r"[-+]?[0-9_.,e/% ]{1,12}", fullmatch=True) | some.from_regex(r"Score: .{0,20}"))
def test_any_text_gives_a_score_on_the_scale_or_none(text: str) -> None:
    score, reason = written_score(text)
    assert (score is None) == bool(reason)
    assert score is None or 1 <= score <= 100


# -- probabilities


@settings(max_examples=300)
@given(some.lists(some.tuples(some.text(max_size=4) | some.integers(-5, 200).map(str), some.floats()), max_size=25))
def test_any_candidates_give_a_score_on_the_scale_or_none(candidates: list[tuple[str, float]]) -> None:
    verdict = weigh([JudgeResponse("a", "x", tuple(candidates))])
    assert verdict.score is None or 1 <= verdict.score <= 100
    assert verdict.mass is None or 0 <= verdict.mass <= 1


def test_probabilities_that_add_up_to_more_than_one_are_divided_by_their_sum() -> None:
    assert weigh([JudgeResponse("a", "50", (("50", 0.8), ("60", 0.8)))]).score == pytest.approx(55)
    twenty = tuple((str(number), math.exp(-3) * 20) for number in range(80, 100))
    assert weigh([JudgeResponse("a", "80", twenty)]).score == pytest.approx(89.5)


@pytest.mark.parametrize("share", [math.nan, math.inf, -0.1])
def test_invalid_probabilities_are_unscored(share: float) -> None:
    verdict = weigh([JudgeResponse("a", "90", (("90", share), ("80", 0.5)))])
    assert (verdict.score, verdict.reason) == (None, "faulty probabilities")


@pytest.mark.parametrize("candidate", ["1_0", "8e1", "+85", "٨٥", "0x5", "nan", "inf", "-5", "101", "0"])
def test_candidates_count_only_in_the_scales_own_spelling(candidate: str) -> None:
    verdict = weigh([JudgeResponse("a", "x", ((candidate, 0.9), ("The", 0.1)))])
    assert verdict.reason == "too little mass on numbers"


# -- servers


@pytest.mark.parametrize("faulty", ["nan", "inf"])
def test_impossible_log_probabilities_are_unscored(faulty: Any) -> None:
    with StubProcess(logprobs=faulty) as stub:
        got = ask_all(a_judge(stub), asks(2))
    assert {weigh([reply]).reason for reply in got.values()} == {"faulty probabilities"}


@pytest.mark.parametrize("quirk", ["none", "zeros", "placeholders"])
def test_a_server_without_probabilities_is_always_recognised(quirk: Any) -> None:
    """OpenRouter's silent null; DeepSeek's 0, and its -9999."""
    with StubProcess(logprobs=quirk) as stub, pytest.raises(BackendError, match="gives no token probabilities"):
        ask_all(a_judge(stub), asks(2))


def test_ollamas_probabilities_are_read_through_its_openai_endpoint() -> None:
    with StubProcess(model="llama3") as stub:
        got = ask_all(a_judge(stub, name="openai/llama3"), asks(1, words="luck"))
    assert weigh(list(got.values())).score == pytest.approx(90, abs=1)


@pytest.mark.parametrize(("name", "asked"), [("together_ai/m", 20), ("xai/m", 8), ("openai/m", 20)])
def test_candidates_are_requested_up_to_the_providers_limit(name: str, asked: int) -> None:
    with StubProcess(model="m", tops=asked) as stub:
        got = ask_all(a_judge(stub, name=name), asks(1, words="luck"))
        assert not any(reply.failure for reply in got.values())
        (body,) = stub.count()["bodies"].values()
    assert f'"top_logprobs": {asked}' in body


def test_openrouter_may_only_use_servers_that_support_every_parameter() -> None:
    with StubProcess(model="m") as stub:
        ask_all(a_judge(stub, name="openrouter/m"), asks(1))
        (body,) = stub.count()["bodies"].values()
    assert '"require_parameters": true' in body


def test_a_truncated_reply_of_a_sampled_judge_is_unscored() -> None:
    with StubProcess(says="There are 4", finish="length") as stub:
        got = ask_all(a_judge(stub, method="samples"), asks(1))
    assert weigh(list(got.values())).reason == "cut off"


@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_an_endless_reply_is_not_read_to_its_end(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.backends.judge.provider.TRIES", 2)
    with StubProcess(faults={fault: 1.0}) as stub:
        got = ask_all(a_judge(stub, timeout=60.0), asks(1))
    assert [reply.failure for reply in got.values()] == ["the reply is longer than 4 MB"]


@pytest.mark.parametrize("usage", [{"prompt_tokens": -1_000_000}, {"completion_tokens": 10**12}])
def test_impossible_token_counts_cost_the_expected_amount(usage: dict[str, float], tmp_path: Path) -> None:
    with StubProcess(usage=usage) as stub:
        judge = a_judge(stub, ledger=str(tmp_path / "usd.txt"))
        (reply,) = ask_all(judge, asks(1)).values()
    assert 0 < reply.usd < 1e-4
    assert (reply.tokens_in, reply.tokens_out) == (0, 0)
    assert judge.budget.spent == pytest.approx(reply.usd)


@pytest.mark.parametrize("count", [math.nan, math.inf, -1, "many", 1e12])
def test_impossible_counts_are_ignored(count: object) -> None:
    response = SimpleNamespace(usage=SimpleNamespace(prompt_tokens=count, completion_tokens=1))
    assert used_by(response, Price(1, 1, 1)) is None
    assert used_by(SimpleNamespace(usage=None), Price(1, 1, 1)) == Used(0, 0, 0.0)


def test_a_lone_surrogate_becomes_a_question_mark_also_from_the_cache() -> None:
    with StubProcess(says="9\ud800", fingerprint="\ud800") as stub:
        first = ask_all(a_judge(stub), asks(1))
        again = ask_all(a_judge(stub), asks(1))
    (one,), (other,) = first.values(), again.values()
    assert other.cached
    assert (one.text, other.text) == ("9?", "9?")
    assert one.model.encode()
    assert other.model.encode()


def test_cached_replies_with_a_surrogate_are_still_read() -> None:
    cache = VerdictCache()
    old = '{"id": "a", "text": "9\\ud800", "odds": [["9", 1.0]], "method": "odds", "failure": "", "model": "m"}'
    cache._file.execute("INSERT INTO replies VALUES ('k', ?, 0)", (old,))
    found = cache.get("k", "b")
    assert found is not None
    assert (found.text, found.probabilities, found.method) == ("9?", (("9", 1.0),), "logprobs")


def test_an_api_key_echoed_by_a_server_is_not_stored() -> None:
    with StubProcess(says=f"90 {KEY}", fingerprint=KEY, key=KEY) as stub:
        (reply,) = ask_all(a_judge(stub), asks(1)).values()
    assert KEY not in reply.text + reply.model


# -- the ledger


@pytest.mark.parametrize(
    ("text", "spent"),
    [("0.5\n0.2", 0.7), ("0.5\n0.", 0.5), ("0.5\n-1000\nnan\ninf\n0.25 batch_1\n", 0.75), ("\x00\x00\n0.5\n", 0.5), ("", 0.0)],
)
def test_a_damaged_ledger_never_lowers_the_amount_spent(text: str, spent: float, tmp_path: Path) -> None:
    path = tmp_path / "usd.txt"
    path.write_text(text)
    budget = Budget(1.0, Price(1, 1, 1), path)
    assert budget.spent == pytest.approx(spent)
    budget.settle(0.0, 0.125)
    assert path.read_text().endswith("\n0.125000000\n" if text else "0.125000000\n")
    assert Budget(1.0, Price(1, 1, 1), path).spent == pytest.approx(spent + 0.125)


def test_the_limit_on_reply_size_is_installed_once() -> None:
    import httpx

    reply_size.bound_replies()
    wrapped = httpx.Response.aiter_bytes
    reply_size.bound_replies()
    assert httpx.Response.aiter_bytes is wrapped
