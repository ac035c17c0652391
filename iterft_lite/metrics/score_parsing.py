"""From what a judge said to a score: the one place where replies are weighed.

The expectation over the numbers 1 to 100 where the judge gives token probabilities (G-Eval, arXiv 2303.16634; arXiv 2503.03064
finds the mean of a judge's distribution better than its mode), a written score where it does not, otherwise nothing, with the
reason. Unscored is never a zero. A score lies between 1 and 100 by construction: it is a mean of numbers that do, weighed by
shares of their own sum.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from iterft_lite.experiment.rows import Verdict
from iterft_lite.protocols import JudgeResponse

LOWEST, HIGHEST = 1, 100

REFUSED_BELOW = 0.5
"""Mass on numbers up to which a written refusal counts: above it a number is likelier, only no single one is."""

LEAST_MASS = 0.25
"""Share of the probability that must lie on numbers, as in persona vectors (arXiv 2507.21509)."""

PLAIN = re.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]+)?")
"""A number as the scale has them: no sign, no exponent, no underscores, no digits of other scripts."""

# -- how a score is written

MARKUP = re.compile(r"[*`#>\"'“”‘’]+|(?<!\w)_+|_+(?!\w)")
"""Markdown and quotes around a number."""

THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
OPENED, CLOSED = (re.compile(rf"<{slash}(?:think|thinking|thought|reasoning)>", re.IGNORECASE) for slash in ("", "/"))
"""A reasoning model's thoughts: numbers in them are not a verdict."""

AMOUNT = (
    r"(?P<value>[-+]?[0-9][0-9_]*(?:[.,][0-9]+)?(?:[eE][-+]?[0-9]+)?)"
    r"(?P<rest>\s*(?:%|/\s*[0-9]+|(?:-|–|to)\s*[0-9]+|out\s+of\s+\w+)?)"
)
ALONE = re.compile(rf"\s*{AMOUNT}\s*[.!]?\s*", re.IGNORECASE)
LABELLED = re.compile(
    rf"\b(?:score|rating|verdict|grade)\b\s*(?:\([^()]*\)|\[[^\][]*\])?\s*(?:[:=]|is\b)\s*{AMOUNT}", re.IGNORECASE
)
"""`85`, `85/100`; `Score (1-100): 85`. The amount takes in what would make it another one: a sign, an exponent,
another scale."""

LABELS = ("score", "rating", "verdict", "grade")
"""Keys of a JSON reply that hold a score."""


def weigh(replies: Sequence[JudgeResponse]) -> Verdict:
    """The verdict in a judge's replies about one answer on one scale: one reply, or several samples.

    Several samples: the mean of those that can be read, which must be more than half.
    """
    single = [_weigh_one(reply) for reply in replies]
    if len(single) == 1:
        return single[0]
    scores = [verdict.score for verdict in single if verdict.score is not None]
    # the readable samples may differ from the others: a minority of them does not stand for all
    enough = 2 * len(scores) > len(single)
    reasons = [verdict.reason for verdict in single if verdict.reason]
    return Verdict(
        score=fmean(scores) if enough else None,
        reason="" if enough else max(set(reasons), key=reasons.count),
        method="samples",
        spread=stdev(scores) if len(scores) > 1 else None,
        text=single[0].text,
        tokens_in=sum(reply.tokens_in for reply in replies),
        tokens_out=sum(reply.tokens_out for reply in replies),
        usd=sum(reply.usd for reply in replies),
        seconds=sum(reply.seconds for reply in replies),
        cached=all(reply.cached for reply in replies),
        model=replies[0].model,
        calls=sum(not reply.cached for reply in replies),
    )


def unasked(reason: str) -> Verdict:
    """The verdict on an answer that no judge was asked about."""
    return Verdict(None, reason, "none")


def _weigh_one(reply: JudgeResponse) -> Verdict:
    score, reason, mass, entropy = _read(reply)
    return Verdict(
        score=score,
        reason=reason,
        method=reply.method,
        mass=mass,
        entropy=entropy,
        text=reply.text[:200],
        tokens_in=reply.tokens_in,
        tokens_out=reply.tokens_out,
        usd=reply.usd,
        seconds=reply.seconds,
        cached=reply.cached,
        model=reply.model,
        calls=int(not reply.cached),
    )


