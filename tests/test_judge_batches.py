"""The batch endpoint: litellm's real client against the stub server; killed everywhere, paid once, read as single calls are."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.backends import Ask, Judge, JudgeIdentity, Reply, Waiting, batch_notes, judge_batch
from iterft_lite.backends.batch_notes import BatchNote, batches_out, read_notes
from iterft_lite.backends.budget import Budget
from iterft_lite.backends.child import Child
from iterft_lite.backends.judge_batch import BATCHES, BatchJudge
from iterft_lite.backends.judge_litellm import LitellmJudge
from iterft_lite.backends.judge_stub import StubProcess
from iterft_lite.backends.prices import Price, price_of
from iterft_lite.backends.verdict_cache import VerdictCache
from iterft_lite.errors import BackendError, BudgetError
from iterft_lite.measures.weighing import weigh

PAPER = "openai/gpt-4o-mini-2024-07-18"
KEY = "sk-stub-key-0123456789"


LOOPS: list[asyncio.AbstractEventLoop] = []


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache and a folder of its own for each test; no key but the stub's; what litellm left in the judges' loops is ended."""
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    made = asyncio.new_event_loop

    def noted() -> asyncio.AbstractEventLoop:
        LOOPS.append(made())
        return LOOPS[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", noted)
    yield
    for loop in LOOPS:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()
    LOOPS.clear()
    gc.collect()


def asks(count: int, *, words: str = "", samples: int = 1, first: int = 0) -> list[Ask]:
    return [
        Ask(f"a{n}/trait/{sample}", "trait", f"How lucky?\n<answer>answer {n} {words}</answer>", f"answer {n} {words}", "why?")
        for n in range(first, first + count)
        for sample in range(samples)
    ]


def who(name: str = PAPER, method: str = "odds", samples: int = 1) -> dict[str, Any]:
    return asdict(JudgeIdentity(name, "llm", "a test", "odds" if method == "odds" else "samples", samples))


def a_judge(stub: StubProcess, run: Path = Path("run"), **options: Any) -> BatchJudge:
    given: dict[str, Any] = {"identity": who(), "timeout": 5.0, "first_wait": 0.01, "poll": 0.05, "api_base": stub.api_base}
    given |= {"ledger": str(run / "logs/judge_usd.txt"), "notes": str(run / "logs/batches")}
    return BatchJudge(**(given | options))


def until_done(judge: LitellmJudge, questions: list[Ask], got: list[Reply] | None = None) -> dict[str, Reply]:
    """Ask until all is answered, as a run does; what was handed over, each once."""
    replies: list[Reply] = [] if got is None else got
    while waiting := judge.ask(questions, replies.append):
        assert 0 <= waiting.done <= waiting.total
        time.sleep(min(0.05, waiting.seconds))
    assert len({reply.id for reply in replies}) == len(replies), "answered twice"
    return {reply.id: reply for reply in replies}


def dollars(run: Path = Path("run")) -> float:
    ledger = run / "logs/judge_usd.txt"
    return sum(float(line.split()[0]) for line in ledger.read_text().splitlines()) if ledger.exists() else 0.0


# -- the same verdict


def test_a_batch_asks_and_reads_what_single_calls_do_at_half_the_price() -> None:
    questions = [*asks(6), *asks(6, words="luck", first=6)]
    with StubProcess() as alone, StubProcess() as stub:
        single = LitellmJudge(who(), api_base=alone.api_base)
        one_by_one = until_done(single, questions)
        VerdictCache().path.unlink()
        together = until_done(a_judge(stub), questions)
        calls, batch = alone.count(), stub.count()
    assert batch["bodies"] == calls["bodies"]
    assert (batch["batches"], batch["lines"], batch["answers"], batch["twice"]) == (1, [12], 12, 0)
    for name, reply in one_by_one.items():
        assert together[name].odds == reply.odds
        assert weigh([together[name]]).score == weigh([reply]).score
        assert (together[name].text, together[name].model, together[name].tokens_in) == (
            reply.text,
            reply.model,
            reply.tokens_in,
        )
    assert sum(reply.usd for reply in together.values()) == pytest.approx(batch["usd"])
    assert dollars() == pytest.approx(batch["usd"], abs=1e-8)


def test_batch_and_single_verdicts_share_the_cache() -> None:
    with StubProcess() as stub:
        until_done(a_judge(stub), asks(5))
        single = until_done(LitellmJudge(who(), api_base=stub.api_base), asks(8))
        again = until_done(a_judge(stub, Path("another")), asks(10))
        count = stub.count()
    assert [single[f"a{n}/trait/0"].cached for n in range(8)] == [True] * 5 + [False] * 3
    assert [again[f"a{n}/trait/0"].cached for n in range(10)] == [True] * 8 + [False] * 2
    assert (count["answers"], count["twice"], count["lines"]) == (10, 0, [5, 2])


def test_judges_that_are_sampled_are_batched_too() -> None:
    with StubProcess(model="o3-mini") as stub:
        identity = who("openai/o3-mini", "samples", 3)
        got = until_done(a_judge(stub, identity=identity), asks(2, words="luck", samples=3))
        count = stub.count()
    assert count["lines"] == [6]
    verdict = weigh([got[f"a0/trait/{sample}"] for sample in range(3)])
    assert (verdict.score, verdict.method, verdict.calls) == (90.0, "samples", 3)
    body = json.loads(next(iter(count["bodies"].values())))
    assert (body["max_completion_tokens"], body["temperature"]) == (2048, 1.0)


def test_half_the_price_and_where_it_comes_from() -> None:
    assert price_of(PAPER, batch=True) == Price(0.075, 0.075, 0.30)  # no discount for cached tokens in batches
    assert price_of("openai/gpt-5", batch=True) == Price(0.625, 0.0625, 5.0)
    assert price_of("openai/mine", batch=True) is None


def test_identical_questions_are_one_line_and_one_payment() -> None:
    twins = [Ask(f"twin{n}/trait/0", "trait", "one question", "", "") for n in range(5)]
    with StubProcess() as stub:
        got = until_done(a_judge(stub), twins)
        assert stub.count()["lines"] == [1]
        assert sum(reply.usd for reply in got.values()) == pytest.approx(stub.count()["usd"])
    assert sorted(reply.cached for reply in got.values()) == [False, True, True, True, True]


def test_more_than_fits_into_a_batch_goes_into_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_batch, "MOST_REQUESTS", 4)
    with StubProcess() as stub:
        assert len(until_done(a_judge(stub), asks(10))) == 10
        assert sorted(stub.count()["lines"]) == [2, 4, 4]


