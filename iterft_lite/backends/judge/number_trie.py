"""The probability of every number from 1 to 100 under a model that writes them in pieces.

Qwen's tokenizer writes 72 as "7", "2": the probabilities of its first token are those of first digits. Here the numbers are a
tree of tokens. Its inner nodes are prefixes after which the model's next-token probabilities are needed: for digits "", "1" ...
"9" and "10", eleven beginnings over one shared prompt. With whole-number tokens there is one, "".

    P(72) = P("7") P("2" | "7")        P(7) = P("7") (1 - P(a digit | "7"))        P(100) = P("1") P("0" | "1") P("0" | "10")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iterft_lite.errors import BackendError

LOWEST, HIGHEST = 1, 100

TOGETHER = 128
"""Questions that are decoded at once, where there is memory for them."""

REFUSAL = "REFUSAL"
"""What a judge writes in place of a number."""

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class NumberProbabilities:
    """What a model would answer to a question.

    Attributes:
        tokens: Of the question.
        numbers: Probability of each number, 1 first.
        refusal: Probability of the first token of a refusal.
        failure: Why it cannot be asked; "" if it was.
    """

    tokens: int
    numbers: list[float] = field(default_factory=list)
    refusal: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class NumberTrie:
    """Numbers as token sequences.

    Attributes:
        paths: Token ids by number.
        digits: All tokens that go on from each inner node to another number.
    """

    paths: Mapping[int, Prefix]
    digits: Mapping[Prefix, frozenset[int]]

    @property
    def nodes(self) -> list[Prefix]:
        """The inner nodes, the root first: where next-token probabilities are needed."""
        return sorted(self.digits, key=lambda prefix: (len(prefix), prefix))

    def probabilities(self, logprobs: Mapping[Prefix, Mapping[int, Any]]) -> dict[int, Any]:
        """Probability of each number.

        Args:
            logprobs: Natural log-probabilities, by token, of at least `digits` after each inner node: floats, or arrays of one
                length, such as of many questions.

        Returns:
            The same, by number.
        """
        found = {}
        for number, path in self.paths.items():
            # the chain rule: the product of each token's probability after the ones before it
            share = np.exp(sum(logprobs[path[:place]][token] for place, token in enumerate(path)))
            if path in self.digits:  # another number begins like this one: it must not go on
                share *= np.maximum(0.0, 1.0 - sum(np.exp(logprobs[path][token]) for token in self.digits[path]))
            found[number] = share
        return found


def number_trie(ids: Callable[[str], Sequence[int]], text: Callable[[Sequence[int]], str]) -> NumberTrie:
    """The trie of a tokenizer, checked against it.

    Args:
        ids: Token ids of a text, nothing added.
        text: The text of token ids.

    Raises:
        BackendError: If a number does not survive the way there and back, or two have the same tokens.
    """
    # Tokenizers differ (whole numbers, digits, a blank before the first): nothing about them is assumed, all is tried out.
    paths = {number: tuple(ids(str(number))) for number in range(LOWEST, HIGHEST + 1)}
    wrong = [number for number, path in paths.items() if text(path).strip() != str(number)]
    if wrong or len(set(paths.values())) < len(paths):
        raise BackendError(f"the judge's tokenizer cannot write {wrong[0] if wrong else 'every number'} and read it back")
    digits: dict[Prefix, set[int]] = {}
    for path in paths.values():
        for place, token in enumerate(path):
            digits.setdefault(path[:place], set()).add(token)
    return NumberTrie(paths, {prefix: frozenset(tokens) for prefix, tokens in digits.items()})
