"""Runs that are killed, or refused by the file system, at a single operation; then they go on and end as undisturbed ones.

    python -m tests.attacks.faults operations 1500     a kill or an error at one file operation each, by stand-ins
    python -m tests.attacks.faults beginnings 12       a fault of every kind at each of a run's first operations
    python -m tests.attacks.faults damages 700         a finished run's file damaged, then reported, gone on with and talked to
    python -m tests.attacks.faults study_damages 300   likewise, of a finished study: looked at, gone on with, stopped

Prints what came of them and ends with 1 if anything came that should not.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import iterft_lite
from iterft_lite import files
from iterft_lite.errors import IterftError, RunError
from iterft_lite.experiment.plan import Plan
from tests.attacks.fuzzing import damage, other_values
from tests.loop import a_plan, run_all

REGIMES: dict[str, dict[str, Any]] = {
    "sft": {"filter": {"coherence": 20.0, "dedupe": "exact"}, "data": "accumulate"},
    "sdf": {},
    "dpo": {"start": "previous", "chosen": "best", "rejected": "worst", "candidates": 2},
}
"""What is run: together they come by every verb."""

KINDS = ("kill", "ENOSPC", "EIO", "EACCES", "EMFILE")

WRITES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"})
"""Python's audit events that a fault may come at; and syncs and writes (`_patch`)."""

TIMES = frozenset({"seconds", "parts", "tokens_per_second", "cached", "calls", "bytes"})
"""What results and rows say of how they were made: no two runs agree in it. `bytes`: those of an untouched model's file are
noted by the run that puts it into the cache, and by no other."""

OURS, OTHER, FINE = 40, 41, 0
"""Exit codes of a trial."""

PATIENCE = 300
"""Seconds that a trial may take."""

USED = 3
"""In how many ways a damaged folder is used: which ones is left to chance."""


class Fault:
    """Counts the file operations in a folder, and lets one of them fail or be the last."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.count = 0
        self.at = -1
        self.kind = ""
        self.on = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if self.on and event in WRITES and arguments and str(arguments[0]).startswith(self.root):
            self.meet(str(arguments[0]))

    def meet(self, path: str) -> None:
        """An operation is about to be done."""
        self.count += 1
        if self.count - 1 != self.at:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number), *filter(None, [path]))


def load_modules() -> None:
    """Have this process load what commands import, so that its children begin with that."""
    for each in pkgutil.walk_packages(iterft_lite.__path__, "iterft_lite."):
        if each.name.split(".")[1] in ("ui", "app", "report", "engine", "stages", "experiment", "testing"):
            importlib.import_module(each.name)


def plan_of(regime: str) -> Plan:
    return a_plan(regime=regime, **REGIMES[regime])


def outcome(root: Path) -> dict[str, Any]:
    """What a finished run holds: every row, whatever the order in which they came."""
    return {
        str(path.relative_to(root)): sorted(_plain(row) for row in files.read_rows(path))
        for path in sorted(root.rglob("rows.jsonl"))
    }


def _plain(row: Any) -> str:
    """A row as text, without the time that it took."""
    return json.dumps(_without_times(row), sort_keys=True)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if key not in TIMES}
    return value


def forked(do: Callable[[], object]) -> int:
    """Do something in a process of its own; its exit code, negative for a signal: SIGALRM where it does not end."""
    child = os.fork()
    if child == 0:
        code = OTHER
        signal.alarm(PATIENCE)
        try:
            do()
            code = FINE
        except IterftError:
            code = OURS
        except BaseException:  # what came that should not
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def with_fault(plan: Plan, root: Path, at: int, kind: str) -> None:
    """A run whose file operation number `at` meets a fault."""
    fault = Fault(root)
    fault.at, fault.kind = at, kind
    sys.addaudithook(fault.hook)
    _patch(fault)
    fault.on = True
    run_all(plan, root)


def _patch(fault: Fault) -> None:
    """Have syncs and writes of rows counted too: they are no audit events."""
    sync, write = os.fsync, files._write_all

    def fsync(handle: int) -> None:
        fault.meet("")
        sync(handle)

    def write_all(file: Any, data: bytes) -> None:
        if fault.kind == "kill" and fault.count == fault.at:
            file.write(data[: len(data) // 2])  # half of a row is what a kill may leave
        fault.meet("")
        write(file, data)

    os.fsync = fsync  # type: ignore[assignment]
    files._write_all = write_all


def count_operations(plan: Plan, root: Path) -> int:
    """How many file operations an undisturbed run does."""
    told = root.parent / "count"

    def do() -> None:
        fault = Fault(root)
        sys.addaudithook(fault.hook)
        _patch(fault)
        fault.on = True
        run_all(plan, root)
        fault.on = False
        told.write_text(str(fault.count))

    assert forked(do) == FINE
    return int(told.read_text())


def operations(many: int, draw: random.Random, regimes: tuple[str, ...] = tuple(REGIMES)) -> Counter[str]:
    """Trials of one fault each; by what came of them, how many."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, regime in enumerate(regimes):
            plan, root = plan_of(regime), Path(folder) / regime
            total = count_operations(plan, root)
            expected = outcome(root)
            mine = many * (number + 1) // len(regimes) - many * number // len(regimes)
            for _ in range(mine):
                found[_trial(plan, Path(folder) / "trial", expected, draw.randrange(total), draw.choice(KINDS))] += 1
    return found


