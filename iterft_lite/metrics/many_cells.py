"""Verdicts on many cells at once: the more are looked at, the more show something that is not there.

Each cell's verdict holds at 5 %; of 25 cells without any effect one or more then seem amplified in nearly half of all studies.
Corrected verdicts are by Holm's procedure (Holm 1979): the k-th smallest of m p-values is held against 5 % / (m - k + 1). It
keeps the chance of one or more false verdicts in the whole grid under 5 % however the cells hang together. And these do: they
answer the same questions, and cells of a column share their cycle 0. A simulated maximum would gain little, and rest on a model
of all that.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iterft_lite.metrics.across_seeds import p_values, two_way
from iterft_lite.metrics.amplification import FROM_CYCLE, THRESHOLD, pooled_spread
from iterft_lite.metrics.intervals import CONFIDENCE, Scores

SIMULATIONS = 2000
"""Grids without any effect that are drawn; a share of them is then known to about one per cent."""

NUMBERS = 30_000_000
"""That are drawn at most: a study of hundreds of cells is simulated less often."""


def holm(found: Mapping[str, float]) -> dict[str, float]:
    """Corrected p-values by name: at most 5 % of families without any effect have one under 5 %."""
    ordered = sorted(found, key=lambda name: found[name])
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(ordered):
        # The running maximum: a cell cannot be more certain than one whose own p-value is smaller.
        least = max(least, min(1.0, (len(ordered) - rank) * found[name]))
        corrected[name] = least
    return corrected


@dataclass(frozen=True)
class Training:
    """What of one training its noise follows from.

    Attributes:
        start: Trainings with the same share their scores at cycle 0.
        prompts: That were scored in cycle 0 and in the last cycle.
        answers: Answers a prompt by cycle, from 0 on; at least cycle 0 and the last.
        spread: Standard deviation of answers to one prompt in one cycle, points.
    """

    start: Hashable
    prompts: int
    answers: Mapping[int, float]
    spread: float


def training_of(start: Hashable, trait: Mapping[int, Scores]) -> Training | None:
    """What a training's noise follows from; None where it has too few scores to tell.

    Args:
        start: Trainings with the same share their scores at cycle 0.
        trait: Scores by cycle and prompt.
    """
    scored = {cycle: scores for cycle, scores in trait.items() if cycle >= 0 and any(scores.values())}
    spread = pooled_spread(list(scored.values()))
    if spread is None or 0 not in scored or len(scored) < 2:
        return None
    prompts = sum(1 for prompt, values in scored[0].items() if values and scored[max(scored)].get(prompt))
    answers = {cycle: sum(map(len, scores.values())) / max(1, _scored(scores)) for cycle, scores in scored.items()}
    return Training(start, prompts, answers, spread) if prompts > 1 else None


def _scored(scores: Scores) -> int:
    return sum(1 for values in scores.values() if values)


@dataclass(frozen=True)
class FalseAlarms:
    """How often a study of this shape shows amplification where nothing changes and trainings do not differ.

    Attributes:
        experiments, trainings: How many were simulated: those of the study that have scores enough.
        any_interval, expected_interval: Share of grids with an experiment that the uncorrected interval calls amplified, and
            how many it calls so on average.
        any_corrected: Share of grids with one that the corrected verdict calls amplified.
        any_paper, expected_paper: Likewise of trainings that meet the paper's rule (anchor 0, any); None before cycle 4.
    """

    experiments: int
    trainings: int
    any_interval: float
    expected_interval: float
    any_corrected: float
    any_paper: float | None
    expected_paper: float | None


def false_alarms(experiments: Sequence[Sequence[Training]], *, seed: int) -> FalseAlarms | None:
    """Simulate grids of this shape without any effect: every cycle's answers to a prompt are drawn around one mean.

    Args:
        experiments: The trainings of each; those of one differ in their random seed alone.
        seed: Of the simulation.
    """
    shaped = [list(trainings) for trainings in experiments if trainings]
    if not shaped:
        return None
    # The shape stays the study's own: as many experiments, trainings, questions and answers, with the same spread.
    size = sum(t.prompts * len(t.answers) for trainings in shaped for t in trainings)
    draws = int(max(100, min(SIMULATIONS, NUMBERS / size)))
    noise = _Noise(np.random.default_rng(seed), draws)
    found = [[noise.of(training) for training in trainings] for trainings in shaped]
    # From here on the first axis is experiments and the second simulated grids: each column is one study without any effect.
    rises, p = zip(*(_tested([change for change, _ in trainings]) for trainings in found), strict=True)
    up, alone = np.array(rises) > 0, np.array(p)
    level = 1 - CONFIDENCE
    seen = up & (alone < level)
    # an amplified cell under Holm: its p-value is under the threshold of its rank, and so are all smaller ones
    ranked = np.sort(alone, axis=0) * np.arange(len(shaped), 0, -1)[:, None]
    corrected = np.maximum.accumulate(ranked, axis=0) < level
    # `corrected` is in the order of p-values, so directions of change are put in that order too before both are joined
    order = np.argsort(alone, axis=0)
    paper = [met for trainings in found for _, met in trainings if met is not None]
    return FalseAlarms(
        experiments=len(shaped),
        trainings=sum(map(len, shaped)),
        any_interval=float(seen.any(axis=0).mean()),
        expected_interval=float(seen.sum(axis=0).mean()),
        any_corrected=float((corrected & np.take_along_axis(up, order, axis=0)).any(axis=0).mean()),
        any_paper=float(np.any(paper, axis=0).mean()) if paper else None,
        expected_paper=float(np.sum(paper, axis=0).mean()) if paper else None,
    )


Numbers = NDArray[np.float64]


class _Noise:
    """Draws trainings without effect; those with one start share their cycle 0."""

    def __init__(self, random: np.random.Generator, draws: int) -> None:
        self.random = random
        self.draws = draws
        self._starts: dict[tuple[Hashable, int], Numbers] = {}

    def of(self, training: Training) -> tuple[Numbers, NDArray[np.bool_] | None]:
        """Changes by prompt to the last cycle, (draws, prompts), and whether the paper's rule is met, (draws,)."""
        key = (training.start, training.prompts)
        # Cells that share their seeded model share its measured scores: their errors at cycle 0 are the same draw. Drawing them
        # anew would hide that such cells raise false alarms together.
        if key not in self._starts:
            self._starts[key] = self._means(training, 0)
        start, last = self._starts[key], max(training.answers)
        late = {cycle: self._means(training, cycle) for cycle in training.answers if cycle >= FROM_CYCLE or cycle == last}
        rises = [means.mean(1) - start.mean(1) for cycle, means in late.items() if cycle >= FROM_CYCLE]
        return late[last] - start, (np.max(rises, axis=0) >= THRESHOLD) if rises else None

    def _means(self, training: Training, cycle: int) -> Numbers:
        # a question's mean over n answers is off by the spread within a question over the root of n; its own level cancels
        error = training.spread / training.answers[cycle] ** 0.5
        return self.random.normal(0.0, error, size=(self.draws, training.prompts))


def _tested(changes: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Mean changes of an experiment and their p-values, (draws,)."""
    prompts = min(change.shape[1] for change in changes)
    means, errors, freedom = two_way(np.stack([change[:, :prompts] for change in changes], axis=1))
    return means, p_values(means, errors, freedom)
