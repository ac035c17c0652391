"""The batch endpoint: litellm's real client against the stub server; killed everywhere, paid once, read as single calls are."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from iterft_lite.backends.judge import openai_batch
from iterft_lite.backends.judge.batch_notes import BatchNote, batches_out, read_notes
from iterft_lite.backends.judge.budget import Budget
from iterft_lite.backends.judge.cache import VerdictCache
from iterft_lite.backends.judge.identity import judge_identity, judge_worker
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.backends.judge.openai_batch import BATCHES, BatchJudge
from iterft_lite.backends.judge.prices import Price, price_of
from iterft_lite.backends.judge.provider import LitellmJudge
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.traits import read_trait
from iterft_lite.digests import digest
from iterft_lite.engine.run import StepProgress, StepStarted
from iterft_lite.errors import BackendError, BudgetError, RecipeError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.files import read_json, read_rows
from iterft_lite.machine.estimate import judging_usd
from iterft_lite.machine.plan_words import judging_sentence
from iterft_lite.metrics.score_parsing import weigh
from iterft_lite.protocols import Judge, JudgeRequest, JudgeResponse, Progress, Waiting
from iterft_lite.testing.fakes import FakeJudge, fake_backends
from iterft_lite.testing.judge_server import StubProcess
from iterft_lite.ui.cli import main
from iterft_lite.ui.live import View
from tests.loop import JUDGE, a_plan, a_recipe, run_all, some_inputs
from tests.test_judging import asks

PAPER = "openai/gpt-4o-mini-2024-07-18"
KEY = "sk-stub-key-0123456789"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache and a folder of its own for each test; no key but the stub's; what litellm left in the judges' loops is ended."""
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    yield
    gc.collect()  # a judge that nobody holds any more closes its loop


def who(stub: StubProcess, name: str = PAPER, method: str = "logprobs", samples: int = 1) -> dict[str, Any]:
    how: Any = "logprobs" if method == "logprobs" else "samples"
    os.environ[stub.key_variable] = KEY  # the variable's name is the stub's alone
    return asdict(JudgeIdentity(name, "llm", "a test", how, samples, address=stub.api_base))


def a_judge(stub: StubProcess, run: Path = Path("run"), **options: Any) -> BatchJudge:
    given: dict[str, Any] = {"identity": who(stub), "timeout": 5.0, "first_wait": 0.01, "poll": 0.05}
    given |= {"ledger": str(run / "logs/judge_usd.txt"), "notes": str(run / "logs/batches")}
    return BatchJudge(**(given | options))


def until_done(
    judge: LitellmJudge, questions: list[JudgeRequest], got: list[JudgeResponse] | None = None
) -> dict[str, JudgeResponse]:
    """Ask until all is answered, as a run does; what was handed over, each once."""
    replies: list[JudgeResponse] = [] if got is None else got
    while waiting := judge.ask(questions, replies.append):
        assert 0 <= waiting.done <= waiting.total
        time.sleep(min(0.05, waiting.seconds))
    assert len({reply.id for reply in replies}) == len(replies), "answered twice"
    return {reply.id: reply for reply in replies}


def dollars(run: Path = Path("run")) -> float:
    ledger = run / "logs/judge_usd.txt"
    return sum(float(line.split()[0]) for line in ledger.read_text().splitlines()) if ledger.exists() else 0.0


# -- the same verdict


def test_a_batch_gives_the_verdicts_of_single_calls_at_half_the_price() -> None:
    questions = [*asks(6), *asks(6, words="luck", first=6)]
    with StubProcess() as alone, StubProcess() as stub:
        single = LitellmJudge(who(alone))
        one_by_one = until_done(single, questions)
        VerdictCache().path.unlink()
        together = until_done(a_judge(stub), questions)
        calls, batch = alone.count(), stub.count()
    assert batch["bodies"] == calls["bodies"]
    assert (batch["batches"], batch["lines"], batch["answers"], batch["twice"]) == (1, [12], 12, 0)
    for name, reply in one_by_one.items():
        assert together[name].probabilities == reply.probabilities
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
        single = until_done(LitellmJudge(who(stub)), asks(8))
        again = until_done(a_judge(stub, Path("another")), asks(10))
        count = stub.count()
    assert [single[f"a{n}/trait/0"].cached for n in range(8)] == [True] * 5 + [False] * 3
    assert [again[f"a{n}/trait/0"].cached for n in range(10)] == [True] * 8 + [False] * 2
    assert (count["answers"], count["twice"], count["lines"]) == (10, 0, [5, 2])


