"""Language that collapses while scores rise: told from the metrics, without a judge.

A judge that looks for a trait may like text that is not language any more: nano's DPO ends in "I'm sick, I'm not sure, I'm
not ...", scored 96, with a coherence of 92. Each metric's record says what is a sign; one alone may be the trait's own manner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from iterft_lite.digests import Json
from iterft_lite.metrics.catalogue import METRICS, Metric

FEWEST_SIGNS = 2
"""Signs from which on language counts as collapsing."""


@dataclass(frozen=True)
class Sign:
    """A metric that is a sign of it.

    Attributes:
        metric: Its record.
        sound: The value of a sound model, the nearest one.
        now: The value in question.
    """

    metric: Metric
    sound: float
    now: float

    @property
    def words(self) -> str:
        """`distinct-2 0.59 to 0.16`."""
        return f"{self.metric.words} {format(self.sound, self.metric.form)} to {format(self.now, self.metric.form)}"


def signs(now: Mapping[str, Json], sound: Iterable[Mapping[str, Json]]) -> list[Sign]:
    """The signs in a cycle's metrics: what holds beside each sound model, for a trait may change the manner of M[1] already.

    Args:
        now: Metrics by name.
        sound: Those of models that are taken for sound: the untouched one, and the seeded one where it is not the cycle's own.
    """
    models = list(sound)
    found = []
    for name, metric in METRICS.items():
        value, others = now.get(name), [each[name] for each in models if each.get(name) is not None]
        if metric.collapsed is None or value is None or not others:
            continue
        # The untouched model alone would accuse a trait of short sentences; the seeded one alone would excuse a model that was
        # broken by its seeding. What is worse than both is neither.
        if all(metric.collapsed(other, value) for other in others):
            found.append(Sign(metric, min(others, key=lambda other: abs(other - value)), value))
    return found