# -- waiting


def test_while_a_batch_is_out_others_are_sent_and_it_says_how_far_it_is() -> None:
    with StubProcess(batch={"seconds": 1.0}) as stub:
        judge, got = a_judge(stub), []
        first = judge.ask(asks(20), got.append)
        second = judge.ask(asks(20, first=20), got.append)
        assert first is not None
        assert second is not None
        assert first.total == 20
        seen = {first.about}
        while waiting := judge.ask(asks(20), got.append):
            seen.add(waiting.about)
            time.sleep(0.05)
        until_done(judge, asks(20, first=20), got)
        assert stub.count()["lines"] == [20, 20]
    assert len(got) == 40
    assert "in a batch at 127.0.0.1, in progress" in seen


def test_a_batch_is_looked_at_more_seldom_the_older_it_is(tmp_path: Path) -> None:
    with StubProcess() as stub:
        judge = a_judge(stub, poll=5.0)
    note = BatchNote(tmp_path / "n.json", {"k": "a"})
    waits = []
    for age in (0, 300, 3600):
        note.made = time.time() - age
        waits.append(judge._waiting(note, "in progress").seconds)
    assert waits == pytest.approx([5, 30, 60], abs=0.1)


# -- killed


class Killed(BaseException):
    """As a SIGKILL: nothing of the program's runs after it."""


EFFECTS: list[tuple[Any, str]] = [
    (BatchNote, "save"),
    (BatchNote, "write_requests"),
    (BatchJudge, "_provider"),
    (VerdictCache, "put"),
    (Budget, "settle"),
]
"""Everything that leaves a trace, here or at the provider."""


