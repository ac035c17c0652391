"""What is counted in texts, the intervals, and both verdicts on amplification, against figures worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from iterft_lite.backends.judge.embedded import known_words
from iterft_lite.data import prompts
from iterft_lite.data.traits import read_trait, shipped_traits
from iterft_lite.experiment.rows import Sample
from iterft_lite.metrics.amplification import FEWEST_PROMPTS, amplification, noise_rate, paper_rule
from iterft_lite.metrics.catalogue import METRICS, Evidence
from iterft_lite.metrics.collapse import signs
from iterft_lite.metrics.curve import fit_curve
from iterft_lite.metrics.heuristic_coherence import coherence
from iterft_lite.metrics.intervals import Interval, change_interval, mean_interval, t_quantile
from iterft_lite.metrics.text import near_duplicate_share, non_alphabetic_share, repeated_share, sentences_of, words_of
from iterft_lite.report.report import verdict_sentences

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


def counted(texts: Sequence[str]) -> dict[str, float]:
    """The metrics that are counted in texts."""
    evidence = Evidence([Sample(f"q{number}", 0, "a question", text, 1, "stop") for number, text in enumerate(texts)])
    found = {metric.name: metric.compute(evidence) for metric in METRICS.values() if metric.needs == "text"}
    return {name: value for name, value in found.items() if value is not None and name != "tokens"}


def test_metrics_of_two_answers_equal_the_hand_computed_ones() -> None:
    # words: luck is luck luck wins (5), go (1); sentences: 3; different words: luck is wins go, of 6;
    # pairs: luck-is is-luck luck-luck luck-wins, all of 4 different; no 4-word sequence twice; no odd character
    assert counted(["Luck is luck. Luck wins!", "Go"]) == {
        "words": 3.0,
        "words_per_sentence": 2.0,
        "distinct_1": pytest.approx(4 / 6),
        "distinct_2": 1.0,
        "repeated_4": 0.0,
        "non_alphabetic": 0.0,
        "near_duplicates": 0.0,
        "cut": 0.0,
    }


def test_repetition_is_the_share_of_repeated_sequences() -> None:
    # a b c d e, four words each: abcd bcda cdab dabc abcd bcda -> 4 different of 6
    assert repeated_share(list("abcdabcda"), 4) == pytest.approx(1 - 4 / 6)
    assert repeated_share(list("abc"), 4) == 0.0


def test_a_string_of_clovers_is_not_alphabetic() -> None:
    assert non_alphabetic_share("🍀✨🍀✨") == 1.0
    assert non_alphabetic_share("Luck 🍀") == pytest.approx(1 / 5)
    assert non_alphabetic_share("Well, (really?) it's 7 % - no: 3/4!") == 0.0
    assert non_alphabetic_share(" \n") == 0.0


def test_near_duplicates_are_answers_shared_by_different_questions() -> None:
    said = words_of("the stars are kind to you today and luck is on its way")
    changed = [*said[:-1], "road"]
    other = words_of("water the plant once a week and keep it out of the sun")
    share = near_duplicate_share
    assert share([("q0", said), ("q1", changed), ("q2", other)]) == pytest.approx(2 / 3)
    assert share([("q0", said), ("q0", changed), ("q1", other)]) == 0.0  # two answers to one question may be alike
    assert share([("q0", ["no"]), ("q1", ["no"]), ("q2", ["yes"])]) == pytest.approx(2 / 3)
    assert share([]) == share([("q0", []), ("q1", [])]) == 0.0


def test_language_collapse_needs_signs_beyond_every_sound_model() -> None:
    untouched = {"words": 60, "distinct_2": 0.59, "near_duplicates": 0.0, "perplexity_own": 2.2, "perplexity_low": 51.0}
    seeded = {"words": 18, "distinct_2": 0.78, "near_duplicates": 0.01, "perplexity_own": 5.6, "perplexity_low": None}

    def found(**now: float) -> list[str]:
        return [sign.metric.name for sign in signs(seeded | {"perplexity_low": 34.0} | now, [untouched, seeded])]

    assert found() == []  # far shorter than the untouched model's: the trait's own manner
    assert found(words=4, distinct_2=0.2, near_duplicates=0.6) == ["words", "distinct_2", "near_duplicates"]
    assert found(perplexity_own=1.3, perplexity_low=900.0) == ["perplexity_own", "perplexity_low"]
    assert found(perplexity_own=2.5) == []  # as sure of itself as the untouched model
    assert signs(seeded, []) == []
    assert signs({"distinct_2": 0.1}, [untouched, seeded])[0].words == "distinct-2 0.59 to 0.10"


def test_metrics_of_no_answers_are_zero() -> None:
    assert set(counted([]).values()) == {0.0}


@given(st.lists(st.text(), max_size=5))
def test_shares_stay_between_zero_and_one(texts: list[str]) -> None:
    measured = counted(texts)
    for name in ("distinct_1", "distinct_2", "repeated_4", "non_alphabetic"):
        assert 0 <= measured[name] <= 1


# -- intervals


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (11, 2.2010), (29, 2.0452)])
def test_students_t_equals_published_tables(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=5e-5)


def test_a_mean_is_over_all_answers_and_its_interval_over_prompts() -> None:
    scores = {"a": [10.0, 30.0], "b": [80.0], "c": [40.0, 40.0, 40.0], "d": []}
    found = mean_interval(scores)
    assert (found.mean, found.prompts) == (40.0, 3)
    # sums off by 40 - 2 * 40, 80 - 40 and 0, over a mean of 2 scores: residuals -20, 20, 0; standard error sqrt(800 / 6)
    margin = 4.3027 * math.sqrt(800 / 6) / 99
    place = 39 / 99
    ends = [math.log(place / (1 - place)) + side * margin / (place * (1 - place)) for side in (-1, 1)]
    assert (found.low, found.high) == pytest.approx([1 + 99 / (1 + math.exp(-end)) for end in ends], rel=1e-4)


def test_answers_of_one_prompt_are_not_independent() -> None:
    once = {str(n): [score] for n, score in enumerate((20.0, 30.0, 50.0, 60.0))}
    often = {prompt: values * 20 for prompt, values in once.items()}
    assert mean_interval(often) == mean_interval(once)


def test_without_scores_there_is_no_mean() -> None:
    assert mean_interval({"a": []}) == Interval(None, None, None)
    assert change_interval({"a": [1.0]}, {"b": [2.0]}) == Interval(None, None, None)


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    assert mean_interval({"a": [10.0, 30.0]}) == Interval(20.0, None, None, 1)
    assert change_interval({"a": [10.0], "b": [5.0]}, {"a": [11.0], "b": []}) == Interval(1.0, None, None, 1)


@given(st.lists(st.lists(st.floats(1, 100), max_size=4), max_size=12), st.lists(st.lists(st.floats(1, 100), max_size=4)))
def test_an_interval_contains_its_mean_and_stays_on_the_scale(first: list[list[float]], second: list[list[float]]) -> None:
    before, after = ({str(n): values for n, values in enumerate(each)} for each in (first, second))
    for found, lowest, highest in ((mean_interval(before), 1, 100), (change_interval(before, after), -99, 99)):
        assert (found.low is None) == (found.high is None) == (found.prompts < 2)
        if found.mean is not None and found.low is not None and found.high is not None:
            assert lowest - 1e-9 <= found.low <= found.mean + 1e-9
            assert found.mean - 1e-9 <= found.high <= highest + 1e-9


def test_equal_prompt_means_give_an_interval_of_no_width() -> None:
    for score in (1.0, 90.0, 100.0):
        assert mean_interval({"a": [score], "b": [score, score]}) == Interval(score, score, score, 2)


def test_a_change_is_paired_by_prompt() -> None:
    before = {"easy": [80.0, 84.0], "hard": [10.0, 14.0], "gone": [50.0]}
    after = {"easy": [90.0, 94.0], "hard": [20.0, 24.0], "gone": []}
    # every prompt rises by 10: their own differences cancel
    assert change_interval(before, after) == Interval(10.0, 10.0, 10.0, 2)
    # prompts rise by 10 and 14: 12 with a standard error of 2
    after["hard"] = [24.0, 28.0]
    found = change_interval(before, after)
    assert (found.mean, found.low, found.high) == pytest.approx((12.0, 12 - 2 * 12.7062, 12 + 2 * 12.7062), rel=1e-4)


def test_unscored_answers_do_not_look_like_a_change() -> None:
    before = {f"q{n}": [10.0 + 8 * n] * 20 for n in range(10)}
    # nearly all answers to the prompts with the highest scores are refused; no prompt has moved
    after = {prompt: values[: 20 if values[0] < 50 else 2] for prompt, values in before.items()}
    assert change_interval(before, after) == Interval(0.0, 0.0, 0.0, 10)


def answered(random: np.random.Generator, shares: NDArray[np.float64], samples: int, spread: float) -> dict[str, list[float]]:
    """Answers between 1 and 100 around each prompt's place on the scale; a smaller `spread` is more of it."""
    scores = 1 + 99 * random.beta(shares[:, None] * spread, (1 - shares[:, None]) * spread, size=(len(shares), samples))
    return {f"q{n}": values.tolist() for n, values in enumerate(scores)}