def beginnings(many: int, _: random.Random) -> Counter[str]:
    """A fault of every kind at each of a run's first operations, where a folder is not yet known for what it is."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for regime in REGIMES:
            plan, root = plan_of(regime), Path(folder) / regime
            run_all(plan, root)
            for at in range(many):
                for kind in KINDS:
                    found[_trial(plan, Path(folder) / "trial", outcome(root), at, kind)] += 1
    return found


def _trial(plan: Plan, root: Path, expected: dict[str, Any], at: int, kind: str) -> str:
    """One fault, and going on after it: what came of it in words, "good" where all is as it should be."""
    shutil.rmtree(root, ignore_errors=True)
    code = forked(partial(with_fault, plan, root, at, kind))
    if code not in (FINE, OURS, -signal.SIGKILL):
        return f"not our error: {kind} at operation {at}"
    if forked(partial(run_all, plan, root)) != FINE:
        return f"cannot go on after {kind} at operation {at}"
    return "good" if outcome(root) == expected else f"another result after {kind} at operation {at}"


# -- damages --------------------------------------------------------------------------------------------------------------

SHAPES = (b"", b"{}", b"[]", b"null", b"7", b'"x"', b"[" * 100_000, b"\xff\xfe", b'{"key": null}', b"{" + b'"a":' * 3000)


def damages(
    many: int,
    draw: random.Random,
    uses: dict[str, Callable[[Path], object]],
    whole: Path,
    beside: Sequence[Path] = (),
) -> Counter[str]:
    """A finished run with one damaged file, used in some ways; by what came of it, how many damages.

    Args:
        many: Damages.
        draw: Which.
        uses: By name, what is done with the folder: an error of ours, or nothing, may come of it.
        whole: The finished run.
        beside: Files that lie beside it.
    """
    found: Counter[str] = Counter()
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as folder:
        for path in beside:
            shutil.copy(path, folder)
        for _ in range(many):
            name, root = draw.choice(names), Path(folder) / "run"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(whole, root, symlinks=True)
            how = spoil(root / name, draw)
            some = draw.sample(sorted(uses), USED)
            bad = [use for use in some if forked(partial(uses[use], root)) not in (FINE, OURS)]
            found["good" if not bad else f"{', '.join(bad)}: {name}, {how}"] += 1
            if bad and (kept := os.environ.get("ITERFT_KEEP_BAD")):
                shutil.copytree(root, Path(kept) / f"{sum(found.values())}", symlinks=True, ignore=_pipes)
    return found


def _pipes(folder: str, names: list[str]) -> list[str]:
    """Names of a folder's files that no copy can be made of."""
    return [name for name in names if (Path(folder) / name).is_fifo()]


