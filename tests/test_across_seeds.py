"""Intervals over questions and trainings cover as often as they say; grids without effect stay without verdict."""

from __future__ import annotations

import numpy as np
import pytest

from iterft_lite.metrics.across_seeds import Estimate, change_over_seeds, difference, score_over_seeds, two_way
from iterft_lite.metrics.intervals import change_interval, mean_interval
from iterft_lite.metrics.many_cells import Training, false_alarms, holm, training_of

RUNS = 6000


def tables(trainings: int, questions: int, training: float, question: float, rest: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(trainings * questions)
    return (
        training * random.normal(size=(RUNS, trainings, 1))
        + question * random.normal(size=(RUNS, 1, questions))
        + rest * random.normal(size=(RUNS, trainings, questions))
    )


def covered(drawn: np.ndarray) -> float:
    """Share of tables whose interval holds the true mean, zero, in per cent."""
    from scipy.special import stdtrit

    means, errors, freedom = two_way(drawn)
    return float(100 * (np.abs(means) <= stdtrit(freedom, 0.975) * errors).mean())


@pytest.mark.parametrize("training", [0.0, 0.3, 0.6, 1.0, 3.0])
@pytest.mark.parametrize(("trainings", "least"), [(2, 89), (3, 92.5), (4, 94), (8, 94)])
@pytest.mark.parametrize("questions", [4, 12])
def test_intervals_over_trainings_have_their_coverage(trainings: int, least: float, questions: int, training: float) -> None:
    assert covered(tables(trainings, questions, training, 1.0)) >= least


def test_intervals_over_questions_alone_miss_differences_between_trainings() -> None:
    drawn = tables(3, 12, 1.0, 1.0)
    assert covered(drawn) > 92.5
    assert covered(drawn.mean(axis=1, keepdims=True)) < 75


def test_a_single_training_has_the_interval_of_its_report() -> None:
    before = {"a": [10.0, 20.0], "b": [30.0], "c": [50.0, 60.0, 70.0]}
    after = {"a": [20.0, 20.0], "b": [55.0], "c": [50.0, 60.0, 70.0], "d": [1.0]}
    mine, theirs = change_over_seeds([before], [after]), change_interval(before, after)
    assert (mine.mean, mine.low, mine.high, mine.prompts) == pytest.approx(
        (theirs.mean, theirs.low, theirs.high, theirs.prompts)
    )
    assert mine.covers == "questions"
    equal = {"a": [10.0, 20.0], "b": [30.0, 40.0], "c": [50.0, 60.0]}
    score, expected = score_over_seeds([equal]), mean_interval(equal)
    assert (score.mean, score.low, score.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_trainings_that_differ_widen_the_interval() -> None:
    before = {f"q{n}": [20.0 + n] for n in range(12)}
    rises = ({q: [v[0] + 10 + n % 3] for n, (q, v) in enumerate(before.items())}, {q: [v[0] + 30] for q, v in before.items()})
    alone, both = change_over_seeds([before], rises[:1]), change_over_seeds([before, before], rises)
    assert alone.low is not None
    assert both.low is not None
    assert alone.low > 0 > both.low
    assert (both.covers, both.trainings) == ("questions and trainings", 2)


def test_questions_that_one_training_could_not_score_are_left_out_of_the_interval() -> None:
    before = {f"q{n}": [20.0 + n] for n in range(5)}
    some = {"q0": [30.0], "q1": [35.0], "q2": []}
    assert change_over_seeds([before, before], [some, {q: [v[0] + 9] for q, v in before.items()}]).prompts == 2


def test_without_scores_there_is_no_mean() -> None:
    assert score_over_seeds([{"a": []}]) == Estimate(None)
    assert change_over_seeds([], []).mean is None
    assert difference([], []).mean is None
    assert score_over_seeds([{"a": [50.0]}]).covers == "nothing"


def test_a_score_over_seeds_stays_on_the_scale() -> None:
    high = score_over_seeds([{"a": [99.0], "b": [100.0], "c": [80.0]}, {"a": [99.0], "b": [99.0], "c": [97.0]}])
    assert high.high is not None
    assert high.high <= 100


# -- differences


def rows(table: np.ndarray) -> list[dict[str, float]]:
    return [{f"q{n}": float(value) for n, value in enumerate(row)} for row in table]


def test_a_difference_is_paired_by_question() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(0, 20, size=12)
    one, other = ([{f"q{n}": h + random.normal(0, 1) + up for n, h in enumerate(hard)}] for up in (0, 3))
    found = difference(one, other)
    assert found.low is not None
    assert found.low > 0
    elsewhere = difference(one, [{f"other{key}": value for key, value in other[0].items()}])
    assert elsewhere.low is not None
    assert elsewhere.low < 0


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_differences_between_groups_have_their_coverage(spread: float) -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        hard = random.normal(size=12)
        one, other = (hard + spread * random.normal(size=(3, 1)) + random.normal(size=(3, 12)) for _ in range(2))
        found = difference(rows(one), rows(other))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert held / 400 >= 0.93


def test_the_interval_of_a_single_training_covers_questions_only() -> None:
    one, other = rows(np.arange(12.0)[None]), rows(np.random.default_rng(2).normal(size=(3, 12)))
    assert difference(one, other).covers == "questions"


# -- many cells


def test_holms_correction_equals_the_hand_computed_one() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})
    assert holm({}) == {}


def grid(columns: int, share: bool) -> list[list[Training]]:
    answers = dict.fromkeys(range(7), 20.0)
    return [[Training(f"column {n // 5 if share else n}", 12, answers, 30.0)] for n in range(columns)]


def test_correction_removes_most_false_alarms_of_grids_without_effect() -> None:
    apart, shared = (false_alarms(grid(25, share), seed=1) for share in (False, True))
    assert apart is not None
    assert shared is not None
    assert 0.44 < apart.any_interval < 0.51  # 1 - 0.975^25
    assert 0.33 < shared.any_interval < apart.any_interval  # cells of a column fail together
    assert apart.expected_interval == pytest.approx(25 * 0.025, abs=0.1)
    assert apart.any_corrected < 0.04
    assert shared.any_corrected < 0.04


def test_noise_meets_the_papers_rule_on_few_questions() -> None:
    few = [[Training(n, 12, dict.fromkeys(range(7), 1.0), 30.0)] for n in range(25)]
    found = false_alarms(few, seed=1)
    assert found is not None
    assert found.any_paper is not None
    assert found.any_paper > 0.95
    early = false_alarms([[Training(n, 12, {0: 1.0, 1: 1.0}, 30.0)] for n in range(25)], seed=1)
    assert early is not None
    assert early.any_paper is None


def test_noise_needs_two_scored_cycles() -> None:
    scores = {"a": [10.0, 30.0], "b": [50.0, 40.0]}
    assert training_of("start", {0: scores}) is None
    assert training_of("start", {0: scores, 1: {"a": [], "b": []}}) is None
    found = training_of("start", {-1: scores, 0: scores, 2: scores})
    assert found is not None
    assert (found.prompts, found.answers) == (2, {0: 2.0, 2: 2.0})
    assert false_alarms([], seed=0) is None
