"""Texts whose likelihood is asked: their token ids, and what the answer is held to; trainer and generator alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import BackendError, ModelError
from iterft_lite.protocols import Likelihood, Passage


@dataclass(frozen=True)
class Text:
    """Tokens of which some are asked about.

    Attributes:
        ids: Token ids.
        first: Place of the first whose log-probability is asked for, from 1 on; the others follow.
    """

    ids: Sequence[int]
    first: int

    @property
    def count(self) -> int:
        """How many are asked about."""
        return max(0, len(self.ids) - self.first)


def text_of(tokenizer: TrainingTokenizer, passage: Passage, most: int) -> Text:
    """A passage after what comes before it; nothing predicts a text's very first token.

    Raises:
        ModelError: As `passage_ids`.
    """
    before, ids = passage_ids(tokenizer, passage, most)
    return Text(before + ids, max(1, len(before)))


def passage_ids(tokenizer: TrainingTokenizer, passage: Passage, most: int) -> tuple[list[int], list[int]]:
    """Token ids of what comes before a passage, and of the passage as far as the context reaches.

    Args:
        most: Tokens of the context.

    Raises:
        ModelError: If what comes before leaves no room in the context.
    """
    before, ids = _split(tokenizer, passage)
    if len(before) >= most:
        raise ModelError(
            f"what comes before passage `{passage.id}` has {len(before)} tokens, the context {most}",
            hint="a longer context, or a model with one",
        )
    # broken characters of an answer can come to more tokens than it was generated in
    return before, ids[: most - len(before)]


def _split(tokenizer: TrainingTokenizer, passage: Passage) -> tuple[list[int], list[int]]:
    """Token ids of what comes before a passage, and of the passage."""
    if passage.messages:
        return tokenizer.reply_ids(passage.messages, passage.text, end=False)
    if passage.prefix:
        return tokenizer.document_ids(passage.prefix), tokenizer.content_ids(passage.text)
    ids = tokenizer.document_ids(passage.text)
    # nothing predicts the very first token: it belongs to what comes before
    return (ids[:1], ids[1:]) if ids[:1] == [tokenizer.bos] else ([], ids)


def likelihood_of(passage: Passage, logprob: float, tokens: int) -> Likelihood:
    """A passage's likelihood.

    Raises:
        BackendError: If it is not a finite number.
    """
    if not math.isfinite(logprob):
        raise BackendError(
            f"the model's probabilities of passage `{passage.id}` are not finite numbers",
            hint="activations leave the range of its number format; another `quant` may hold them",
        )
    return Likelihood(passage.id, logprob, tokens)