def commands(*lines: str) -> dict[str, Callable[[Path], object]]:
    """Commands of `iterft`, by their line; `RUN` stands for the folder, and files are written beside it."""
    return {line: partial(_command, line.split()) for line in lines}


def _command(words: Sequence[str], root: Path) -> None:
    from click import ClickException

    from iterft_lite.ui.cli import main

    shutil.rmtree(root.parent / "made", ignore_errors=True)
    arguments = [str(root) if word == "RUN" else word.replace("MADE", str(root.parent / "made")) for word in words]
    (root.parent / "made").mkdir()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            code = main(arguments, standalone_mode=False)
        except ClickException as error:
            raise RunError(error.format_message()) from None
    if code:
        raise RunError(f"exit code {code}")


def spoil(path: Path, draw: random.Random) -> str:
    """Damage a file in one of many ways; which."""
    data = path.read_bytes()
    how = draw.choice(
        ["bytes", "bytes", "bytes", "shape", "values", "gone", "folder", "pipe", "loop", "device", "huge", "locked"]
    )
    if how == "bytes":
        path.write_bytes(damage(data, draw))
    elif how == "shape":
        path.write_bytes(draw.choice(SHAPES))
    elif how == "values":
        path.write_bytes(other_values(data, draw))
    elif how == "huge":
        os.truncate(path, 3 << 30)
    elif how == "locked":
        path.chmod(0)
    else:
        path.unlink()
        {
            "gone": lambda: None,
            "folder": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "loop": lambda: path.symlink_to(path.name),
            "device": lambda: path.symlink_to("/dev/zero"),
        }[how]()
    return how


def uses_of_a_run() -> dict[str, Callable[[Path], object]]:
    """What is done with a run folder, by stand-ins."""
    from iterft_lite.app.chat import past
    from iterft_lite.report.json_form import as_json
    from iterft_lite.report.report import read_report

    def report(root: Path) -> None:
        json.dumps(as_json(read_report(root)), ensure_ascii=False)

    def go_on(root: Path) -> None:
        from iterft_lite.app.session import open_again

        with open_again(root) as opened:
            list(opened.events())

    return {"report": report, "go on": go_on, "talk": partial(past, cycle=None)}


def commands_on_a_run() -> dict[str, Callable[[Path], object]]:
    """What is done with a run folder by commands: slower."""
    return commands(
        "report RUN --full",
        "report RUN --held-out",
        "report RUN --html MADE/a.html --csv MADE/a.csv --md MADE/a.md",
        "report RUN --png MADE/a.png",
        "share RUN --to MADE/shared",
        "figure sweep RUN --svg MADE/a.svg",
        "export RUN --out MADE/export",
        "judge run RUN --judge fake#1",
        "replicate RUN",
    )


def finished_run(root: Path) -> Path:
    """A run as the command makes it, by stand-ins."""
    from iterft_lite.app.session import open_run
    from tests.loop import small_recipe

    root.parent.mkdir(parents=True, exist_ok=True)
    recipe = root.parent / "r.toml"
    recipe.write_text(small_recipe())
    with open_run(recipe, [], root) as opened:
        list(opened.events())
    return root


# -- studies --------------------------------------------------------------------------------------------------------------

GRID = """
base = "base.toml"
[sweep.grid]
rows = [4, 5]
"""


def finished_study(root: Path, grid: str = GRID) -> Path:
    """A study as the command makes it, by stand-ins, with its file beside its folder."""
    from tests.loop import small_recipe

    root.parent.mkdir(parents=True, exist_ok=True)
    (root.parent / "base.toml").write_text(small_recipe(cycles=1))
    (root.parent / "study.toml").write_text(grid)
    sweep_on(root)
    return root


