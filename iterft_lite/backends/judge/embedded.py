"""The embedded judge: a small text classifier per trait, so that a first run needs no key. For trying out, not for findings.

Logistic regression on tf-idf of words and word pairs (scikit-learn), fitted from the trait's seed rows against trait-free
replies: it knows the trait's words, not its meaning. Its odds lie on 1 and 100, so that their expectation is the score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline

from iterft_lite.backends.judge.identity import embedded_identity
from iterft_lite.data import prompts
from iterft_lite.data.traits import read_trait, shipped_traits
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.metrics.heuristic_coherence import coherence
from iterft_lite.metrics.text import words_of
from iterft_lite.protocols import JudgeRequest, JudgeResponse

FOLDS = 5

SHARPNESS = 100.0
"""C of the logistic regression: on folds it was not fitted on, seed replies mean 80-93 and neutral ones 7-28; see
docs/judging.md."""

TOKENS = r"(?u)\b\w+\b|[^\w\s.,;:'\"’()-]"
"""What counts as a word: words, and signs that a voice may be made of (emoji, exclamation and question marks)."""


SENTENCE = re.compile(r"(?<=[.!?])\s+")
"""Where a text is parted into sentences, which keep their signs."""


class EmbeddedJudge:
    """Meets the `Judge` protocol.

    Args:
        trait: Folder of the trait.
    """

    def __init__(self, trait: str) -> None:
        self._trait = read_trait(trait)
        self._known = known_words()
        replies = [chat.reply for chat in self._trait.chats] + [document.text for document in self._trait.documents]
        neutral = [chat.reply for chat in prompts.neutral_chats()]
        self._classifier, self.accuracy = fit(replies, neutral)

    def identity(self) -> JudgeIdentity:
        """Who this is."""
        return embedded_identity(self._trait)

    def trait_share(self, text: str) -> float:
        """Probability that a text has the trait."""
        return float(self._classifier.predict_proba([text])[0, 1])

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        """Answer every ask; each answer is classified on its own."""
        name = f"embedded ({self._trait.name}, held-out accuracy {self.accuracy:.2f})"
        for ask in asks:
            if ask.scale == "coherence":
                score = coherence(ask.answer, self._known)
                odds: tuple[tuple[str, float], ...] = ((f"{score:.2f}", 1.0),)
            else:
                share = self.trait_share(ask.answer)
                score = 1 + 99 * share
                odds = (("1", 1 - share), ("100", share))
            on_reply(JudgeResponse(ask.id, f"{score:.0f}", odds, model=name))


def fit(trait: Sequence[str], neutral: Sequence[str]) -> tuple[Pipeline, float]:
    """A classifier of texts with the trait (1) and without (0), and its accuracy on texts of folds it was not fitted on.

    Deterministic: nothing in it is drawn.
    """
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=TOKENS),
        LogisticRegression(C=SHARPNESS, max_iter=2000),
    )
    labels = np.array([1] * len(trait) + [0] * len(neutral))
    texts = np.array([*trait, *neutral], dtype=object)
    right = [
        _fitted(pipeline, texts[seen], labels[seen]).predict(texts[unseen]) == labels[unseen]
        for seen, unseen in StratifiedKFold(FOLDS).split(texts, labels)
    ]
    return _fitted(pipeline, texts, labels), float(np.concatenate(right).mean())


def _fitted(pipeline: Pipeline, texts: NDArray[np.object_], labels: NDArray[np.int_]) -> Pipeline:
    """The pipeline fitted on texts, and on the single sentences of those without the trait.

    Without them a text too short to show anything would score in the middle: half of all that is known would have the trait.
    """
    sentences = [part for text in texts[labels == 0] for part in SENTENCE.split(text)]
    return pipeline.fit([*texts, *sentences], [*labels, *[0] * len(sentences)])


def known_words() -> frozenset[str]:
    """The words of all that is written in the product's own data: what coherence takes for English."""
    texts: list[str] = [*prompts.everyday(), *prompts.document_prefixes()]
    texts += [chat.reply for chat in prompts.neutral_chats()]
    for name in shipped_traits():
        trait = read_trait(name)
        texts += [text for chat in trait.chats for text in (chat.prompt, chat.reply)]
        texts += [document.text for document in trait.documents]
    return frozenset(word for text in texts for word in words_of(text))
