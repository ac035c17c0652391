"""One child process a backend: the parent stays free of torch, llama.cpp and litellm, and a child that ends frees its memory.

Messages are JSON lines on two pipes of their own, so that whatever a library prints goes to the log and whatever it asks on
standard input finds nothing there. Requests: `{"call": method, "args": {...}}`. Replies: any number of `{"event": ...}` and
`{"alive": true}`, then `{"result": ...}` or `{"error": {"kind", "message", "hint"}}`. Arguments, events and results are
validated against the method's annotations on both sides.

A child ends when its pipe of requests does, and when its parent does (`programs.py`); closing it ends its whole process group.
While it works it says every few seconds that it is alive: one that was stopped, or hangs, is noticed (`Silence`).

Run as the module iterft_lite.backends.processes.child with `MODULE:CLASS REPLIES OPTIONS REQUESTS HIDDEN`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args, get_type_hints

from pydantic import TypeAdapter

from iterft_lite import errors
from iterft_lite.files import open_append
from iterft_lite.programs import Secrets, described, error_of, start_module

LOG_LINES = 15
"""Lines of a failed child's log that an error quotes."""

PIPE = 1 << 16
"""Bytes that a pipe holds, and that are taken off it at once."""

BEAT = 5.0
"""Seconds between two signs of life of a child that works."""

SILENT = 30.0
"""Seconds without a sign of life after which that is reported, and again after twice as many, and so on."""

CLOSING = 2.0
"""Seconds that a child is given to end by itself."""

FRAME = re.compile(
    r"""^\s*(?:
        \S+\((?:\S*)\+0x[0-9a-f]+\)                # what backtrace(3) prints
        | \#\d+\s+0x[0-9a-f]+\s                    # gdb
        | \[New\ LWP | \[Thread\ debugging | Using\ host\ libthread | \[Inferior | warning:\ .*(?:debuginfod|gdb)
        | Fatal\ Python\ error | (?:Current\ t|T)hread\ 0x | File\ ".*",\ line\ \d+\ in\  | Extension\ modules: | $
    )""",
    re.VERBOSE,
)
"""Lines of a log that are about C and not about what went wrong."""

STATES = {"T": "is stopped: `kill -CONT {pid}` lets it go on", "D": "waits for a disk or a driver", "Z": "has ended"}
"""What a process does, by the kernel's letter, where that is worth a word."""

SIGNALS = {
    signal.SIGKILL: (
        "was killed",
        "mostly this means that the machine ran out of memory (`dmesg` says so); else somebody killed it",
    ),
    signal.SIGTERM: ("was told to end", "another program, or the machine going down, ended it: run again to go on"),
    signal.SIGABRT: ("was given up by a library in it", "the lines above, or earlier ones in the log, say why"),
    signal.SIGSEGV: ("crashed in a library", "run again; if it happens again, report it with the log"),
    signal.SIGBUS: ("crashed in a library", "mostly a file that was cut short while it was being read, or a full /dev/shm"),
    signal.SIGILL: (
        "met an instruction that this processor has not got",
        "install builds of torch and llama-cpp-python for it",
    ),
    signal.SIGFPE: ("crashed in a library", "run again; if it happens again, report it with the log"),
}
"""By signal that ended a child: what that means, and what to do."""


@dataclass(frozen=True)
class Silence:
    """A child that works has given no sign of life for some time.

    Attributes:
        name: Which: "trainer", "generator", ...
        doing: What it was asked to do.
        seconds: For how long.
        pid: Its process.
        state: What the kernel says that it does; "" where nothing is worth saying.
    """

    name: str
    doing: str
    seconds: float
    pid: int
    state: str

    @property
    def sentence(self) -> str:
        """For people."""
        state = f"; process {self.pid} {self.state}" if self.state else f" (process {self.pid})"
        return f"the {self.name} has given no sign of life for {self.seconds:.0f} s while {self.doing}{state}"


OnSilence = Callable[[Silence], None]


