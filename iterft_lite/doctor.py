"""What this machine can do, and what to install."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.backends.judges import KEY_VARIABLES
from iterft_lite.resolve import this_machine
from iterft_lite.versions import versions

GOOD, LACKING = "ok", "--"

PROBES = {
    "torch": "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available()]))",
    "llama_cpp": "import json, llama_cpp as l; print(json.dumps([l.__version__, bool(l.llama_supports_gpu_offload())]))",
}
"""What is asked of a library in a process of its own: its version, and whether it can use a GPU."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    mark: str
    name: str
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything a run may need. Starts two short processes; sends nothing anywhere."""
    return [*_gpu_and_libraries(), *_packages(), *_judges(), *_disk()]


def _gpu_and_libraries() -> Iterator[Finding]:
    machine = this_machine()
    memory = f"{machine.vram_free / 2**30:.1f} of {machine.vram_total / 2**30:.1f} GiB VRAM free"
    has_gpu = bool(machine.gpu)
    yield Finding(
        GOOD if has_gpu else LACKING,
        "GPU",
        f"{machine.gpu}, {memory}" if has_gpu else "no NVIDIA GPU seen: nano models run well, larger ones slowly",
        "" if has_gpu or shutil.which("nvidia-smi") is None else "nvidia-smi is there: install `nvidia-ml-py`",
    )
    yield Finding(GOOD, "CPU", f"{os.cpu_count()} cores")
    for name, remedy in (
        ("torch", "this torch is a CPU build: install the CUDA build of the same version from PyTorch's own index"),
        (
            "llama_cpp",
            'built without CUDA: CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir --no-deps '
            "llama-cpp-python==0.3.36",
        ),
    ):
        answer = _probe(name)
        if answer is None:
            yield Finding(LACKING, name, "cannot be imported", f"pip install {name.replace('llama_cpp', 'llama-cpp-python')}")
        else:
            version, on_gpu = answer
            yield Finding(
                GOOD, name, f"{version}, {'uses the GPU' if on_gpu else 'CPU only'}", remedy if has_gpu and not on_gpu else ""
            )


def _probe(name: str) -> tuple[str, bool] | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        done = subprocess.run([sys.executable, "-c", PROBES[name]], capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    version, on_gpu = json.loads(lines[-1])
    return str(version), bool(on_gpu)


def _packages() -> Iterator[Finding]:
    found = versions()
    for name in ("transformers", "trl", "peft", "litellm"):
        yield Finding(GOOD if name in found else LACKING, name, found.get(name, "not installed"))
    missing = [name for name in ("unsloth", "bitsandbytes") if name not in found]
    wanted = bool(this_machine().gpu) and missing
    text = ", ".join(f"{name} {found[name]}" for name in ("unsloth", "bitsandbytes") if name in found) or "not installed"
    yield Finding(LACKING if missing else GOOD, "QLoRA", text, "pip install 'iterft_lite[gpu]'" if wanted else "")


def _judges() -> Iterator[Finding]:
    for provider, variable in KEY_VARIABLES.items():
        there = bool(os.environ.get(variable))
        yield Finding(GOOD if there else LACKING, f"{provider} key", f"{variable} is {'set' if there else 'not set'}")
    yield Finding(GOOD, "embedded judge", "always there; for trying out, not for findings")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(GOOD if free > 20e9 else LACKING, "disk", f"{free / 1e9:.0f} GB free here")
