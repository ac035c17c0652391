"""Bootstrap intervals clustered on prompts: answers to one prompt are not independent (Efron and Tibshirani 1993, ch. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, Sequence[float]]
"""The scores of one cycle, by prompt."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; all None where nothing was scored."""

    mean: float | None
    low: float | None
    high: float | None


def mean_interval(scores: Scores, *, resamples: int, seed: int) -> Interval:
    """Mean over all scores (the paper's), interval over resampled prompts.

    Args:
        scores: By prompt; prompts without scores are left out.
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    sums, counts = _tables([scores], [prompt for prompt in scores if scores[prompt]])
    if not counts.sum():
        return Interval(None, None, None)
    mean = float(sums.sum() / counts.sum())
    return Interval(mean, *_quantiles(_resampled(sums, counts, resamples, seed)[:, 0]))


def change_interval(before: Scores, after: Scores, *, resamples: int, seed: int) -> Interval:
    """Mean of `after` minus mean of `before`, paired: each resample takes the same prompts from both.

    Prompts that lack a score on either side are left out of both.
    """
    shared = [prompt for prompt in before if before[prompt] and after.get(prompt)]
    if not shared:
        return Interval(None, None, None)
    sums, counts = _tables([before, after], shared)
    means = sums.sum(axis=1) / counts.sum(axis=1)
    drawn = _resampled(sums, counts, resamples, seed)
    return Interval(float(means[1] - means[0]), *_quantiles(drawn[:, 1] - drawn[:, 0]))


def _tables(cycles: Sequence[Scores], prompts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and counts of scores, each [cycles, prompts]."""
    sums = np.array([[sum(scores[prompt]) for prompt in prompts] for scores in cycles], dtype=np.float64)
    counts = np.array([[len(scores[prompt]) for prompt in prompts] for scores in cycles], dtype=np.float64)
    return sums, counts


def _resampled(sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means over resampled prompts, [resamples, cycles]; the same prompts for every cycle."""
    prompts = sums.shape[1]
    drawn = np.random.default_rng(seed).integers(prompts, size=(resamples, prompts))
    return np.asarray(sums[:, drawn].sum(axis=2).T / counts[:, drawn].sum(axis=2).T)


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
