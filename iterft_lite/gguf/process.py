"""Running a module of this package as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_module(module: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENT...` with this Python and this package; gives its exit code and what it wrote."""
    package = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=environment,
    )
