"""What is exported computes what was trained: llama.cpp's logits of exported files, transformers' of the merged model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterft_lite
from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.digests import digest_by_pieces
from iterft_lite.errors import ExportError
from iterft_lite.gguf import base as bases
from iterft_lite.gguf import merge
from iterft_lite.gguf.arithmetic import F32
from iterft_lite.gguf.base import run_llamacpp_script
from iterft_lite.gguf.file import Array, GgufFile
from iterft_lite.gguf.llamacpp_source import llamacpp_source
from iterft_lite.gguf.merge import run_quantiser
from iterft_lite.protocols import Exported, Progress
from tests.converter_server import Server
from tests.tiny_models import ARCHITECTURES, TEXTS, tiny_adapter, tiny_model

pytestmark = pytest.mark.slow

# measured 0.9e-5, 1.6e-5, 1.4e-5, 2.2e-3; ggml takes Gemma's GELU on a CPU from a table in f16, whatever the file's format
LOGITS = {"qwen3": 1e-4, "qwen2": 1e-4, "llama": 1e-4, "gemma3": 1e-2}


@dataclass(frozen=True)
class Trained:
    """A tiny model, an adapter, the two merged by peft, and the merged model's logits."""

    architecture: str
    model: Path
    adapter: Path
    merged: Path
    tokens: list[int]
    logits: Array


@pytest.fixture(scope="module")
def source() -> Path:
    try:
        return llamacpp_source()
    except ExportError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, source: Path) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    layers = 6 if request.param == "gemma3" else 2  # every sixth of Gemma-3's layers sees the whole context
    model = tiny_model(folder / "model", request.param, layers=layers)
    adapter = tiny_adapter(model, folder / "lora")
    return merge_with_peft(request.param, model, adapter, folder / "merged")


