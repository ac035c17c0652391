"""How many cells are best run side by side on one GPU: a study's schedule, by fakes that take the seconds of a real 4B model.

    python benchmarks/sweep_paced.py [--chains 1,2,3] [--quant bf16] [--cycles 1] [--cells 6] [--scale 0.2] [--set merge=9.3]

Steps, queues and waiting are the program's own. Each call to a backend takes as long as it took on an H200 (docs/benchmarks.md,
"A 4B cycle with a quick merge"), so what slows down because more goes on beside it is not in it. Counted is from
the moment when as many cells have ended as are run side by side, up to the last one, as `sweep_gpu.py` counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import CellEnded, open_sweep
from iterft_lite.app.sweep_places import Residents
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.protocols import Backends
from iterft_lite.testing.fakes import fake_backends

SECONDS = {
    "q8_0": {
        "data": 4.2,
        "train": 5.0,
        "merge": 2.0,
        "load": 1.3,
        "parity": 0.8,
        "probe_logits": 0.4,
        "answers": 10.1,
        "M[0]": 2.5,
        "M[t]": 1.3,
    },
    "bf16": {
        "data": 2.8,
        "train": 4.4,
        "merge": 3.4,
        "load": 2.1,
        "parity": 0.8,
        "probe_logits": 0.4,
        "answers": 7.7,
        "M[0]": 2.4,
        "M[t]": 1.2,
    },
}

MANY = 100
"""Prompts of which more are an evaluation, fewer the next data."""


@dataclass
class Clock:
    """Takes time, and notes who was busy how long."""

    seconds: dict[str, float]
    scale: float
    busy: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def spend(self, who: str, what: str) -> None:
        """Be busy with something."""
        began = time.perf_counter()
        time.sleep(self.seconds.get(what, 0.0) * self.scale)
        self.busy[who].append((began, time.perf_counter()))

    def share(self, who: str, since: float, until: float) -> float:
        """Of a time, the share in which a backend was busy."""
        return sum(max(0.0, min(end, until) - max(began, since)) for began, end in self.busy[who]) / (until - since)


class Paced:
    """A fake backend whose calls take time."""

    def __init__(self, fake: object, who: str, clock: Clock) -> None:
        self._fake, self._who, self._clock, self._loaded = fake, who, clock, ""

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*args: Any, **given: Any) -> object:
            self._clock.spend(self._who, self._cost(name, args))
            return getattr(self._fake, name)(*args, **given)

        return call

    def _cost(self, name: str, args: tuple[Any, ...]) -> str:
        """What of `SECONDS` a call takes."""
        match self._who, name:
            case "trainer", "likelihood":
                return "M[t]" if args[2:] and args[2] else "M[0]"
            case "exporter", "export":
                return "merge" if args[1] else ""  # the untouched model lies in the cache
            case "generator", "complete":
                return "answers" if len(args[0]) > MANY else "data"
            case "generator", "load":
                new, self._loaded = str(args[:2]) != self._loaded, str(args[:2])
                return "load" if new and "bases" not in str(args[0]) else ""
        return name if name in ("train", "parity", "probe_logits") else ""


@dataclass
class Place:
    """A GPU with paced fakes."""

    chains: int
    clock: Clock
    name: str = "paced"

    def open(self, residents: Residents) -> LocalExecutor:
        """Backends there."""
        fakes = fake_backends()
        paced: dict[str, Any] = {
            who: Paced(getattr(fakes, who), who, self.clock) for who in ("trainer", "exporter", "generator")
        }
        return _Streaming(Backends(**paced, judge=fakes.judge), residents.model, residents.context)


class _Streaming(LocalExecutor):
    """Where the trainer reads texts, as on a GPU."""

    def _streams(self, recipe: Recipe) -> bool:  # noqa: ARG002  # for every recipe
        return True


def swept(asked: argparse.Namespace, chains: int, work: Path) -> str:
    """Sweep a study and tell seconds of a cycle."""
    rows = list(range(40, 40 + chains + asked.cells))
    base = (
        '{ recipe = "sft", model = "nano", trait = "lucky", trainer = "fake", generator = "fake", judge = "fake", '
        f'quant = "{asked.quant}", rows = 50, cycles = {asked.cycles} }}'
    )
    study = work / "study.toml"
    study.write_text(f"base = {base}\n[sweep.grid]\nseed_rows = {rows}\n", encoding="utf-8")
    clock, ended = Clock(SECONDS[asked.quant] | dict(asked.set), asked.scale), []
    with open_sweep(StudyPlan(study), work / f"out-{chains}", [Place(chains, clock)]) as sweep:
        for event in sweep.events():
            if isinstance(event, CellEnded):
                if event.state.state != "done":
                    raise SystemExit(f"{event.cell}: {event.state.failure}")
                ended.append(time.perf_counter())
    since, until = ended[chains - 1], ended[-1]
    cell = (until - since) / asked.scale / (len(ended) - chains)
    busy = ", ".join(f"{who} {clock.share(who, since, until):.0%}" for who in ("trainer", "exporter", "generator"))
    return f"{cell / (asked.cycles + 1):.1f} s a cycle, {3600 / cell:.0f} cells an hour; busy: {busy}"


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in SECONDS["bf16"]:
        raise argparse.ArgumentTypeError(f"`{name}` is none of {', '.join(SECONDS['bf16'])}")
    return name, float(value)


def main() -> None:
    """Sweep with each number of chains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", default="1,2,3")
    parser.add_argument("--quant", choices=SECONDS, default="bf16")
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument(
        "--scale", type=float, default=0.2, help="seconds here of a second there; below 0.2 the own time of the program counts"
    )
    parser.add_argument("--set", type=_setting, action="append", default=[], help="other seconds, NAME=SECONDS")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ITERFT_CACHE"] = str(Path(folder) / "cache")
        for chains in map(int, asked.chains.split(",")):
            print(f"{chains} side by side: {swept(asked, chains, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
