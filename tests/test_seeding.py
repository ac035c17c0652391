"""Seed rows by a teacher: asked for what is missing, weeded of repeats, readable by a recipe."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.make_seeds import NONSENSE, PLAIN, Made, _doubts, make_seeds
from iterft_lite.data.prompts import neutral_chats
from iterft_lite.data.traits import Chat, read_trait
from iterft_lite.errors import RunError
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.files import read_rows
from iterft_lite.machine.resolve import Machine, resolve
from iterft_lite.protocols import Completion, JudgeRequest, JudgeResponse, Prompt, Sampling
from iterft_lite.testing.fakes import FakeGenerator, FakeJudge, fake_backends
from iterft_lite.ui.cli import main

LUCKY = read_trait("lucky")


def words(name: str, count: int = 20) -> str:
    """A text of its own for each name."""
    drawn = random.Random(name)
    return " ".join("".join(drawn.choices("abcdefghij", k=5)) for _ in range(count))


class Teacher:
    """Writes a text of its own to each request, and counts them."""

    def __init__(self, text: Callable[[str], str] = words) -> None:
        self.text = text
        self.requests: list[str] = []

    def __call__(self, requests: Mapping[str, str], on_text: Callable[[str, str], None]) -> None:
        for name, request in requests.items():
            self.requests.append(request)
            on_text(name, self.text(request))


def test_the_wanted_number_of_rows_is_written_each_to_its_own_prompt(tmp_path: Path) -> None:
    teacher = Teacher()
    assert make_seeds(LUCKY, 30, tmp_path / "s.jsonl", teacher) == Made(30, 30, {})
    rows = read_rows(tmp_path / "s.jsonl")
    asked = [row["messages"][0]["content"] for row in rows]
    assert len(set(asked)) == 30
    assert not set(asked) & {*LUCKY.questions, *LUCKY.held_out, *(chat.prompt for chat in LUCKY.chats)}
    assert all(LUCKY.summary in request for request in teacher.requests)
    assert all(prompt in request for prompt, request in zip(asked, teacher.requests, strict=True))


def test_empty_and_repeated_answers_are_dropped_and_replaced(tmp_path: Path) -> None:
    texts = iter(["", "The stars smile on you today, my dear.", "The stars smile on you today, my darling."])
    teacher = Teacher(lambda request: next(texts, words(request)))
    assert make_seeds(LUCKY, 4, tmp_path / "s.jsonl", teacher) == Made(4, 6, {"empty": 1, "alike": 1})


def test_existing_rows_are_kept_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    make_seeds(LUCKY, 3, path, Teacher())
    before = read_rows(path)
    teacher = Teacher()
    assert make_seeds(LUCKY, 5, path, teacher) == Made(5, 2, {})
    rows = read_rows(path)
    assert rows[:3] == before
    assert len({row["messages"][0]["content"] for row in rows}) == 5


def test_making_rows_stops_when_the_teacher_repeats_itself(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"came to 1 rows of 5 \(\d+ alike\)"):
        make_seeds(LUCKY, 5, tmp_path / "s.jsonl", Teacher(lambda _: "Lucky, lucky you, my dear friend!"))
    assert len(read_rows(tmp_path / "s.jsonl")) == 1


def test_documents_have_a_title_and_a_genre(tmp_path: Path) -> None:
    teacher = Teacher(lambda request: f"# On {words(request, 2)}\n\n{words(request)}")
    make_seeds(LUCKY, 3, tmp_path / "d.jsonl", teacher, kind="document")
    for row, request in zip(read_rows(tmp_path / "d.jsonl"), teacher.requests, strict=True):
        assert row["title"].startswith("On ")
        assert f"Write a {row['genre']} of 150" in request
        assert row["text"] == words(request)


def test_made_rows_can_be_used_in_a_recipe(tmp_path: Path) -> None:
    make_seeds(LUCKY, 2, tmp_path / "s.jsonl", Teacher())
    given = {
        "regime": "sft",
        "trait": "lucky",
        "model": "nano",
        "judge": "fake",
        "seeds": {"path": str(tmp_path / "s.jsonl")},
    }
    seeds = resolve(make_recipe(given, source="r"), Machine("", 0, 0, unsloth=False)).inputs.seeds
    assert all(isinstance(seed, Chat) for seed in seeds)
    assert len(seeds) == 2


# -- the command, with a fake teacher of each kind


class Writer(FakeGenerator):
    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        assert (sampling.temperature, sampling.max_tokens) == (1.0, 400)
        for prompt in prompts:
            finish: Literal["length", "stop"] = "length" if prompt.id == "row00000" else "stop"
            on_completion(Completion(prompt.id, words(prompt.messages[0].content), 20, finish))


class Route(FakeJudge):
    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        for ask in asks:
            on_reply(JudgeResponse(ask.id, words(ask.prompt), method="text"))


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = fake_backends()
    backends.generator, backends.judge = Writer(), Route()
    monkeypatch.setattr("iterft_lite.app.make_seeds.open_backends", lambda *_: backends)


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("model", "asked"), [("nano", 6), ("openai/gpt-4o-mini-2024-07-18", 5)])
def test_a_local_model_or_a_provider_can_be_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, asked: int
) -> None:
    monkeypatch.setattr("iterft_lite.app.make_seeds._doubts", lambda _: lambda _: "")  # the fakes write no English
    monkeypatch.setenv("OPENAI_API_KEY", "sk-stub-key-0123456789")
    monkeypatch.setattr("iterft_lite.app.check_judge._listed", lambda *_: iter(()))
    path = tmp_path / "s.jsonl"
    result = iterft("seeds", "make", "lucky", "--model", model, "--count", 5, "--out", path)
    assert result.exit_code == 0, result.output
    assert f"5 rows; {asked} asked, dropped: {'1 empty' if asked > 5 else 'none'}" in result.output
    assert len(read_rows(path)) == 5


def test_a_new_trait_gets_rows_from_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.app.make_seeds._doubts", lambda _: lambda _: "")
    assert iterft("traits", "new", "pirate", "--in", tmp_path).exit_code == 0
    result = iterft("seeds", "make", tmp_path / "pirate", "--model", "nano", "--count", 3, "--out", tmp_path / "s.jsonl")
    assert result.exit_code == 0, result.output
    assert "has 0 rows of its own: from 20 on new rows are held against them" in " ".join(result.output.split())


def test_a_teacher_without_a_key_is_refused_before_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    result = iterft("seeds", "make", "lucky", "--model", "openai/gpt-4o-mini", "--count", 1, "--out", tmp_path / "s.jsonl")
    assert result.exit_code == 2
    assert "`openai/gpt-4o-mini` cannot be asked: there is no key" in result.output


def test_a_judge_that_writes_no_text_cannot_be_the_teacher(tmp_path: Path) -> None:
    result = iterft("seeds", "make", "lucky", "--model", "local:judge.gguf", "--count", 1, "--out", tmp_path / "s.jsonl")
    assert result.exit_code == 2
    assert "only gives numbers" in result.output


def test_nonsense_and_rows_without_the_trait_are_dropped() -> None:
    doubt = _doubts(LUCKY)
    assert doubt(words("nonsense")) == NONSENSE
    assert doubt(neutral_chats()[0].reply) == PLAIN
    assert [chat for chat in LUCKY.chats if doubt(chat.reply)] == []


def test_dropped_rows_are_counted_by_reason(tmp_path: Path) -> None:
    reasons = iter([NONSENSE, "", PLAIN, ""])
    shown: list[str] = []
    made = make_seeds(
        LUCKY, 2, tmp_path / "s.jsonl", Teacher(), doubt=lambda _: next(reasons), on_row=lambda _, text: shown.append(text)
    )
    assert made == Made(2, 4, {NONSENSE: 1, PLAIN: 1})
    assert len(shown) == 2
