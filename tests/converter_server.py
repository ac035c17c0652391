"""llama.cpp's converter, imported once for many models: a process that forks for each.

The product starts it anew for each base, which takes five seconds, mostly imports. Here a warm process forks instead; what is
run in the fork is the product's own `gguf.convert.run_script`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parents[1])


class Server:
    """The warm process; `run` stands in for `programs.run_module`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": PACKAGE}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.converter_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=PACKAGE,
        )

    def run(self, module: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """Convert as `python -m iterft_lite.gguf.convert ARGUMENT...` does."""
        assert module == "iterft_lite.gguf.convert"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as said:
            self._process.stdin.write(json.dumps([said.name, arguments]) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, "", said.read())

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def serve() -> None:
    """Fork for each line on stdin; answer with the exit code."""
    import importlib

    loaded = ""
    for line in sys.stdin:
        said, arguments = json.loads(line)
        if loaded != arguments[0]:
            loaded = arguments[0]
            sys.path[:0] = [loaded, f"{loaded}/gguf-py"]
            importlib.import_module("conversion").load_all_models()
            importlib.import_module("transformers").AutoTokenizer  # noqa: B018  # its modules are imported when asked for
        child = os.fork()
        if child == 0:
            _convert(said, arguments)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _convert(said: str, arguments: list[str]) -> None:
    """Run a conversion in this process and end it."""
    import traceback

    from iterft_lite.gguf.convert import main

    sys.stderr = Path(said).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    code = 0
    try:
        main(*arguments)
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
