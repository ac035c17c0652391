"""llama.cpp's conversion scripts: they are in the source package of llama-cpp-python, not in what it installs.

Looked for in this order: the folder that `ITERFT_LLAMA_CPP` names, `share/iterft_lite/llama.cpp` of the Python installation
(where the set-up puts it), the user's cache; then fetched into the cache with pip, for exactly the version installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from iterft_lite.cache import cache_folder
from iterft_lite.errors import ExportError, NotFetched
from iterft_lite.programs import run_command

PACKAGE = "llama-cpp-python"
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
WANTED = (*SCRIPTS, "LICENSE", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")
"""Parts of `vendor/llama.cpp` in the source package that are kept: 3 of 300 MB."""
HINT = (
    "download the source package of llama-cpp-python where there is a network (`pip download --no-deps --no-binary :all: "
    "llama-cpp-python=={version}`), unpack it, and set ITERFT_LLAMA_CPP to its `vendor/llama.cpp`"
)


def find_source() -> Path | None:
    """The folder of llama.cpp's scripts on this machine, or None.

    Raises:
        ExportError: If `ITERFT_LLAMA_CPP` is set and names no such folder.
    """
    given = os.environ.get("ITERFT_LLAMA_CPP")
    if given:
        if not _whole(Path(given)):
            raise ExportError(f"`ITERFT_LLAMA_CPP={given}` has no {SCRIPTS[0]} with its `conversion` and `gguf-py` folders")
        return Path(given)
    places = (Path(sys.prefix) / "share/iterft_lite/llama.cpp", _cached())
    return next((place for place in places if _whole(place)), None)


def llamacpp_source() -> Path:
    """The folder of llama.cpp's scripts. Fetches it once if it is missing (76 MB).

    Raises:
        NotFetched, ExportError: If it is not there and cannot be fetched.
    """
    return find_source() or fetch_source()


def fetch_source(folder: Path | None = None, *, more: tuple[str, ...] = ()) -> Path:
    """Download the source package with pip and keep its conversion scripts.

    Args:
        folder: Where they are kept; by default in the user's cache.
        more: What else of `vendor/llama.cpp` is kept: beginnings of paths.

    Raises:
        NotFetched: If there is no network, or no such package.
        ExportError: If there is no pip.
    """
    hint = HINT.format(version=_version())
    with tempfile.TemporaryDirectory(prefix="iterft_") as temporary:
        command = [*pip_command(hint), "download", "--no-deps", "--no-binary", ":all:", "--disable-pip-version-check"]
        done = run_command([*command, "--dest", temporary, f"{PACKAGE}=={_version()}"])
        packages = list(Path(temporary).glob("*.tar.gz"))
        # pip runs the package's build system to read its metadata; if that fails, the downloaded file is still there
        if not packages:
            end = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-5:])
            raise NotFetched(f"llama.cpp's conversion scripts could not be fetched; pip says:\n{end}", hint=hint)
        return unpack_source(packages[0], folder or _cached(), more=more)


def unpack_source(package: Path, folder: Path, *, more: tuple[str, ...] = ()) -> Path:
    """Take llama.cpp's conversion scripts, and more of it, out of a source package of llama-cpp-python; gives `folder`.

    Raises:
        ExportError: If they are not in it.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(package) as archive:
            archive.extractall(partial, members=_members(archive, (*WANTED, *more)), filter="data")
        if not _whole(partial):
            raise ExportError(f"`{package}` does not carry llama.cpp's {SCRIPTS[0]}", hint=HINT.format(version=_version()))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ExportError(f"`{package}` is no whole package: {error}", hint=HINT.format(version=_version())) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _members(archive: tarfile.TarFile, wanted: tuple[str, ...]) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        _, found, inner = member.name.partition("/vendor/llama.cpp/")
        if found and member.isfile() and inner.startswith(wanted):
            yield member.replace(name=inner)


def _whole(folder: Path) -> bool:
    return all((folder / name).exists() for name in (*SCRIPTS, "conversion", "gguf-py/gguf"))


def _cached() -> Path:
    return cache_folder() / f"llama.cpp-{_version()}"


def _version() -> str:
    return importlib.metadata.version(PACKAGE)


def pip_command(hint: str) -> list[str]:
    """A command that runs pip: this Python's own, or one on the path (environments made by uv have none).

    Raises:
        ExportError: If there is none, with `hint`.
    """
    own = [sys.executable, "-P", "-m", "pip"]
    if run_command([*own, "--version"]).returncode == 0:
        return own
    other = shutil.which("pip3") or shutil.which("pip")
    if other is None:
        raise ExportError("what is needed is not here, and there is no pip to fetch it with", hint=hint)
    return [other]