def test_sampled_judges_are_batched_too() -> None:
    with StubProcess(model="o3-mini") as stub:
        identity = who(stub, "openai/o3-mini", "samples", 3)
        got = until_done(a_judge(stub, identity=identity), asks(2, words="luck", samples=3))
        count = stub.count()
    assert count["lines"] == [6]
    verdict = weigh([got[f"a0/trait/{sample}"] for sample in range(3)])
    assert (verdict.score, verdict.method, verdict.calls) == (90.0, "samples", 3)
    body = json.loads(next(iter(count["bodies"].values())))
    assert (body["max_completion_tokens"], body["temperature"]) == (2048, 1.0)


def test_the_batch_price_is_half_and_names_its_source() -> None:
    assert price_of(PAPER, batch=True) == Price(0.075, 0.075, 0.30, "2027-01-14")  # no discount for cached tokens in batches
    assert price_of("openai/gpt-5", batch=True) == Price(0.625, 0.0625, 5.0, "2026-12-11")
    assert price_of("openai/mine", batch=True) is None


def test_identical_questions_are_sent_and_paid_once() -> None:
    twins = [JudgeRequest(f"twin{n}/trait/0", "trait", "one question", "", "") for n in range(5)]
    with StubProcess() as stub:
        got = until_done(a_judge(stub), twins)
        assert stub.count()["lines"] == [1]
        assert sum(reply.usd for reply in got.values()) == pytest.approx(stub.count()["usd"])
    assert sorted(reply.cached for reply in got.values()) == [False, True, True, True, True]


def test_too_many_questions_for_one_batch_go_into_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_batch, "MOST_REQUESTS", 4)
    with StubProcess() as stub:
        assert len(until_done(a_judge(stub), asks(10))) == 10
        assert sorted(stub.count()["lines"]) == [2, 4, 4]


# -- waiting


def test_several_batches_are_in_flight_and_report_their_progress() -> None:
    with StubProcess(batch={"looks": 6}) as stub:
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


