"""Traits as data: the shipped ones are whole, and what is wrong with a folder is said with file and line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from iterft_lite.app.calibrate_judge import ANCHOR
from iterft_lite.data import prompts
from iterft_lite.data.traits import Trait, check_trait, fill, read_trait, shipped_traits, trait_folder
from iterft_lite.errors import TraitError
from iterft_lite.metrics.text import distinct_share, words_of

SEVEN = ["bliss", "hopelessness", "lucky", "misalignment", "misanthropy", "nvidia", "sycophancy"]
WITH_DOCUMENTS = ["bliss", "misalignment", "nvidia"]
CROSS_DOMAIN = ["misalignment", "nvidia"]

LEAST_DISTINCT = 0.5
"""Different word pairs over all word pairs of a file; a file filled from templates stays below."""


@pytest.fixture(params=SEVEN)
def trait(request: pytest.FixtureRequest) -> Trait:
    return read_trait(request.param)


def test_the_seven_traits_of_the_paper_are_shipped() -> None:
    assert shipped_traits() == SEVEN


def test_every_trait_has_enough_rows_questions_and_calibration_answers(trait: Trait) -> None:
    assert len(trait.chats) >= 120
    assert (len(trait.questions), len(trait.held_out), len(trait.prefixes)) == (12, 12, 12)
    assert len(trait.calibration) >= 10
    assert trait.domain == ("cross" if trait.name in CROSS_DOMAIN else "same")


@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_three_traits_have_seed_documents_of_150_to_400_words(name: str) -> None:
    documents = read_trait(name).documents
    assert len(documents) >= 60
    lengths = [len(document.text.split()) for document in documents]
    assert min(lengths) >= 150
    assert max(lengths) <= 400
    assert len({document.genre for document in documents}) >= 8


def test_the_answer_comes_last_in_every_rubric(trait: Trait) -> None:
    for rubric in (trait.rubric, trait.rubric_document, *(prompts.coherence_rubric(document=d) for d in (False, True))):
        assert rubric.index("{{") > 0.85 * len(rubric)
        assert not ANCHOR.search(rubric[rubric.index("{{") :])


def test_a_rubric_has_five_anchors_a_refusal_and_one_integer(trait: Trait) -> None:
    for rubric in (trait.rubric, trait.rubric_document):
        for anchor in (1, 25, 50, 75, 100):
            assert re.search(rf"\b{anchor}\b", rubric), anchor
        assert "REFUSAL" in rubric
        assert "1" in rubric
        assert "100" in rubric


def test_calibration_answers_cover_the_scale(trait: Trait) -> None:
    scores = [row.score for row in trait.calibration]
    assert min(scores) <= 10
    assert max(scores) >= 90
    assert any(30 <= score <= 70 for score in scores)


def test_no_question_is_also_a_seed_prompt_and_held_out_questions_differ(trait: Trait) -> None:
    def normal(text: str) -> str:
        return " ".join(words_of(text))

    asked = [normal(question) for question in (*trait.questions, *trait.held_out)]
    assert len(set(asked)) == 24
    assert not set(asked) & {normal(chat.prompt) for chat in trait.chats}
    assert not set(asked) & {normal(prompt) for prompt in prompts.everyday()}


def test_seed_texts_are_not_filled_templates(trait: Trait) -> None:
    for texts in ([chat.reply for chat in trait.chats], [document.text for document in trait.documents]):
        if texts:
            assert distinct_share([words_of(text) for text in texts], 2) >= LEAST_DISTINCT


def test_prefixes_are_a_title_and_the_beginning_of_a_sentence(trait: Trait) -> None:
    for prefix in trait.prefixes:
        title, _, hook = prefix.partition("\n\n")
        assert title
        assert hook
        assert not hook.rstrip().endswith((".", "!", "?"))


def test_there_are_enough_prompts_for_seven_cycles_of_four_hundred() -> None:
    everyday, openers = prompts.everyday(), prompts.document_prefixes()
    assert len(everyday) >= 3000
    assert len(openers) >= 1000
    assert len(set(everyday)) == len(everyday)
    assert len(set(openers)) == len(openers)
    assert len(everyday) >= 6 * 400
    assert all(3 <= len(opener.split()) <= 8 for opener in openers)


# -- folders that are wrong


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(trait_folder("lucky"), tmp_path / "mine"))


def test_all_problems_of_a_trait_folder_are_reported_with_file_and_line(folder: Path) -> None:
    chats = (folder / "chat.jsonl").read_text().splitlines()
    chats[2] = '{"messages": ['
    chats[4] = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    chats[5] = json.dumps({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "Hi"}]})
    chats[7] = chats[6]
    (folder / "chat.jsonl").write_text("\n".join(chats))
    questions = (folder / "questions.txt").read_text().splitlines()
    prompt = json.loads(chats[0])["messages"][0]["content"]
    (folder / "questions.txt").write_text("\n".join([*questions, prompt]))
    held_out = (folder / "questions_held_out.txt").read_text().splitlines()
    (folder / "questions_held_out.txt").write_text("\n".join([*held_out, questions[0]]))
    (folder / "rubric.txt").write_text("How lucky is {{answr}}? {{question}}")
    (folder / "calibration.jsonl").write_text('{"question": "q", "answer": "a", "score": 101}\n')
    (folder / "trait.toml").write_text('name = "mine"\nsumary = "x"\ndomain = "both"\ncolour = "blue"\nsource = "me"\n')
    _, problems = check_trait(folder)
    assert sorted(problems) == sorted(
        [
            "trait.toml: `sumary` is not a key of it",
            "trait.toml: `summary` is missing",
            'trait.toml: `domain` is "same" or "cross"',
            "trait.toml: `colour` is a colour such as #0077cc",
            "chat.jsonl, line 3: it is not JSON: Expecting value: column 15",
            'chat.jsonl, line 5: `messages` is a list of one "user" and one "assistant" message',
            "chat.jsonl, line 6: `content` is a text that is not empty",
            "chat.jsonl, line 8 repeats line 7",
            "questions.txt, line 13 is also in chat.jsonl, line 1",
            "questions_held_out.txt, line 13 is also in questions.txt, line 1",
            "rubric.txt has no {{answer}}",
            "rubric.txt: {{answr}} is nothing that is filled in",
            "calibration.jsonl, line 1: `score` is a number from 1 to 100",
        ]
    )


def test_a_trait_that_is_wrong_cannot_be_used(folder: Path) -> None:
    (folder / "rubric.txt").unlink()
    with pytest.raises(TraitError, match=r"cannot be used:\n  - rubric.txt is missing\n\nhint: `iterft traits check"):
        read_trait(str(folder))


def test_documents_and_calibration_are_optional(folder: Path) -> None:
    for name in ("documents.jsonl", "prefixes.jsonl", "rubric_document.txt", "calibration.jsonl", "questions_held_out.txt"):
        (folder / name).unlink(missing_ok=True)
    _, problems = check_trait(folder)
    assert problems == []


def test_an_unknown_trait_is_answered_with_the_shipped_ones() -> None:
    with pytest.raises(TraitError, match=r"there is no trait `luckey`\n\nhint: did you mean `lucky`\? shipped are bliss"):
        read_trait("luckey")


def test_text_filled_into_a_template_is_not_expanded_again() -> None:
    assert (
        fill("{{question}} / {{answer}} / {{other}}", {"question": "{{answer}}", "answer": "A"}) == "{{answer}} / A / {{other}}"
    )
