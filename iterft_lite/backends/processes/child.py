"""One child process a backend: the parent stays free of torch, llama.cpp and litellm, and a child that ends frees its memory.

Messages are JSON lines: requests on the child's stdin, replies on a pipe of its own, so that whatever a library prints goes
to the log. Requests: `{"call": method, "args": {...}}`. Replies: any number of `{"event": ...}`, then `{"result": ...}` or
`{"error": {"kind", "message", "hint", "trace"}}`. Arguments, events and results are validated against the method's
annotations on both sides. A child ends when its stdin does: it does not outlive a killed parent.

Run as `python -m iterft_lite.backends.processes.child MODULE:CLASS FD`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, get_args, get_type_hints

from pydantic import TypeAdapter

from iterft_lite import errors

LOG_LINES = 15
"""Lines of a failed child's log that an error quotes."""

PIPE = 1 << 16
"""Bytes that a pipe holds, and that are taken off it at once."""


def _event_parameter(hints: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The parameter of a method that takes events, with the events' type: the one annotated as a callable."""
    for name, hint in hints.items():
        arguments = get_args(hint)
        if name != "return" and len(arguments) == 2 and isinstance(arguments[0], list):
            return name, arguments[0][0]
    return None


class Child:
    """A backend in a process of its own, started at its first call.

    Args:
        worker: `module:Class` of the worker.
        protocol: The protocol that both sides meet; its annotations are the wire format.
        log: File that the child's output goes to.
        environment: Variables set for the child, on top of this process's.
        options: Keyword arguments of the worker's constructor; JSON values.
    """

    def __init__(
        self,
        worker: str,
        protocol: type,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._worker = worker
        self._protocol = protocol
        self._log = log
        self._environment = dict(environment or {})
        self._options = dict(options or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: IO[str] | None = None
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
    def running(self) -> bool:
        """Whether the process is there (and holds memory)."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """The process's number, while it is there."""
        process = self._process  # another thread may end it meanwhile
        return process.pid if process is not None and process.poll() is None else None

    def close(self) -> None:
        """End the process, at once if it does not end by itself; a later call starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._replies is not None:
            self._replies.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        environment = {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts; CUDA itself would begin with the fastest
            **os.environ,
            # two processes that spin while they wait take each other's cores: 40 times slower on two cores
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            **self._environment,
        }
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "iterft_lite.backends.processes.child",
                    self._worker,
                    str(writing),
                    json.dumps(self._options),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                env=environment,
                # Ctrl-C is the parent's to handle: it ends its children by closing their stdin
                start_new_session=True,
            )
        os.close(writing)
        self._process = process
        self._replies = os.fdopen(reading, encoding="utf-8", buffering=PIPE)
        return process

    def _exchange(self, name: str, args: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send one request; yield its events and then its result or error."""
        process = self._process if self.running and self._process else self._start()
        assert process.stdin is not None
        assert self._replies is not None
        with contextlib.suppress(BrokenPipeError):  # the reply, or its absence, tells more
            process.stdin.write(json.dumps({"call": name, "args": args}).encode() + b"\n")
            process.stdin.flush()
        finished = False
        try:
            while not finished:
                line = self._replies.readline()
                if not line.endswith("\n"):  # nothing, or what a killed child had not written to its end
                    finished = True
                    raise self._death(process)
                message = json.loads(line)
                finished = "event" not in message
                yield message
        finally:
            if not finished:  # the caller was interrupted: what the child still says answers no later question
                process.kill()
                process.wait()

    def _death(self, process: subprocess.Popen[bytes]) -> errors.BackendError:
        code = process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = "signal 9 mostly means that the machine ran out of memory" if code == -9 else None
        return errors.BackendError(f"`{self._worker}` {how}\n{self._tail()}", exception="died", hint=hint)

    def _tail(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            lines = []
        return "\n".join([f"its log, {self._log}, ends:", *(f"  {line}" for line in lines)])

    def _error(self, error: Mapping[str, str]) -> errors.IterftError:
        kind = getattr(errors, error["kind"], None)
        if isinstance(kind, type) and issubclass(kind, errors.IterftError) and kind is not errors.BackendError:
            made = kind.__new__(kind)
            errors.IterftError.__init__(made, error["message"], hint=error["hint"] or None)
            return made
        return errors.BackendError(
            f"`{self._worker}` failed: {error['message']}\n(traceback in {self._log})",
            exception=error["kind"],
            hint=error["hint"] or None,
        )


def serve(worker: str, replies: IO[str], options: Mapping[str, Any]) -> None:
    """Answer requests on stdin until it ends. Runs in the child."""
    module, _, class_name = worker.partition(":")
    made: Any = None
    requests: list[str | None] = []
    ready = threading.Condition()

    def read() -> None:
        for line in sys.stdin:
            with ready:
                requests.append(line)
                ready.notify()
        # the parent is gone or has said goodbye: nobody waits for what is being done
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()

    def send(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    while True:
        with ready:
            while not requests:
                ready.wait()
            line = requests.pop(0)
        assert line is not None
        request = json.loads(line)
        try:
            if made is None:
                made = getattr(importlib.import_module(module), class_name)(**options)
            send({"result": _answer(made, request["call"], request["args"], send)})
        except Exception as error:  # whatever it is, the parent decides
            traceback.print_exc()
            send({"error": _described(error)})


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


def _described(error: Exception) -> dict[str, str]:
    """An exception for the wire."""
    if isinstance(error, errors.IterftError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint or ""}
    return {"kind": type(error).__name__, "message": f"{type(error).__name__}: {error}", "hint": ""}


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as pipe:
        serve(sys.argv[1], pipe, json.loads(sys.argv[3]))