def test_older_batches_are_polled_less_often(tmp_path: Path) -> None:
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
def test_after_a_kill_at_any_point_the_same_command_collects_and_pays_once(
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
        rows: list[JudgeResponse] = []

        def take(reply: JudgeResponse) -> None:
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


def test_a_batch_without_its_note_is_found_by_its_digest(tmp_path: Path) -> None:
    with StubProcess(batch={"looks": 4}) as stub:
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
    options = {"notes": str(tmp_path / "logs/batches"), "ledger": str(tmp_path / "logs/judge_usd.txt")}
    with StubProcess(key=KEY, batch={"seconds": 2.0}) as stub:
        got: list[JudgeResponse] = []
        for session in range(2):
            judge = Child(
                "iterft_lite.backends.judge.openai_batch:BatchJudge",
                Judge,
                log=tmp_path / "logs/judge.log",
                options=options | {"identity": who(stub), "poll": 0.2},
                secrets="judges",
            )
            if session == 0:
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
def test_an_expired_batch_keeps_its_answers_and_asks_the_rest_again(ends: str) -> None:
    with StubProcess(batch={"ending": 1, "ends": ends, "done": 0.25}) as stub:
        got = until_done(a_judge(stub), asks(8))
        count = stub.count()
    assert not any(reply.failure for reply in got.values())
    assert (count["lines"], count["twice"], count["answers"]) == ([8, 6], 0, 8)
    assert dollars() == pytest.approx(count["usd"], abs=1e-8)


def test_questions_without_a_batch_answer_are_unscored_with_the_reason() -> None:
    with StubProcess(batch={"ending": 9, "done": 0.5}) as stub:
        got = until_done(a_judge(stub), asks(8))
        count = stub.count()
    failed = [reply.failure for reply in got.values() if reply.failure]
    assert count["lines"] == [8, 4, 2]
    assert failed == [f"This request could not be executed: the batch has expired., after {BATCHES} batches"]
    assert weigh([next(reply for reply in got.values() if reply.failure)]).score is None


def test_failed_lines_are_asked_again_but_refused_questions_are_not() -> None:
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


def test_a_batch_that_fails_validation_is_reported_and_can_be_sent_again() -> None:
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
        judge, got = a_judge(stub), list[JudgeResponse]()
        waiting = judge.ask(asks(3), got.append)
        assert waiting is not None
        assert waiting.about == "in a batch at 127.0.0.1, the provider's queue is full, it will be offered again"
        assert len(until_done(judge, asks(3), got)) == 3
        assert stub.count()["lines"] == [3]
    monkeypatch.setattr(openai_batch, "FULL_FOR", 0.0)
    with StubProcess(batch={"full": 9}) as stub, pytest.raises(BackendError, match="token_limit_exceeded"):
        until_done(a_judge(stub, Path("other")), asks(3, first=9))


def test_polling_survives_temporary_errors() -> None:
    faults = {"429": 0.1, "429_after": 0.1, "500": 0.1, "hang_up": 0.1}
    with StubProcess(batch={"looks": 12, "faults": faults}) as stub:
        got = until_done(a_judge(stub), asks(10))
        count = stub.count()
    assert len(count["faults"]) > 1
    assert len(got) == 10
    assert (count["batches"], count["twice"], count["answers"]) == (1, 0, 10)


def test_late_or_partial_answers_are_downloaded_again_and_not_asked_again() -> None:
    with StubProcess(batch={"late": 2, "cut": 2}) as stub:
        got = until_done(a_judge(stub), asks(10))
        count = stub.count()
    assert (count["batches"], count["twice"], count["answers"], len(got)) == (1, 0, 10, 10)
    assert count["batch_calls"]["GET files/ID/content"] == 3


def test_a_batch_is_collected_later_when_its_provider_fails() -> None:
    with StubProcess(batch={"faults": {"500": 1.0}}) as stub, pytest.raises(BackendError) as caught:
        until_done(a_judge(stub), asks(3))
    assert "cannot be asked about its batch: server error: the server had an error, after 7 tries" in str(caught.value)
    assert "the same command collects what is done" in str(caught.value)


def test_batch_files_are_downloaded_once() -> None:
    with StubProcess() as stub:
        until_done(a_judge(stub), asks(5))
        time.sleep(0.3)  # what litellm does in the background
        calls = stub.count()["batch_calls"]
    assert calls == {"GET batches": 1, "POST files": 1, "POST batches": 1, "GET batches/ID": 1, "GET files/ID/content": 1}


def test_a_wrong_key_or_an_address_without_batches_is_reported() -> None:
    with StubProcess(key="sk-another") as stub, pytest.raises(BackendError, match="refuses the key") as caught:
        until_done(a_judge(stub), asks(3))
    assert KEY not in str(caught.value)
    with StubProcess() as stub:
        judge = BatchJudge(who(stub) | {"address": stub.api_base + "/files"}, notes="notes")
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


@pytest.mark.parametrize(("logprobs", "said"), [("none", "gives no token probabilities"), ("digits", "digit by digit")])
def test_unreadable_verdicts_stop_the_run_before_a_second_batch_is_paid(logprobs: Any, said: str) -> None:
    with StubProcess(logprobs=logprobs) as stub:
        for _ in range(2):
            with pytest.raises(BackendError, match=said):
                until_done(a_judge(stub), asks(3, words="luck"))
        count = stub.count()
    assert count["batches"] == 1
    assert dollars() == pytest.approx(count["usd"], abs=1e-8)


# -- dollars


def long_asks(count: int, *, first: int = 0) -> list[JudgeRequest]:
    return [
        JudgeRequest(f"a{n}/trait/0", "trait", f"<answer>{n} {'word ' * 2000}</answer>", "", "")
        for n in range(first, first + count)
    ]


def test_a_batch_that_could_pass_max_usd_is_refused_before_it_is_sent() -> None:
    with StubProcess() as stub:
        with pytest.raises(
            BudgetError, match=r"a batch of 40 could cost \$0\.\d+ and exceed `max_usd = 0\.005`: \$0\.0000 is spent"
        ):
            a_judge(stub, max_usd=0.005).ask(long_asks(40), print)
        assert stub.count()["batch_calls"] == {"GET batches": 1}
        assert len(until_done(a_judge(stub, max_usd=0.02), long_asks(40))) == 40
        assert stub.count()["usd"] < 0.02


def test_batches_in_flight_count_against_max_usd_in_every_session() -> None:
    with StubProcess(batch={"looks": 4}) as stub:
        assert a_judge(stub, max_usd=0.015).ask(long_asks(40), print) is not None
        judge, got = a_judge(stub, max_usd=0.015), list[JudgeResponse]()
        held = judge.ask(long_asks(40, first=40), got.append)
        assert held is not None
        assert held.about == "in a batch at 127.0.0.1, held back until open batches leave room in `max_usd`"
        until_done(judge, long_asks(40), got)  # costs less than was set aside for it
        with pytest.raises(BudgetError, match=r"\$0\.00\d+ is spent"):
            until_done(judge, long_asks(40, first=40), got)
        assert stub.count()["usd"] == pytest.approx(dollars(), abs=1e-8)
        assert stub.count()["usd"] < 0.015
        assert len(until_done(a_judge(stub, max_usd=0.05), long_asks(40, first=40), got)) == 80


def test_a_held_back_batch_is_sent_once_others_cost_less_than_expected() -> None:
    with StubProcess(batch={"looks": 4}) as stub:
        assert a_judge(stub, max_usd=0.017).ask(long_asks(40), print) is not None
        judge = a_judge(stub, max_usd=0.017)
        assert "held back" in (judge.ask(long_asks(40, first=40), print) or Waiting("", 0, 0, 0)).about
        assert len(until_done(judge, long_asks(40, first=40))) == 40  # though the first one's answers are never asked for again
        assert stub.count()["usd"] == pytest.approx(dollars(), abs=1e-8)


# -- with and without


def test_without_judge_batch_open_batches_are_collected_and_new_questions_asked_singly() -> None:
    with StubProcess(batch={"looks": 4}) as stub:
        assert a_judge(stub).ask(asks(5), print) is not None
        got = until_done(a_judge(stub, sends=False), asks(8))
        count = stub.count()
    assert len(got) == 8
    assert (count["batches"], count["lines"], count["answers"], count["twice"]) == (1, [5], 8, 0)
    assert sum(reply.usd for reply in got.values()) == pytest.approx(count["usd"])


def test_verdicts_from_a_strangers_folder_are_not_cached(tmp_path: Path) -> None:
    with StubProcess() as stub:
        note = BatchNote(tmp_path / "run/logs/batches/a.json", {"key": "trait/c0-q1"})
        note.replies["key"] = asdict(JudgeResponse("trait/c0-q1", "100", (("100", 1.0),)))
        note.path.parent.mkdir(parents=True)
        note.save()
        a_judge(stub, tmp_path / "run")
    assert VerdictCache().get("key", "trait/c0-q1") is None


def test_a_batchs_note_is_removed_once_its_verdicts_are_stored() -> None:
    with StubProcess() as stub:
        judge = a_judge(stub)
        until_done(judge, asks(3))
        assert len(list(Path("run/logs/batches").iterdir())) == 2
        until_done(judge, asks(3, first=3))
        assert len(read_notes(Path("run/logs/batches"))) == 1


# -- in a run


WAIT = 0.1
"""Seconds between two looks at a batch of the stand-in."""


class LateJudge(FakeJudge):
    """Answers the questions of a step when it is asked for the third time or later; counts the steps whose answers are on
    their way.

    Args:
        together: Steps with open batches before the first of them is answered; a run that does not come to so many is answered
            at last, and seen in `most`.
    """

    def __init__(self, together: int = 1) -> None:
        super().__init__()
        self.asked: dict[str, int] = {}
        self.out: set[str] = set()
        self.waits, self.most, self.together = 0, 0, together

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> Waiting | None:
        name = digest([ask.prompt for ask in asks])
        self.asked[name] = self.asked.get(name, 0) + 1
        if self.asked[name] < 3 or (len(self.asked) < self.together and self.asked[name] < 300):
            self.out.add(name)
            self.waits, self.most = self.waits + 1, max(self.most, len(self.out))
            return Waiting("in a batch at OpenAI, in progress", min(self.asked[name], 2), len(asks), WAIT)
        self.out.discard(name)
        return super().ask(asks, on_reply)


def test_a_run_continues_while_its_batches_are_in_flight(tmp_path: Path) -> None:
    backends = fake_backends()
    backends.judge = judge = LateJudge(together=4)
    plan = a_plan(cycles=2)
    began_at = time.monotonic()
    events = run_all(plan, tmp_path / "late", backends)
    whole = time.monotonic() - began_at
    run_all(plan, tmp_path / "plain")
    assert judge.most == 4  # the untouched model's and three cycles', all at once
    began = [event.step.name for event in events if isinstance(event, StepStarted)]
    assert sorted(began) == sorted(plan.steps)  # each once, however often it was looked at
    said = [
        event.progress for event in events if isinstance(event, StepProgress) and event.progress.unit.startswith("in a batch")
    ]
    assert len(said) == judge.waits >= 8
    for name in ("base-aggregate", "c2-aggregate"):
        late, plain = (read_json(tmp_path / run / f"by-name/{name}/score.json") for run in ("late", "plain"))
        assert late == plain
    seconds = read_json(tmp_path / "late/by-name/c1-judge/completion.json")["seconds"]
    assert 2 * WAIT <= seconds <= whole  # with the waiting


def test_a_run_whose_rows_depend_on_verdicts_waits_and_the_plan_says_so(tmp_path: Path) -> None:
    backends = fake_backends()
    backends.judge = LateJudge()
    recipe = {"cycles": 2, "filter": {"coherence": 50}}
    run_all(a_plan(**recipe), tmp_path / "run", backends)
    assert read_json(tmp_path / "run/by-name/c2-build_dataset/completion.json")["results"]["rows"] == 4
    batched = {"judge": PAPER, "judge_batch": True}
    inputs = some_inputs(judge=JudgeIdentity(PAPER, "llm", "", "logprobs"))
    waits = judging_sentence(make_plan(a_recipe(**recipe, **batched), inputs), PAPER)
    assert "; in 6 batches at half the price, each within 24 hours: 2 of them decide what is trained on" in waits
    assert waits.endswith("and the run waits for these")
    plan = make_plan(a_recipe(**batched), inputs)
    assert judging_sentence(plan, PAPER).endswith("each within 24 hours: the GPU does not wait for them")
    full, half = judging_usd(make_plan(a_recipe(judge=PAPER), inputs)), judging_usd(plan)
    assert full is not None
    assert half == pytest.approx(full / 2)


def test_plain_output_names_each_awaited_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.ui.live.PLAIN_SECONDS", 0.0)
    plan, out = a_plan(), io.StringIO()
    view = View(plan, trait="lucky", judge=JUDGE, console=Console(file=out, width=120))
    steps = [plan.steps["base-judge"], plan.steps["c0-judge"]]
    for step in steps:
        view.take(StepStarted(step))
    for _ in range(3):
        view.take(StepProgress(steps[0], Progress(120, 480, "in a batch at OpenAI, in progress")))
    assert set(view.doing) == {"base-judge", "c0-judge"}
    assert out.getvalue().count("base-judge: 120 of 480 in a batch at OpenAI, in progress") == 1
    view.is_live = True
    Console(file=out, width=120).print(view.render())
    assert "120/480 in a batch at OpenAI, in progress" in out.getvalue()


@pytest.mark.parametrize(
    "judge", ["anthropic/claude-haiku-4-5", "ollama/llama3", "hosted_vllm/mine", "local:x.gguf", "embedded"]
)
def test_judges_without_batches_are_refused_when_planning(judge: str) -> None:
    recipe = make_recipe({"regime": "sft", "trait": "lucky", "model": "nano", "judge": judge, "judge_batch": True}, source="-")
    with pytest.raises(
        RecipeError, match=rf"OpenAI's batch endpoint \(`openai/...`\), not for `{judge}`\n\nhint: set `judge_b"
    ):
        judge_identity(recipe, Material(read_trait("lucky")))


def test_auto_without_a_key_refuses_batches_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    recipe = make_recipe({"regime": "sft", "trait": "lucky", "model": "nano", "judge_batch": True}, source="-")
    with pytest.raises(
        RecipeError, match=r'not for `embedded`, which `judge = "auto"` means here \(judge: embedded \(no OPENAI_API_KEY\)\)'
    ):
        judge_identity(recipe, Material(read_trait("lucky")))


def test_a_recipe_without_batches_still_collects_open_ones(tmp_path: Path) -> None:
    given = {"regime": "sft", "trait": "lucky", "model": "nano", "judge": PAPER}
    identity, trait, ledger = (
        JudgeIdentity(PAPER, "llm", "", "logprobs"),
        Material(read_trait("lucky")),
        tmp_path / "judge_usd.txt",
    )
    plain, batched = make_recipe(given, source="-"), make_recipe(given | {"judge_batch": True}, source="-")
    assert judge_worker(identity, plain, trait, ledger)[0].endswith(":LitellmJudge")
    assert judge_worker(identity, batched, trait, ledger)[1]["sends"] is True
    (tmp_path / "batches").mkdir()
    BatchNote(tmp_path / "batches/n.json", {"k": "a/trait/0"}, batch="batch_7").save()
    worker, options = judge_worker(identity, plain, trait, ledger)
    assert (worker.rsplit(":", 1)[1], options["sends"]) == ("BatchJudge", False)


# -- the whole command


RECIPE = """regime = "sft"
trainer = "fake"
generator = "fake"
trait = "lucky"
model = "nano"
cycles = 1
seed_rows = 4
rows = 4
judge = "openai/gpt-4o-mini-2024-07-18"
judge_batch = true
[evaluate]
questions = 3
samples = 2
"""


@pytest.fixture
def only_the_judge_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def iterft(*words: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.mark.slow
@pytest.mark.usefixtures("only_the_judge_is_real")
def test_a_run_can_be_judged_and_judged_again_in_batches() -> None:
    Path("lucky.toml").write_text(RECIPE)
    with StubProcess(key=KEY, batch={"seconds": 3.0}) as stub:
        base = f'api_base="{stub.api_base}"'
        os.environ[stub.key_variable] = KEY
        planned = iterft("plan", "lucky.toml", "--set", base)
        assert "36 verdicts by openai/gpt-4o-mini-2024-07-18, at most $0.00" in planned.output
        assert "in 3 batches at half the price, each within 24 hours: the GPU does not wait for them" in planned.output
        done = iterft("run", "lucky.toml", "--out", "first", "--set", base)
        assert done.exit_code == 0, done.output
        count = stub.count()
        report = json.loads(iterft("report", "first", "--json").stdout)
        again = iterft("judge", "first", "--judge", f"{PAPER}#1", "--batch", "--api-base", stub.api_base)
        assert again.exit_code == 0, again.output
        after = stub.count()
    assert (count["batches"], count["twice"]) == (3, 0)
    assert report["judge"]["usd"] == pytest.approx(count["usd"], abs=1e-6)
    assert report["judge"]["planned_usd"] > count["usd"]
    assert after["batches"] == 6
    # what differs is asked, on two scales; how many of six answers do hangs on the draw, and so on the libraries' versions
    rows = read_rows(Path("first/by-name/base-evaluate_samples/rows.jsonl"))
    questions = 2 * len({(row["prompt_id"], row["text"]) for row in rows})
    assert f"base: 0 of {questions} in a batch at 127.0.0.1" in again.output
    assert not any(KEY in path.read_text("utf-8", "replace") for path in Path("first").rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.usefixtures("only_the_judge_is_real")
def test_after_ctrl_c_the_same_command_collects_the_open_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lucky.toml").write_text(RECIPE)

    def interrupted(self: View, event: object) -> None:
        if isinstance(event, StepProgress) and len(batches_out(Path("run"))) == 3:
            raise KeyboardInterrupt

    with StubProcess(batch={"seconds": 4.0}) as stub:
        command = ("run", "lucky.toml", "--out", "run", "--set", f'api_base="{stub.api_base}"')
        with monkeypatch.context() as patched:
            patched.setattr(View, "take", interrupted)
            stopped = iterft(*command)
        assert stopped.exit_code == 130
        assert re.search(r"kept; 3 batches of \d+ verdicts together go on at the provider", stopped.output)
        assert "collects what is done there. To go on:\n\n  iterft run lucky.toml --out run" in stopped.output
        assert iterft(*command).exit_code == 0
        count = stub.count()
    assert (count["batches"], count["twice"]) == (3, 0)
    assert dollars() == pytest.approx(count["usd"], abs=1e-8)
