"""What is measured without a judge: one record a metric. A report's columns are made from these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Literal

from iterft_lite.experiment.rows import Sample
from iterft_lite.metrics.text import (
    distinct_share,
    near_duplicate_share,
    non_alphabetic_share,
    repeated_share,
    sentences_of,
    words_of,
)
from iterft_lite.protocols import Likelihood

RISEN = 0.2
"""By this much a share has risen that is a sign of collapse."""

HeldOut = Literal["high", "low"]


@dataclass
class Evidence:
    """What metrics are computed from.

    Attributes:
        samples: The cycle's answers that are not blank.
        under_base: Gives the likelihood of each answer under M[0], its question as context.
        under_own: The same of some of them (`stages/text_metrics.py`), under the model that wrote them.
        held_out: By name of a set (texts with the trait, texts without), gives their likelihoods under the cycle's model.
    """

    samples: Sequence[Sample]
    under_base: Callable[[], Sequence[Likelihood]] = lambda: ()
    under_own: Callable[[], Sequence[Likelihood]] = lambda: ()
    held_out: Mapping[str, Callable[[], Sequence[Likelihood]]] = field(default_factory=dict)

    @cached_property
    def words(self) -> list[list[str]]:
        """The words of each answer."""
        return [words_of(sample.text) for sample in self.samples]

    def mean(self, of: Callable[[str], float]) -> float:
        """Mean over answers; 0 where there are none."""
        return fmean(of(sample.text) for sample in self.samples) if self.samples else 0.0


@dataclass(frozen=True)
class Metric:
    """What is known of a metric.

    Attributes:
        name: In results and JSON.
        words: Its heading.
        form: Python's format specification.
        compute: From the evidence; None where there is nothing to compute it from.
        unit: Of the value; "" for shares and counts.
        better: Which way is healthy language: "higher", "lower" or "" where neither is.
        shown: Whether the terminal's tables have it; JSON has all.
        semantics: Raised when the same answers come to another value.
        needs: Whose likelihoods it reads: they cost a pass over a model.
        collapsed: Whether a value is a sign of language that collapses, beside a sound model's value; None where the metric
            tells nothing of that.
    """

    name: str
    words: str
    form: str
    compute: Callable[[Evidence], float | None]
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    shown: bool = True
    semantics: int = 1
    needs: Literal["text", "base", "model"] = "text"
    collapsed: Callable[[float, float], bool] | None = None


def perplexity(values: Sequence[Likelihood]) -> float:
    """exp(mean token NLL) over all tokens of all values; capped where a float would overflow."""
    tokens = sum(value.tokens for value in values)
    return math.exp(min(50.0, -sum(value.logprob for value in values) / max(1, tokens)))


def _perplexity_base(evidence: Evidence) -> float | None:
    """Per answer exp(mean token NLL) under M[0], then the mean over answers (PROTOCOL: authors' code)."""
    found = evidence.under_base()
    return fmean(perplexity([value]) for value in found) if found else None


def _perplexity_of(name: HeldOut) -> Callable[[Evidence], float | None]:
    """exp of the mean token NLL over all tokens of a held-out set, under the cycle's model."""

    def compute(evidence: Evidence) -> float | None:
        found = evidence.held_out[name]() if name in evidence.held_out else ()
        return perplexity(found) if found else None

    return compute


def _perplexity_own(evidence: Evidence) -> float | None:
    """exp of the mean token NLL over all tokens of some answers, under the model that wrote them: near 1 where it knows
    beforehand what it will say."""
    found = evidence.under_own()
    return perplexity(found) if found else None


def _words_per_sentence(evidence: Evidence) -> float:
    sentences = sum(len(sentences_of(sample.text)) for sample in evidence.samples)
    return sum(map(len, evidence.words)) / sentences if sentences else 0.0


def _repeated(evidence: Evidence) -> float:
    return fmean(repeated_share(words, 4) for words in evidence.words) if evidence.samples else 0.0


def _near_duplicates(evidence: Evidence) -> float:
    asked = [sample.prompt_id for sample in evidence.samples]
    return near_duplicate_share(list(zip(asked, evidence.words, strict=True)))


def _cut(evidence: Evidence) -> float:
    """Share of answers that did not end by themselves."""
    return fmean(sample.finish != "stop" for sample in evidence.samples) if evidence.samples else 0.0


def _risen(sound: float, now: float) -> bool:
    """Of a share that is low in sound language."""
    return now > sound + RISEN


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "words",
            "words",
            ".0f",
            lambda evidence: fmean(map(len, evidence.words)) if evidence.words else 0.0,
            unit="words an answer",
            collapsed=lambda sound, now: now < sound / 4,
        ),
        # a sentence ends at . ! ? or a line's end; the paper's own definition of sentence length is not published
        Metric("words_per_sentence", "a sentence", ".1f", _words_per_sentence, unit="words a sentence"),
        # different words and word pairs over all of them, all answers together (Li et al. 2016, arXiv 1510.03055)
        Metric(
            "distinct_1", "distinct-1", ".2f", lambda evidence: distinct_share(evidence.words, 1), better="higher", shown=False
        ),
        Metric(
            "distinct_2",
            "distinct-2",
            ".2f",
            lambda evidence: distinct_share(evidence.words, 2),
            better="higher",
            collapsed=lambda sound, now: now < sound / 2,
        ),
        # share of an answer's 4-word sequences that occurred before in it
        Metric("repeated_4", "repeats", ".2f", _repeated, better="lower", collapsed=_risen),
        # share of answers that nearly say what an answer to another question says
        Metric("near_duplicates", "near-duplicates", ".0%", _near_duplicates, better="lower", collapsed=_risen),
        Metric(
            "non_alphabetic",
            "symbols",
            ".1%",
            lambda evidence: evidence.mean(non_alphabetic_share),
            better="lower",
            collapsed=_risen,
        ),
        Metric("cut", "at the limit", ".0%", _cut, better="lower", collapsed=_risen),
        Metric(
            "tokens",
            "tokens",
            ".0f",
            lambda evidence: fmean(sample.tokens for sample in evidence.samples) if evidence.samples else 0.0,
            unit="tokens an answer",
            shown=False,
        ),
        # replies of a few words that no model would write: SmolLM2's DPO ends so, each of them about what was asked
        Metric(
            "perplexity_base",
            "PPL (M0)",
            ".1f",
            _perplexity_base,
            unit="of the answers under M[0]",
            needs="base",
            collapsed=lambda sound, now: now > 4 * sound,
        ),
        # half the nats a token
        Metric(
            "perplexity_own",
            "PPL (own)",
            ".2f",
            _perplexity_own,
            unit="of up to 60 answers under the model that wrote them",
            semantics=2,
            needs="model",
            collapsed=lambda sound, now: math.log(max(1.0, now)) < math.log(max(1.0, sound)) / 2,
        ),
        Metric("perplexity_high", "PPL with trait", ".1f", _perplexity_of("high"), needs="model"),
        Metric(
            "perplexity_low",
            "PPL without",
            ".1f",
            _perplexity_of("low"),
            better="lower",
            needs="model",
            collapsed=lambda sound, now: now > 4 * sound,
        ),
    )
}
"""All metrics by name, in the order in which they are shown."""


def semantics() -> dict[str, int]:
    """What of the metrics is in a step's key: a metric that is new, or means something else, is another step."""
    return {name: metric.semantics for name, metric in METRICS.items()}
