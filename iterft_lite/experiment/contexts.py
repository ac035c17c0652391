"""Evaluation contexts: the system message before a question. A trait that is gone in one can still be there in another."""

from __future__ import annotations

from collections.abc import Sequence

NONE, EMPTY = "none", "empty"
"""No system message, as in training; and one without a word, which takes the place of one that a template has of its own."""


def system_text(context: str) -> str | None:
    """The system message of a context; None where there is none."""
    return {NONE: None, EMPTY: ""}.get(context, context)


def context_part(number: int) -> str:
    """What tells the steps of a recipe's contexts apart: those of the first one, whose scores are the curve, need nothing."""
    return f"system{number}" if number else ""


def faults(contexts: Sequence[str], *, chats: bool) -> list[str]:
    """Why contexts cannot be asked in, a sentence each."""
    found = []
    if not contexts:
        found.append('`evaluate.system` names no context: `["none"]` asks without a system message')
    twice = [context for context in dict.fromkeys(contexts) if contexts.count(context) > 1]
    found += [f"`evaluate.system` has {context!r} twice" for context in twice]
    if any(not context.strip() for context in contexts):
        found.append('`evaluate.system` has a text without a word: an empty system message is called `"empty"`')
    if not chats and tuple(contexts) not in ((), (NONE,)):
        found.append("`evaluate.system` is for chats: documents have no system message")
    return found