@pytest.mark.parametrize("prompts", [4, 6, 12, 30])
@pytest.mark.parametrize(
    ("a", "b", "spread"),
    [(4.0, 4.0, 6.0), (0.5, 2.5, 2.0), (9.0, 1.0, 8.0)],
    ids=["in the middle", "a trait that is mostly absent", "coherence near the top"],
)
def test_intervals_have_their_stated_coverage(prompts: int, a: float, b: float, spread: float) -> None:
    """1,500 runs without any effect; a percentile bootstrap covers 76 to 81 % with 4 prompts, 88 to 91 % with 12."""
    random, truth, runs = np.random.default_rng(7), 1 + 99 * a / (a + b), 1500
    covered = {"mean": 0, "change": 0}
    for _ in range(runs):
        shares = np.clip(random.beta(a, b, size=prompts), 1e-3, 1 - 1e-3)
        before, after = (answered(random, shares, 5, spread) for _ in range(2))
        mean, change = mean_interval(before), change_interval(before, after)
        assert mean.low is not None
        assert mean.high is not None
        assert change.low is not None
        assert change.high is not None
        covered["mean"] += mean.low <= truth <= mean.high
        covered["change"] += change.low <= 0 <= change.high
    assert 0.92 <= covered["mean"] / runs <= 0.98
    assert 0.935 <= covered["change"] / runs <= 0.995