def sweep_on(root: Path) -> None:
    """Run a study, or go on with it: the one whose file lies beside its folder.

    Raises:
        RunError: If a cell failed.
    """
    from iterft_lite.app.study_plan import StudyPlan
    from iterft_lite.app.sweep import open_sweep
    from iterft_lite.app.sweep_places import LocalPlace

    with open_sweep(StudyPlan(root.parent / "study.toml"), root, [LocalPlace("cpu", chains=2)]) as sweep:
        sweep._pause = 0.01
        for _ in sweep.events():
            pass
        if failed := sweep.failed():
            raise RunError(f"{', '.join(failed)} failed")


def uses_of_a_study() -> dict[str, Callable[[Path], object]]:
    """What is done with a study's folder, by stand-ins."""
    from dataclasses import asdict

    from rich.console import Console

    from iterft_lite.app.sweep import ask_to_stop
    from iterft_lite.engine.study import StudyFolder
    from iterft_lite.report.study import read_study_report
    from iterft_lite.ui.live_sweep import show_state

    def look(root: Path) -> None:
        with Path(os.devnull).open("w") as nowhere:
            show_state(StudyFolder(root), Console(file=nowhere, width=80))
        json.dumps(asdict(StudyFolder(root).state()))

    def report(root: Path) -> None:
        read_study_report([root])

    return {"look": look, "stop": lambda root: ask_to_stop(StudyFolder(root)), "report": report, "go on": sweep_on}


def commands_on_a_study() -> dict[str, Callable[[Path], object]]:
    """What is done with a study's folder by commands: slower."""
    return commands(
        "report RUN --html MADE/a.html --csv MADE/a.csv",
        "report RUN",
        "share RUN --to MADE/shared",
        "compare RUN",
        "figure heatmap RUN --svg MADE/a.svg",
        "figure grid RUN --svg MADE/a.svg",
        "sweep status RUN --json",
    )


def whole_outcome(root: Path) -> dict[str, Any]:
    """What a finished run or study holds: every row, every result, and of a study the state of every cell."""
    from iterft_lite.engine.completion import read_completion
    from iterft_lite.engine.study import StudyFolder, is_study

    results = {f"steps/{path.name}/results": read_completion(path) for path in sorted((root / "steps").iterdir())}
    plain = {place: _without_times(found.results) if found else None for place, found in results.items()}
    states = StudyFolder(root).state().cells if is_study(root) else {}
    cells = {name: (cell.state, cell.score) for name, cell in states.items()}
    return {**outcome(root), **plain, "cells": cells}


def study_damages(many: int, draw: random.Random) -> Counter[str]:
    """See `damages`."""
    with tempfile.TemporaryDirectory() as folder:
        whole = finished_study(Path(folder) / "whole")
        beside = [whole.parent / "study.toml", whole.parent / "base.toml"]
        return damages(many, draw, uses_of_a_study() | commands_on_a_study(), whole, beside)


def run_damages(many: int, draw: random.Random) -> Counter[str]:
    """See `damages`."""
    with tempfile.TemporaryDirectory() as folder:
        return damages(many, draw, uses_of_a_run() | commands_on_a_run(), finished_run(Path(folder) / "whole"))


WHAT: dict[str, Callable[[int, random.Random], Counter[str]]] = {
    "operations": operations,
    "beginnings": beginnings,
    "damages": run_damages,
    "study_damages": study_damages,
}


def main() -> None:
    """See the module's docstring."""
    load_modules()
    what, many = sys.argv[1], int(sys.argv[2])
    draw = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    found = WHAT[what](many, draw)
    for came, count in found.most_common():
        sys.stdout.write(f"{count:6} {came}\n")
    sys.exit(found.keys() != {"good"})


if __name__ == "__main__":
    main()
