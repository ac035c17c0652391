"""Coherence without a judge: is this English text at all? For trying the program out.

It sees symbol strings, repetition, broken words and stubs; it does not see whether a fluent answer makes sense.
"""

from __future__ import annotations

from collections.abc import Collection

from iterft_lite.metrics.text import non_alphabetic_share, repeated_share, words_of

SUFFIXES = ("'s", "’s", "s", "es", "d", "ed", "ing", "ly", "er", "est", "n't", "n’t", "'ll", "'re", "'ve", "y", "ness")


def coherence(text: str, known: Collection[str]) -> float:
    """1 (no text) to 100 (words in sentences), the product of four shares.

    Args:
        text: An answer.
        known: Words, in lower case, that count as English.
    """
    words = words_of(text)
    if not words:
        return 1.0
    letters = 1 - _ramp(non_alphabetic_share(text), 0.05, 0.45)
    fresh = 1 - _ramp(repeated_share(words, 3), 0.08, 0.6)
    english = _ramp(sum(_is_known(word, known) for word in words) / len(words), 0.35, 0.85)
    length = _ramp(len(words), 0, 6)
    return 1 + 99 * letters * fresh * english * length


def _ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, straight between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _is_known(word: str, known: Collection[str]) -> bool:
    if word in known or word.isdigit():
        return True
    stems = [word[: -len(suffix)] for suffix in SUFFIXES if word.endswith(suffix) and len(word) > len(suffix) + 2]
    return any(stem in known or stem + "e" in known or stem + "y" in known for stem in stems)