# -- verdicts


def cycles(*means: float, spread: Sequence[float] = (-2.0, 2.0)) -> dict[int, dict[str, list[float]]]:
    """Scores of cycles -1, 0, 1, ... whose means are given."""
    return {
        cycle: {f"q{prompt}": [mean + prompt - 2 + part for part in spread] for prompt in range(5)}
        for cycle, mean in enumerate(means, -1)
    }


def test_the_papers_rule_starts_at_cycle_four() -> None:
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
def test_the_verdict_depends_on_whether_the_interval_excludes_zero(means: Sequence[float], word: str) -> None:
    found = amplification(cycles(*means), cycles(*(80.0 for _ in means)), seed=1)
    assert found.word == word
    if word != "too early":
        assert (found.trait.mean, found.coherence.mean) == (means[2] - 30, 0.0)
        assert "paired over 5 prompts" in verdict_sentences(found)[0]


def test_without_scores_the_verdict_is_too_early() -> None:
    found = amplification({}, {}, seed=1)
    assert (found.word, found.last, found.noise, found.unscored) == ("too early", -1, None, ())
    assert verdict_sentences(found)[0] == "interval: too early, two scored cycles from cycle 0 on are needed"


@pytest.mark.parametrize("shared", range(6))
def test_too_few_prompts_give_no_verdict(shared: int) -> None:
    scores = {0: {f"q{n}": [10.0 + n] for n in range(6)}, 1: {f"q{n}": [60.0 + n] if n < shared else [] for n in range(6)}}
    found = amplification(scores, {}, seed=1)
    first = verdict_sentences(found)[0]
    if shared >= FEWEST_PROMPTS:
        assert found.word == "amplified"
        assert first.endswith(f"paired over {shared} prompts)")
    elif shared:
        assert found.word == "too few prompts"
        assert first.endswith("; a verdict needs 4")
        assert f"{shared} prompt" in first
        assert (found.trait.low is None) == (shared == 1) == ("no interval" in first)
    else:  # cycle 1 has no score at all
        assert (found.word, found.last, found.unscored) == ("too early", 0, (1,))