def _read(reply: JudgeResponse) -> tuple[float | None, str, float | None, float | None]:
    """Score, reason, mass, entropy of one reply."""
    if reply.failure:
        return None, reply.failure, None, None
    if reply.method == "text":
        return (*written_score(reply.text), None, None)
    if not all(math.isfinite(share) and share >= 0 for _, share in reply.probabilities):
        return None, "faulty probabilities", None, None
    numbers = probabilities_of_numbers(reply.probabilities)
    on_numbers = sum(numbers.values())
    # rounding, and servers that do not renormalise, give a little more than 1 in all
    mass = on_numbers / max(1.0, sum(share for _, share in reply.probabilities))
    if refuses(reply.text) and mass <= REFUSED_BELOW:
        return None, "refusal", mass, None
    if mass < LEAST_MASS:
        return None, "too little mass on numbers", mass, None
    # Normalised over numbers only: what a judge puts on words ("I", "The") says nothing about the score. How much that was is
    # kept as the mass, and too little of it is no verdict.
    shares = {number: share / on_numbers for number, share in numbers.items()}
    mean = sum(number * share for number, share in shares.items())
    entropy = -sum(share * math.log(share) for share in shares.values() if share > 0)
    return min(float(HIGHEST), max(float(LOWEST), mean)), "", mass, max(0.0, entropy)


def probabilities_of_numbers(candidates: Sequence[tuple[str, float]]) -> dict[float, float]:
    """The probability of each number from 1 to 100, candidates that differ in blanks taken together.

    Whole numbers, except where a judge gives its score as a single number of its own.
    """
    numbers: dict[float, float] = {}
    for text, probability in candidates:
        plain = text.strip()
        if PLAIN.fullmatch(plain) and LOWEST <= float(plain) <= HIGHEST and probability > 0:
            numbers[float(plain)] = numbers.get(float(plain), 0.0) + probability
    return numbers


def refuses(text: str) -> bool:
    """Whether a judge wrote the refusal that rubrics name, whatever is around it."""
    return re.sub(r"^[\W_]+", "", text).upper().startswith("REFUSAL")


def written_score(text: str) -> tuple[float | None, str]:
    """The score in a text, or None and why there is none.

    A number that stands alone (as the whole text or as one line of it), one behind a label, or one in a JSON object. Several
    different ones are none; a number within a sentence is none: it may count anything.
    """
    said = _spoken(text)
    if said is None:
        return None, "cut off"
    if refuses(said):
        return None, "refusal"
    # A set: a reply that gives the same score twice is clear, one that gives two scores is not.
    found = {_scaled(value, rest) for value, rest in _amounts(said)}
    if not found:
        return None, "no number"
    if len(found) > 1:
        return None, "more than one number"
    return found.pop()


def _spoken(text: str) -> str | None:
    """What a reasoning model says after its thoughts; None if it does not come to that."""
    said = THOUGHT.sub(" ", text)
    # a template may open the thought itself, so that the text has only its end: what counts stands behind the last one
    *_, said = CLOSED.split(said)  # of thoughts that the template has opened
    return None if OPENED.search(said) else said


def _amounts(text: str) -> Iterator[tuple[str, str]]:
    """Amounts that a text gives as its score, each as written and with what follows it: in JSON, else labelled, else alone."""
    in_json = _json_score(text)
    if in_json is not None:
        match = ALONE.fullmatch(in_json)
        yield (match["value"], match["rest"]) if match else (in_json, "")
        return
    plain = MARKUP.sub("", text)
    labelled = [(match["value"], match["rest"]) for match in LABELLED.finditer(plain)]
    yield from labelled or [(match["value"], match["rest"]) for line in plain.splitlines() if (match := ALONE.fullmatch(line))]


def _json_score(text: str) -> str | None:
    """What stands under a score's key in the JSON object of a text, as text; None where there is none."""
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return None
    try:
        found = json.loads(text[start : end + 1], parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        return None
    values = [value for key, value in found.items() if key.lower() in LABELS] if isinstance(found, dict) else []
    return str(values[0]) if len(values) == 1 else None


def _scaled(value: str, rest: str) -> tuple[float | None, str]:
    """An amount on the scale of 1 to 100, or None and what is wrong with it."""
    scale = "".join(rest.split())
    if scale not in ("", "/100", "outof100"):
        return None, "another scale"
    if re.fullmatch(r"0?[.,][0-9]+|0[.,][0-9]+", value):
        return None, "another scale"
    if re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", value) and not (PLAIN.fullmatch(value) and float(value) <= HIGHEST):
        return None, "out of range"
    return (float(value), "") if PLAIN.fullmatch(value) else (None, "no number")
