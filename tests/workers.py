"""Workers for tests of child processes: each meets a piece of a protocol and misbehaves in its way."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from iterft_lite.errors import StoreError
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.programs import run_module
from iterft_lite.protocols import ModelFacts, OnProgress, Progress, TrainJob, TrainResult


class Teller:
    """Says in the names of its facts what it finds around it; `model` is what to look for."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        if model == "stdin":
            said = repr(sys.stdin.read())
        elif model == "path":
            said = repr([entry for entry in sys.path if not entry or entry == str(Path.cwd())])
        elif model == "import":
            import random

            said = random.__file__
        elif model == "missing":
            names = ("colorsys", "sched")
            said = ", ".join(name for name in names if importlib.util.find_spec(name) is None)
        else:
            said = os.environ.get(model, "unset")
        return ModelFacts(said, 0, 0, 0, True, "f32", "cpu")


class Announcing:
    """Says in its log when it is made."""

    def __init__(self) -> None:
        sys.stderr.write("made\n")
        sys.stderr.flush()

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        return ModelFacts("ready", 0, 0, 0, True, "f32", "cpu")


class Refusing:
    """Cannot be made."""

    def __init__(self) -> None:
        raise StoreError("not like this")


class Dying:
    """Ends by the signal whose name it is told to load, after a library's last words."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        sys.stderr.write("GGML_ASSERT(tokens) failed: no byte tokens\n")
        sys.stderr.write("/lib/libggml.so(ggml_print_backtrace+0x21)[0x7f1]\n#5  0x00007f12 in llama_model_load ()\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.Signals[model])
        time.sleep(10)
        raise AssertionError


class Hanging:
    """Starts a program that sleeps, says its number, and sleeps itself."""

    def probe(self, out: Path, adapter: Path | None = None) -> None:
        time.sleep(60)

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        on_progress(Progress(sleeper.pid, 0, "pid"))
        time.sleep(60)
        raise AssertionError


class Full:
    """Meets a full disk."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        Path("/dev/full").write_text("a")
        raise AssertionError


class Grandparent:
    """Runs a module that sleeps."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        run_module("tests.workers", [model])
        raise AssertionError


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(60)
