"""Whose GPU memory is whose, by a driver that is a stand-in."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iterft_lite.app.session import open_run
from iterft_lite.backends.processes.child import Child
from iterft_lite.hardware import Gpu, Peak, gpu_handle

OTHERS = 4_000_000_000
"""A number that no process has."""


def a_gpu(held: dict[int, int], used: int) -> Gpu:
    def running(_: Any) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items()]

    gpu = Gpu()
    gpu._handle = None
    gpu._nvml = SimpleNamespace(
        nvmlDeviceGetComputeRunningProcesses=running, nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=used)
    )
    return gpu


@pytest.mark.parametrize(
    ("held", "pids", "expected"),
    [
        ({os.getpid(): 7, os.getppid(): 20}, [os.getpid()], 7),
        ({os.getpid(): 7, os.getppid(): 20}, [os.getppid()], 27),  # a process's child is its own
        ({os.getppid(): 20}, [os.getpid()], 0),  # seen, and not ours: a screen, another program
        ({OTHERS: 7}, [os.getpid()], 30),  # the numbers of another system: a container hides who holds what
        ({}, [os.getpid()], 30),
    ],
)
def test_only_our_own_processes_memory_counts_where_it_is_known(held: dict[int, int], pids: list[int], expected: int) -> None:
    assert a_gpu(held, 30).used(pids) == expected


def test_a_peak_includes_memory_taken_after_the_first_reading() -> None:
    held: dict[int, int] = {os.getppid(): 20}
    with Peak(a_gpu(held, 30), lambda: [os.getpid()]) as peak:
        held[os.getpid()] = 9
    assert peak.bytes == 9


def test_without_a_gpu_no_memory_is_used() -> None:
    gpu = Gpu()
    gpu._nvml = None
    assert not gpu.there
    assert gpu.used([os.getpid()]) == 0
    gpu.wait_for_release()


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        *((None, 0), ("1", 1), ("1,0", 1), ("GPU-beef", 1), ("GPU-", 0), ("MIG-7", "MIG-7")),
        *(("", None), ("-1", None), ("GPU-no", None)),
    ],
)
def test_memory_is_read_from_the_first_gpu_visible_to_cuda(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, found: int | str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUUID=lambda handle: ("GPU-cafe-1", "GPU-beef-2")[handle],
    )
    if found is None:
        with pytest.raises(LookupError):
            gpu_handle(nvml)
    else:
        assert gpu_handle(nvml) == found


@pytest.mark.parametrize("swap", [False, True])
def test_where_trainer_and_generator_take_turns_the_exporter_leaves_the_gpu_alone(tmp_path: Path, swap: bool) -> None:
    (tmp_path / "small.toml").write_text(
        'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\ntrainer = "peft"\nquant = "q8_0"\njudge = "fake"\n'
    )
    with open_run(tmp_path / "small.toml", [], tmp_path / "run") as opened:
        backends = replace(opened, swap=swap)._backends()
        exporter = backends.processes["exporter"]
        assert isinstance(exporter, Child)
        variables = exporter._environment
    assert variables.get("CUDA_VISIBLE_DEVICES") == ("" if swap else None)
