"""How much longer a run takes, while it goes on: the forecast of its plan, put right by what its steps really take.

Pure: a function of the forecast and of what was told, with times of one clock.

A forecast is off in two ways. The machine may be busier or quieter than when it was measured: all steps are off by one factor.
Or one kind of step is: training rows are longer, say. So a step that is still to come takes

    forecast of the step x (seconds that its verb's finished steps took / forecast of the same steps)

and, before a step of its verb is finished, the root of the same ratio over all verbs. A verb's first step also starts a process
or compiles; it counts for the ratio only while it is the only one. Where nothing was forecast, a step takes the mean of its
verb's steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.machine.forecast import timeline

FURTHEST = 4.0
"""A ratio between what steps took and what was forecast counts up to this factor either way."""

NEGLIGIBLE = 0.5
"""A step of fewer seconds tells nothing about the machine."""


@dataclass
class _Going:
    """A step that is being done."""

    since: float
    share: float = 0.0
    shown: float = 0.0
    """Share that was done before this session: it took none of the seconds since."""


@dataclass
class Countdown:
    """Seconds that are left of a run.

    Attributes:
        plan: What is being run.
        forecast: Seconds of each step, by name; empty where nothing is known.
        going: Steps that are being done, by name.
    """

    plan: Plan
    forecast: Mapping[str, float] = field(default_factory=dict)
    _took: dict[str, float] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)
    going: dict[str, _Going] = field(default_factory=dict)

    def began(self, step: Step, now: float) -> None:
        """A step has begun."""
        self.going[step.name] = _Going(now)

    def moved(self, step: Step, done: int, total: int, now: float) -> None:
        """A step has come further."""
        going = self.going.setdefault(step.name, _Going(now))
        share = done / total if total else 0.0
        if going.share == 0.0 and now - going.since < NEGLIGIBLE:
            going.shown = share
        going.share = share

    def done(self, step: Step, seconds: float, *, reused: bool) -> None:
        """A step is finished."""
        self.going.pop(step.name, None)
        self._finished.add(step.name)
        if not reused:
            self._took[step.name] = seconds

    def left(self, now: float) -> float | None:
        """Seconds until the run's end; None before anything can be said."""
        left = {step.name: self.left_of(step, now) for step in self.plan if step.name not in self._finished}
        if any(seconds is None for seconds in left.values()):
            return None
        return max(timeline(self.plan, {name: seconds or 0.0 for name, seconds in left.items()}).values(), default=0.0)

    def left_of(self, step: Step, now: float) -> float | None:
        """Seconds until a step's end, from when it begins; None before anything can be said."""
        whole, going = self._expected(step), self.going.get(step.name)
        if going is None:
            return whole
        passed, share = max(0.0, now - going.since), going.share
        own = (share - going.shown) / max(1e-9, 1.0 - going.shown)
        if own <= 0.0:
            # overdue and silent: it takes a little longer the longer it took
            return None if whole is None else max(whole - passed, 0.1 * min(passed, whole))
        pace = passed * (1.0 - share) / max(1e-9, share - going.shown)
        if whole is None:
            return pace
        # the further it is, the more its own pace is worth
        return (1.0 - own) * max(whole - passed, 0.0) + own * pace

    # -- what a step takes

    def _expected(self, step: Step) -> float | None:
        """Seconds of a whole step."""
        alike = self._counted(step.verb)
        known = self.forecast.get(step.name, 0.0)
        if known:
            return known * self._ratio(alike or list(self._took), certain=bool(alike))
        if alike:
            return sum(self._took[name] for name in alike) / len(alike)
        return None if VERBS[step.verb].act and not self.forecast else 0.0

    def _counted(self, verb: str) -> list[str]:
        """The finished steps that tell how long one of a verb takes: all but the first, where there are others."""
        mine = [step.name for step in self.plan if step.verb == verb and step.name in self._took]
        return mine[1:] or mine

    def _ratio(self, names: list[str], *, certain: bool) -> float:
        """What steps took over what was forecast of them."""
        pairs = [(self._took[name], self.forecast[name]) for name in names if self.forecast.get(name, 0.0) > NEGLIGIBLE]
        if not pairs:
            return 1.0
        ratio = sum(took for took, _ in pairs) / sum(known for _, known in pairs)
        if not certain:  # other verbs say something of the machine, not everything of this verb
            ratio = ratio**0.5
        return min(FURTHEST, max(1 / FURTHEST, ratio))
