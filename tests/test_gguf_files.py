"""GGUF files: what is written, what is refused, what is left behind when there is no room."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from iterft_lite.backends.processes.child import Child
from iterft_lite.digests import LEAST_PIECE, digest_by_pieces
from iterft_lite.errors import ExportError, FolderError, ModelError, NoRoom, ResultError, StoreError
from iterft_lite.gguf import arithmetic, llamacpp_source
from iterft_lite.gguf import file as gguf_file
from iterft_lite.gguf.adapter import read_adapter, write_lora
from iterft_lite.gguf.arithmetic import BF16, F16, F32, Q8_0, NumpyArithmetic, TorchArithmetic, choose_arithmetic
from iterft_lite.gguf.base import Base, base_gguf, refuse_vocabulary
from iterft_lite.gguf.file import Array, Checksum, GgufFile
from iterft_lite.gguf.merge import planned, write_merged
from iterft_lite.gguf.modelfile import write_modelfile
from iterft_lite.gguf.tokenizer import cuts_like_qwen2
from iterft_lite.hardware import MERGING
from iterft_lite.protocols import Exporter
from tests.tiny_models import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", "qwen3", dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(model, tmp_path_factory.mktemp("tiny") / "lora")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ITERFT_LLAMA_CPP", raising=False)
    return tmp_path / "cache"


def merged(base: Base, adapter: Path | None, path: Path, quant: str) -> GgufFile:
    write_merged(base.file, None if adapter is None else read_adapter(adapter, base), path, quant)
    return GgufFile(path)


def matrix(file: GgufFile, name: str) -> Array:
    tensor = file.tensors[name]
    return np.asarray(dequantize(np.ascontiguousarray(file.rows(tensor)), tensor.kind))


# -- what is written --------------------------------------------------------------------------------------------------


def test_a_base_file_holds_the_models_exact_weights(model: Path) -> None:
    base = base_gguf(str(model))
    config = json.loads((model / "config.json").read_text())
    assert base.file.architecture == "qwen3"
    assert base.file.value("general.file_type") == LlamaFileType.MOSTLY_BF16
    assert base.file.value("tokenizer.ggml.pre") == "qwen2"
    assert base.file.value("tokenizer.ggml.add_bos_token") is False
    assert base.file.value("tokenizer.ggml.eos_token_id") == config["eos_token_id"]
    assert base.file.value("tokenizer.ggml.padding_token_id") == config["pad_token_id"]
    assert base.file.value("tokenizer.ggml.eot_token_id") == config["eos_token_id"]
    assert len(base.file.value("tokenizer.ggml.tokens")) == config["vocab_size"]
    assert base.file.value("tokenizer.chat_template") == (model / "chat_template.jinja").read_text()
    assert "output.weight" not in base.file.tensors  # tied to the embedding
    assert {tensor.kind for tensor in base.file.tensors.values() if len(tensor.shape) == 1} == {F32}
    assert {tensor.kind for tensor in base.file.tensors.values() if len(tensor.shape) == 2} == {BF16}


@pytest.mark.parametrize(
    ("quant", "kind", "file_type"),
    [
        ("f32", F32, LlamaFileType.ALL_F32),
        ("f16", F16, LlamaFileType.MOSTLY_F16),
        ("bf16", BF16, LlamaFileType.MOSTLY_BF16),
        ("q8_0", Q8_0, LlamaFileType.MOSTLY_Q8_0),
    ],
)
def test_merging_adds_scale_times_b_times_a_and_nothing_else(
    model: Path, adapter: Path, tmp_path: Path, quant: str, kind: GGMLQuantizationType, file_type: LlamaFileType
) -> None:
    base = base_gguf(str(model))
    made = merged(base, adapter, tmp_path / "model.gguf", quant)
    weights = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    update = 2.0 * weights[f"{prefix}B.weight"] @ weights[f"{prefix}A.weight"]  # alpha 8 / rank 4
    expected = quantize(matrix(base.file, "blk.1.ffn_down.weight") + update.astype(np.float32), kind)
    found = made.rows(made.tensors["blk.1.ffn_down.weight"])
    if quant in ("f16", "bf16"):  # the number below or above, by chance
        step = np.abs(dequantize(expected, kind)) * 2.0 ** (-10 if quant == "f16" else -7) + 1e-7
        assert (np.abs(matrix(made, "blk.1.ffn_down.weight") - dequantize(expected, kind)) <= step).all()
    else:  # the last bit may go either way with the order of the sums
        different = np.ascontiguousarray(expected).view(np.uint8).reshape(found.shape) != found
        assert np.mean(different) < (0.2 if quant == "f32" else 1e-3)
    assert made.value("general.file_type") == file_type
    assert [key for key in base.file.keys if made.value(key) != base.file.value(key)] in ([], ["general.file_type"])
    for name, tensor in made.tensors.items():
        assert tensor.kind == (kind if len(tensor.shape) == 2 else F32)
        if len(tensor.shape) == 1:
            np.testing.assert_array_equal(matrix(made, name), matrix(base.file, name))


def test_a_merged_file_has_the_planned_size(model: Path, tmp_path: Path) -> None:
    base = base_gguf(str(model))
    made = merged(base, None, tmp_path / "model.gguf", "q8_0")
    data = sum(tensor.bytes + -tensor.bytes % 32 for tensor in planned(base.file, "q8_0"))
    first = min(tensor.offset for tensor in made.tensors.values())
    assert made.path.stat().st_size == first + data


def test_merging_large_tensors_in_parts_gives_the_same_bytes(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_gguf(str(model))
    merged(base, adapter, tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("iterft_lite.gguf.merge.PART_NUMBERS", 256 * 7)
    merged(base, adapter, tmp_path / "parts.gguf", "q8_0")
    different = sum(
        a != b for a, b in zip((tmp_path / "whole.gguf").read_bytes(), (tmp_path / "parts.gguf").read_bytes(), strict=True)
    )
    assert different < 20  # roundings at a tie, of 1.4 million


def test_a_base_is_made_once_for_the_same_content(model: Path, tmp_path: Path, cache: Path) -> None:
    first = base_gguf(str(model))
    written = first.path.stat().st_mtime_ns
    copy = shutil.copytree(model, tmp_path / "copy")
    assert base_gguf(str(copy)).path == first.path
    assert first.path.stat().st_mtime_ns == written
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert base_gguf(str(copy)).path != first.path
    assert list(cache.rglob("*.part")) == []


def test_the_exporter_works_in_a_child_process(model: Path, adapter: Path, tmp_path: Path) -> None:
    worker = "iterft_lite.backends.exporter.gguf:GgufExporter"
    exporter = Child(worker, Exporter, log=tmp_path / "exporter.log", options={"threads": 2})
    seen: list[Any] = []
    try:
        made = exporter.export(str(model), adapter, tmp_path / "a", "merged", "q8_0", seen.append)
        assert made.path == tmp_path / "a/model.gguf"
        assert made.bytes == made.path.stat().st_size
        beside = exporter.export(str(model), adapter, tmp_path / "b", "adapter", "q8_0", seen.append)
        assert beside.adapter == tmp_path / "b/adapter.gguf"
        assert beside.path.parent == base_gguf(str(model)).folder
        again = exporter.export(str(model), adapter, tmp_path / "c", "adapter", "q8_0", seen.append)
        assert again.path == beside.path
        assert again.bytes < 200_000  # only the adapter
        with pytest.raises(ExportError, match="not a PEFT adapter folder"):
            exporter.export(str(model), tmp_path, tmp_path / "d", "merged", "q8_0", seen.append)
    finally:
        exporter.close()
    assert {(event.done, event.total) for event in seen} >= {(1, 24), (24, 24)}


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def hard_numbers() -> Array:
    """Rows that meet ties, zeros, tiny and huge scales."""
    made = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    made[0] = 0
    made[1] *= 1e-6
    made[2] *= 1e-30
    made[3] *= 300
    made[4] = np.arange(256, dtype=np.float32) - 127.5
    made[5, ::2] = 0
    made[6] = np.round(made[6] * 4) / 2
    return made


@pytest.mark.parametrize("target", [F32, F16, BF16, Q8_0])
@pytest.mark.parametrize("kind", [F32, F16, BF16])
def test_torch_quantises_to_the_same_bytes_as_the_gguf_package(
    kind: GGMLQuantizationType, target: GGMLQuantizationType
) -> None:
    stored = np.ascontiguousarray(quantize(hard_numbers(), kind)).view(np.uint8)
    ours = TorchArithmetic("cpu").merged(stored, kind, target, None)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, NumpyArithmetic().merged(stored, kind, target, None))
    if kind == F32:
        np.testing.assert_array_equal(ours, np.ascontiguousarray(quantize(hard_numbers(), target)).view(np.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("target", [F32, F16, BF16, Q8_0])
def test_a_gpu_quantises_to_the_same_bytes_as_the_gguf_package(target: GGMLQuantizationType) -> None:
    stored = hard_numbers().view(np.uint8)
    ours = TorchArithmetic("cuda").merged(stored, F32, target, None)
    np.testing.assert_array_equal(ours, np.ascontiguousarray(quantize(hard_numbers(), target)).view(np.uint8))


def test_a_file_that_was_cut_off_while_it_was_written_gets_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    with contextlib.closing(Checksum()) as checksum:
        checksum.begin(path)
        checksum.written(1000)
        path.write_bytes(bytes(10))
        with pytest.raises(OSError, match="shorter"):
            checksum.hexdigest()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_does_not_fit_into_the_gpus_memory_is_merged_on_the_cpu(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_one, stored = TorchArithmetic("cpu"), hard_numbers().view(np.uint8)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch_one, "_merged", full)
    for _ in range(2 * torch_one.threads):  # a failed part gives its place back
        ours = torch_one.merged(stored, F32, Q8_0, None)
        np.testing.assert_array_equal(ours, NumpyArithmetic().merged(stored, F32, Q8_0, None))
    monkeypatch.setattr(arithmetic, "_on_gpu", functools.cache(full))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(choose_arithmetic(10**9), NumpyArithmetic)


def test_another_error_of_the_gpu_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_one = TorchArithmetic("cpu")

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch_one, "_merged", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        torch_one.merged(hard_numbers().view(np.uint8), F32, Q8_0, None)


def test_a_file_of_several_pieces_is_digested_behind_its_writers(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "PIECE", LEAST_PIECE)
    base, path = base_gguf(str(model)), tmp_path / "model.gguf"
    for quant in ("f32", "q8_0"):
        with contextlib.closing(Checksum()) as checksum:
            write_merged(base.file, read_adapter(adapter, base), path, quant, checksum=checksum)
            assert checksum.hexdigest() == digest_by_pieces(path, LEAST_PIECE)
        assert quant != "f32" or path.stat().st_size > 2 * LEAST_PIECE


def test_a_gpu_without_room_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arithmetic, "_on_gpu", functools.cache(lambda: TorchArithmetic("cpu")))
    gpu = SimpleNamespace(free=MERGING - 1)
    monkeypatch.setattr(arithmetic, "Gpu", lambda: SimpleNamespace(facts=lambda: gpu))
    assert isinstance(choose_arithmetic(10**9), NumpyArithmetic)
    gpu.free += 1
    assert isinstance(choose_arithmetic(10**9 - 1), NumpyArithmetic)
    assert isinstance(choose_arithmetic(10**9), TorchArithmetic)
    gpu.free = 0  # it has its memory already
    assert isinstance(choose_arithmetic(10**9), TorchArithmetic)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert isinstance(choose_arithmetic(10**9), NumpyArithmetic)


@pytest.mark.parametrize("arithmetic", [NumpyArithmetic(), TorchArithmetic("cpu")])
def test_a_number_too_large_for_f16_is_refused(arithmetic: Any) -> None:
    stored = np.full((1, 32), 1e5, np.float32).view(np.uint8)
    with pytest.raises(ResultError, match="65504"):
        arithmetic.merged(stored, F32, F16, None)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(
    model: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "lora")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ExportError, match=said):
        read_adapter(copy, base_gguf(str(model)))


def test_an_adapter_of_another_model_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    base = base_gguf(str(model))
    copy = shutil.copytree(adapter, tmp_path / "lora")
    weights = load_file(copy / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({**weights, key: weights[key][:100]}, copy / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="does not fit"):
        read_adapter(copy, base)
    save_file({**weights, key.replace("layers.0", "layers.7"): weights[key]}, copy / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"layers.7.*no tensor"):
        read_adapter(copy, base)
    save_file({**weights, "base_model.model.lm_head.lora_embedding_A": weights[key]}, copy / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="lora_embedding_A"):
        read_adapter(copy, base)


def test_a_missing_model_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        base_gguf(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        base_gguf(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ModelError, match="could not be fetched from the hub: OSError: no network"):
        base_gguf("owner/model")


def test_a_checkpoint_in_4_bits_is_refused(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ExportError, match="name the 16-bit model"):
        base_gguf(str(copy))


def test_a_broken_gguf_file_is_refused(model: Path, tmp_path: Path) -> None:
    whole = base_gguf(str(model)).path.read_bytes()
    for size in (0, 10, 2000, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ExportError, match="not a whole GGUF file"):
            GgufFile(tmp_path / "cut.gguf")


def test_only_a_tokenizer_that_splits_like_qwen2_is_labelled_qwen2(model: Path, tmp_path: Path) -> None:
    assert cuts_like_qwen2(model)
    read = json.loads((model / "tokenizer.json").read_text())
    split = read["pre_tokenizer"]["pretokenizers"][0]
    for path, value in (
        (
            ("pre_tokenizer", "pretokenizers"),
            [{**split, "pattern": {"Regex": r"\s+"}}, read["pre_tokenizer"]["pretokenizers"][1]],
        ),
        (("model", "ignore_merges"), True),
        (("normalizer",), {"type": "Lowercase"}),
    ):
        changed = json.loads(json.dumps(read))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        assert not cuts_like_qwen2(tmp_path)


# -- no room ----------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_free_space_is_checked_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    base = base_gguf(str(model))
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(NoRoom, match=r"needs \d+\.\d MB, .* has 1\.0 MB free"):
        write_merged(base.file, None, tmp_path / "out/model.gguf", quant)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    base = base_gguf(str(model))

    class Full(NumpyArithmetic):
        def merged(self, *arguments: Any) -> Array:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="the disk is full"):
        write_merged(base.file, None, tmp_path / "out/model.gguf", "q8_0", arithmetic=Full())
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unwritable_cache_is_reported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(FolderError, match="cannot be written: permission denied") as caught:
        base_gguf(str(model))
    assert "ITERFT_CACHE" in (caught.value.hint or "")


def test_a_lora_file_in_half_precision_takes_half_the_space(model: Path, adapter: Path, tmp_path: Path) -> None:
    base = base_gguf(str(model))
    read = read_adapter(adapter, base)
    whole = write_lora(read, base, tmp_path / "whole.gguf")
    half = write_lora(read, base, tmp_path / "half.gguf", quant="f16")
    assert half < 0.6 * whole
    name = "blk.0.attn_q.weight.lora_b"
    one, other = (matrix(GgufFile(tmp_path / f"{size}.gguf"), name) for size in ("whole", "half"))
    np.testing.assert_array_equal(one.astype(np.float16), other.astype(np.float16))


# -- llama.cpp's scripts ----------------------------------------------------------------------------------------------


def source_package(path: Path, names: tuple[str, ...]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"llama_cpp_python-0.0.0/vendor/llama.cpp/{name}")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    return path


WHOLE = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/base.py", "gguf-py/gguf/quants.py", "LICENSE")


def test_only_the_scripts_are_taken_from_a_source_package(tmp_path: Path) -> None:
    package = source_package(tmp_path / "package.tar.gz", (*WHOLE, "src/llama.cpp", "../../../escape.txt"))
    folder = llamacpp_source.unpack_source(package, tmp_path / "cache/llama.cpp")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(WHOLE)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["llama.cpp"]


def test_a_source_package_without_the_scripts_is_refused(tmp_path: Path) -> None:
    package = source_package(tmp_path / "package.tar.gz", WHOLE[1:])
    with pytest.raises(ExportError, match="does not carry"):
        llamacpp_source.unpack_source(package, tmp_path / "llama.cpp")
    assert [path.name for path in tmp_path.iterdir() if "llama" in path.name] == []


def test_the_environment_can_name_the_scripts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llamacpp_source.unpack_source(source_package(tmp_path / "p.tar.gz", WHOLE), tmp_path / "llama.cpp")
    monkeypatch.setenv("ITERFT_LLAMA_CPP", str(folder))
    assert llamacpp_source.llamacpp_source() == folder
    monkeypatch.setenv("ITERFT_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match=r"has no convert_hf_to_gguf\.py"):
        llamacpp_source.find_source()


def test_a_machine_without_network_is_told_how_to_get_the_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ExportError, match="could not be fetched") as caught:
        llamacpp_source.llamacpp_source()
    assert "ITERFT_LLAMA_CPP" in (caught.value.hint or "")
    assert caught.value.kind == "machine"  # the network may come back: a sweep tries it again


# -- the Modelfile ----------------------------------------------------------------------------------------------------


def test_a_chatml_model_gets_a_chatml_modelfile(model: Path, tmp_path: Path) -> None:
    path = merged(base_gguf(str(model)), None, tmp_path / "model.gguf", "q8_0").path
    made = write_modelfile(path, tmp_path, temperature=0.7)
    assert (made.template, made.note) == ("chatml", "")
    assert made.path.read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|im_start|>"\n'
        "PARAMETER temperature 0.7\n"
        "PARAMETER top_k 0\n"
        "PARAMETER top_p 1\n"
        "PARAMETER min_p 0\n"
    )


@pytest.mark.parametrize(
    ("template", "kind", "said"),
    [
        (None, "raw", ""),
        ("{{ messages[0].content }}", "raw", "not ChatML"),
        ("{{ '<|im_start|>system\nBe kind.<|im_end|>' }}", "chatml", "does more than ChatML"),
    ],
)
def test_a_template_that_ollama_cannot_use_gets_a_note(
    model: Path, tmp_path: Path, template: str | None, kind: str, said: str
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    made = write_modelfile(base_gguf(str(copy)).path, tmp_path / "out", temperature=1.0, adapter=tmp_path / "out/adapter.gguf")
    assert made.template == kind
    assert said in made.note
    assert "ADAPTER ./adapter.gguf\n" in made.path.read_text()


@pytest.mark.parametrize("there", [False, True])
def test_a_vocabulary_that_crashes_llamacpp_is_refused_before_loading(tmp_path: Path, there: bool) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<s>", *(f"<0x{byte:02X}>" for byte in range(256) if there or byte != 10)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with contextlib.nullcontext() if there else pytest.raises(ExportError, match=r"no token for the byte 0x0A: .* would abort"):
        refuse_vocabulary(GgufFile(tmp_path / "m.gguf"), tmp_path)
