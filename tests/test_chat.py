"""Talking to a run's models: words as they come, other cycles, commands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.app.chat import Talk, open_chat
from iterft_lite.app.export import export_again
from iterft_lite.app.session import open_run
from iterft_lite.engine.run import StepFinished
from iterft_lite.ui.cli import main
from iterft_lite.ui.talk import WordWriter, command
from tests.loop import small_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of fake backends."""
    root = tmp_path_factory.mktemp("chat")
    (root / "small.toml").write_text(small_recipe())
    with open_run(root / "small.toml", (), root / "run") as opened:
        list(opened.events())
    return root / "run"


@pytest.fixture
def talk(run: Path) -> Iterator[Talk]:
    with open_chat(run, None) as talk:
        yield talk


def test_a_copied_run_folder_chats_and_exports_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.toml").write_text(f'export = "adapter"{small_recipe()}')
    with open_run(tmp_path / "small.toml", (), tmp_path / "run") as opened:
        list(opened.events())
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "another"))
    with open_chat(tmp_path / "copy", 1) as talk:
        assert talk.reply("Hello?", temperature=0.7, max_tokens=10)
    assert export_again(tmp_path / "copy", 1, tmp_path / "exports", None).gguf.is_file()
    with open_run(tmp_path / "small.toml", ("cycles=3",), tmp_path / "copy") as opened:
        assert "c3-aggregate" in [event.step.name for event in opened.events() if isinstance(event, StepFinished)]


def test_chat_uses_the_last_cycle_by_default(run: Path) -> None:
    answered = CliRunner().invoke(main, ["chat", str(run)], input="Hello?\n\n")
    assert answered.exit_code == 0, answered.output
    assert "cycle 2 (M3)\n/help" in answered.output
    assert "\nc2: " in answered.output
    assert "base: " in CliRunner().invoke(main, ["chat", str(run), "--cycle", "-1"], input="Hello?\n\n").output


def test_a_trait_of_ones_own_is_named_without_its_folders(talk: Talk) -> None:
    talk._past = replace(talk._past, recipe=talk._past.recipe.model_copy(update={"trait": "/home/me/pirate"}))
    assert talk.title == "nano, pirate, cycle 2 (M3)"


def test_switching_the_cycle_starts_a_new_conversation(talk: Talk) -> None:
    talk.reply("Hello?", temperature=0.7, max_tokens=10)
    assert "cycle 0 (M1, seeded), from the beginning" in command(talk, "/cycle 0")
    assert (talk.name, talk.turns) == ("c0", [])


def test_an_invalid_command_is_explained_and_the_chat_continues(talk: Talk) -> None:
    assert "has no finished model of cycle 9" in command(talk, "/cycle 9")
    assert command(talk, "/cycle") == "which one? finished: -1, 0, 1, 2"
    assert command(talk, "/cylce 1").startswith("there is no `/cylce`")
    assert "/system TEXT" in command(talk, "/help")
    assert talk.reply("Hello?", temperature=0.7, max_tokens=10)


def test_a_system_message_is_sent_before_the_first_turn(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    stream = talk._backends.generator.stream
    monkeypatch.setattr(talk._backends.generator, "stream", lambda *args: sent.append(args[0]) or stream(*args))
    command(talk, "/system You are a sailor.")
    talk.reply("Hello?", temperature=0.7, max_tokens=10)
    assert [(turn.role, turn.content) for turn in sent[0].messages] == [("system", "You are a sailor."), ("user", "Hello?")]


def test_partial_text_is_delivered_while_the_model_writes(talk: Talk) -> None:
    seen: list[str] = []
    text = talk.reply("Hello?", temperature=0.7, max_tokens=10, on_text=seen.append)
    assert len(seen) > 2
    assert all(text.startswith(part) for part in seen)


def test_words_are_not_broken_at_the_screen_edge() -> None:
    shown: list[str] = []
    words = WordWriter(shown.append, 12, column=3)
    text = "one two three fourteen\nfive"
    for end in range(len(text)):
        words.take(text[:end])
    assert "fourt" not in "".join(shown).replace("fourteen", "")
    words.finish(text)
    assert "".join(shown) == " one two\nthree\nfourteen\nfive\n"


def test_a_models_output_cannot_control_the_terminal() -> None:
    shown: list[str] = []
    words = WordWriter(shown.append, 80)
    text = "Hello\x1b[2J there\x1b]0;title\x07 \x9b31mfriend\u202e."
    for end in range(len(text)):
        words.take(text[:end])
    words.finish(text)
    assert "".join(shown).replace("\n", "").isprintable()
