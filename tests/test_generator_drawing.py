"""The arithmetic of drawing tokens, without a model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from iterft_lite.backends.llamacpp.sampling import BLOCK, Floats, choose, log_softmax, unnormalised
from iterft_lite.errors import BackendError
from iterft_lite.protocols import Sampling


def weights_of(logits: Floats, sampling: Sampling) -> Floats:
    width = -(-logits.shape[1] // BLOCK) * BLOCK
    weights = np.zeros((len(logits), width), dtype=np.float32)
    unnormalised(logits, sampling, out=weights[:, : logits.shape[1]])
    return weights


def random_logits(rows: int, vocab: int, scale: float = 3.0) -> Floats:
    return np.random.default_rng(0).normal(scale=scale, size=(rows, vocab)).astype(np.float32)


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = random_logits(1, 150)
    weights = np.repeat(weights_of(logits, Sampling(0.7, 1)), 20_000, axis=0)
    drawn = choose(weights, np.random.default_rng(1).random(len(weights)))
    expected = np.exp(logits[0].astype(np.float64) / 0.7)
    expected *= len(weights) / expected.sum()
    common = expected >= 5
    seen = np.bincount(drawn, minlength=150)
    observed = [*seen[common], seen[~common].sum()]
    assert stats.chisquare(observed, [*expected[common], expected[~common].sum()]).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [64, 65, 1000, 151_936])
def test_drawing_picks_the_token_that_exact_arithmetic_gives(vocab: int) -> None:
    logits = random_logits(4, vocab, scale=1.0)
    weights = weights_of(logits, Sampling(1.0, 1))
    ends = np.cumsum(weights.astype(np.float64), axis=1)
    for aim in (0.0, 0.1, 0.5, 0.9, 0.999, np.nextafter(1.0, 0.0)):
        exact = [int(np.searchsorted(row, aim * row[-1], side="right")) for row in ends]
        drawn = choose(weights, np.full(4, aim))
        assert all(weights[row, token] > 0 for row, token in enumerate(drawn))
        assert np.abs(drawn - np.minimum(exact, vocab - 1)).max() <= 1  # the sums' own rounding


def test_tokens_of_zero_probability_are_never_drawn() -> None:
    weights = np.zeros((3, 3 * BLOCK), dtype=np.float32)
    weights[0, 70] = weights[1, 5] = weights[1, 190] = weights[2, 128] = 1.0
    assert choose(weights, np.array([0.0, 0.4999, 0.999999])).tolist() == [70, 5, 128]
    assert choose(weights, np.array([0.999999, 0.5001, 0.0])).tolist() == [70, 190, 128]


def test_top_k_top_p_and_min_p_keep_the_right_tokens() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]], dtype=np.float32))

    def kept(**truncation: float) -> list[int]:
        return np.flatnonzero(weights_of(logits, Sampling(1.0, 1, **truncation))).tolist()  # type: ignore[arg-type]

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=0.5) == [0]
    assert kept(min_p=0.2) == [0, 1, 2]
    assert kept(top_k=3, top_p=0.99, min_p=0.4) == [0, 1]


def test_temperature_comes_before_truncation() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1]], dtype=np.float32))
    assert np.count_nonzero(weights_of(logits, Sampling(0.25, 1, min_p=0.1))) == 1
    assert np.count_nonzero(weights_of(logits, Sampling(1.0, 1, min_p=0.1))) == 3


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_nan_logits_are_reported(broken: float) -> None:
    logits = random_logits(2, 100)
    logits[1, 3] = broken
    with np.errstate(invalid="ignore"), pytest.raises(BackendError, match="not finite"):
        choose(weights_of(logits, Sampling(1.0, 1)), np.array([0.5, 0.5]))


def test_log_softmax_is_exact_to_single_precision() -> None:
    logits = random_logits(130, 5000, scale=10.0)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
    assert np.abs(log_softmax(logits) - expected).max() < 1e-5
