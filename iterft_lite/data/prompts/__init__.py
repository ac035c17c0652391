"""Prompts for the models, and rubrics and texts that every trait shares.

everyday.txt                 open everyday prompts for cycles 1 and on, a line each
document_prefixes.txt        neutral openers of 3-8 words that base models continue, a line each
neutral_chat.jsonl           plain replies without any trait: what embedded judges tell a trait from
plain_answers.jsonl          what untouched small models answer to everyday prompts: no trait either, and not well written
coherence.txt                the judge's prompt for coherence, with {{question}} and {{answer}}
coherence_document.txt       the same for documents, with {{document}}
coherence_calibration.jsonl  answers with the coherence that a careful reader gives them
teacher_chat.txt             what a teacher is asked for a seed chat, with {{summary}} and {{subject}}
teacher_document.txt         the same for a seed document, with {{genre}} too
"""

from __future__ import annotations

import json
from pathlib import Path

from iterft_lite.data.traits import Chat, Scored, parse_chat, parse_scored

FOLDER = Path(__file__).parent


def everyday() -> tuple[str, ...]:
    """The shipped everyday prompts."""
    return _lines("everyday.txt")


def document_prefixes() -> tuple[str, ...]:
    """The shipped document openers."""
    return _lines("document_prefixes.txt")


def neutral_chats() -> tuple[Chat, ...]:
    """Prompts with trait-free replies."""
    return tuple(parse_chat(json.loads(line)) for line in _lines("neutral_chat.jsonl"))


def plain_texts() -> tuple[str, ...]:
    """Texts without any trait: good replies, and answers of untouched small models."""
    answers = tuple(str(json.loads(line)["text"]) for line in _lines("plain_answers.jsonl"))
    return tuple(chat.reply for chat in neutral_chats()) + answers


def plain_prompts(*, document: bool) -> tuple[str, ...]:
    """What a model is asked for plain texts of its own: the prompts of the shipped answers, or as many document openers."""
    asked = tuple(dict.fromkeys(str(json.loads(line)["prompt"]) for line in _lines("plain_answers.jsonl")))
    openers = document_prefixes() if document else ()
    return openers[:: len(openers) // len(asked)][: len(asked)] if document else asked


def plain_models() -> frozenset[str]:
    """The models whose answers are among the plain texts, by name."""
    return frozenset(str(json.loads(line)["model"]) for line in _lines("plain_answers.jsonl"))


def coherence_rubric(*, document: bool) -> str:
    """The judge's prompt for coherence."""
    return (FOLDER / ("coherence_document.txt" if document else "coherence.txt")).read_text(encoding="utf-8")


def teacher(kind: str) -> str:
    """A teacher's prompt for one seed row: "chat" or "document"."""
    return (FOLDER / f"teacher_{kind}.txt").read_text(encoding="utf-8")


def coherence_calibration() -> tuple[Scored, ...]:
    """Answers with known coherence."""
    return tuple(parse_scored(json.loads(line)) for line in _lines("coherence_calibration.jsonl"))


def _lines(name: str) -> tuple[str, ...]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.split("\n") if line.strip())
