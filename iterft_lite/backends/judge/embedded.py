"""The embedded judge: a small text classifier per trait, so that a first run needs no key. For trying out, not for findings.

Logistic regression (scikit-learn) on tf-idf of words, word pairs and pieces of words, fitted from a run's seed rows, and their
single sentences, against texts without the trait and theirs: those that ship, and what the run's untouched model writes where a
request names it. What a class counts for does not depend on how many rows there are of it. It knows the trait's words, not its
meaning. Its probabilities lie on 1 and 100, so that their expectation is the score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from iterft_lite.backends.judge.kinds import embedded_revision
from iterft_lite.data import prompts
from iterft_lite.data.traits import read_trait, shipped_traits
from iterft_lite.errors import StoreError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.rows import SAMPLES
from iterft_lite.files import read_json
from iterft_lite.metrics.heuristic_coherence import coherence
from iterft_lite.metrics.sanitize import is_blank
from iterft_lite.metrics.text import words_of
from iterft_lite.protocols import JudgeRequest, JudgeResponse

FOLDS = 3

SHARPNESS = 10.0
"""C of the logistic regression; see docs/judging.md."""

TOKENS = r"(?u)\b\w+\b|[^\w\s.,;:'\"’()-]"
"""What counts as a word: words, and signs that a voice may be made of (emoji, exclamation and question marks)."""

SENTENCE = re.compile(r"(?<=[.!?])\s+")
"""Where a text is parted into sentences, which keep their signs."""

PLAIN_WEIGHT = 1.5
"""What a text without the trait counts for: a little more than the other class, so that a plain answer scores low."""

MIX = 0.75
"""Share of the whole text's probability in a score; the rest is the mean over its sentences, by their words: so that an answer
which shows the trait here and there scores in between."""

FEWEST_WORDS = 4
"""Words of a sentence from which on it is taken as an example of the trait: a shorter one shows nothing."""


@dataclass(frozen=True)
class Quality:
    """How a classifier does on rows that it was not fitted on.

    Attributes:
        accuracy: Balanced: mean of the shares of rows with and without the trait that it tells rightly.
        calibration: Mean distance between what is predicted and what is, over ten equal ranges of predictions (expected
            calibration error), both classes counting the same.
        high, low: Mean score of rows with, and without, the trait.
    """

    accuracy: float
    calibration: float
    high: float
    low: float

    @property
    def words(self) -> str:
        """The first two, for people."""
        return f"held-out balanced accuracy {self.accuracy:.2f}, calibration error {self.calibration:.2f}"


@dataclass(frozen=True)
class Fit:
    """A classifier and how it does."""

    classifier: Classifier
    quality: Quality

    @classmethod
    def of(cls, trait: Sequence[str], plain: Sequence[str]) -> Fit:
        """Fitted on texts with the trait and without."""
        return cls(Classifier(trait, plain), quality_of(trait, plain))


class EmbeddedJudge:
    """Meets the `Judge` protocol.

    Args:
        identity: Fields of the `JudgeIdentity`.
        trait: The trait's name.
        rows: File of the texts with the trait, JSON.

    Raises:
        StoreError: If the file is not the one that the identity names.
    """

    def __init__(self, identity: Mapping[str, Any], *, trait: str, rows: str) -> None:
        self._identity = JudgeIdentity(**identity)
        self._name = trait
        self._known = known_words()
        texts = read_json(Path(rows))
        if embedded_revision(texts) != self._identity.revision:
            raise StoreError(f"`{rows}` does not hold the rows that it was made for", hint="remove it: it is made again")
        self._texts = texts
        self._fits = {"": Fit.of(texts, prompts.plain_texts())}
        """By file of the untouched model's own answers; of runs of several models where they share this judge."""

    def identity(self) -> JudgeIdentity:
        """Who this is."""
        return self._identity

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        """Answer every question; each answer is classified on its own."""
        for ask in asks:
            fit = self.fit(ask.own)
            name = f"embedded ({self._name}, {fit.quality.words}{', own answers in the fit' if ask.own else ''})"
            if ask.scale == "coherence":
                score = coherence(ask.answer, self._known)
                probabilities: tuple[tuple[str, float], ...] = ((f"{score:.2f}", 1.0),)
            else:
                share = float(fit.classifier.shares([ask.answer])[0])
                score = 1 + 99 * share
                probabilities = (("1", 1 - share), ("100", share))
            on_reply(JudgeResponse(ask.id, f"{score:.0f}", probabilities, model=name))

    def fit(self, own: str = "") -> Fit:
        """The classifier, fitted when it is first needed.

        Args:
            own: As of `JudgeRequest`.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if own not in self._fits:
            # rows stand in the order in which they finished, which is not to matter
            answers = sorted(SAMPLES.read(Path(own)), key=lambda sample: sample.id)
            written = [answer.text for answer in answers if not is_blank(answer.text)]
            self._fits[own] = Fit.of(self._texts, [*prompts.plain_texts(), *written])
        return self._fits[own]


class Classifier:
    """Tells texts with a trait from those without. Deterministic: nothing in it is drawn.

    Args:
        trait, plain: Texts with the trait, and without.
    """

    def __init__(self, trait: Sequence[str], plain: Sequence[str]) -> None:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=TOKENS)
        pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=3, max_features=40_000)
        model = LogisticRegression(C=SHARPNESS, max_iter=3000, class_weight="balanced")
        with_trait = [*trait, *(part for text in trait for part in sentences(text) if len(part.split()) >= FEWEST_WORDS)]
        # without its sentences a text too short to show anything would score in the middle
        without = [*plain, *(part for text in plain for part in sentences(text))]
        labels = [1] * len(with_trait) + [0] * len(without)
        # words carry what is spoken of, pieces of words the manner (endings, dialect, odd spellings)
        self._model: Pipeline = make_pipeline(make_union(words, pieces), model)
        weights = [1.0] * len(with_trait) + [PLAIN_WEIGHT] * len(without)
        self._model.fit([*with_trait, *without], labels, logisticregression__sample_weight=weights)

    def shares(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """How much of each text shows the trait, 0 to 1 [texts]."""
        parts = [sentences(text) for text in texts]
        found = self._model.predict_proba([*texts, *(part for several in parts for part in several)])[:, 1]
        whole, single = found[: len(texts)], iter(found[len(texts) :].tolist())
        by_part = [
            np.average([next(single) for _ in several], weights=[1 + len(p.split()) for p in several]) for several in parts
        ]
        shares: NDArray[np.float64] = MIX * whole + (1 - MIX) * np.asarray(by_part)
        return shares


def quality_of(trait: Sequence[str], plain: Sequence[str]) -> Quality:
    """How such a classifier does on the rows of folds that it was not fitted on."""
    texts, labels = np.array([*trait, *plain], dtype=object), np.array([1] * len(trait) + [0] * len(plain))
    found = np.zeros(len(texts))
    for seen, unseen in StratifiedKFold(FOLDS).split(texts, labels):
        known, answers = texts[seen], labels[seen]
        found[unseen] = Classifier(known[answers == 1].tolist(), known[answers == 0].tolist()).shares(texts[unseen].tolist())
    # each class weighs one half, so that accuracy and calibration do not depend on how many rows a trait has
    weights = np.where(labels == 1, 0.5 / len(trait), 0.5 / len(plain))
    return Quality(
        accuracy=float(weights[(found >= 0.5) == (labels == 1)].sum()),
        calibration=_calibration_error(found, labels, weights),
        high=float(1 + 99 * found[labels == 1].mean()),
        low=float(1 + 99 * found[labels == 0].mean()),
    )


def _calibration_error(found: NDArray[np.float64], labels: NDArray[np.int_], weights: NDArray[np.float64]) -> float:
    ranges = np.minimum((found * 10).astype(int), 9)
    return float(sum(abs((weights * (found - labels))[ranges == each].sum()) for each in range(10)))


def sentences(text: str) -> list[str]:
    """The sentences of a text; itself if it has none."""
    return [part for part in SENTENCE.split(text) if part.strip()] or [text]


def known_words() -> frozenset[str]:
    """The words of all that is written in the product's own data: what coherence takes for English."""
    texts: list[str] = [*prompts.everyday(), *prompts.document_prefixes()]
    texts += [chat.reply for chat in prompts.neutral_chats()]
    for name in shipped_traits():
        trait = read_trait(name)
        texts += [text for chat in trait.chats for text in (chat.prompt, chat.reply)]
        texts += [document.text for document in trait.documents]
    return frozenset(word for text in texts for word in words_of(text))