def _event_parameter(hints: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The parameter of a method that takes events, with the events' type: the one annotated as a callable."""
    for name, hint in hints.items():
        arguments = get_args(hint)
        if name != "return" and len(arguments) == 2 and isinstance(arguments[0], list):
            return name, arguments[0][0]
    return None


class _Replies:
    """Lines off a pipe, with a limit to waiting."""

    def __init__(self, handle: int) -> None:
        self._file = os.fdopen(handle, "rb", buffering=0)
        self._rest = b""
        self._lines: list[bytes] = []

    def next(self, seconds: float) -> bytes | None:
        """The next whole line; None after that many seconds without one; what there is of a line once the other end closed."""
        end = time.monotonic() + seconds
        while not self._lines:
            ready = self._poll(max(0.0, end - time.monotonic()))
            if not ready:
                return None
            found = self._file.read(PIPE)
            if not found:
                rest, self._rest = self._rest, b""
                return rest
            *self._lines, self._rest = (self._rest + found).split(b"\n")
        return self._lines.pop(0) + b"\n"

    def _poll(self, seconds: float) -> bool:
        poll = select.poll()  # select(2) knows no descriptors above 1,023
        poll.register(self._file, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        self._file.close()


@dataclass
class _Running:
    """A child's process and the ends of its pipes."""

    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: _Replies


class Child:
    """A backend in a process of its own, started at its first call.

    Args:
        worker: `module:Class` of the worker.
        protocol: The protocol that both sides meet; its annotations are the wire format.
        log: File that the child's output goes to; its stem is what the child is called.
        environment: Variables set for the child, on top of what `programs.environment` gives.
        options: Keyword arguments of the worker's constructor; JSON values.
        secrets: Which keys it gets.
        hidden: Packages that are not there for what it imports: libraries import them where they are installed, which takes
            seconds, for what this worker never does.

    Attributes:
        on_silence: Told when it gives no sign of life, from the thread that waits for it.
    """

    def __init__(
        self,
        worker: str,
        protocol: type,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        secrets: Secrets = "none",
        hidden: Sequence[str] = (),
    ) -> None:
        self.on_silence: OnSilence | None = None
        self._worker = worker
        self._protocol = protocol
        self._log = log
        self._environment = dict(environment or {})
        self._options = dict(options or {})
        self._secrets: Secrets = secrets
        self._hidden = list(hidden)
        self._running: _Running | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._protocol, name, None)
        if name.startswith("_") or method is None:
            raise AttributeError(name)
        hints = get_type_hints(method)
        signature = inspect.signature(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = dict(signature.bind(self, *args, **kwargs).arguments)
            bound.pop("self")
            taker = _event_parameter(hints)
            on_event = bound.pop(taker[0]) if taker else None
            wire = {key: TypeAdapter(hints[key]).dump_python(value, mode="json") for key, value in bound.items()}
            with self._lock:
                for message in self._exchange(name, wire):
                    if "event" in message:
                        if taker and on_event:
                            on_event(TypeAdapter(taker[1]).validate_python(message["event"]))
                    elif "error" in message:
                        raise self._error(message["error"])
                    else:
                        return TypeAdapter(hints["return"]).validate_python(message["result"])
            raise AssertionError("an exchange ends with a result or an error")

        return call

    @property
    def name(self) -> str:
        """What it is called: "trainer", "judge", ..."""
        return self._log.stem

    @property
    def running(self) -> bool:
        """Whether the process is there (and holds memory)."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """The process's number, while it is there."""
        running = self._running  # another thread may end it meanwhile
        return running.process.pid if running is not None and _alive(running.process) else None

    def watch(self, on_silence: Callable[[str], None] | None) -> None:
        """Have somebody told, in a sentence, when it works and gives no sign of life."""
        self.on_silence = None if on_silence is None else lambda silence: on_silence(silence.sentence)

    def prepare(self) -> None:
        """Start the process, which makes its worker at once: a call finds it ready, or meets what went wrong there."""
        if self._lock.acquire(blocking=False):  # who is calling it starts it
            try:
                if not self.running:
                    self._start()
            finally:
                self._lock.release()

    def close(self) -> None:
        """End the process, and what it started, at once if it does not end by itself; a later call starts a new one."""
        running, self._running = self._running, None
        if running is None:
            return
        with contextlib.suppress(OSError):
            running.requests.close()
        end = time.monotonic() + CLOSING
        while _alive(running.process) and time.monotonic() < end:
            time.sleep(0.01)
        _end_group(running.process)
        # another thread may be reading: it finds the other end closed, and lets go of the lock
        if self._lock.acquire(timeout=CLOSING):
            running.replies.close()
            self._lock.release()

    def _start(self) -> _Running:
        log = self._open_log()
        asked, requests = os.pipe()
        reading, replies = os.pipe()
        try:
            process = start_module(
                "iterft_lite.backends.processes.child",
                [self._worker, str(replies), json.dumps(self._options), str(asked), json.dumps(self._hidden)],
                secrets=self._secrets,
                more=self._environment,
                stdout=log,
                stderr=log,
                pass_fds=(asked, replies),
                # Ctrl-C is the parent's to handle: it ends its children; and a group can be ended as a whole
                start_new_session=True,
            )
        finally:
            for handle in (log, asked, replies):
                os.close(handle)
        self._running = _Running(process, os.fdopen(requests, "wb", buffering=0), _Replies(reading))
        return self._running

    def _open_log(self) -> int:
        """A descriptor of the log; in a temporary folder where its own cannot be written, or is somebody's trap."""
        try:
            if self._log.parent.is_symlink():
                raise OSError
            self._log.parent.mkdir(parents=True, exist_ok=True)
            return open_append(self._log)
        except (OSError, errors.FileError):
            self._log = Path(tempfile.mkdtemp(prefix="iterft-logs-")) / self._log.name
            return open_append(self._log)

    def _exchange(self, name: str, args: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send one request; yield its events and then its result or error."""
        running = self._running if self.running and self._running else self._start()
        finished = False
        try:
            _ask(running.requests, json.dumps({"call": name, "args": args}).encode() + b"\n")
            while not finished:
                line = self._line(running, name)
                if not line.endswith(b"\n"):  # nothing, or what a killed child had not written to its end
                    finished = True
                    raise self._death(running.process, name)
                message = json.loads(line)
                if "alive" in message:
                    continue
                finished = "event" not in message
                yield message
        finally:
            if not finished:  # the caller was interrupted: what the child still says answers no later question
                _end_group(running.process)

    def _line(self, running: _Running, doing: str) -> bytes:
        """The next line that the child writes; says when it is long in coming."""
        silent, patience = 0.0, SILENT
        while True:
            line = running.replies.next(patience)
            if line is not None:
                return line
            silent, patience = silent + patience, silent + patience
            if not _alive(running.process):
                return b""  # ended, while something that it started holds the pipe
            if self.on_silence is not None:
                state = STATES.get(_state(running.process.pid), "").format(pid=running.process.pid)
                self.on_silence(Silence(self.name, doing_words(doing), silent, running.process.pid, state))

    def _death(self, process: subprocess.Popen[bytes], doing: str) -> errors.BackendError:
        while _alive(process):  # its pipe is closed: it is about to end
            time.sleep(0.01)
        _end_group(process)
        code = process.returncode
        what, hint = f"ended with exit code {code}", None
        if code < 0:
            number = signal.Signals(-code)
            means, hint = SIGNALS.get(number, ("was ended", None))
            what = f"{means} (signal {-code}, {number.name})"
        return errors.BackendError(
            f"the {self.name} {what} while {doing_words(doing)}\n{self._tail()}", exception="died", hint=hint
        )

    def _tail(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, self._log.stat().st_size - PIPE))
                lines = file.read(PIPE).decode(errors="replace").splitlines()
        except OSError:
            lines = []
        told = [line for line in lines if not FRAME.match(line)][-LOG_LINES:]
        return "\n".join([f"its log, {self._log}, ends:", *(f"  {line}" for line in told)])

    def _error(self, error: Mapping[str, str]) -> errors.IterftError:
        return error_of(error) or errors.BackendError(
            f"the {self.name} failed: {error['message']}\n(traceback in {self._log})",
            exception=error["kind"],
            hint=error["hint"] or None,
        )


def doing_words(call: str) -> str:
    """What a method of a backend does, for people: its name, as something that goes on."""
    words = {
        "load": "loading a model",
        "train": "training",
        "probe": "writing the check of an export",
        "export": "exporting a model",
        "complete": "generating text",
        "likelihood": "measuring likelihoods",
        "parity": "checking an exported model",
        "ask": "judging",
    }
    return words.get(call, f"doing `{call}`")


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process runs. One that ended is not forgotten by the kernel yet, so that its group's number stays its own."""
    if process.returncode is not None:
        return False
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except (ChildProcessError, AttributeError):  # macOS has no waitid before Python 3.13
        return process.poll() is None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process with everything that it started, and take note of how it ended."""
    if process.returncode is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _state(pid: int) -> str:
    """The kernel's letter for what a process does."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return ""


def _ask(requests: IO[bytes], data: bytes) -> None:
    """Write a request; beside the reading of what comes back, where it may be more than the pipe takes at once."""

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):  # the reply, or its absence, tells more
            rest = data
            while rest:
                rest = rest[requests.write(rest) :]

    if len(data) <= select.PIPE_BUF:
        write()
    else:
        threading.Thread(target=write, daemon=True).start()


# -- in the child


class _Wire:
    """The child's end: whole lines, one at a time; a sign of life every few seconds while something is being done."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self.busy = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._handle, data) :]

    def _beat(self) -> None:
        while True:
            self.busy.wait()
            time.sleep(BEAT)
            if self.busy.is_set():
                with contextlib.suppress(OSError):
                    self.send({"alive": True})


def serve(worker: str, requests: IO[str], wire: _Wire, options: Mapping[str, Any]) -> None:
    """Answer requests until they end; the worker is made before the first comes. Runs in the child."""
    lines: list[str] = []
    ready = threading.Condition()

    def read() -> None:
        for line in requests:
            with ready:
                lines.append(line)
                ready.notify()
        # the parent is gone or has said goodbye: nobody waits for what is being done
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()

    made, failed = _make(worker, options, wire)
    while True:
        with ready:
            while not lines:
                ready.wait()
            line = lines.pop(0)
        request = json.loads(line)
        if made is None and failed is None:  # it failed, and somebody asks again
            made, failed = _make(worker, options, wire)
        wire.busy.set()
        try:
            if failed is not None:
                error, failed = failed, None
                raise error
            message = {"result": _answer(made, request["call"], request["args"], wire.send)}
        except Exception as error:  # whatever it is, the parent decides
            traceback.print_exc()
            message = {"error": described(error)}
        wire.busy.clear()
        wire.send(message)


def _make(worker: str, options: Mapping[str, Any], wire: _Wire) -> tuple[Any, Exception | None]:
    """The worker, or why there is none."""
    module, _, class_name = worker.partition(":")
    wire.busy.set()
    # importing large libraries makes a million objects that stay: looking through them for garbage takes a fifth of the time
    gc.disable()
    try:
        return getattr(importlib.import_module(module), class_name)(**options), None
    except Exception as error:  # whatever it is, the parent decides
        return None, error
    finally:
        gc.freeze()
        gc.enable()
        wire.busy.clear()


def _answer(worker: Any, call: str, wire: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> Any:
    """Call a worker's method with arguments off the wire; its result for the wire."""
    method = getattr(worker, call)
    hints = get_type_hints(method)
    args = {key: TypeAdapter(hints[key]).validate_python(value) for key, value in wire.items()}
    taker = _event_parameter(hints)
    if taker:
        event_type = TypeAdapter(taker[1])
        args[taker[0]] = lambda event: send({"event": event_type.dump_python(event, mode="json")})
    return TypeAdapter(hints["return"]).dump_python(method(**args), mode="json")


def hide(packages: Sequence[str]) -> None:
    """Have packages not found by what is imported from now on."""
    missing: dict[str, Any] = dict.fromkeys(packages)  # what Python's import takes None there to mean
    sys.modules.update(missing)


def main() -> None:
    """Be the child that the arguments say."""
    worker, replies, options, asked = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    hide(json.loads(sys.argv[5]))
    for handle in (replies, asked):
        os.set_inheritable(handle, False)  # what the worker starts is not to hold them open
    with os.fdopen(asked, encoding="utf-8") as requests:
        serve(worker, requests, _Wire(replies), json.loads(options))


if __name__ == "__main__":
    main()
