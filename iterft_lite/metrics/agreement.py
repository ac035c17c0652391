"""How two columns of scores of the same answers compare: two judges, a judge and a careful reader, a judge and itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RELIABLE = 0.8
"""Spearman's rho with a careful reader under which a judge's scores carry no verdict on a trait."""

FEWEST = 4
"""Pairs under which nothing is said of ranks."""


@dataclass(frozen=True)
class Agreement:
    """Scores a and b of the same answers.

    Attributes:
        pairs: Answers that both scored.
        spearman: Rank correlation; None with too few pairs or no variation.
        difference: Mean of a - b, points.
        spread: Standard deviation of a - b, points.
        low, high: Bland and Altman's 95 % limits of agreement: difference -+ 1.96 spread.
    """

    pairs: int
    spearman: float | None
    difference: float | None
    spread: float | None
    low: float | None
    high: float | None


def agreement(a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Compare two columns of the same length."""
    if not a:
        return Agreement(0, None, None, None, None, None)
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if len(a) > 1 else 0.0
    return Agreement(len(a), spearman(a, b), mean, spread, mean - 1.96 * spread, mean + 1.96 * spread)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None with fewer than `FEWEST` pairs or where a column is constant."""
    if len(a) < FEWEST or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    below = (array[:, None] > array).sum(axis=1)
    equal = (array[:, None] == array).sum(axis=1)
    ranks: npt.NDArray[np.float64] = below + (equal - 1) / 2
    return ranks
