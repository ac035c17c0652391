"""How long the steps of a study take together, and how much longer a sweep takes by what its steps took so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from iterft_lite.experiment.steps import Step
from iterft_lite.machine.countdown import FURTHEST


def together(steps: Iterable[tuple[Step, float]], places: int) -> float:
    """Seconds that steps take side by side.

    The device's are shared out to the places. Where trainer and generator have queues of their own (`Step.queue`), answers and
    what is measured on them go on while a place trains and exports: a training waits for its data alone. Judging goes on beside
    everything.

    Args:
        steps: Each with its own seconds.
        places: Where the device's steps are done.
    """
    lanes: dict[str, float] = defaultdict(float)
    data = 0.0
    for step, seconds in steps:
        lanes[step.queue] += seconds
        data += seconds if (step.queue, step.verb) == ("generator", "training_samples") else 0.0
    device, generator = lanes["device"] + data, lanes["generator"] + lanes["measure"]
    return max(max(device, generator) / places, lanes["judge"])


@dataclass
class TimeLeft:
    """Seconds that are left of a sweep.

    A step takes what was forecast of it, times the ratio of seconds taken to seconds forecast over the finished steps of its
    verb; where nothing was forecast, the mean of its verb's steps. They go on side by side (`together`).

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
        left = [(step, self.of(step)) for step in map(self.steps.__getitem__, unfinished)]
        if any(seconds is None and step.queue in ("device", "generator", "measure") for step, seconds in left):
            return None
        return together(((step, seconds or 0.0) for step, seconds in left), self.chains)
