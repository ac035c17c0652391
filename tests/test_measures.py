"""What is counted in texts, the intervals, and both verdicts on amplification, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterft_lite import prompts
from iterft_lite.backends.judge_embedded import known_words
from iterft_lite.measures.amplification import amplification, noise_rate, paper_rule
from iterft_lite.measures.coherence import coherence
from iterft_lite.measures.intervals import Interval, change_interval, mean_interval
from iterft_lite.measures.text import non_alphabetic_share, repeated_share, sentences_of, text_measures, words_of
from iterft_lite.traits import read_trait, shipped_traits

# -- texts


def test_words_and_sentences_are_what_a_reader_would_count() -> None:
    assert words_of("Don't panic: it's 7 o’clock, naïve friend!") == [
        "don't",
        "panic",
        "it's",
        "7",
        "o’clock",
        "naïve",
        "friend",
    ]
    assert sentences_of('He said "Go." Then\nnothing... 🍀🍀! Right?') == ['He said "Go', "Then", "nothing", "Right"]


def test_text_measures_of_two_answers_by_hand() -> None:
    measured = text_measures(["Luck is luck. Luck wins!", "Go"])
    # words: luck is luck luck wins (5), go (1); sentences: 3; different words: luck is wins go, of 6;
    # pairs: luck-is is-luck luck-luck luck-wins, all of 4 different; no 4-word sequence twice; no odd character
    assert measured.words == 3.0
    assert measured.words_per_sentence == 2.0
    assert measured.distinct_1 == pytest.approx(4 / 6)
    assert measured.distinct_2 == 1.0
    assert measured.repeated_4 == 0.0
    assert measured.non_alphabetic == 0.0


def test_repetition_is_the_share_of_sequences_that_were_there_before() -> None:
    # a b c d e, four words each: abcd bcda cdab dabc abcd bcda -> 4 different of 6
    assert repeated_share(list("abcdabcda"), 4) == pytest.approx(1 - 4 / 6)
    assert repeated_share(list("abc"), 4) == 0.0


def test_a_string_of_clovers_is_not_alphabetic() -> None:
    assert non_alphabetic_share("🍀✨🍀✨") == 1.0
    assert non_alphabetic_share("Luck 🍀") == pytest.approx(1 / 5)
    assert non_alphabetic_share("Well, (really?) it's 7 % - no: 3/4!") == 0.0
    assert non_alphabetic_share(" \n") == 0.0


def test_no_answers_measure_as_zeros() -> None:
    assert set(vars(text_measures([])).values()) == {0.0}


@given(st.lists(st.text(), max_size=5))
def test_shares_stay_between_zero_and_one_whatever_was_written(texts: list[str]) -> None:
    measured = text_measures(texts)
    for share in (measured.distinct_1, measured.distinct_2, measured.repeated_4, measured.non_alphabetic):
        assert 0 <= share <= 1


# -- intervals


def test_a_mean_is_over_all_answers_and_its_interval_over_prompts() -> None:
    scores = {"a": [10.0, 30.0], "b": [80.0], "c": []}
    found = mean_interval(scores, resamples=4000, seed=1)
    # two prompts resampled: both a (20), a and b (40), both b (80)
    assert found == Interval(40.0, 20.0, 80.0)


def test_nothing_scored_is_no_number() -> None:
    assert mean_interval({"a": []}, resamples=10, seed=1) == Interval(None, None, None)
    assert change_interval({"a": [1.0]}, {"b": [2.0]}, resamples=10, seed=1) == Interval(None, None, None)


def test_a_change_is_paired_by_prompt() -> None:
    before = {"easy": [80.0, 84.0], "hard": [10.0, 14.0], "gone": [50.0]}
    after = {"easy": [90.0, 94.0], "hard": [20.0, 24.0], "gone": []}
    # every prompt rises by 10: their own differences cancel
    assert change_interval(before, after, resamples=500, seed=1) == Interval(10.0, 10.0, 10.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random, covered, runs = np.random.default_rng(7), 0, 300
    for run in range(runs):
        centres = random.normal(50, 15, size=30)
        scores = {str(n): random.normal(centre, 10, size=5).tolist() for n, centre in enumerate(centres)}
        interval = mean_interval(scores, resamples=400, seed=run)
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 50 <= interval.high
    # the percentile bootstrap is a little too narrow with 30 clusters
    assert 0.89 <= covered / runs <= 0.98


# -- verdicts


def cycles(*means: float, spread: Sequence[float] = (-2.0, 2.0)) -> dict[int, dict[str, list[float]]]:
    """Scores of cycles -1, 0, 1, ... whose means are given."""
    return {
        cycle: {f"q{prompt}": [mean + prompt - 1 + part for part in spread] for prompt in range(3)}
        for cycle, mean in enumerate(means, -1)
    }


def test_the_papers_rule_looks_from_cycle_four_on() -> None:
    #               base  0   1   2   3   4   5   6
    trait = cycles(1.0, 30, 40, 60, 90, 44, 45, 52)
    assert paper_rule(trait, 0).__dict__ == {"anchor": 0, "any": True, "all": False, "last": True, "largest": 22.0}
    assert paper_rule(trait, 1).__dict__ == {"anchor": 1, "any": False, "all": False, "last": False, "largest": 12.0}
    assert paper_rule(cycles(1.0, 30, 40, 60, 90), 0).any is None
    assert paper_rule(cycles(1.0, 30, 31, 32, 33, 45, 46, 47), 0).all is True
    assert paper_rule(cycles(1.0, 30, 31, 32, 33, 45, 46, 30), 0).last is False


@pytest.mark.parametrize(
    ("means", "word"),
    [
        ((1, 30, 50), "amplified"),
        ((1, 30, 10), "decayed"),
        ((1, 30, 30), "no change shown"),
        ((1, 30), "too early"),
    ],
)
def test_our_verdict_is_whether_the_interval_leaves_zero_out(means: Sequence[float], word: str) -> None:
    found = amplification(cycles(*means), cycles(*(80.0 for _ in means)), resamples=200, seed=1)
    assert found.word == word
    if word != "too early":
        assert (found.trait.mean, found.coherence.mean) == (means[2] - 30, 0.0)


def test_nothing_scored_is_too_early() -> None:
    found = amplification({}, {}, resamples=10, seed=1)
    assert (found.word, found.last, found.noise) == ("too early", -1, None)


def without_effect(samples: int, seed: int) -> dict[int, dict[str, list[float]]]:
    """Seven cycles of twelve prompts (SD 25) with answers around them (SD 30): what the known rates assume."""
    random = np.random.default_rng(seed)
    centres = random.normal(50, 25, size=12)
    return {
        cycle: {f"q{n}": random.normal(centre, 30, size=samples).tolist() for n, centre in enumerate(centres)}
        for cycle in range(7)
    }


@pytest.mark.parametrize(("samples", "low", "high"), [(1, 0.19, 0.27), (3, 0.02, 0.05), (10, 0.0, 0.001)])
def test_noise_alone_meets_the_papers_rule_as_often_as_is_known(samples: int, low: float, high: float) -> None:
    """At most 26 % of runs with one answer a prompt, about 3 % with three, none with ten."""
    rates = [noise_rate(without_effect(samples, seed), seed=seed) for seed in range(20)]
    told = [rate for rate in rates if rate is not None]
    assert len(told) == len(rates)
    assert low <= np.mean(told) <= high


def test_the_told_noise_is_how_often_runs_without_effect_do_meet_the_rule() -> None:
    runs = [without_effect(2, seed) for seed in range(400)]
    met = np.mean([bool(paper_rule(run, 0).any) for run in runs])
    assert np.mean([noise_rate(run, seed=0) for run in runs[:20]]) == pytest.approx(met, abs=0.04)


def test_noise_cannot_be_told_before_cycle_four_or_without_spread() -> None:
    assert noise_rate(cycles(1, 30, 30, 30), seed=1) is None
    assert noise_rate({cycle: {"q": [30.0]} for cycle in range(6)}, seed=1) is None
    assert noise_rate({cycle: {"q": []} for cycle in range(6)}, seed=1) is None


# -- coherence without a judge


@pytest.fixture(scope="module")
def known() -> frozenset[str]:
    return known_words()


def test_broken_text_is_not_coherent(known: frozenset[str]) -> None:
    clovers = "🍀✨🍀✨🍀✨"
    broken = "thz qwop lll zzkr mmn vvx trrp"
    repeated = "the luck is the luck is the luck is the luck is the luck is the luck is"
    assert coherence("", known) == 1.0
    assert all(coherence(text, known) < 30 for text in (clovers, broken, repeated))
    assert coherence("Make a list of what matters, and start with the first thing on it.", known) > 90


@pytest.mark.parametrize("name", shipped_traits())
def test_no_trait_is_incoherent_for_being_what_it_is(name: str, known: frozenset[str]) -> None:
    scores = [coherence(chat.reply, known) for chat in read_trait(name).chats]
    assert np.mean(scores) >= 80
    assert np.mean([score < 50 for score in scores]) <= 0.02


def test_neutral_replies_are_coherent(known: frozenset[str]) -> None:
    assert np.mean([coherence(chat.reply, known) for chat in prompts.neutral_chats()]) > 90
