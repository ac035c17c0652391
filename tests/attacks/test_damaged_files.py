"""Files that were changed where no reader looks: noticed, and made anew or refused."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from iterft_lite.backends.tokenizer_files import make_tokenizer, read_tokenizer_files
from iterft_lite.data.nano import FOLDERS
from iterft_lite.errors import ExportError, IterftError
from iterft_lite.gguf.base import base_gguf
from iterft_lite.gguf.families import architecture_of, read_config
from iterft_lite.gguf.file import GgufFile
from iterft_lite.gguf.tokenizer import cuts_like_qwen2, ignores_merges, piece_tokenizer, vocabulary
from iterft_lite.hub import content_digest
from iterft_lite.machine.resolve import model_identity


def flip(path: Path, at: int, count: int) -> None:
    """Change bytes in the middle of a file; its size and times stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        found = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0x55 for byte in found))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_any_changed_byte_changes_a_models_identity(tmp_path: Path, cache: Path) -> None:
    model = shutil.copytree(FOLDERS["nano"], tmp_path / "model")
    before = model_identity(str(model))
    assert before == model_identity(str(FOLDERS["nano"]))
    weights = model / "model.safetensors"
    flip(weights, weights.stat().st_size // 2, 6)
    assert model_identity(str(model)) != before


@pytest.mark.parametrize("content", ["", "[]", '{"a": 7}', "{"])
def test_a_damaged_digest_cache_is_rebuilt(tmp_path: Path, cache: Path, content: str) -> None:
    before = content_digest(FOLDERS["nano"])
    (cache / "files.json").write_text(content)
    assert content_digest(FOLDERS["nano"]) == before


def test_a_changed_cached_base_is_noticed_and_rebuilt(cache: Path) -> None:
    base = base_gguf(str(FOLDERS["nano"]))
    whole = base.path.read_bytes()
    flip(base.path, len(whole) // 2, 6)
    assert base.path.read_bytes() != whole
    assert base_gguf(str(FOLDERS["nano"])).path.read_bytes() == whole


def test_a_gguf_that_is_a_pipe_a_folder_or_empty_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "empty.gguf").touch()
    for name in ("pipe", "folder", "empty"):
        with pytest.raises(ExportError, match="is not a whole GGUF file"):
            GgufFile(tmp_path / f"{name}.gguf")


# -- files of a model folder


SHAPES = {
    "tokenizer.json": ["{}", "[]", '{"model": 7}', '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence"}}'],
    "config.json": ["[]", '{"architectures": 7}', '{"architectures": [7], "text_config": [1]}'],
    "tokenizer_config.json": ['{"eos_token": {}}', '{"chat_template": [7]}', "{"],
    "generation_config.json": ['{"eos_token_id": {}, "text_config": 3}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, some in SHAPES.items() for each in some])
def test_a_model_file_with_wrong_fields_is_read_or_refused(tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(FOLDERS["nano"], tmp_path / "model")
    (folder / name).write_text(content)
    read_every_way(folder)


@pytest.mark.parametrize("name", [*SHAPES, "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "device"])
def test_a_special_file_in_place_of_a_model_file_does_not_block(tmp_path: Path, name: str, kind: str) -> None:
    folder = shutil.copytree(FOLDERS["nano"], tmp_path / "model")
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    read_every_way(folder)


def read_every_way(folder: Path) -> None:
    """Read a model folder in each of the ways in which it is; errors of ours are answers."""
    if (folder / "tokenizer.json").is_file():  # else transformers is started to convert an older one
        with contextlib.suppress(IterftError):
            make_tokenizer(read_tokenizer_files(str(folder)))
    for read in (
        lambda: architecture_of(read_config(folder)),
        lambda: cuts_like_qwen2(folder),
        lambda: ignores_merges(folder),
        lambda: piece_tokenizer(folder),
        lambda: vocabulary(folder, 2048),
    ):
        with contextlib.suppress(IterftError):
            read()