def merge_with_peft(architecture: str, model: Path, adapter: Path, folder: Path) -> Trained:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = tokenizer.encode(TEXTS[1] + TEXTS[4])
    with torch.no_grad():
        logits = merged(torch.tensor([tokens])).logits[0].numpy()
    return Trained(architecture, model, adapter, folder, tokens, logits)


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[GgufExporter]:
    converter = Server()  # llama.cpp's converter takes five seconds to start, and is asked a dozen times
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERFT_LLAMA_CPP", str(source))
        patch.setenv("ITERFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(bases, "run_module", converter.run)
        yield GgufExporter(threads=2)
    converter.close()


def export(exporter: GgufExporter, trained: Trained, folder: Path, kind: str, quant: str) -> Exported:
    return exporter.export(str(trained.model), trained.adapter, folder, kind, quant, ignore)


def ignore(_: Progress) -> None:
    pass


def gguf_logits(path: Path, tokens: list[int], folder: Path, lora: Path | None = None) -> Array:
    """llama.cpp's logits."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "logits.npy"
    READER.read({"model": str(path), "tokens": tokens, "out": str(out), "lora": str(lora) if lora else None})
    return np.load(out)


class Reader:
    """llama.cpp in a process of its own, which imports it first; the same one for all files, since importing takes longest."""

    _process: subprocess.Popen[str] | None = None

    def read(self, asked: dict[str, Any]) -> None:
        """Have logits written (see `gguf_logits.py`)."""
        if self._process is None:
            script = Path(__file__).with_name("gguf_logits.py")
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # until it is closed
            self._process = subprocess.Popen([sys.executable, str(script)], text=True, stderr=self._said, **pipes)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n":
            self.close()
            self._said.seek(0)
            pytest.fail(self._said.read()[-2000:])

    def close(self) -> None:
        """End it; it starts again when it is asked again."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


READER = Reader()


@pytest.fixture(scope="module", autouse=True)
def _reader_ends() -> Iterator[None]:
    yield
    READER.close()


def mean_kl(expected: Array, found: Array) -> float:
    """Mean over positions of KL(expected || found), nats."""

    def log_softmax(logits: Array) -> Array:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def max_delta(expected: Array, found: Array) -> float:
    return float(np.abs(expected - found).max())


def test_a_merged_f32_file_computes_the_merged_models_logits(exporter: GgufExporter, trained: Trained, tmp_path: Path) -> None:
    exported = export(exporter, trained, tmp_path, "merged", "f32")
    delta = max_delta(trained.logits, gguf_logits(exported.path, trained.tokens, tmp_path))
    assert delta <= LOGITS[trained.architecture]
    assert trained.logits.std() > 0.5  # the bound says something


def test_an_adapter_over_the_base_computes_the_merged_models_logits(
    exporter: GgufExporter, trained: Trained, tmp_path: Path
) -> None:
    exported = export(exporter, trained, tmp_path, "adapter", "f32")
    laid_over = gguf_logits(exported.path, trained.tokens, tmp_path, exported.adapter)
    merged = export(exporter, trained, tmp_path, "merged", "f32")
    delta = max_delta(gguf_logits(merged.path, trained.tokens, tmp_path), laid_over)
    assert delta <= LOGITS[trained.architecture]


def test_merging_in_gguf_equals_llamacpps_conversion_of_the_merged_model(
    exporter: GgufExporter, trained: Trained, tmp_path: Path, source: Path
) -> None:
    theirs = tmp_path / "theirs.gguf"
    arguments = [str(trained.merged), "--outtype", "f32", "--outfile", str(theirs)]
    run_llamacpp_script(source, "convert_hf_to_gguf.py", trained.merged, arguments)
    ours = export(exporter, trained, tmp_path, "merged", "f32").path
    deltas = tensor_deltas(GgufFile(theirs), GgufFile(ours))
    assert max(deltas.values()) <= 1e-6
    delta = max_delta(gguf_logits(theirs, trained.tokens, tmp_path), gguf_logits(ours, trained.tokens, tmp_path))
    assert delta <= 1e-5


def tensor_deltas(one: GgufFile, other: GgufFile) -> dict[str, float]:
    assert set(one.tensors) == set(other.tensors)
    deltas = {}
    for name, tensor in one.tensors.items():
        assert tensor.kind == other.tensors[name].kind == F32
        assert tensor.shape == other.tensors[name].shape
        pair = [file.rows(file.tensors[name]).view(np.float32) for file in (one, other)]
        deltas[name] = max_delta(*pair)
    return deltas


# nats; the largest of the four architectures measured 2.0e-6, 1.2e-4, 1.4e-3, 0.010, 0.035 and 0.116
KL = {"f16": 1e-4, "bf16": 1e-3, "q8_0": 1e-2, "q6_k": 0.05, "q5_k_m": 0.1, "q4_k_m": 0.3}


@pytest.mark.parametrize("quant", KL)
def test_each_number_format_stays_within_its_error_bound(
    exporter: GgufExporter, trained: Trained, tmp_path: Path, quant: str
) -> None:
    exported = export(exporter, trained, tmp_path, "merged", quant)
    found = gguf_logits(exported.path, trained.tokens, tmp_path)
    kl = mean_kl(trained.logits, found)
    assert kl <= KL[quant]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("quant", ["q4_k_m", "q6_k"])
def test_a_k_quant_equals_llamacpps_of_the_merged_model(
    exporter: GgufExporter, trained: Trained, tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def quantiser(source: Path, *arguments: Any) -> None:
        asked.append(source)
        run_quantiser(source, *arguments)

    monkeypatch.setattr(merge, "run_quantiser", quantiser)
    monkeypatch.setattr(merge, "cache_folder", lambda: tmp_path / "cache")
    merged = export(exporter, trained, tmp_path, "merged", "f32").path.rename(tmp_path / "f32.gguf")
    run_quantiser(merged, tmp_path / "theirs.gguf", merge.K_QUANTS[quant][0], 2)
    for _ in range(2):
        exported = export(exporter, trained, tmp_path / "a folder that is new", "merged", quant)
        ours, theirs = GgufFile(exported.path), GgufFile(tmp_path / "theirs.gguf")
        assert {name: tensor.kind for name, tensor in ours.tensors.items()} == {
            name: tensor.kind for name, tensor in theirs.tensors.items()
        }
        for name, tensor in ours.tensors.items():
            np.testing.assert_array_equal(ours.rows(tensor), theirs.rows(theirs.tensors[name]), name)
        assert {key: ours.value(key) for key in ours.keys} == {key: theirs.value(key) for key in ours.keys}
        assert exported.digest == digest_by_pieces(exported.path)
    assert any(tensor.kind.name.endswith("_K") for tensor in ours.tensors.values())
    assert len(asked) == 1  # the base, once: its layout is known afterwards


def test_our_lora_file_equals_llamacpps_conversion(
    exporter: GgufExporter, trained: Trained, tmp_path: Path, source: Path
) -> None:
    if trained.architecture in ("qwen2", "gemma3"):
        pytest.skip("two say it: Llama's rows change places, Qwen3's do not")
    theirs = tmp_path / "theirs.gguf"
    arguments = ["--base", str(trained.model), "--outtype", "f32", "--outfile", str(theirs), str(trained.adapter)]
    run_llamacpp_script(source, "convert_lora_to_gguf.py", trained.model, arguments)
    ours = export(exporter, trained, tmp_path, "adapter", "f32").adapter
    assert ours is not None
    assert max(tensor_deltas(GgufFile(theirs), GgufFile(ours)).values()) == 0.0
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert GgufFile(ours).value(key) == GgufFile(theirs).value(key)


def test_a_direct_qwen3_base_equals_llamacpps_conversion(tmp_path: Path, source: Path, exporter: GgufExporter) -> None:
    for dtype, kind in (("float32", "f32"), ("bfloat16", "bf16")):
        model = tiny_model(tmp_path / dtype, "qwen3", dtype=dtype)
        theirs = tmp_path / f"{dtype}.gguf"
        run_llamacpp_script(source, "convert_hf_to_gguf.py", model, [str(model), "--outtype", kind, "--outfile", str(theirs)])
        one, other = GgufFile(exporter.export(str(model), None, tmp_path / kind, "merged", kind, ignore).path), GgufFile(theirs)
        assert {name: (t.shape, t.kind) for name, t in one.tensors.items()} == {
            name: (t.shape, t.kind) for name, t in other.tensors.items()
        }
        for name, tensor in one.tensors.items():
            np.testing.assert_array_equal(one.rows(tensor), other.rows(other.tensors[name]))
        ours_only = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id"}
        names = {"general.name", "general.size_label"}
        assert set(one.keys) - ours_only - names == set(other.keys) - ours_only - names
        for key in set(one.keys) - ours_only - names:
            assert one.value(key) == other.value(key), key


def test_rank_stabilised_adapters_have_the_same_scale_in_both_exports(
    exporter: GgufExporter, tmp_path: Path, source: Path
) -> None:
    model = tiny_model(tmp_path / "model")
    adapter = tiny_adapter(model, tmp_path / "lora", use_rslora=True, alpha_pattern={"q_proj": 3.0}, rank_pattern={"o_proj": 2})
    trained = merge_with_peft("qwen3", model, adapter, tmp_path / "merged")
    merged = export(exporter, trained, tmp_path / "out", "merged", "f32")
    beside = export(exporter, trained, tmp_path / "out", "adapter", "f32")
    assert max_delta(trained.logits, gguf_logits(merged.path, trained.tokens, tmp_path)) <= 1e-4
    assert max_delta(trained.logits, gguf_logits(beside.path, trained.tokens, tmp_path, beside.adapter)) <= 1e-4


@pytest.mark.parametrize("name", ["chat", "base"])
def test_the_nano_models_are_exported_within_the_error_bounds(exporter: GgufExporter, tmp_path: Path, name: str) -> None:
    model = Path(iterft_lite.__file__).parent / "data" / "nano" / name
    adapter = tiny_adapter(model, tmp_path / "lora", rank=16, alpha=32.0)
    trained = merge_with_peft("qwen3", model, adapter, tmp_path / "merged")
    logits = {
        quant: gguf_logits(export(exporter, trained, tmp_path / quant, "merged", quant).path, trained.tokens, tmp_path)
        for quant in ("f32", "q8_0")
    }
    assert max_delta(trained.logits, logits["f32"]) <= 1e-4
    assert mean_kl(trained.logits, logits["q8_0"]) <= 0.01
