"""Intervals over questions and trainings: what trainings that differ in their random seed alone say together.

Every training answers the same questions, so a value (a score, or how far it has moved) has one number a training s = 1..S and
question q = 1..Q:

    d[s, q] = mean + training[s] + question[q] + rest[s, q]                     crossed random effects

With the mean squares of the two-way layout, MS_A of trainings (S - 1 degrees of freedom), MS_B of questions (Q - 1) and MS_E of
the rest ((S - 1)(Q - 1)), the variance of the grand mean has the unbiased estimate

    V = (MS_A + MS_B - MS_E) / (S Q)                                            Brennan 2001, Generalizability Theory, 3.3

which here is never less than its larger part, max(MS_A, MS_B) / (S Q). The interval is Student's t with Satterthwaite's degrees
of freedom, but at least min(S, Q) - 1:

    (MS_A + MS_B - MS_E)^2 / (MS_A^2 / (S - 1) + MS_B^2 / (Q - 1) + MS_E^2 / ((S - 1)(Q - 1)))

With one training it is Student's t over questions, and says nothing of another training. The difference of two groups of
trainings that answered the same questions has MS_B from the questions' own differences, and MS_A and MS_E of both. How often
these cover: docs/study.md, "Intervals over seeds"; tests/test_across_seeds.py holds them to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from iterft_lite.metrics.intervals import CONFIDENCE, FEWEST, HIGHEST, LOWEST, Scores, on_scale

Table = NDArray[np.float64]
"""One number a training and question, (..., trainings, questions)."""

Covers = Literal["nothing", "questions", "questions and trainings"]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and trainings, points, with its 95 % interval.

    Attributes:
        mean: None where nothing was scored.
        low, high: None with fewer than `FEWEST` questions.
        prompts: Questions that it rests on: those that were scored in every training.
        trainings: How many it rests on.
        error: Standard error.
        freedom: Degrees of freedom of Student's t.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    prompts: int = 0
    trainings: int = 0
    error: float | None = None
    freedom: float | None = None

    @property
    def covers(self) -> Covers:
        """What else could have come out otherwise, as far as the interval knows."""
        if self.low is None:
            return "nothing"
        return "questions and trainings" if self.trainings > 1 else "questions"

    @property
    def p_value(self) -> float | None:
        """Two-sided, of no difference from zero; None without an interval."""
        if self.mean is None or self.error is None or self.freedom is None:
            return None
        if not self.error:
            return float(self.mean == 0)
        return float(p_values(np.array(self.mean), np.array(self.error), np.array(self.freedom)))


NOTHING = Estimate(None)
"""Where nothing was scored."""


def p_values(means: Table, errors: Table, freedom: Table) -> Table:
    """Two-sided p-values of Student's t."""
    from scipy.special import stdtr

    with np.errstate(divide="ignore", invalid="ignore"):
        found: Table = 2 * stdtr(freedom, -np.abs(means / errors))
    return found


def two_way(table: Table) -> tuple[Table, Table, Table]:
    """Grand means, their standard errors and degrees of freedom, over the last two axes: trainings and questions."""
    parts = _Parts.of(table)
    return table.mean(axis=(-2, -1)), *_error(parts.questions, (parts,), table.shape[-1])


@dataclass(frozen=True)
class _Parts:
    """What a table adds to the variance of its mean, each divided by the number of its values.

    Attributes:
        trainings, questions, rest: MS_A, MS_B, MS_E over S Q; with one training the first and the last are zero.
        count: S.
    """

    trainings: Table
    questions: Table
    rest: Table
    count: int

    @classmethod
    def of(cls, table: Table) -> _Parts:
        count, prompts = table.shape[-2:]
        rows, columns = table.mean(-1, keepdims=True), table.mean(-2, keepdims=True)
        grand = rows.mean(-2, keepdims=True)
        trainings = prompts * _squares(rows - grand) / max(1, count - 1)
        questions = count * _squares(columns - grand) / (prompts - 1)
        rest = _squares(table - rows - columns + grand) / max(1, (count - 1) * (prompts - 1))
        size = count * prompts
        return cls(trainings / size, questions / size, rest / size, count)


def _squares(residuals: Table) -> Table:
    total: Table = (residuals**2).sum(axis=(-2, -1))
    return total


def _error(questions: Table, groups: Sequence[_Parts], prompts: int) -> tuple[Table, Table]:
    """Standard error and degrees of freedom from the questions' part and the trainings' parts of one or two groups."""
    several = [group for group in groups if group.count > 1]
    trainings, rest = (sum((getattr(g, name) for g in several), np.zeros_like(questions)) for name in ("trainings", "rest"))
    # By chance the rest's mean square can exceed the others, and the unbiased estimate is then too small, or negative. It is
    # held at its larger part: the interval errs on the wide side.
    variance = np.maximum(questions + trainings - rest, np.maximum(questions, trainings))
    # Satterthwaite's denominator: each mean square squared, over its own degrees of freedom.
    uncertain = questions**2 / (prompts - 1)
    for group in several:
        own = group.trainings**2 / (group.count - 1) + group.rest**2 / ((group.count - 1) * (prompts - 1))
        uncertain = uncertain + own
    # with few trainings the estimated degrees of freedom are uncertain themselves: at least those of the scarcer factor
    least = min([prompts, *(group.count for group in several)]) - 1
    freedom = np.maximum(np.divide(variance**2, uncertain, out=np.full_like(variance, least), where=uncertain > 0), least)
    return np.sqrt(variance), freedom


