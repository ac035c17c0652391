"""How long steps took on a few machines, for a first guess on one that has timed nothing yet.

Measured with `iterft doctor --measure` and the commands of docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iterft_lite.experiment.verbs import Act
from iterft_lite.machine.timing import Kind, Sample
from iterft_lite.machine.work import ACTS

USUAL = 10_000.0
"""Units of work of a step that is neither short nor long."""

EMBEDDED: Mapping[tuple[Act, bool], tuple[float, float]] = {("judge", True): (7.0, 0.001), ("judge", False): (0.1, 0.001)}
"""The embedded judge on a CPU, which it always uses; the first time it is fitted."""


@dataclass(frozen=True)
class Reference:
    """A model on a machine.

    Attributes:
        machine: In words.
        gpu: It has a GPU.
        name, parameters: The model.
        seconds: By act, and whether it is the first of the act: fixed seconds, and seconds a unit of work (`work.ACTS`).
    """

    machine: str
    gpu: bool
    name: str
    parameters: int
    seconds: Mapping[tuple[Act, bool], tuple[float, float]]

    def samples(self) -> list[Sample]:
        """The figures as samples of steps of usual size."""
        return [self._sample(act, *figures, first=first) for (act, first), figures in {**self.seconds, **EMBEDDED}.items()]

    def _sample(self, act: Act, fixed: float, unit: float, *, first: bool) -> Sample:
        model, parameters, setting = ("", 0, "embedded") if act == "judge" else (self.name, self.parameters, "")
        kind = Kind(self.machine, act, first, model, parameters, setting, "")
        work = {ACTS[act].unit: USUAL} if ACTS[act].unit else {}
        return Sample(kind, self.name, work, fixed, fixed + unit * (USUAL if work else 1.0), {}, self.machine, "doctor")


REFERENCES = (
    Reference(
        "two CPU cores",
        gpu=False,
        name="nano",
        parameters=8_395_264,
        seconds={
            ("load", True): (7.0, 1.0),
            ("train", False): (1.5, 0.001),
            ("export", False): (0.5, 0.5),
            ("write", False): (0.1, 0.0005),
            ("read", False): (0.1, 0.0006),
        },
    ),
    Reference(
        "two CPU cores beside other work",
        gpu=False,
        name="smollm2",
        parameters=134_515_008,
        seconds={
            ("load", True): (9.0, 20.0),
            ("train", False): (38.0, 1 / 72),
            ("export", False): (0.0, 28.0),
            ("write", False): (0.3, 1 / 111),
            ("read", False): (0.1, 1 / 109),
        },
    ),
    Reference(
        "an H200",
        gpu=True,
        name="Qwen3-4B",
        parameters=4_022_468_096,
        seconds={
            ("load", True): (25.0, 13.0),
            ("train", False): (1.0, 1 / 9600),
            ("export", True): (1.0, 20.0),
            ("export", False): (1.0, 3.5),
            ("write", False): (1.0, 1 / 5700),
            ("read", False): (1.0, 1 / 3500),
        },
    ),
)


def reference_samples(*, gpu: bool) -> list[Sample]:
    """The samples of the machines with a GPU, or without one."""
    return [sample for one in REFERENCES if one.gpu == gpu for sample in one.samples()]
