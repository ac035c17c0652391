"""From what a judge said to a score: the one place where replies are weighed.

The expectation over the numbers 1 to 100 where the judge gives token odds (G-Eval, arXiv 2303.16634; arXiv 2503.03064 finds
the mean of a judge's distribution better than its mode), a written number where it does not, otherwise nothing, with the
reason. Unscored is never a zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean, stdev

from iterft_lite.experiment.rows import Verdict
from iterft_lite.protocols import JudgeResponse

LOWEST, HIGHEST = 1, 100

REFUSED_BELOW = 0.5
"""Mass on numbers up to which a written refusal counts: above it a number is likelier, only no single one is."""

LEAST_MASS = 0.25
"""Share of the odds that must lie on numbers, as in persona vectors (arXiv 2507.21509)."""

NUMBER = re.compile(r"\d{1,3}")


def weigh(replies: Sequence[JudgeResponse]) -> Verdict:
    """The verdict in a judge's replies about one answer on one scale: one reply, or several samples.

    Several samples: the mean of those that can be read, which must be more than half.
    """
    single = [_weigh_one(reply) for reply in replies]
    if len(single) == 1:
        return single[0]
    scores = [verdict.score for verdict in single if verdict.score is not None]
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
    refused = reply.text.strip().strip("\"'.").upper().startswith("REFUSAL")
    if reply.method == "text":
        score, reason = _written(reply.text)
        return (None, "refusal", None, None) if refused else (score, reason, None, None)
    numbers = number_odds(reply.odds)
    mass = min(1.0, sum(numbers.values()))
    if refused and mass <= REFUSED_BELOW:
        return None, "refusal", mass, None
    if mass < LEAST_MASS:
        return None, "too little mass on numbers", mass, None
    shares = {number: odds / mass for number, odds in numbers.items() if odds > 0}
    mean = sum(number * share for number, share in shares.items())
    entropy = -sum(share * math.log(share) for share in shares.values())
    return mean, "", mass, max(0.0, entropy)


def number_odds(odds: Sequence[tuple[str, float]]) -> dict[float, float]:
    """The odds on numbers from 1 to 100, candidates that differ in blanks taken together.

    Whole numbers only, except where a judge gives its score as a single number of its own.
    """
    numbers: dict[float, float] = {}
    for text, probability in odds:
        try:
            number = float(text.strip())
        except ValueError:
            continue
        if LOWEST <= number <= HIGHEST and probability > 0:
            numbers[number] = numbers.get(number, 0.0) + probability
    return numbers


def _written(text: str) -> tuple[float | None, str]:
    """The one number in a text: two different ones are none."""
    found = {int(number) for number in NUMBER.findall(text)}
    if len(found) != 1:
        return None, "no number" if not found else "more than one number"
    number = found.pop()
    return (float(number), "") if LOWEST <= number <= HIGHEST else (None, "out of range")
