"""What can be counted in answers without a judge: length, sentences, repetition, diversity, letters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
SENTENCE_END = re.compile(r"[.!?…]+[\s\"'”’)\]]*|\n+")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [match.lower() for match in WORD.findall(text)]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text that have a word in them."""
    return [part for part in SENTENCE_END.split(text) if WORD.search(part)]


def repeated_share(words: Sequence[str], n: int) -> float:
    """Share of the n-word sequences that occurred before; 0 for texts shorter than that."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def non_alphabetic_share(text: str) -> float:
    """Share of characters, blanks left out, that are neither letters, digits nor usual punctuation."""
    visible = [character for character in text if not character.isspace()]
    odd = sum(not (character.isalnum() or character in ".,;:!?'\"()-–—…’‘“”/%&$€£*#+=") for character in visible)
    return odd / len(visible) if visible else 0.0


def distinct_share(texts: Iterable[Sequence[str]], n: int) -> float:
    """Different n-word sequences over all of them, in all texts together; 0 where there are none."""
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