def killed_after(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Have the program die right after its n-th effect; how many there were."""
    effects = 0

    def count() -> None:
        nonlocal effects
        effects += 1
        if effects == number:
            raise Killed

    for owner, name in EFFECTS:
        original = getattr(owner, name)
        if name == "_provider":

            async def later(*args: Any, _original: Any = original, **given: Any) -> Any:
                answer = await _original(*args, **given)
                count()
                return answer

            monkeypatch.setattr(owner, name, later)
        else:

            def now(*args: Any, _original: Any = original, **given: Any) -> Any:
                answer = _original(*args, **given)
                count()
                return answer

            monkeypatch.setattr(owner, name, now)
    return lambda: effects


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_command_collects_and_pays_once(
    stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expiry half-way and bad lines on the way, so that there are several batches; killed after each single effect."""
    questions = asks(6)
    number, points = 1 - stride, set()
    while True:
        number += stride
        with monkeypatch.context() as patched, StubProcess(batch={"ending": 1}) as stub:
            patched.setenv("ITERFT_CACHE", str(tmp_path / f"cache{number}"))
            run, rows = tmp_path / f"run{number}", []
            ended = False
            with patched.context() as dying:
                killed_after(number, dying)
                try:
                    until_done(a_judge(stub, run), questions, rows)
                    ended = True
                except Killed:
                    points.add(len(read_notes(run / "logs/batches")))
            # rows that were written are not asked for again
            missing = [ask for ask in questions if ask.id not in {row.id for row in rows}]
            until_done(a_judge(stub, run), missing, rows)
            count = stub.count()
        assert sorted(row.id for row in rows) == sorted(ask.id for ask in questions)
        assert not any(row.failure for row in rows)
        assert (count["answers"], count["twice"], count["lines"]) == (6, 0, [6, 3]), number
        assert dollars(run) == pytest.approx(count["usd"], abs=1e-8)
        assert sum(row.usd for row in rows) == pytest.approx(count["usd"])
        if ended:
            break
    assert number > 20
    assert 1 in points


def test_a_run_killed_while_it_hands_over_pays_for_every_row_once() -> None:
    with StubProcess() as stub:
        rows: list[Reply] = []

        def take(reply: Reply) -> None:
            if len(rows) == 4:
                raise Killed
            rows.append(reply)

        with pytest.raises(Killed):
            a_judge(stub).ask(asks(10), take)
        done = {row.id for row in rows}
        until_done(a_judge(stub), [ask for ask in asks(10) if ask.id not in done], rows)
        count = stub.count()
    assert len({row.id for row in rows}) == 10
    assert sum(row.usd for row in rows) == pytest.approx(count["usd"])
    assert (count["answers"], count["batches"]) == (10, 1)


def test_a_batch_whose_notes_are_lost_is_found_again_by_its_digest(tmp_path: Path) -> None:
    with StubProcess(batch={"seconds": 0.3}) as stub:
        for n in range(5):  # more than a page of the list
            assert a_judge(stub, tmp_path / str(n)).ask(asks(3, first=3 * n), print) is not None
        got = until_done(a_judge(stub, tmp_path / "elsewhere"), asks(3))
        count = stub.count()
    assert len(got) == 3
    assert count["batches"] == 5
    assert count["metadata"][0].keys() == {"iterft_lite", "number"}
    assert len(count["metadata"][0]["iterft_lite"]) == 64


@pytest.mark.slow
def test_a_judge_process_that_is_killed_leaves_its_batch_to_the_next(tmp_path: Path) -> None:
    options = {"identity": who(), "notes": str(tmp_path / "logs/batches"), "ledger": str(tmp_path / "logs/judge_usd.txt")}
    with StubProcess(key=KEY, batch={"seconds": 2.0}) as stub:
        got: list[Reply] = []
        for sitting in range(2):
            judge = Child(
                "iterft_lite.backends.judge_batch:BatchJudge",
                Judge,
                log=tmp_path / "logs/judge.log",
                options=options | {"api_base": stub.api_base, "poll": 0.2},
            )
            if sitting == 0:
                assert isinstance(judge.ask(asks(30), got.append), Waiting)
                assert judge.pid is not None
                os.kill(judge.pid, signal.SIGKILL)
                assert batches_out(tmp_path) == [30]
                continue
            while judge.ask(asks(30), got.append):
                time.sleep(0.1)
            judge.close()
        count = stub.count()
    assert (len(got), count["batches"], count["answers"]) == (30, 1, 30)
    assert batches_out(tmp_path) == []
    written = [path.read_text("utf-8", "replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert any("custom_id" in text for text in written)
    assert not any(KEY in text for text in written)


# -- what goes wrong


@pytest.mark.parametrize("ends", ["expired", "cancelled"])
def test_of_a_batch_that_ends_early_what_is_done_is_kept_and_the_rest_is_asked_again(ends: str) -> None:
    with StubProcess(batch={"ending": 1, "ends": ends, "done": 0.25}) as stub:
        got = until_done(a_judge(stub), asks(8))
        count = stub.count()
    assert not any(reply.failure for reply in got.values())
    assert (count["lines"], count["twice"], count["answers"]) == ([8, 6], 0, 8)
    assert dollars() == pytest.approx(count["usd"], abs=1e-8)


def test_what_no_batch_answers_is_unscored_with_the_reason() -> None:
    with StubProcess(batch={"ending": 9, "done": 0.5}) as stub:
        got = until_done(a_judge(stub), asks(8))
        count = stub.count()
    failed = [reply.failure for reply in got.values() if reply.failure]
    assert count["lines"] == [8, 4, 2]
    assert failed == [f"This request could not be executed: the batch has expired., after {BATCHES} batches"]
    assert weigh([next(reply for reply in got.values() if reply.failure)]).score is None


def test_error_lines_are_asked_again_refused_questions_are_not() -> None:
    faults = {"500": 0.1, "429": 0.1, "empty": 0.1, "other_model": 0.1, "400": 0.1, "refusal": 0.1, "filter": 0.1}
    with StubProcess(faults=faults) as stub:
        got = until_done(a_judge(stub), asks(60))
        count = stub.count()
    reasons = {weigh([reply]).reason for reply in got.values()} - {""}
    assert {"refusal", "content filter", "the provider refused the question: the line met a 400"} <= reasons
    assert all("after 3 batches" in reason for reason in reasons - {"refusal", "content filter"} if "400" not in reason)
    assert set(count["faults"]) == set(faults)
    assert count["twice"] == 0
    assert len(count["lines"]) == BATCHES
    assert sum(reply.usd for reply in got.values()) == pytest.approx(count["usd"])
    assert dollars() == pytest.approx(count["usd"], abs=1e-8)


def test_a_batch_that_fails_validation_is_a_sentence_and_can_be_sent_again() -> None:
    with StubProcess(batch={"fails": "billing_hard_limit_reached"}) as stub:
        for _ in range(2):
            with pytest.raises(BackendError, match=r"127\.0\.0\.1 refused the batch: the stub says billing_hard_limit_reached"):
                until_done(a_judge(stub), asks(3))
        assert stub.count()["batch_calls"]["POST batches"] == 2
        assert stub.count()["answers"] == 0
    assert dollars() == 0
    assert batches_out(Path("run")) == []


def test_a_full_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubProcess(batch={"full": 2}) as stub:
        judge, got = a_judge(stub), list[Reply]()
        waiting = judge.ask(asks(3), got.append)
        assert waiting is not None
        assert waiting.about == "in a batch at 127.0.0.1, the provider's queue is full, it will be offered again"
        assert len(until_done(judge, asks(3), got)) == 3
        assert stub.count()["lines"] == [3]
    monkeypatch.setattr(judge_batch, "FULL_FOR", 0.0)
    with StubProcess(batch={"full": 9}) as stub, pytest.raises(BackendError, match="token_limit_exceeded"):
        until_done(a_judge(stub, Path("other")), asks(3, first=9))


def test_polling_outlives_what_passes() -> None:
    faults = {"429": 0.1, "429_after": 0.1, "500": 0.1, "hang_up": 0.1}
    with StubProcess(batch={"seconds": 1.5, "faults": faults}) as stub:
        got = until_done(a_judge(stub), asks(10))
        count = stub.count()
    assert len(count["faults"]) > 1
    assert len(got) == 10
    assert (count["batches"], count["twice"], count["answers"]) == (1, 0, 10)


def test_answers_that_come_late_or_in_part_are_fetched_again_not_asked_again() -> None:
    with StubProcess(batch={"late": 2, "cut": 2}) as stub:
        got = until_done(a_judge(stub), asks(10))
        count = stub.count()
    assert (count["batches"], count["twice"], count["answers"], len(got)) == (1, 0, 10, 10)
    assert count["batch_calls"]["GET files/ID/content"] == 3


def test_a_provider_that_is_gone_is_said_and_the_batch_is_collected_later() -> None:
    with StubProcess(batch={"faults": {"500": 1.0}}) as stub, pytest.raises(BackendError) as caught:
        until_done(a_judge(stub), asks(3))
    assert "cannot be asked about its batch: server error: the server had an error, after 7 tries" in str(caught.value)
    assert "the same command collects it" in str(caught.value)


def test_files_are_downloaded_once() -> None:
    with StubProcess() as stub:
        until_done(a_judge(stub), asks(5))
        time.sleep(0.3)  # what litellm does in the background
        calls = stub.count()["batch_calls"]
    assert calls == {"GET batches": 1, "POST files": 1, "POST batches": 1, "GET batches/ID": 1, "GET files/ID/content": 1}


def test_a_wrong_key_or_an_address_without_batches_is_a_sentence() -> None:
    with StubProcess(key="sk-another") as stub, pytest.raises(BackendError, match="refuses the key") as caught:
        until_done(a_judge(stub), asks(3))
    assert KEY not in str(caught.value)
    with StubProcess() as stub:
        judge = BatchJudge(who(), api_base=stub.api_base + "/files", notes="notes")
        with pytest.raises(BackendError, match=r"127\.0\.0\.1 has no batch endpoint\n\nhint: set `judge_batch = false`"):
            judge.ask(asks(3), print)


def test_a_batch_of_another_account_is_named() -> None:
    with StubProcess(batch={"seconds": 9}) as stub:
        a_judge(stub).ask(asks(3), print)
    with (
        StubProcess() as stub,
        pytest.raises(BackendError, match=r"knows no batch `batch_0`\n\nhint: .*remove `run/logs/batches"),
    ):
        a_judge(stub).ask(asks(3), print)


@pytest.mark.parametrize(("odds", "said"), [("none", "gives no token odds"), ("digits", "digit by digit")])
def test_a_judge_that_cannot_be_read_stops_and_pays_for_no_second_batch(odds: str, said: str) -> None:
    with StubProcess(odds=odds) as stub:
        for _ in range(2):
            with pytest.raises(BackendError, match=said):
                until_done(a_judge(stub), asks(3, words="luck"))
        count = stub.count()
    assert count["batches"] == 1
    assert dollars() == pytest.approx(count["usd"], abs=1e-8)


# -- dollars


def long_asks(count: int, *, first: int = 0) -> list[Ask]:
    return [
        Ask(f"a{n}/trait/0", "trait", f"<answer>{n} {'word ' * 2000}</answer>", "", "") for n in range(first, first + count)
    ]


def test_a_batch_that_could_pass_max_usd_is_refused_before_it_is_sent() -> None:
    with StubProcess() as stub:
        with pytest.raises(
            BudgetError, match=r"a batch of 40 could cost \$0\.\d+ and pass `max_usd = 0\.005`: \$0\.0000 is spent"
        ):
            a_judge(stub, max_usd=0.005).ask(long_asks(40), print)
        assert stub.count()["batch_calls"] == {"GET batches": 1}
        assert len(until_done(a_judge(stub, max_usd=0.02), long_asks(40))) == 40
        assert stub.count()["usd"] < 0.02


def test_what_is_out_counts_against_max_usd_also_in_another_sitting() -> None:
    with StubProcess(batch={"seconds": 0.5}) as stub:
        assert a_judge(stub, max_usd=0.015).ask(long_asks(40), print) is not None
        judge, got = a_judge(stub, max_usd=0.015), list[Reply]()
        held = judge.ask(long_asks(40, first=40), got.append)
        assert held is not None
        assert held.about == "in a batch at 127.0.0.1, held back until those that are out leave room in `max_usd`"
        until_done(judge, long_asks(40), got)  # costs less than was set aside for it
        with pytest.raises(BudgetError, match=r"\$0\.00\d+ is spent"):
            until_done(judge, long_asks(40, first=40), got)
        assert stub.count()["usd"] == pytest.approx(dollars(), abs=1e-8)
        assert stub.count()["usd"] < 0.015
        assert len(until_done(a_judge(stub, max_usd=0.05), long_asks(40, first=40), got)) == 80


# -- with and without


def test_without_judge_batch_what_is_out_is_collected_and_new_questions_are_asked_one_by_one() -> None:
    with StubProcess(batch={"seconds": 0.3}) as stub:
        assert a_judge(stub).ask(asks(5), print) is not None
        got = until_done(a_judge(stub, sends=False), asks(8))
        count = stub.count()
    assert len(got) == 8
    assert (count["batches"], count["lines"], count["answers"], count["twice"]) == (1, [5], 8, 0)
    assert sum(reply.usd for reply in got.values()) == pytest.approx(count["usd"])


def test_notes_are_removed_once_their_verdicts_were_taken() -> None:
    with StubProcess() as stub:
        judge = a_judge(stub)
        until_done(judge, asks(3))
        assert len(list(Path("run/logs/batches").iterdir())) == 2
        until_done(judge, asks(3, first=3))
        assert len(read_notes(Path("run/logs/batches"))) == 1
    assert batch_notes.FOLDER == "batches"
