"""`scripts/setup.sh` on other systems: what it would install there, with stand-ins for the system's commands."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *" wheel "*) for last; do :; done; while [ "$1" != --wheel-dir ]; do shift; done; touch "$2/llama_cpp_python-1-any.whl" ;;
  *"config get"* | *dry-run*) exit 1 ;;
  "- "*) echo click ;;
esac
"""
"""In place of the environment's Python: notes what it is called with, and "builds" a wheel."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with an environment in which nothing happens."""
    for folder in ("scripts", ".venv/bin", "stubs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "scripts/setup.sh").write_bytes((ROOT / "scripts/setup.sh").read_bytes())
    (tmp_path / "pyproject.toml").touch()
    _command(tmp_path / ".venv/bin/python", PYTHON)
    for name in ("cmake", "c++", "g++"):
        _command(tmp_path / "stubs" / name, "#!/bin/bash\n")
    return tmp_path


def _command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def set_up(clone: Path, system: str, processor: str) -> subprocess.CompletedProcess[str]:
    """Run the script as if on another system."""
    _command(clone / "stubs/uname", f'#!/bin/bash\nif [ "$1" = -m ]; then echo {processor}; else echo {system}; fi\n')
    _command(clone / "stubs/sysctl", "#!/bin/bash\necho 8\n")
    path = f"{clone / 'stubs'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(
        ["bash", "scripts/setup.sh"],
        cwd=clone,
        env={"PATH": path, "HOME": str(clone / "home"), "CALLS": str(clone / "calls"), "ITERFT_UV": "no"},
        capture_output=True,
        text=True,
    )


def test_a_mac_gets_plain_torch_and_its_own_wheel_cache(clone: Path) -> None:
    done = set_up(clone, "Darwin", "arm64")
    assert done.returncode == 0, done.stderr
    calls = (clone / "calls").read_text()
    assert "+cpu" not in calls
    assert "download.pytorch.org" not in calls
    assert len(list((clone / "home/Library/Caches/iterft_lite/wheels").glob("*/llama_cpp_python-1-any.whl"))) == 1
    assert (clone / ".venv/.ready").exists()


def test_linux_without_a_gpu_gets_a_cpu_build_of_torch(clone: Path) -> None:
    done = set_up(clone, "Linux", "x86_64")
    assert done.returncode == 0, done.stderr
    assert "torch==2.13.0+cpu --extra-index-url" in (clone / "calls").read_text()


@pytest.mark.parametrize(
    ("system", "processor", "way_out"),
    [
        ("Darwin", "x86_64", "a Mac with Apple silicon is needed"),
        ("MINGW64_NT-10.0", "x86_64", "in WSL2 (wsl --install) this script works as on Linux"),
    ],
)
def test_an_unsupported_system_is_refused_with_an_alternative(clone: Path, system: str, processor: str, way_out: str) -> None:
    done = set_up(clone, system, processor)
    assert done.returncode == 1
    assert way_out in done.stderr
    assert not (clone / "calls").exists()


def test_an_old_python_is_refused_with_two_alternatives(clone: Path) -> None:
    (clone / ".venv/bin/python").unlink()
    old = '#!/bin/bash\ncase "$2" in *version_info*) exit 1 ;; *) echo 3.10.12 ;; esac\n'
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        _command(clone / "stubs" / name, old)
    done = set_up(clone, "Linux", "x86_64")
    assert done.returncode == 1
    for words in ("Python 3.11 or newer is needed, found: 3.10.12", "astral.sh/uv", "apt install python3.11 python3.11-venv"):
        assert words in done.stderr


def test_every_place_names_the_same_versions() -> None:
    def named(pattern: str, *files: str) -> set[str]:
        return {version for name in files for version in re.findall(pattern, (ROOT / name).read_text())}

    built = ("pyproject.toml", "iterft_lite/app/doctor.py")
    assert len(named(r"llama-cpp-python==([\d.]+)", *built) | named(r"(?m)^llama=([\d.]+)", "scripts/setup.sh")) == 1
    assert len(named(r"torch==([\d.]+)\+cpu", "docker/cpu.Dockerfile") | named(r"(?m)^torch=([\d.]+)", "scripts/setup.sh")) == 1
