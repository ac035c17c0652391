"""Did the trait amplify? The paper's rule and an interval side by side, and how often noise alone would meet the rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from iterft_lite.measures.intervals import Interval, Scores, change_interval

THRESHOLD = 15.0
"""Points of the judge's scale (arXiv 2605.01130)."""

FROM_CYCLE = 4
"""The paper's "sustained past cycle 4": cycles from this one on count."""

SIMULATIONS = 4000

Word = Literal["amplified", "decayed", "no change shown", "too early"]


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
        word: "amplified" or "decayed" where the 95 % interval of the change from cycle 0 to the last cycle leaves zero out.
        trait: That change of the trait score, paired by prompt.
        coherence: The same for coherence.
        last: The last cycle scored.
        paper: The paper's rule with anchors 0 and 1.
        noise: How often a run without any effect would meet the paper's rule (anchor 0, any) with this many prompts and
            samples, simulated from this run's own spread; None where it cannot be told.
    """

    word: Word
    trait: Interval
    coherence: Interval
    last: int
    paper: tuple[PaperRule, ...]
    noise: float | None


def amplification(trait: Mapping[int, Scores], coherence: Mapping[int, Scores], *, resamples: int, seed: int) -> Amplification:
    """The verdicts on a run.

    Args:
        trait, coherence: Scores by cycle and prompt; cycles below 0 are ignored.
    """
    cycles = sorted(cycle for cycle in trait if cycle >= 0)
    last = cycles[-1] if cycles else -1
    nothing = Interval(None, None, None)
    change, coherent = nothing, nothing
    if last > 0 and 0 in trait:
        change = change_interval(trait[0], trait[last], resamples=resamples, seed=seed)
        coherent = change_interval(coherence.get(0, {}), coherence.get(last, {}), resamples=resamples, seed=seed)
    return Amplification(
        word=_word(change),
        trait=change,
        coherence=coherent,
        last=last,
        paper=tuple(paper_rule(trait, anchor) for anchor in (0, 1)),
        noise=noise_rate(trait, seed=seed),
    )


def _word(change: Interval) -> Word:
    if change.low is None or change.high is None:
        return "too early"
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

    No effect: every cycle's answers to a prompt are drawn from one normal distribution around the prompt's own mean, with the
    spread within prompts that this run shows (pooled over its cycles). Prompts are the same in every cycle, so their own
    spread cancels. Cut to 1-100.
    """
    cycles = {cycle: scores for cycle, scores in trait.items() if cycle >= 0}
    late = sum(cycle >= FROM_CYCLE for cycle in cycles)
    groups = [np.asarray(values) for scores in cycles.values() for values in scores.values() if len(values) > 1]
    if not late or not groups or 0 not in cycles:
        return None
    within = np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / sum(len(group) - 1 for group in groups))
    counts = np.array([len(values) for values in cycles[0].values() if values])
    centres = np.array([np.mean(values) for values in cycles[0].values() if values])
    random = np.random.default_rng(seed)
    prompts = np.repeat(centres, counts)
    met = 0
    for _ in range(SIMULATIONS):
        drawn = np.clip(random.normal(prompts, within, size=(late + 1, len(prompts))), 1, 100).mean(axis=1)
        met += bool((drawn[1:] - drawn[0] >= THRESHOLD).any())
    return met / SIMULATIONS


def _mean(scores: Scores) -> float | None:
    values = [value for group in scores.values() for value in group]
    return float(np.mean(values)) if values else None
