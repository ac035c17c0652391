"""A real run of `recipes/nano_sft.toml` on two CPU cores, as its events came: for views and clocks.

nano_sft.json holds the recipe, the seconds that were forecast for each step of the plan, in the plan's order, and the events:
seconds since the beginning, what happened, the step's place in the plan, and what came with it. The steps are named by their
place, so that the names of verbs may change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterft_lite.engine.completion import Completion
from iterft_lite.engine.run import Event, StepFinished, StepProgress, StepStarted
from iterft_lite.experiment.inputs import ResolvedInputs
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.machine.resolve import Machine, resolve
from iterft_lite.protocols import Progress

FILE = Path(__file__).parent / "nano_sft.json"


@dataclass(frozen=True)
class Recorded:
    """A run that was recorded.

    Attributes:
        seconds: It took.
        forecast: Seconds of each step by name, as a plan said before.
        times: Of the events.
    """

    plan: Plan
    inputs: ResolvedInputs
    seconds: float
    forecast: dict[str, float]
    times: list[float]
    events: list[Event]

    def until(self, share: float) -> Iterator[tuple[float, Event]]:
        """The events of the first part of the run."""
        for when, event in zip(self.times, self.events, strict=True):
            if when > share * self.seconds:
                return
            yield when, event


def read_recorded() -> Recorded:
    """The recorded run."""
    value = json.loads(FILE.read_text(encoding="utf-8"))
    resolved = resolve(make_recipe(value["recipe"], source="recorded"), Machine("", 0, 0, unsloth=False))
    plan = make_plan(resolved.recipe, resolved.inputs)
    steps = list(plan)
    forecast = {step.name: seconds for step, seconds in zip(steps, value["forecast"], strict=True)}
    events = [_event(steps[row[2]], row) for row in value["events"]]
    return Recorded(plan, resolved.inputs, value["seconds"], forecast, [row[0] for row in value["events"]], events)


def _event(step: Step, row: list[Any]) -> Event:
    match row[1]:
        case "began":
            return StepStarted(step)
        case "moved":
            return StepProgress(step, Progress(*row[3:]))
        case _:
            return StepFinished(step, Completion(step.key, row[3], row[4], {}), reused=False)