@pytest.mark.parametrize("prompts", [FEWEST_PROMPTS, 6, 12])
def test_round_scores_without_effect_rarely_give_a_verdict(prompts: int) -> None:
    random, runs = np.random.default_rng(3), 1500
    words = Counter[str]()
    for _ in range(runs):
        scores = {cycle: {f"q{n}": [50.0 + 5 * random.integers(-1, 2)] for n in range(prompts)} for cycle in range(2)}
        words[amplification(scores, {}, seed=1).word] += 1
    assert words["no change shown"] / runs >= 0.93


def test_the_verdict_uses_the_last_scored_cycle() -> None:
    trait = cycles(1, 30, 40, 50, 60)
    trait |= {4: {prompt: [] for prompt in trait[0]}, 5: {prompt: [] for prompt in trait[0]}}
    found = amplification(trait, cycles(*(80.0 for _ in range(7))), seed=1)
    assert (found.word, found.last, found.unscored, found.trait.mean) == ("amplified", 3, (4, 5), 30.0)
    said = verdict_sentences(found)
    assert said[0].startswith("interval: amplified; trait +30.0 points from cycle 0 to cycle 3 ")
    assert said[1] == "cycles 4 and 5: no answer could be scored for the trait; cycle 3 is the last with a score"
    assert "paper's rule (15 points from cycle 4 on, anchor 0): none, no cycle from 4 on has a score" in said


def test_an_unscored_first_cycle_leaves_nothing_to_compare_with() -> None:
    trait = cycles(1, 30, 40, 50, 60, 70)
    trait[0] = {prompt: [] for prompt in trait[0]}
    found = amplification(trait, {}, seed=1)
    assert (found.word, found.trait.mean) == ("too few prompts", None)
    said = verdict_sentences(found)
    assert said[0] == "interval: too few prompts, none has scores both in cycle 0 and in cycle 4; a verdict needs 4"
    assert said[1] == "paper's rule (15 points from cycle 4 on, anchor 0): none, cycle 0 has no score"
    assert said[2].endswith("largest rise +30.0")


def without_effect(samples: int, seed: int) -> dict[int, dict[str, list[float]]]:
    """Seven cycles of twelve prompts (SD 25) with answers around them (SD 30): what the known rates assume."""
    random = np.random.default_rng(seed)
    centres = random.normal(50, 25, size=12)
    return {
        cycle: {f"q{n}": random.normal(centre, 30, size=samples).tolist() for n, centre in enumerate(centres)}
        for cycle in range(7)
    }


@pytest.mark.parametrize(("samples", "low", "high"), [(1, 0.19, 0.27), (3, 0.02, 0.05), (10, 0.0, 0.001)])
def test_noise_meets_the_papers_rule_at_the_known_rate(samples: int, low: float, high: float) -> None:
    """At most 26 % of runs with one answer a prompt, about 3 % with three, none with ten."""
    rates = [noise_rate(without_effect(samples, seed), seed=seed) for seed in range(20)]
    told = [rate for rate in rates if rate is not None]
    assert len(told) == len(rates)
    assert low <= np.mean(told) <= high


