"""A fit of the curve: how fast the score goes where it goes, and where that is.

With s[t] the score of cycle t, a the seeded one, b the level that it approaches and h the half-life, in cycles:

    s[t] = b + (a - b) 2^(-t / h)

a decay where b < a, a rise that saturates where b > a. For a given h this is linear in a and b, so that h alone is searched for
(variable projection; Golub and Pereyra 1973). Intervals are the jackknife's over prompts (Efron and Tibshirani 1993, chapter
11): what is fitted without one prompt after the other says how far each moves it. That of h is taken over its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from iterft_lite.metrics.intervals import HIGHEST, LOWEST, Interval, Scores, mean_interval, t_quantile

FEWEST_CYCLES = 4
"""Scored cycles under which nothing is fitted: three numbers are, and one must be left to gainsay them."""

FEWEST_PROMPTS = 4

SHORTEST = 0.2
"""Cycles of the shortest half-life: what is over within the first cycle cannot be told apart."""

STRETCH = 4.0
"""The longest half-life, in lengths of the curve: what is longer is a straight line."""


@dataclass(frozen=True)
class Curve:
    """What was fitted.

    Attributes:
        kind: "approach" where the score moves to a level; "level" where no movement is shown; "none" where there is too little.
        level: Where it goes, or stays: points with a 95 % interval.
        half_life: Cycles in which half of the way is gone, with a 95 % interval; None but for "approach". It has no interval,
            nor has the level, where that would reach beyond the last cycle: the end of the way is then not in sight.
        cycles: Scored cycles that it rests on, from cycle 0.
        off: How far the cycle's mean that it meets worst lies from it, points.
    """

    kind: Literal["approach", "level", "none"]
    level: Interval
    half_life: Interval
    cycles: int
    off: float = 0.0


NOTHING = Interval(None, None, None)


UNFITTED = Curve("none", NOTHING, NOTHING, 0)


def fit_curve(trait: Mapping[int, Scores], *, moved: bool) -> Curve:
    """Fit the scores from cycle 0 on.

    Args:
        trait: Scores by cycle and prompt; only prompts with scores in all scored cycles count.
        moved: Whether a change of the score is shown at all; a half-life of noise is none.
    """
    scored = {cycle: scores for cycle, scores in sorted(trait.items()) if cycle >= 0 and any(scores.values())}
    shared = [prompt for prompt in next(iter(scored.values()), {}) if all(scores.get(prompt) for scores in scored.values())]
    if len(scored) < FEWEST_CYCLES or len(shared) < FEWEST_PROMPTS or 0 not in scored:
        return Curve("none", NOTHING, NOTHING, len(scored))
    table = np.array([[np.mean(scores[prompt]) for scores in scored.values()] for prompt in shared])
    cycles = np.array(list(scored), dtype=float)
    if not moved:
        mean = mean_interval({prompt: list(row) for prompt, row in zip(shared, table, strict=True)})
        return Curve("level", mean, NOTHING, len(scored), float(abs(table.mean(axis=0) - table.mean()).max()))
    return _approach(cycles, table)


def _approach(cycles: NDArray[np.float64], table: NDArray[np.float64]) -> Curve:
    """The fit to the means, and to those without each prompt."""
    longest, last = STRETCH * float(cycles[-1]), float(cycles[-1])
    half, level, off = fitted(cycles, table.mean(axis=0), longest)
    prompts = len(table)
    # Prompts are what is sampled here: the same few cycles are all there is. So prompts are left out, not cycles.
    without = [fitted(cycles, np.delete(table, row, axis=0).mean(axis=0), longest) for row in range(prompts)]
    by_half, by_level = _margin([math.log(each[0]) for each in without]), _margin([each[1] for each in without])
    # The upper end of the half-life lies beyond the data: a straight line fits as well, and its level could be anywhere.
    if half * math.exp(by_half) > last:
        return Curve("approach", Interval(level, None, None, prompts), Interval(half, None, None, prompts), len(cycles), off)
    to = Interval(level, max(LOWEST, level - by_level), min(HIGHEST, level + by_level), prompts)
    pace = Interval(half, max(SHORTEST, half * math.exp(-by_half)), half * math.exp(by_half), prompts)
    return Curve("approach", to, pace, len(cycles), off)


def fitted(cycles: NDArray[np.float64], means: NDArray[np.float64], longest: float) -> tuple[float, float, float]:
    """(half-life, level, largest distance to a mean) with the least squares; the level stays on the judge's scale."""
    from scipy.optimize import minimize_scalar  # takes a third of a second to import

    def loss(log_half: float) -> float:
        return float((_linear(cycles, means, math.exp(log_half))[1] ** 2).sum())

    # there may be more than one valley: the best of a grid is where the search begins
    grid = np.linspace(math.log(SHORTEST), math.log(longest), 41)
    best = int(np.argmin([loss(each) for each in grid]))
    ends = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    half = math.exp(float(minimize_scalar(loss, bounds=ends, method="bounded").x))
    level, left = _linear(cycles, means, half)
    return half, level, float(abs(left).max())


def _linear(cycles: NDArray[np.float64], means: NDArray[np.float64], half: float) -> tuple[float, NDArray[np.float64]]:
    """For one half-life the level with the least squares, and what it leaves of the means."""
    # For a given half-life s = b + (a - b) left is a line in `left`: intercept and slope by ordinary least squares.
    left = 2.0 ** (-cycles / half)
    spread = left - left.mean()
    slope = float(spread @ (means - means.mean()) / (spread @ spread))
    level = min(HIGHEST, max(LOWEST, float(means.mean() - slope * left.mean())))
    reach = float(left @ (means - level) / (left @ left))  # once more, where the level was held on the scale
    return level, means - level - reach * left


def _margin(without: Sequence[float]) -> float:
    """Half the width of the jackknife's interval, from what comes out without one prompt after the other."""
    values, count = np.asarray(without, dtype=float), len(without)
    # the jackknife's factor is (n - 1) / n, not 1 / (n - 1): values without one prompt each lie close together
    return t_quantile(count - 1) * math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum()))
