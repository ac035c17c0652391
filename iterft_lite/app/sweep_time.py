"""How much longer a sweep takes: its distinct steps, by what steps of their verb took, shared out to the places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from iterft_lite.experiment.steps import Step
from iterft_lite.machine.countdown import FURTHEST


@dataclass
class TimeLeft:
    """Seconds that are left of a sweep.

    A step takes what was forecast of it, times the ratio of seconds taken to seconds forecast over the finished steps of its
    verb; where nothing was forecast, the mean of its verb's steps. Judging goes on beside the device: the longer one counts.

    Attributes:
        steps: By key.
        forecast: Seconds of a step by key, where they are known.
        chains: Cells that are run side by side.
    """

    steps: Mapping[str, Step]
    forecast: Mapping[str, float]
    chains: int = 1
    _took: dict[str, list[tuple[float, float | None]]] = field(default_factory=lambda: defaultdict(list))

    def took(self, step: Step, seconds: float) -> None:
        """A step has taken so many seconds."""
        self._took[step.verb].append((seconds, self.forecast.get(step.key)))

    def of(self, step: Step) -> float | None:
        """Seconds that a step will take; None where nothing tells."""
        known, forecast = self._took.get(step.verb, []), self.forecast.get(step.key)
        known = known[1:] or known  # a verb's first step also starts a process
        if forecast is None:
            return sum(seconds for seconds, _ in known) / len(known) if known else None
        taken = sum(seconds for seconds, foreseen in known if foreseen)
        foreseen = sum(foreseen for _, foreseen in known if foreseen)
        ratio = taken / foreseen if foreseen else 1.0
        return forecast * min(FURTHEST, max(1 / FURTHEST, ratio))

    def seconds(self, unfinished: Iterable[str]) -> float | None:
        """Seconds until all of these steps are finished; None where one of the device's is of a verb that nothing is known
        of."""
        lanes: dict[str, float] = defaultdict(float)
        for key in unfinished:
            step = self.steps[key]
            seconds = self.of(step)
            if seconds is None and step.queue == "device":
                return None
            lanes[step.queue] += seconds or 0.0
        return max(lanes["device"] / self.chains, lanes["judge"])
