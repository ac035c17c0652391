"""The GPU as its driver describes it (NVML), from outside the processes that use it; the CPU and the machine's memory."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PROCESSES = Path("/proc")
"""This system's processes. A container may not see the processes that NVML names."""

EVERY = 0.1
"""Seconds between two readings."""

RELEASE_SECONDS = 20.0
"""Longest wait for freed memory, seconds. The driver takes one or two after a process has ended."""


BF16_FLAGS = frozenset(["avx512_bf16", "amx_bf16"])
"""Flags of CPUs, as Linux names them, that multiply bf16 numbers at twice the speed of f32 or more and sum in f32."""


def cpu_name() -> str:
    """The CPU's model as the system names it, else its architecture."""
    return _of_cpu("model name") or platform.processor() or platform.machine()


def cpu_precision(processors: Path = PROCESSES / "cpuinfo") -> Literal["f32", "bf16-mixed"]:
    """In which precision this CPU trains on a base of 32 bits: "bf16-mixed" where it has instructions for products in bf16.

    Args:
        processors: Where the system lists its CPUs with their flags.
    """
    return "bf16-mixed" if BF16_FLAGS & set(_of_cpu("flags", processors).split()) else "f32"


def _of_cpu(entry: str, processors: Path = PROCESSES / "cpuinfo") -> str:
    """An entry of the system's first CPU; "" if there is none."""
    with contextlib.suppress(OSError):
        for line in processors.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == entry:
                return value.strip()
    return ""


def available_memory() -> int:
    """Bytes of the machine's memory that can be had; what is only kept of files counts as free."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (PROCESSES / "meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


MERGING = 3 << 29
"""Bytes of a GPU's memory that merging a model there may take, with CUDA's own."""


def gpu_handle(nvml: Any, name: str = "") -> Any:
    """NVML's handle of a GPU; NVML and CUDA's programs both count by PCI slot (see `programs.environment`).

    Args:
        nvml: The module, initialised.
        name: As CUDA_VISIBLE_DEVICES names it: a number, or the beginning of a UUID; the first that is seen if "".

    Raises:
        LookupError: If there is none.
    """
    first = name or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("GPU-"):
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            if str(nvml.nvmlDeviceGetUUID(handle)).startswith(first):
                return handle
    raise LookupError(f"`{first}` is not a GPU")


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, each as CUDA_VISIBLE_DEVICES names it; none without a driver."""
    nvml = _nvml()
    if nvml is None:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(number) for number in range(nvml.nvmlDeviceGetCount())]
    return every if named is None else [name.strip() for name in named.split(",") if name.strip()]


def _nvml() -> Any:
    """The driver's library, ready; None without the package, a driver or a GPU, which are all the same here."""
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    return None


@dataclass(frozen=True)
class GpuFacts:
    """Properties of a GPU.

    Attributes:
        free, total: Memory, bytes.
        capability: CUDA compute capability.
    """

    name: str
    free: int
    total: int
    capability: tuple[int, int]


class Gpu:
    """A GPU, or none, as the driver (NVML) describes it.

    Args:
        name: As of `gpu_handle`.
    """

    def __init__(self, name: str = "") -> None:
        self._nvml = _nvml()
        try:
            self._handle = gpu_handle(self._nvml, name)
        except Exception:  # there is no such GPU
            self._nvml = None

    @property
    def there(self) -> bool:
        """Whether there is a GPU that can be asked."""
        return self._nvml is not None

    def facts(self) -> GpuFacts | None:
        """The GPU's properties; None without a GPU or an answer of the driver."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
            name = str(self._nvml.nvmlDeviceGetName(self._handle))
            return GpuFacts(name, int(memory.free), int(memory.total), (int(major), int(minor)))
        except Exception:
            return None

    def used(self, pids: Iterable[int]) -> int:
        """GPU memory of processes and their children, bytes. In a container that hides processes: of the whole GPU."""
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            held = {process.pid: process.usedGpuMemory or 0 for process in running}
            counted = set(pids)
            own = sum(used for pid, used in held.items() if pid in counted or _parent(pid) in counted)
            if own or any(PROCESSES.joinpath(str(pid)).exists() for pid in held):
                return int(own)  # without the memory of other programs
        except Exception:  # no GPU, or no answer: this is a note and must never stop a run
            return 0
        return self._used_by_all()

    def _used_by_all(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except Exception:
            return 0

    def wait_for_release(self) -> None:
        """Return once the GPU's used memory has stopped falling."""
        end, before = time.monotonic() + RELEASE_SECONDS, self._used_by_all()
        while before and time.monotonic() < end:
            time.sleep(4 * EVERY)
            now = self._used_by_all()
            if now >= before:
                return
            before = now


def _parent(pid: int) -> int:
    """The process that started a process; 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        stat = PROCESSES.joinpath(str(pid), "stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rsplit(")", 1)[1].split()[1])
    return 0


class Peak:
    """The peak GPU memory during a block.

    Args:
        gpu: The GPU.
        pids: Gives the processes that count.
    """

    def __init__(self, gpu: Gpu, pids: Callable[[], Iterable[int]]) -> None:
        self.bytes = 0
        self._gpu, self._pids = gpu, pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._look()
        if self._gpu.there:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._gpu.used(self._pids()))
