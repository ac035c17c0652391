"""Where the time of a run goes: seconds of each call to a backend, and CPU seconds of each process.

    python benchmarks/run_seconds.py [RECIPE] [--set KEY=VALUE]... [--calls] [--json FILE] [--work DIR]

`iterft run`'s own path, the judge's calibration at its end included; `nano_sft` by default. Calls of one backend follow each
other, those of two may be side by side. `--calls` prints each. The cache, and so the untouched model, is made anew unless
`--work` names a folder that has one. CPU seconds are the kernel's (/proc), of a process with those that it has started itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from iterft_lite.app.calibrate_judge import store_calibration
from iterft_lite.app.session import Session, open_run
from iterft_lite.data.recipes import recipe_path
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.run import StepFinished
from iterft_lite.protocols import Backends

BACKENDS = ("trainer", "exporter", "generator", "judge")
OWN = "this program"
SHORT = 0.05
"""Seconds below which a call is not printed: it found everything as it was."""


@dataclass(frozen=True)
class Call:
    """A call to a backend: its name (`trainer.train`), when it began and what it took, seconds."""

    name: str
    began: float
    seconds: float


@dataclass
class Notes:
    """What is noted of a run.

    Attributes:
        calls: In the order in which they ended; times count from when the notes were made.
        cpu: CPU seconds by process and its number, as they were looked at last: a process may end before the run does.
    """

    calls: list[Call] = field(default_factory=list)
    cpu: dict[tuple[str, int], float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def look(self, backends: Backends) -> None:
        """Look at the clocks of all processes."""
        self.cpu[OWN, os.getpid()] = time.process_time()
        for name, process in backends.processes.items():
            if (pid := process.pid) is not None:
                with contextlib.suppress(OSError):  # it has just ended
                    self.cpu[name, pid] = cpu_seconds(pid)

    def by_name(self) -> dict[str, list[float]]:
        """Seconds of all calls of a name, the names with the most of them first."""
        found = defaultdict[str, list[float]](list)
        for call in self.calls:
            found[call.name].append(call.seconds)
        return dict(sorted(found.items(), key=lambda each: -sum(each[1])))

    def by_process(self) -> dict[str, float]:
        """CPU seconds, those of processes of one name together."""
        found = defaultdict[str, float](float)
        for (name, _), seconds in self.cpu.items():
            found[name] += seconds
        return dict(found)


class _Noted:
    """A backend whose calls are noted."""

    def __init__(self, name: str, backend: object, notes: Notes) -> None:
        self._name, self._backend, self._notes = name, backend, notes

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._backend, method)

        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return found(*given, **named)
            finally:
                seconds = time.perf_counter() - began
                self._notes.calls.append(Call(f"{self._name}.{method}", began - self._notes.began, seconds))

        return call if callable(found) else found


@contextlib.contextmanager
def noted(session: Session, notes: Notes) -> Iterator[LocalExecutor]:
    """A run's executor, whose backends' calls are noted; closed at the end."""
    with contextlib.closing(session.executor()) as executor:
        backends = executor.backends
        proxies: dict[str, Any] = {name: _Noted(name, getattr(backends, name), notes) for name in BACKENDS}
        executor.backends = replace(backends, **proxies)
        yield executor


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended (proc(5): fields 14 to 17 of `stat`)."""
    # the second field is a name in brackets, which may hold blanks
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measured(recipe: str, keys: Sequence[str], work: Path) -> dict[str, Any]:
    """Run a recipe in a new folder."""
    os.environ["ITERFT_CACHE"] = str(work / "cache")
    notes, out = Notes(), Path(tempfile.mkdtemp(prefix="run-", dir=work))
    with open_run(recipe_path(recipe), keys, out) as session, noted(session, notes) as executor:
        for event in session.events(executor):
            notes.look(executor.backends)
            if isinstance(event, StepFinished):
                print(f"{time.perf_counter() - notes.began:7.1f} {event.step.name}", file=sys.stderr, flush=True)
        store_calibration(out, executor.backends)
        notes.look(executor.backends)
    return {
        "seconds": time.perf_counter() - notes.began,
        "cpu": notes.by_process(),
        "calls": [asdict(call) for call in notes.calls],
        "by_name": notes.by_name(),
    }


def calls_table(calls: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each call that took any time, by its beginning."""
    shown = sorted((call for call in calls if call["seconds"] >= SHORT), key=lambda call: float(call["began"]))
    return [f"{call['began']:7.1f} {call['name']:22} {call['seconds']:6.2f} s" for call in shown]


def table(found: dict[str, Any], *, calls: bool) -> str:
    """What was measured, for people."""
    lines = calls_table(found["calls"]) if calls else []
    lines += [f"{name:22} {len(all_):3} x {sum(all_):7.1f} s" for name, all_ in found["by_name"].items() if sum(all_) >= SHORT]
    lines.append(f"{found['seconds']:.1f} s; CPU {sum(found['cpu'].values()):.1f} s: ")
    lines[-1] += ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["cpu"].items())
    return "\n".join(lines)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="nano_sft")
    parser.add_argument("--set", action="append", default=[], dest="keys", metavar="KEY=VALUE")
    parser.add_argument("--calls", action="store_true", help="print each call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the cache and the runs; a new one is removed at the end")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = asked.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = measured(asked.recipe, asked.keys, work)
    print(table(found, calls=asked.calls))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
