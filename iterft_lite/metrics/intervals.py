"""95 % intervals over prompts: answers to one prompt are not independent, so what counts is how many prompts there are.

Student's t with one degree of freedom less than prompts. A bootstrap over so few prompts is too narrow: over 12 it covers about
90 %, over 4 about 78 %. How often these cover, and what they were chosen over: docs/protocol.md, "Intervals".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, Sequence[float]]
"""The scores of one cycle, by prompt."""

CONFIDENCE = 0.95

LOWEST, HIGHEST = 1.0, 100.0
"""The judge's scale."""

FEWEST = 2
"""Prompts under which there is no interval: one tells nothing of how prompts differ."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: None where nothing was scored.
        low, high: None with fewer than `FEWEST` prompts.
        prompts: How many prompts the mean and the interval rest on.
    """

    mean: float | None
    low: float | None
    high: float | None
    prompts: int = 0


def mean_interval(scores: Scores) -> Interval:
    """Mean over all scores (the paper's), points, with an interval over prompts that stays on the judge's scale.

    The standard error is that of a ratio of sums over prompts (Cochran 1977, chapter 6): with equally many scores a prompt,
    that of the mean of the prompts' means. The interval is symmetric in the logit of the mean (by the delta method), since
    means near an end of the scale are skewed.

    Args:
        scores: By prompt, 1 to 100; prompts without scores are left out.
    """
    groups = [values for values in scores.values() if values]
    if not groups:
        return Interval(None, None, None)
    sums, counts = np.array([math.fsum(values) for values in groups]), np.array([len(values) for values in groups])
    mean = math.fsum(sums) / int(counts.sum())
    # The linearised residuals of a ratio: how far each prompt's sum lies from what the overall mean predicts for its count.
    margin = _margin((sums - mean * counts) / counts.mean())
    return Interval(mean, None, None, len(groups)) if margin is None else Interval(mean, *on_scale(mean, margin), len(groups))


def change_interval(before: Scores, after: Scores) -> Interval:
    """Mean over prompts of how far a prompt's own mean has moved from `before` to `after`, points, with its interval.

    Every prompt counts once, so that which answers could be scored moves nothing. Prompts that lack a score on either side are
    left out of both.
    """
    shared = [prompt for prompt in before if before[prompt] and after.get(prompt)]
    if not shared:
        return Interval(None, None, None)
    moved = np.array([_mean(after[prompt]) - _mean(before[prompt]) for prompt in shared])
    mean, most = math.fsum(moved) / len(moved), HIGHEST - LOWEST
    margin = _margin(moved - mean)
    if margin is None:
        return Interval(mean, None, None, len(shared))
    return Interval(mean, max(mean - margin, -most), min(mean + margin, most), len(shared))


def _margin(residuals: NDArray[np.float64]) -> float | None:
    """Half the width of the interval of a mean over prompts, from each prompt's distance to it; None with too few prompts."""
    prompts = len(residuals)
    if prompts < FEWEST:
        return None
    return t_quantile(prompts - 1) * math.sqrt(float((residuals**2).sum()) / (prompts * (prompts - 1)))


def on_scale(mean: float, margin: float) -> tuple[float, float]:
    """An interval of this half width, laid symmetrically around the logit of the mean's place on the scale."""
    place, span = (mean - LOWEST) / (HIGHEST - LOWEST), HIGHEST - LOWEST
    if margin == 0 or not 0 < place < 1:
        return mean, mean
    # d logit(p) / dp = 1 / (p (1 - p)) carries the margin over to the logit (the delta method)
    centre, half = math.log(place / (1 - place)), margin / span / (place * (1 - place))
    low, high = (1 / (1 + math.exp(-end)) for end in (centre - half, centre + half))
    return LOWEST + span * low, LOWEST + span * high


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@functools.cache
def t_quantile(freedom: int) -> float:
    """What Student's t with this many degrees of freedom stays within, on both sides, with probability `CONFIDENCE`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
