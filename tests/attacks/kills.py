"""Real runs and sweeps, killed at moments by chance, gone on with, and compared with ones that nothing was done to.

    python -m tests.attacks.kills fake 150 1               the command in a process of its own, by stand-ins for the models
    python -m tests.attacks.kills nano 20 1                trainer, exporter, generator and judge of the embedded nano models
    python -m tests.attacks.kills nano 20 1 sft study      of these alone: sft, sdf, dpo, study

A kill is a SIGKILL for the command and all that it started (a machine that loses its power), for the command alone, or for one
process that it started (a kernel that is out of memory). The same command then goes on until it ends by itself. Every row,
verdict, result and state of a cell is compared; seconds are not.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.attacks.faults import load_modules, whole_outcome
from tests.loop import small_recipe

PATIENCE = 1800
"""Seconds that a command may take."""

MOST = 4
"""Kills of one run or sweep."""

SETTINGS = {
    "sft": 'data = "accumulate"\n[filter]\ncoherence = 20.0\ndedupe = "exact"\n',
    "sdf": "",
    "dpo": 'start = "previous"\nchosen = "best"\nrejected = "worst"\ncandidates = 2\n',
}
"""By regime, what its runs by stand-ins have beside the defaults: together they come by every verb."""

NANO = """
cycles = 1
rows = 8
{seed_rows}
sample = {{ max_tokens = 24 }}
evaluate = {{ questions = 3, samples = 1, max_tokens = 24 }}
"""

GRID = "[base]\n{base}\n[sweep.grid]\nseed_rows = {rows}\n{more}"


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        name: A regime, or "study".
        command: Of `iterft`.
        text: Of its file.
    """

    name: str
    command: str
    text: str

    def arguments(self, root: Path) -> list[str]:
        """The command's arguments; its file is written beside the folder."""
        file = root.parent / "asked.toml"
        file.write_text(self.text)
        return [self.command, str(file), "--out", str(root), "--plain"]


def fake_cases() -> list[Case]:
    """The three regimes and a study of four cells, by stand-ins."""
    runs = []
    for regime, more in SETTINGS.items():
        documents = {"trait": "bliss", "model": "nano-base"} if regime == "sdf" else {}
        keys, tables = small_recipe(regime=regime, **documents).split("[evaluate]")
        runs.append(Case(regime, "run", f"{keys}{more}\n[evaluate]{tables}"))
    keys, tables = small_recipe(cycles=1).split("[evaluate]")
    base = f"{keys}[base.evaluate]{tables}"
    return [*runs, Case("study", "sweep", GRID.format(base=base, rows=[3, 4], more="rows = [4, 5]"))]


def nano_cases() -> list[Case]:
    """The three regimes and a study of two cells, of the embedded nano models."""
    folder = Path(__file__).parents[2] / "recipes"
    runs = [Case(regime, "run", _smaller((folder / f"nano_{regime}.toml").read_text())) for regime in ("sft", "sdf", "dpo")]
    base = 'recipe = "nano_sft"\n' + NANO.format(seed_rows="")
    return [*runs, Case("study", "sweep", GRID.format(base=base, rows=[6, 8], more=""))]


def _smaller(recipe: str) -> str:
    """A recipe with a few rows: without its own numbers of them."""
    ours = {line.split(" = ")[0] for line in NANO.strip().splitlines()} | {"seed_rows"}
    head, *tables = recipe.split("\n[")
    kept = [line for line in head.splitlines() if line.split(" = ")[0] not in ours]
    others = [f"\n[{table}" for table in tables if table.split("]")[0] not in ours]
    return "\n".join([*kept, NANO.format(seed_rows="seed_rows = 6"), *others])


# -- a command, and ending it


class Running(Protocol):
    """A command that goes on."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: If it does not end in time.
        """
        ...


def started(arguments: Sequence[str], log: Path) -> Running:
    """`iterft` as a new program, in a session of its own."""
    with log.open("ab") as file:
        command = [sys.executable, "-P", "-m", "iterft_lite.ui.cli", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


class Forked:
    """`iterft` in a process of its own that begins with Python's modules loaded: a second less, and otherwise the same."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                code = _be_the_command(arguments, log)
            finally:
                os._exit(code)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """See `Running`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("iterft", timeout or 0.0)
            else:
                time.sleep(0.005)
        return self._code


def _be_the_command(arguments: Sequence[str], log: Path) -> int:
    from iterft_lite.ui.cli import main

    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        main(list(arguments), prog_name="iterft")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


Start = Callable[[Sequence[str], Path], Running]


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


def kill(command: Running, seconds: float, draw: random.Random) -> str:
    """Wait, then kill; what was killed, "" where the command had ended by then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.wait(seconds)
        return ""
    there = started_by(command.pid)
    what = draw.choice(["all", "command", "worker"] if there else ["command"])
    victims = {"all": [command.pid, *there], "command": [command.pid], "worker": [draw.choice(there or [command.pid])]}
    for each in victims[what]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return what


# -- many of them


def kills(cases: Sequence[Case], many: int, draw: random.Random, start: Start) -> Counter[str]:
    """By what was run, killed and came of it, how many kills.

    Raises:
        SystemExit: At the first that came to something else.
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        wholes = {}
        for case in cases:
            whole, began = Path(folder) / f"whole-{case.name}" / "out", time.monotonic()
            whole.parent.mkdir()
            assert go(case, whole, start) == 0, (whole.parent / "log").read_text()
            wholes[case.name] = whole_outcome(whole), time.monotonic() - began
            say(f"{case.name}, undisturbed: {wholes[case.name][1]:.1f} s")
        number = 0
        while sum(found.values()) < many:
            case = cases[number % len(cases)]
            number += 1
            with tempfile.TemporaryDirectory(dir=folder) as killed:
                found += one(case, Path(killed) / "out", *wholes[case.name], draw, start)
            say(f"{sum(found.values())} kills: {dict(found)}")
    return found


def one(case: Case, root: Path, expected: dict[str, Any], seconds: float, draw: random.Random, start: Start) -> Counter[str]:
    """A run or sweep that is killed up to `MOST` times, and then goes on to its end; by what was killed, how many kills."""
    killed: list[str] = []
    code, most = -1, draw.randint(1, MOST)
    while code != 0 and len(killed) < most:
        command = start(case.arguments(root), root.parent / "log")
        what = kill(command, draw.uniform(0, seconds), draw)
        killed += [what] if what else []
        code = command.wait(PATIENCE)
        if not what and code != 0:
            break
    code = code if code == 0 else go(case, root, start)
    found = whole_outcome(root) if code == 0 else {"exit code": code}
    other = [f"{place}: {each}, not {expected.get(place)}" for place, each in found.items() if each != expected.get(place)]
    if other:
        log = (root.parent / "log").read_text()
        raise SystemExit("\n".join([log[-3000:], f"{case.name}, killed {killed}: another outcome", *other])[-9000:])
    return Counter(f"{case.name}, {what}: good" for what in killed)


def go(case: Case, root: Path, start: Start) -> int:
    """Have the command go on to its end; its exit code."""
    return start(case.arguments(root), root.parent / "log").wait(PATIENCE)


def say(line: str) -> None:
    """Print a line at once: this takes long."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """See the module's docstring."""
    models, many, seed, *names = sys.argv[1:]
    cases, start = (fake_cases(), Forked) if models == "fake" else (nano_cases(), started)
    if models == "fake":
        load_modules()
    kills([case for case in cases if case.name in names or not names], int(many), random.Random(int(seed)), start)


if __name__ == "__main__":
    main()
