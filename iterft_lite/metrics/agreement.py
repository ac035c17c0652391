"""How two columns of scores of the same answers compare: two judges, a judge and a careful reader, a judge and itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RELIABLE = 0.8
"""Spearman's rho with a careful reader that a judge must surely have, for its scores to carry a verdict on a trait."""

MOST_BIAS = 10.0
"""Points by which a reliable judge's scores lie above or below the reader's on average: two thirds of what the paper's
rule asks."""

ENOUGH = 12
"""Calibration answers under which nothing is called reliable."""

FEWEST = 4
"""Pairs under which no rank correlation is given."""

SURE = 1.645
"""Standard errors to each side of the interval of rho: 90 %, so that its lower end is passed by chance in 5 of 100 cases."""

ONE = 0.9999
"""Rho above which Fisher's transformation is not taken."""


@dataclass(frozen=True)
class Agreement:
    """Scores a and b of the same answers.

    Attributes:
        pairs: Answers that both scored.
        spearman: Rank correlation; None with too few pairs or no variation.
        difference: Mean of a - b, points.
        spread: Standard deviation of a - b, points.
        low, high: Bland and Altman's 95 % limits of agreement: difference -+ 1.96 spread.
        spearman_low, spearman_high: 90 % interval of the rank correlation; None where there is none.
    """

    pairs: int
    spearman: float | None
    difference: float | None
    spread: float | None
    low: float | None
    high: float | None
    spearman_low: float | None = None
    spearman_high: float | None = None


@dataclass(frozen=True)
class Calibrated:
    """What a judge's calibration says of it, for a report.

    Attributes:
        spearman: Rank correlation with careful readers; None where it is not known.
        doubt: Why it is not reliable, a clause; "" where it is.
    """

    spearman: float | None
    doubt: str


def agreement(a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Compare two columns of the same length."""
    if not a:
        return Agreement(0, None, None, None, None, None)
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if len(a) > 1 else 0.0
    rho = spearman(a, b)
    return Agreement(len(a), rho, mean, spread, mean - 1.96 * spread, mean + 1.96 * spread, *spearman_interval(rho, len(a)))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None with fewer than `FEWEST` pairs or where a column is constant."""
    if len(a) < FEWEST or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    from scipy import stats  # takes half a second to import, which a report without judges need not wait for

    return float(stats.spearmanr(a, b).statistic)


def spearman_interval(rho: float | None, pairs: int) -> tuple[float | None, float | None]:
    """90 % interval of a rank correlation, by Fisher's transformation with Bonett and Wright's (2000) standard error."""
    if rho is None:
        return None, None
    centre = math.atanh(max(-ONE, min(ONE, rho)))
    margin = SURE * math.sqrt((1 + rho**2 / 2) / (pairs - 3))
    return math.tanh(centre - margin), math.tanh(centre + margin)


def calibrated(found: Agreement) -> Calibrated:
    """Whether a judge can be relied on, by its scores (a) of answers that careful readers scored (b)."""
    rho, low, bias = found.spearman, found.spearman_low, found.difference
    if found.pairs < ENOUGH:
        return Calibrated(rho, f"{found.pairs} calibration answers have scores by it and careful readers, {ENOUGH} are needed")
    if rho is None or low is None or bias is None:
        return Calibrated(
            rho, f"all {found.pairs} calibration answers have one score by it, or by careful readers: no ranks to compare"
        )
    if low < RELIABLE:
        return Calibrated(rho, f"Spearman with careful readers is {rho:.2f} and may be {low:.2f}, {RELIABLE} is needed")
    if abs(bias) > MOST_BIAS:
        side = "above" if bias > 0 else "below"
        return Calibrated(
            rho, f"its scores lie {abs(bias):.0f} points {side} careful readers', at most {MOST_BIAS:.0f} are accepted"
        )
    return Calibrated(rho, "")


def read_calibrated(known: Any) -> Calibrated:
    """What a run's folder says of its judge on a scale; folders of version 0.1 hold the rank correlation alone."""
    if isinstance(known, Mapping):
        return Calibrated(known.get("spearman"), str(known.get("doubt", "")))
    rho = float(known) if isinstance(known, int | float) else None
    doubt = rho is not None and rho < RELIABLE
    return Calibrated(rho, f"Spearman with careful readers is {rho:.2f}, {RELIABLE} is needed" if doubt else "")
