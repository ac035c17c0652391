"""The one way in which this program starts another one: what it may see, import and read, and that it ends with its parent.

Every program started here
- sees no key or token, but those that it is given on purpose (`OWN`);
- imports this package from where it is, and nothing from the folder that the user happens to be in (`python -P`);
- reads nothing from the terminal: its standard input is empty;
- runs no code out of a model folder (`model_code.py`);
- is ended by the kernel when the process that started it ends, however that ends (Linux; elsewhere it goes by its pipes).
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from iterft_lite import errors
from iterft_lite.files import FULL, our_error
from iterft_lite.model_code import refuse_model_code, trust, trusted

ROOT = str(Path(__file__).resolve().parents[1])
"""The folder that this package is in."""

Secrets = Literal["none", "judges", "tensorboard", "wandb", "trackio", "mlflow"]
"""Whose keys a program gets."""

SECRET = re.compile(
    r"(?:^|_)(?:\w*KEYS?|KEY_ID|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASS|CREDENTIALS?|AUTH|COOKIES?|DSN|PAT)(?:_|$)",
    re.IGNORECASE,
)
"""Names of variables that hold a key, as a whole part of the name."""

HUB = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN"})
"""Variables with the hub's token."""

NO_JUDGES = "WANDB_|TRACKIO_|MLFLOW_|RAY_"
"""How variables begin that are a tracker's or a cluster's."""

OWN: Mapping[Secrets, re.Pattern[str]] = {
    "none": re.compile("(?!)"),
    # a judge's provider can be any: all but trackers' and clusters', and the hub's, which the first process alone fetches from
    "judges": re.compile(rf"(?!{NO_JUDGES}|(?:{'|'.join(sorted(HUB))})$)", re.IGNORECASE),
    "tensorboard": re.compile("(?!)"),
    "wandb": re.compile("WANDB_"),
    "trackio": re.compile("TRACKIO_"),
    "mlflow": re.compile("MLFLOW_|DATABRICKS_"),
}
"""By `Secrets`, the names of variables with keys that the program gets."""

BOOT = (
    "import sys; root = sys.argv.pop(1); "
    # behind the standard library, before installed packages: another copy of this package may be among them
    "at = next((n for n, p in enumerate(sys.path) if p.endswith(('site-packages', 'dist-packages'))), len(sys.path)); "
    "root in sys.path or sys.path.insert(at, root); "
    "from iterft_lite.programs import enter; enter()"
)

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl(2)."""

PIPE = 1 << 16


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a key."""
    return SECRET.search(name) is not None


def environment(secrets: Secrets = "none", more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a program that is started: this process's, without keys that are none of its business.

    Args:
        secrets: Which keys it gets all the same.
        more: Laid over the others.
    """
    kept = {name: value for name, value in os.environ.items() if not is_secret(name) or OWN[secrets].match(name)}
    path = os.pathsep.join(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts; CUDA itself would begin with the fastest
        **kept,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        # an empty entry would be the folder that the user is in
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        # two processes that spin while they wait take each other's cores: 40 times slower on two cores
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",  # compiled code from the hub that a model's configuration can ask for
        **(more or {}),
    }


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    secrets: Secrets = "none",
    more: Mapping[str, str] | None = None,
    errors_to: int = -1,
    **given: Any,
) -> subprocess.Popen[bytes]:
    """Start a module of this package as a program.

    Args:
        module: Its name.
        arguments: Of the program.
        secrets: See `environment`.
        more: See `environment`.
        errors_to: Descriptor that an IterftError is written to (`_tell`); -1 for none.
        given: Of `subprocess.Popen`.
    """
    about = json.dumps({"module": module, "parent": os.getpid(), "errors": errors_to, "trusted": trusted()})
    command = [sys.executable, "-P", "-c", BOOT, ROOT, about, *arguments]
    return start(command, env=environment(secrets, more), **given)


def start(command: Sequence[str], **given: Any) -> subprocess.Popen[bytes]:
    """Start any program with an empty standard input; `given` is `subprocess.Popen`'s."""

    def popen() -> subprocess.Popen[bytes]:
        return subprocess.Popen(list(command), stdin=subprocess.DEVNULL, **given)

    # the kernel ends a child with the thread that made it, not with the process: so one thread, which stays, makes them all
    return _starter().submit(popen).result()


@cache
def _starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="starter")


def run_module(
    module: str, arguments: Sequence[str], *, secrets: Secrets = "none", timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module of this package as a program; gives its exit code and what it wrote.

    Raises:
        IterftError: The one that ended it, if one did.
        subprocess.TimeoutExpired: If it takes longer than `timeout` seconds; it is ended.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as told:
        try:
            process = start_module(
                module,
                arguments,
                secrets=secrets,
                errors_to=writing,
                pass_fds=(writing,),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            os.close(writing)
        done = _finish(process, timeout)
        raise_told(told)
    return done


def run_command(command: Sequence[str], *, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run any program, without keys; gives its exit code and what it wrote.

    Raises:
        subprocess.TimeoutExpired: If it takes longer than `timeout` seconds; it is ended.
    """
    return _finish(start(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE), timeout)


def _finish(process: subprocess.Popen[bytes], timeout: float | None) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(
        process.args, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )


# -- errors that cross from one process to another


def described(error: BaseException) -> dict[str, str]:
    """An exception for the wire."""
    error = _disk_full(error) or error
    if isinstance(error, errors.IterftError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint or ""}
    return {"kind": type(error).__name__, "message": f"{type(error).__name__}: {error}", "hint": ""}


def _disk_full(error: BaseException) -> errors.IterftError | None:
    """What a full disk did to a library, said as such: some have it in a number, some only in their words."""
    full = getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error)
    if not full or isinstance(error, errors.IterftError):
        return None
    return our_error(Path(getattr(error, "filename", None) or "a file"), OSError(errno.ENOSPC, str(error)))


def error_of(told: Mapping[str, str]) -> errors.IterftError | None:
    """The error of this program that was described, or None where it was another one."""
    kind = getattr(errors, told["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, errors.IterftError)) or kind is errors.BackendError:
        return None
    made = kind.__new__(kind)
    errors.IterftError.__init__(made, told["message"], hint=told["hint"] or None)
    return made


def raise_told(pipe: IO[bytes]) -> None:
    """Raise the error that a program wrote before it ended."""
    told = pipe.read(PIPE)
    error = error_of(json.loads(told)) if told.endswith(b"}") else None
    if error is not None:
        raise error


# -- in the program that was started


def enter() -> None:
    """Be the program that `start_module` asked for. Runs in the child."""
    about = json.loads(sys.argv.pop(1))
    end_with(about["parent"])
    faulthandler.enable()
    for model in about["trusted"]:
        trust(model)
    refuse_model_code()
    if about["errors"] >= 0:
        os.set_inheritable(about["errors"], False)
    try:
        runpy.run_module(about["module"], run_name="__main__", alter_sys=True)
    except errors.IterftError as error:
        if about["errors"] < 0:
            raise
        os.write(about["errors"], json.dumps(described(error)).encode()[:PIPE])
        sys.exit(1)


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that was said
        os._exit(1)
