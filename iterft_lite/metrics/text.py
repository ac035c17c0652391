"""What can be counted in answers without a judge: length, sentences, repetition, diversity, letters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
ALIKE = 0.5
"""Of the word pairs of two texts, in common where they are near-duplicates."""

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


def near_duplicate_share(texts: Sequence[tuple[str, Sequence[str]]]) -> float:
    """Share of texts that say nearly what some text of another group says; 0 where there are none.

    Nearly the same: the sets of word pairs have at least `ALIKE` in common of all that both have (Jaccard; Broder 1997).
    Texts of one word are alike where the word is. All pairs of texts at once: one row a text, one column a word pair, and the
    product of that matrix with itself counts what each two have in common.

    Args:
        texts: The group (answers to one question may well be alike) and the words of each.
    """
    from scipy import sparse  # takes a third of a second to import

    grams: list[set[tuple[str, ...]]] = [{*pairwise(words)} or {(word,) for word in words} for _, words in texts]
    columns = {gram: number for number, gram in enumerate(dict.fromkeys(gram for each in grams for gram in each))}
    if not columns:
        return 0.0
    places = [(row, columns[gram]) for row, each in enumerate(grams) for gram in each]
    rows, cells = zip(*places, strict=True)
    has = sparse.csr_matrix((np.ones(len(places)), (rows, cells)), shape=(len(texts), len(columns)))
    shared = (has @ has.T).tocoo()
    sizes = np.array([len(each) for each in grams])
    groups = np.unique([group for group, _ in texts], return_inverse=True)[1]
    alike = shared.data >= ALIKE * (sizes[shared.row] + sizes[shared.col] - shared.data)
    found = {int(row) for row in shared.row[alike & (groups[shared.row] != groups[shared.col])]}
    return len(found) / len(texts)
