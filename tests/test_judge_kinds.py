"""A kind of judge is one record: registered here, recipes, plans, prices, runs, judging again and calibration find it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.app.calibrate_judge import calibrate
from iterft_lite.app.named_judge import is_same, named
from iterft_lite.app.rejudge import rejudge
from iterft_lite.app.session import open_run
from iterft_lite.backends.judge.kinds import JUDGES, JudgeKind, kind_of
from iterft_lite.backends.judge.prices import FREE
from iterft_lite.data.traits import read_trait
from iterft_lite.engine import backends
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.machine.estimate import judging_usd
from iterft_lite.protocols import JudgeRequest, JudgeResponse
from iterft_lite.report.report import read_report
from tests.loop import small_recipe


class LengthJudge:
    """Scores an answer by its length."""

    def __init__(self, identity: Mapping[str, Any], *, most: int) -> None:
        self._identity, self._most = JudgeIdentity(**identity), most

    def identity(self) -> JudgeIdentity:
        return self._identity

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        for ask in asks:
            score = max(1, min(100, 100 * len(ask.answer) // self._most))
            on_reply(JudgeResponse(ask.id, str(score), ((str(score), 1.0),), model="length"))


def by_length(name: str, _: object, __: object) -> JudgeIdentity:
    return JudgeIdentity(name, "llm", name, "logprobs")


LENGTH = JudgeKind(
    name="how long an answer is",
    recognises=lambda judge: judge.startswith("length:"),
    identify=by_length,
    worker="tests.test_judge_kinds:LengthJudge",
    options=lambda identity, _, __: {"most": int(identity.name.removeprefix("length:"))},
    price=lambda _: FREE,
)


class Here:
    """A worker in this process, in place of one in its own."""

    pid = None

    def __init__(self, worker: str, *_: Any, options: dict[str, Any], **__: Any) -> None:
        module, _, name = worker.partition(":")
        self._made = getattr(importlib.import_module(module), name)(**options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def prepare(self) -> None: ...

    def watch(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def test_a_new_judge_takes_one_record_and_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(JUDGES, "length", LENGTH)
    monkeypatch.setattr(backends, "Child", Here)
    (tmp_path / "small.toml").write_text(small_recipe(judge="length:80"))
    with open_run(tmp_path / "small.toml", (), tmp_path / "run") as run:
        assert judging_usd(run.plan) == 0
        list(run.events())
    report = read_report(tmp_path / "run")
    assert (report.judge["name"], report.judge["model"]) == ("length:80", "length")
    assert all(cycle.trait and cycle.trait["unscored"] == 0 for cycle in report.cycles)
    again = rejudge(tmp_path / "run", named("length:160"), {}, lambda *_: None)
    before, after = (found.cycles[0].trait["mean"] for found in (report, again) if found.cycles[0].trait)
    assert after == pytest.approx(before / 2, abs=1)
    found = {one.subject: one for one in calibrate(named("length:400"), "lucky", {})}
    assert found["lucky"].agreement.pairs == len(read_trait("lucky").calibration)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedded", "embedded"),
        ("base", "base"),
        ("fake", "fake"),
        ("local:judge.gguf", "local"),
        ("openai/gpt-4o-mini-2024-07-18", "provider"),
        ("openrouter/openai/gpt-4o-mini", "provider"),
    ],
)
def test_each_judge_name_means_one_kind_of_judge(name: str, kind: str) -> None:
    assert kind_of(name) is JUDGES[kind]
    assert [key for key, known in JUDGES.items() if known.recognises(name)] == [kind]


def test_the_old_name_odds_still_means_logprobs() -> None:
    given = {"regime": "sft", "trait": "lucky", "model": "nano", "judge_method": "odds"}
    assert make_recipe(given, source="an old recipe").judge_method == "logprobs"
    old = {"name": "openai/m", "kind": "llm", "revision": "", "method": "odds", "samples": 1, "note": ""}
    now = JudgeIdentity("openai/m", "llm", "", "logprobs", address="https://api.openai.com/v1")
    assert is_same(old, now)
    assert not is_same(old, replace(now, revision="http://elsewhere/v1"))