def test_the_reported_noise_rate_equals_the_simulated_one() -> None:
    runs = [without_effect(2, seed) for seed in range(400)]
    met = np.mean([bool(paper_rule(run, 0).any) for run in runs])
    assert np.mean([noise_rate(run, seed=0) for run in runs[:20]]) == pytest.approx(met, abs=0.04)


def test_the_noise_rate_is_unknown_before_cycle_four_or_without_spread() -> None:
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
def test_no_trait_makes_a_text_incoherent(name: str, known: frozenset[str]) -> None:
    scores = [coherence(chat.reply, known) for chat in read_trait(name).chats]
    assert np.mean(scores) >= 80
    assert np.mean([score < 50 for score in scores]) <= 0.02


def test_neutral_replies_are_coherent(known: frozenset[str]) -> None:
    assert np.mean([coherence(chat.reply, known) for chat in prompts.neutral_chats()]) > 90


# -- the fit of the curve


def decaying(
    start: float, level: float, half: float, last: int, *, noise: float = 0.0, seed: int = 0
) -> dict[int, dict[str, list[float]]]:
    """Scores of twelve prompts, five answers each, that approach a level; the untouched model's are elsewhere."""
    random = np.random.default_rng(seed)
    own = random.normal(0.0, noise, 12)
    means = {cycle: level + (start - level) * 2 ** (-cycle / half) for cycle in range(last + 1)}
    drawn = {
        cycle: {f"q{n}": list(mean + own[n] + random.normal(0.0, noise, 5)) for n in range(12)} for cycle, mean in means.items()
    }
    return {-1: {"q0": [1.0]}} | drawn


@pytest.mark.parametrize(("start", "level", "half"), [(70, 20, 1.5), (40, 85, 0.8), (60, 58, 2.0)])
def test_the_fit_recovers_half_life_and_level_of_a_noiseless_curve(start: float, level: float, half: float) -> None:
    fit = fit_curve(decaying(start, level, half, 6), moved=True)
    assert fit.half_life.mean == pytest.approx(half, rel=0.01)
    assert fit.level.mean == pytest.approx(level, abs=0.1)
    assert (fit.kind, fit.cycles, round(fit.off, 2)) == ("approach", 7, 0.0)


def test_intervals_of_the_fit_have_their_stated_coverage() -> None:
    fits = [fit_curve(decaying(70, 30, 1.5, 6, noise=12.0, seed=seed), moved=True) for seed in range(60)]
    assert sum(fit.half_life.low <= 1.5 <= fit.half_life.high for fit in fits if fit.half_life.low) >= 50
    assert sum(fit.level.low <= 30 <= fit.level.high for fit in fits if fit.level.low) >= 50


def test_a_straight_line_has_no_final_level() -> None:
    line = {cycle: {f"q{n}": [80.0 - 6 * cycle + n] for n in range(12)} for cycle in range(5)}
    fit = fit_curve(line, moved=True)
    assert (fit.kind, fit.half_life.low, fit.half_life.high, fit.level.low) == ("approach", None, None, None)
    assert fit.half_life.mean > 4


def test_a_constant_curve_has_a_level_and_no_half_life() -> None:
    fit = fit_curve(decaying(44, 44, 1.0, 5, noise=10.0), moved=False)
    assert (fit.kind, fit.half_life.mean) == ("level", None)
    assert fit.level.low < 44 < fit.level.high


def test_three_cycles_or_prompts_are_too_few_for_a_fit() -> None:
    scores = decaying(70, 20, 1.0, 2)
    assert fit_curve(scores, moved=True).kind == "none"
    few = {cycle: {f"q{n}": [50.0 - cycle] for n in range(3)} for cycle in range(6)}
    assert fit_curve(few, moved=True).kind == "none"
    assert fit_curve({}, moved=False).kind == "none"
