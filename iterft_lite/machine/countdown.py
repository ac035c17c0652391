"""The time left of a run in progress: the plan's forecast, corrected by how long its steps really take.

Pure: a function of the forecast and the reported events, with times of one clock.

A forecast can be wrong in two ways. The machine is busier or quieter than when it was measured: all steps are off by one
factor. Or one kind of step is off: training rows are longer, say. So a step that is still to come takes

    forecast of the step x (seconds that its verb's finished steps took / forecast of the same steps)

and, before a step of its verb is finished, the root of the same ratio over all verbs. A verb's first step also starts a process
or compiles; it counts for the ratio only while it is the only one. Without a forecast, a step takes the mean of its verb's
finished steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.machine.forecast import timeline

FURTHEST = 4.0
"""Largest correction of a forecast, as a factor either way."""

NEGLIGIBLE = 0.5
"""Steps of fewer seconds than this say nothing about the machine."""


@dataclass
class _Going:
    """A step in progress."""

    since: float
    share: float = 0.0
    shown: float = 0.0
    """Share of the step that an earlier session did: it took none of the seconds since."""


@dataclass
class Countdown:
    """Counts down the seconds of a run.

    Attributes:
        plan: The run's plan.
        forecast: Seconds of each step, by name; empty if they are not known.
        going: Steps in progress, by name.
    """

    plan: Plan
    forecast: Mapping[str, float] = field(default_factory=dict)
    _took: dict[str, float] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)
    going: dict[str, _Going] = field(default_factory=dict)

    def began(self, step: Step, now: float) -> None:
        """A step has started."""
        self.going[step.name] = _Going(now)

    def moved(self, step: Step, done: int, total: int, now: float) -> None:
        """A step reports progress."""
        going = self.going.setdefault(step.name, _Going(now))
        share = done / total if total else 0.0
        if going.share == 0.0 and now - going.since < NEGLIGIBLE:
            going.shown = share
        going.share = share

    def done(self, step: Step, seconds: float, *, reused: bool) -> None:
        """A step has finished."""
        self.going.pop(step.name, None)
        self._finished.add(step.name)
        if not reused:
            self._took[step.name] = seconds

    def left(self, now: float) -> float | None:
        """Seconds until the run's end; None if they are not known yet."""
        left = {step.name: self.left_of(step, now) for step in self.plan if step.name not in self._finished}
        if any(seconds is None for seconds in left.values()):
            return None
        return max(timeline(self.plan, {name: seconds or 0.0 for name, seconds in left.items()}).values(), default=0.0)

    def left_of(self, step: Step, now: float) -> float | None:
        """Seconds until a step's end, counted from its start; None if they are not known yet."""
        whole, going = self._expected(step), self.going.get(step.name)
        if going is None:
            return whole
        passed, share = max(0.0, now - going.since), going.share
        own = (share - going.shown) / max(1e-9, 1.0 - going.shown)
        if own <= 0.0:
            # No report yet. Once the step is overdue, expect a tenth of the time that has passed.
            return None if whole is None else max(whole - passed, 0.1 * min(passed, whole))
        pace = passed * (1.0 - share) / max(1e-9, share - going.shown)
        if whole is None:
            return pace
        # mix forecast and own pace: the further the step is, the more its own pace counts
        return (1.0 - own) * max(whole - passed, 0.0) + own * pace

    # -- how long a step takes

    def _expected(self, step: Step) -> float | None:
        """Expected seconds of a whole step."""
        alike = self._counted(step.verb)
        known = self.forecast.get(step.name, 0.0)
        if known:
            return known * self._ratio(alike or list(self._took), certain=bool(alike))
        if alike:
            return sum(self._took[name] for name in alike) / len(alike)
        return None if VERBS[step.verb].act and not self.forecast else 0.0

    def _counted(self, verb: str) -> list[str]:
        """The finished steps of a verb, without the first one if there are others."""
        mine = [step.name for step in self.plan if step.verb == verb and step.name in self._took]
        return mine[1:] or mine

    def _ratio(self, names: list[str], *, certain: bool) -> float:
        """Seconds that steps took, over their forecast."""
        pairs = [(self._took[name], self.forecast[name]) for name in names if self.forecast.get(name, 0.0) > NEGLIGIBLE]
        if not pairs:
            return 1.0
        ratio = sum(took for took, _ in pairs) / sum(known for _, known in pairs)
        if not certain:  # other verbs show how busy the machine is, but not this verb's own error: correct by the root only
            ratio = ratio**0.5
        return min(FURTHEST, max(1 / FURTHEST, ratio))
