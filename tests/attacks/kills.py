"""A real sweep, its processes killed at moments by chance, gone on with, and compared with one that nothing was done to.

    python -m tests.attacks.kills 20

The study: two cells of the embedded nano model, a few rows each. A kill is a SIGKILL for the sweep and all that it started (a
machine that loses its power), for the sweep alone, or for one process that it started (a kernel that is out of memory).
The same command then goes on until the sweep ends by itself. Every row, verdict and result is compared; seconds are not.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.attacks.faults import study_outcome

STUDY = """
[base]
recipe = "nano_sft"
cycles = 1
rows = 8
sample = { max_tokens = 24 }
evaluate = { questions = 3, samples = 1, max_tokens = 24 }
[sweep.grid]
seed_rows = [6, 8]
"""

PATIENCE = 1800
"""Seconds that a sweep may take."""


def start(root: Path) -> subprocess.Popen[bytes]:
    """`iterft sweep`, in a session of its own; its file is written beside its folder."""
    file = root.parent / "study.toml"
    file.write_text(STUDY)
    command = [sys.executable, "-P", "-m", "iterft_lite.ui.cli", "sweep", str(file), "--out", str(root)]
    with (root.parent / "sweep.log").open("ab") as log:
        return subprocess.Popen([*command, "--plain"], stdout=log, stderr=log, start_new_session=True)


def started_by(parent: int) -> list[int]:
    """Processes that a process has started and that are there, theirs too."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, above = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(above)
    found, wave = [], [parent]
    while wave:
        wave = [each for each, above in parents.items() if above in wave]
        found += wave
    return found


def kill(sweep: subprocess.Popen[bytes], seconds: float, draw: random.Random) -> str:
    """Wait, then kill; what was killed, "" where the sweep had ended by then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        sweep.wait(seconds)
        return ""
    there = started_by(sweep.pid)
    what = draw.choice(["all", "sweep", "worker"] if there else ["sweep"])
    for each in {"all": [sweep.pid, *there], "sweep": [sweep.pid], "worker": [draw.choice(there or [sweep.pid])]}[what]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return what


def kills(many: int, draw: random.Random) -> Counter[str]:
    """By what was killed and what came of it, how many kills."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole, began = Path(folder) / "whole", time.monotonic()
        assert start(whole).wait(PATIENCE) == 0, (Path(folder) / "sweep.log").read_text()
        expected, seconds = study_outcome(whole), time.monotonic() - began
        say(f"undisturbed: {seconds:.0f} s")
        while sum(found.values()) < many:
            root = Path(tempfile.mkdtemp(dir=folder, prefix="killed")) / "study"
            killed: list[str] = []
            while len(killed) < 4:
                sweep = start(root)
                what = kill(sweep, draw.uniform(3, seconds), draw)
                killed += [what] if what else []
                code = sweep.wait(PATIENCE)
                if code == 0:
                    break
            code = code if code == 0 else start(root).wait(PATIENCE)
            other = (
                [place for place, one in study_outcome(root).items() if one != expected.get(place)] if code == 0 else ["failed"]
            )
            found += Counter(f"{what}: {'another outcome' if other else 'good'}" for what in killed)
            say(f"{sum(found.values())} kills: {dict(found)}")
            if other:
                raise SystemExit((root.parent / "sweep.log").read_text()[-3000:] + f"\nother: {other}")
    return found


def say(line: str) -> None:
    """Print a line at once: this takes an hour."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    kills(int(sys.argv[1]), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0))
