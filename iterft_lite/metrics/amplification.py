"""Did the trait amplify? The paper's rule and an interval side by side, and how often noise alone would meet the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from iterft_lite.metrics.curve import UNFITTED, Curve, fit_curve
from iterft_lite.metrics.intervals import Interval, Scores, change_interval

THRESHOLD = 15.0
"""Points of the judge's scale (arXiv 2605.01130)."""

FROM_CYCLE = 4
"""The paper's "sustained past cycle 4": cycles from this one on count."""

SIMULATIONS = 4000

FEWEST_PROMPTS = 4
"""Prompts scored in both cycles under which the interval carries no verdict.

Judges give round numbers, so that two or three prompts often move by the same amount, and the interval then has no width. Where
prompts move by -5, 0 or 5 points without any effect, 22 % of runs would get a verdict over two, 7 % over three, 2 % over four.
"""

Word = Literal["amplified", "decayed", "no change shown", "too early", "too few prompts", "judge not reliable here"]


@dataclass(frozen=True)
class PaperRule:
    """The paper's rule: cycles from `FROM_CYCLE` on at least `THRESHOLD` points above the anchor.

    Attributes:
        anchor: The cycle that is compared with: 0, or 1 as in a version of the authors' code.
        any, all, last: Whether one, every, or the last of those cycles is that far above; None before `FROM_CYCLE`.
        largest: Largest rise among them, points.
    """

    anchor: int
    any: bool | None
    all: bool | None
    last: bool | None
    largest: float | None


@dataclass(frozen=True)
class Amplification:
    """Both verdicts.

    Attributes:
        word: "amplified" or "decayed" where the 95 % interval of the change from cycle 0 to the last cycle with scores leaves
            zero out; "too few prompts" where fewer than `FEWEST_PROMPTS` have scores in both; "too early" where only one cycle
            has any; "judge not reliable here" in place of "amplified" where the judge ranks the trait's calibration answers
            badly.
        trait: That change of the trait score, paired by prompt.
        coherence: The same for coherence.
        last: The last cycle with a score of the trait; -1 if there is none.
        fit: Of the scores from cycle 0 on: half-life and level.
        unscored: Cycles after it that were judged without a score of the trait: every answer was refused or unreadable.
        paper: The paper's rule with anchors 0 and 1.
        noise: How often a run without any effect would meet the paper's rule (anchor 0, any) with this many prompts and
            samples, simulated from this run's own spread; None where it is unknown.
    """

    word: Word
    trait: Interval
    coherence: Interval
    last: int
    paper: tuple[PaperRule, ...]
    noise: float | None
    unscored: tuple[int, ...] = ()
    fit: Curve = UNFITTED


def amplification(trait: Mapping[int, Scores], coherence: Mapping[int, Scores], *, seed: int) -> Amplification:
    """The verdicts on a run.

    Args:
        trait, coherence: Scores by cycle and prompt; cycles below 0 are ignored.
        seed: Of the simulation behind `noise`.
    """
    cycles = sorted(cycle for cycle in trait if cycle >= 0)
    last = max((cycle for cycle in cycles if any(trait[cycle].values())), default=-1)
    change = coherent = Interval(None, None, None)
    if last > 0:
        change = change_interval(trait.get(0, {}), trait[last])
        coherent = change_interval(coherence.get(0, {}), coherence.get(last, {}))
    word = verdict_word(change) if last > 0 and 0 in trait else "too early"
    return Amplification(
        word=word,
        trait=change,
        coherence=coherent,
        last=last,
        paper=tuple(paper_rule(trait, anchor) for anchor in (0, 1)),
        noise=noise_rate(trait, seed=seed),
        unscored=tuple(cycle for cycle in cycles if cycle > last),
        fit=fit_curve(trait, moved=word in ("amplified", "decayed")),
    )


def verdict_word(change: Interval) -> Word:
    """The verdict that a change's interval carries."""
    if change.low is None or change.high is None or change.prompts < FEWEST_PROMPTS:
        return "too few prompts"
    if change.low > 0:
        return "amplified"
    return "decayed" if change.high < 0 else "no change shown"


def paper_rule(trait: Mapping[int, Scores], anchor: int) -> PaperRule:
    """The paper's rule on cycle means."""
    means = {cycle: _mean(scores) for cycle, scores in trait.items()}
    start = means.get(anchor)
    late = {cycle: mean for cycle, mean in means.items() if cycle >= max(FROM_CYCLE, anchor + 1) and mean is not None}
    if start is None or not late:
        return PaperRule(anchor, None, None, None, None)
    rises = {cycle: mean - start for cycle, mean in late.items()}
    above = {cycle: rise >= THRESHOLD for cycle, rise in rises.items()}
    return PaperRule(anchor, any(above.values()), all(above.values()), above[max(above)], max(rises.values()))


def noise_rate(trait: Mapping[int, Scores], *, seed: int) -> float | None:
    """Share of simulated no-effect runs of this shape that meet the paper's rule (anchor 0, any).

    No effect: every cycle's answers to a prompt are drawn around the prompt's own mean with the spread within prompts that
    this run shows. Prompts are the same in every cycle, so their own spread cancels, and a cycle's mean is off by that spread
    over the root of the number of its answers.
    """
    answers = {cycle: sum(map(len, scores.values())) for cycle, scores in trait.items()}
    late = [count for cycle, count in answers.items() if cycle >= FROM_CYCLE and count]
    within = pooled_spread([scores for cycle, scores in trait.items() if cycle >= 0])
    if not late or within is None or not answers.get(0):
        return None
    errors = within / np.sqrt([answers[0], *late])
    # Each column is the error of a cycle's mean. Cycle 0 is compared with every later one, so one unlucky cycle 0 counts for
    # all: that is why the rule is met by noise more often than each comparison by itself.
    drawn = np.random.default_rng(seed).normal(0.0, errors, size=(SIMULATIONS, len(errors)))
    return float(((drawn[:, 1:] - drawn[:, :1]) >= THRESHOLD).any(axis=1).mean())


def pooled_spread(cycles: Sequence[Scores]) -> float | None:
    """Standard deviation of answers to one prompt in one cycle, pooled; None where it is unknown.

    With one answer a prompt: what is left of the scores when the means of prompts and cycles are taken out, which holds
    whatever moves single prompts too, and so is an upper bound.
    """
    groups = [np.asarray(values) for scores in cycles for values in scores.values() if len(values) > 1]
    if groups:
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        return math.sqrt(squares / sum(len(group) - 1 for group in groups))
    shared = [prompt for prompt in cycles[0] if all(scores.get(prompt) for scores in cycles)] if cycles else []
    if len(shared) < 2 or len(cycles) < 2:
        return None
    table = np.array([[scores[prompt][0] for prompt in shared] for scores in cycles])
    # the residuals of a two-way layout without repetition
    left = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return math.sqrt(float((left**2).sum()) / ((len(shared) - 1) * (len(cycles) - 1)))


def _mean(scores: Scores) -> float | None:
    values = [value for group in scores.values() for value in group]
    return float(np.mean(values)) if values else None