# -- from scores


def score_over_seeds(scores: Sequence[Scores]) -> Estimate:
    """Mean score of a cycle over trainings, 1 to 100, with an interval that stays on the judge's scale.

    The mean is that of the trainings' own means over all their scores (the paper's); the interval is symmetric in its logit.

    Args:
        scores: Of each training, by prompt; trainings without any are left out.
    """
    scored = [each for each in scores if any(each.values())]
    if not scored:
        return NOTHING
    means = [math.fsum(all_) / len(all_) for each in scored if (all_ := [value for group in each.values() for value in group])]
    found = _estimate(math.fsum(means) / len(means), _table([prompt_means(each) for each in scored]), len(scored))
    if found.error is None or found.freedom is None or found.mean is None:
        return found
    # symmetric in the logit: near 1 or 100 a symmetric interval in points would leave the scale
    low, high = on_scale(found.mean, found.error * _t(found.freedom))
    return _with_bounds(found, low, high)


def change_over_seeds(before: Sequence[Scores], after: Sequence[Scores]) -> Estimate:
    """How far the trainings' scores have moved from `before` to `after`, paired by training and prompt, points.

    Args:
        before, after: Of each training, by prompt, in the same order.
    """
    return _points([moved for pair in zip(before, after, strict=True) if (moved := moves(*pair))])


def difference(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> Estimate:
    """How far `other` lies above `one`, points: over trainings, and paired by prompt where they share two or more.

    Args:
        one, other: Of each training of a group, one number a prompt: a mean score, or how far it has moved.
    """
    shared = [prompt for prompt in _shared(one) if prompt in set(_shared(other))]
    if len(shared) < FEWEST:
        return _unpaired(one, other)
    first, second = (np.array([[row[prompt] for prompt in shared] for row in rows]) for rows in (one, other))
    apart = second.mean(0) - first.mean(0)
    # Both groups answered the same questions: how hard a question is cancels in the difference. So the questions' part comes
    # from the differences themselves, and only the trainings' parts from each group.
    groups = (_Parts.of(first), _Parts.of(second))
    error, freedom = _error(np.array(apart.var(ddof=1) / len(shared)), groups, len(shared))
    # a side of one training knows nothing of another, whatever the other side has
    trainings = min(len(one), len(other))
    return _bounded(float(apart.mean()), float(error), float(freedom), len(shared), trainings)


def _unpaired(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> Estimate:
    """The same of groups that answered other questions (Welch)."""
    first, second = _points(one), _points(other)
    if first.mean is None or second.mean is None:
        return NOTHING
    mean, prompts, trainings = second.mean - first.mean, min(first.prompts, second.prompts), min(len(one), len(other))
    if first.error is None or second.error is None or first.freedom is None or second.freedom is None:
        return Estimate(mean, prompts=prompts, trainings=trainings)
    variance = first.error**2 + second.error**2
    uncertain = first.error**4 / first.freedom + second.error**4 / second.freedom
    # no shared questions, so nothing cancels: variances add up, with Welch's degrees of freedom
    return _bounded(mean, math.sqrt(variance), variance**2 / uncertain if uncertain else 1.0, prompts, trainings)


def prompt_means(scores: Scores) -> dict[str, float]:
    """Each prompt's own mean; prompts without scores are left out."""
    return {prompt: math.fsum(values) / len(values) for prompt, values in scores.items() if values}


def moves(before: Scores, after: Scores) -> dict[str, float]:
    """How far each prompt's own mean has moved; prompts that lack a score on either side are left out."""
    first, then = prompt_means(before), prompt_means(after)
    return {prompt: then[prompt] - first[prompt] for prompt in first if prompt in then}


def _points(rows: Sequence[Mapping[str, float]]) -> Estimate:
    """Mean of one number a training and prompt, points."""
    table = _table(rows)
    if not table.size:
        return Estimate(None, trainings=len(rows))
    found = _estimate(float(table.mean()), table, len(rows))
    if found.error is None or found.freedom is None:
        return found
    return _bounded(float(table.mean()), found.error, found.freedom, found.prompts, found.trainings)


def _shared(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Prompts that every training has."""
    return [prompt for prompt in rows[0] if all(prompt in row for row in rows)] if rows else []


def _table(rows: Sequence[Mapping[str, float]]) -> Table:
    shared = _shared(rows)
    return np.array([[row[prompt] for prompt in shared] for row in rows], dtype=float).reshape(len(rows), len(shared))


def _estimate(mean: float, table: Table, trainings: int) -> Estimate:
    """A mean with the standard error that its table has."""
    prompts = table.shape[-1]
    if prompts < FEWEST:
        return Estimate(mean, prompts=prompts, trainings=trainings)
    _, error, freedom = two_way(table)
    return Estimate(mean, prompts=prompts, trainings=trainings, error=float(error), freedom=float(freedom))


def _bounded(mean: float, error: float, freedom: float, prompts: int, trainings: int) -> Estimate:
    margin, most = error * _t(freedom), HIGHEST - LOWEST
    low, high = max(mean - margin, -most), min(mean + margin, most)
    return Estimate(mean, low, high, prompts, trainings, error, freedom)


def _with_bounds(found: Estimate, low: float, high: float) -> Estimate:
    return Estimate(found.mean, low, high, found.prompts, found.trainings, found.error, found.freedom)


def _t(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
