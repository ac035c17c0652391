"""Models on the Hugging Face hub, pinned to a commit: `owner/name@commit` names the same files today and next year."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

from iterft_lite.cache import cache_folder
from iterft_lite.digests import file_digest
from iterft_lite.errors import FileError, FolderError, ModelError, StoreError
from iterft_lite.files import file_mark, open_regular, read_errors, read_object, write_json

NAME = re.compile(r"(?P<name>(?![.~])[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?")
"""A model on the hub: owner, name and optionally a branch, tag or commit."""

COMMIT = re.compile(r"[0-9a-f]{40}")

DIGEST = re.compile(r"[0-9a-f]{64}")

SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
"""A model's folder in the hub's cache, which keeps the files of a commit in `snapshots/COMMIT`."""

MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.py")
"""Files of a model's folder that decide its weights, its tokenizer or its GGUF file."""

LEFT_OUT = ("original/*", "onnx/*", "consolidated*")
"""Copies of the same weights in other formats."""

PATIENCE = 10.0
"""Longest wait for the hub to say which commit a name means, seconds."""

FRESH = 60.0
"""Seconds that its answer is taken for."""


def is_name(text: str) -> bool:
    """Whether a text can be a model on the hub, and not a path."""
    return NAME.fullmatch(text) is not None


def is_pinned(text: str) -> bool:
    """Whether a name on the hub names a commit, not a branch or tag that can move."""
    return is_name(text) and COMMIT.fullmatch(_parts(text)[1] or "") is not None


def pin(text: str) -> str:
    """A name on the hub with its commit: the one in this machine's cache, else the one that the hub names.

    The cache comes first: so a plan needs no network, and a run continues with the files that it began with.

    Raises:
        ModelError: If neither knows it.
    """
    if is_pinned(text):
        return text
    name, revision = _parts(text)
    cached = cached_file(text, "config.json")
    if cached is not None:
        return f"{name}@{cached.parent.name}"
    found = _asked(name, revision, int(time.monotonic() / FRESH))
    if isinstance(found, Exception):
        raise _unreachable(text, found) from found
    return f"{name}@{found}"


@functools.lru_cache(maxsize=16)
def _asked(name: str, revision: str | None, _: int) -> str | Exception | None:
    """The commit that the hub names for a revision, or why it names none. The cells of a study all ask for the same model."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=PATIENCE).sha
    except Exception as error:  # its errors have no common class: no network, no such model, no right to read it
        return error


def cached_file(text: str, file: str) -> Path | None:
    """A file of a model on the hub in this machine's cache; None if the cache lacks it."""
    if not is_name(text):
        return None
    import huggingface_hub

    name, revision = _parts(text)
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(text: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model on the hub. Fetches missing files; without a network it takes the files that are in the cache.

    Args:
        files: Patterns of the files; PyTorch's weights are fetched only if there are none in safetensors.

    Raises:
        ModelError: If it cannot be had.
    """
    folder = _snapshot(text, [pattern for pattern in files if pattern != "*.bin"])
    if "*.bin" in files and not any(folder.glob("*.safetensors")):
        folder = _snapshot(text, list(files))
    return folder


def folder_of(model: str) -> str:
    """The place that a model is loaded from: for a name on the hub the folder of its files, else the place as given."""
    return model if Path(model).is_dir() or not is_name(model) else str(fetch(model))


def example_folder(name: str) -> Path | None:
    """The folder of an example model that `iterft models get` has made, or None."""
    folder = cache_folder() / "models" / name
    return folder if "/" not in name and (folder / "config.json").is_file() else None


def title(model: str) -> str:
    """A model's name for people: a commit is shortened, a folder becomes its last part or its name on the hub."""
    if is_pinned(model):
        return model[: model.index("@") + 9]
    return name_of(Path(model)) if Path(model).is_absolute() else model


def name_of(folder: Path) -> str:
    """A folder's name: in the hub's cache the model's name, else the last part."""
    found = SNAPSHOT.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return f"{found['owner']}/{found['name']}" if found else folder.name


def _parts(text: str) -> tuple[str, str | None]:
    found = NAME.fullmatch(text)
    assert found is not None, "a name on the hub"
    return found["name"], found["revision"]


def _snapshot(text: str, files: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # they would be drawn over the live view
    name, revision = _parts(text)

    def snapshot(*, cached: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=list(LEFT_OUT), local_files_only=cached
            )
        )

    try:
        return snapshot(cached=False)
    except Exception as error:  # see `pin`
        try:
            return snapshot(cached=True)
        except Exception:  # report the first reason
            raise _unreachable(text, error) from error


def _unreachable(text: str, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return ModelError(
        f"`{text}` could not be fetched from the hub: {type(error).__name__}: {reason}",
        hint="check the name and the network, or give a local folder; gated models need `HF_TOKEN`; "
        "HF_HUB_OFFLINE=1 finds only downloaded models",
    )


def content_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files: the identity of a model folder.

    Reads each file once and notes its digest: a file with the same place, size and times is taken to be unchanged (hashing 8 GB
    takes some seconds).

    Raises:
        FileError: If one cannot be read.
    """
    kept = cache_folder() / "files.json"
    known, learned, whole = _known_digests(kept), {}, hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        with read_errors(path):
            open_regular(path).close()  # raises for a named pipe, which would block
            mark = file_mark(path)
            found = known.get(mark) or file_digest(path)
        if mark not in known:
            learned[mark] = found
        whole.update(f"{path.name} {found}\n".encode())
    if learned:
        # these notes only save time: whoever must write to the cache reports that it cannot be written
        with contextlib.suppress(FolderError, StoreError):
            write_json(kept, {**known, **learned})
    return whole.hexdigest()


def _known_digests(path: Path) -> dict[str, str]:
    """Digests of files seen before, by mark; empty if the notes cannot be read."""
    try:
        found = read_object(path)
    except (OSError, FileError):
        return {}
    return {mark: digest for mark, digest in found.items() if isinstance(digest, str) and DIGEST.fullmatch(digest)}
