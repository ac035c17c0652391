"""A fit of the curve: how fast the score goes where it goes, and where that is.

With s[t] the score of cycle t, a the seeded one, b the level that it approaches and h the half-life, in cycles:

    s[t] = b + (a - b) 2^(-t / h)

a decay where b < a, a rise that saturates where b > a. For a given h this is linear in a and b, so that h alone is searched for
(variable projection; Golub and Pereyra 1973). Intervals are the jackknife's over prompts (Efron and Tibshirani 1993, chapter
11): what is fitted without one prompt after the other says how far each moves it. That of h is taken over its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


GRID, ROUNDS = 41, 7
"""Half-lives that are tried at once, and how often: their logarithms are known to 1e-8 then."""

Floats = NDArray[np.float64]


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


def _approach(cycles: Floats, table: Floats) -> Curve:
    """The fit to the means, and to those without each prompt."""
    longest, last = STRETCH * float(cycles[-1]), float(cycles[-1])
    prompts = len(table)
    # Prompts are what is sampled here: the same few cycles are all there is. So prompts are left out, not cycles.
    without = (table.sum(axis=0) - table) / (prompts - 1)
    halves, levels, offs = fitted(cycles, np.vstack([table.mean(axis=0), without]), longest)
    half, level, off = float(halves[0]), float(levels[0]), float(offs[0])
    by_half, by_level = _margin(np.log(halves[1:])), _margin(levels[1:])
    # The upper end of the half-life lies beyond the data: a straight line fits as well, and its level could be anywhere.
    if half * math.exp(by_half) > last:
        return Curve("approach", Interval(level, None, None, prompts), Interval(half, None, None, prompts), len(cycles), off)
    to = Interval(level, max(LOWEST, level - by_level), min(HIGHEST, level + by_level), prompts)
    pace = Interval(half, max(SHORTEST, half * math.exp(-by_half)), half * math.exp(by_half), prompts)
    return Curve("approach", to, pace, len(cycles), off)


def fitted(cycles: Floats, means: Floats, longest: float) -> tuple[Floats, Floats, Floats]:
    """The curves with the least squares; their levels stay on the judge's scale. All are searched for at once.

    Args:
        cycles: Their numbers, [n_cycles].
        means: Scores, [n_curves, n_cycles].
        longest: Half-life that is not exceeded, cycles.

    Returns:
        Half-lives in cycles, levels, and the largest distance to a mean, each [n_curves].
    """
    rows = np.arange(len(means))
    low, high = np.full(len(means), math.log(SHORTEST)), np.full(len(means), math.log(longest))
    # There may be more than one valley: the best of a grid is where the search begins. Each round lays a grid between the two
    # neighbours of the best, twenty times finer, until no more can be told by 64 bits.
    for _ in range(ROUNDS):
        grid = np.linspace(low, high, GRID, axis=1)
        best = (_linear(cycles, means, np.exp(grid))[1] ** 2).sum(axis=2).argmin(axis=1)
        low, high = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, GRID - 1)]
    halves = np.exp(grid[rows, best])
    levels, left = _linear(cycles, means, halves[:, None])
    return halves, levels[:, 0], np.abs(left[:, 0]).max(axis=1)


def _linear(cycles: Floats, means: Floats, half: Floats) -> tuple[Floats, Floats]:
    """For each half-life the level with the least squares, [n_curves, n_halves], and what it leaves of the means, by cycle.

    Args:
        half: [n_curves, n_halves].
    """
    # For a given half-life s = b + (a - b) left is a line in `left`: intercept and slope by ordinary least squares.
    left = 2.0 ** (-cycles / half[:, :, None])
    means = means[:, None, :]
    spread = left - left.mean(axis=2, keepdims=True)
    middle = means.mean(axis=2)
    slope = (spread * (means - middle[:, :, None])).sum(axis=2) / (spread**2).sum(axis=2)
    level = np.clip(middle - slope * left.mean(axis=2), LOWEST, HIGHEST)
    # once more, where the level was held on the scale
    reach = (left * (means - level[:, :, None])).sum(axis=2) / (left**2).sum(axis=2)
    return level, means - level[:, :, None] - reach[:, :, None] * left


def _margin(values: Floats) -> float:
    """Half the width of the jackknife's interval, from what comes out without one prompt after the other."""
    count = len(values)
    # the jackknife's factor is (n - 1) / n, not 1 / (n - 1): values without one prompt each lie close together
    return t_quantile(count - 1) * math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum()))
