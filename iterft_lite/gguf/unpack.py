"""A Hugging Face folder made from a GGUF file of a Llama: weights in bfloat16, tokenizer, chat template, configuration.

For models that are published as GGUF only. Quantised numbers keep their rounded values. This is the inverse of llama.cpp's
converter: it restores the order of the query and key rows (`names._usual_orders`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, TokenType
from gguf.quants import dequantize, quantize

from iterft_lite.errors import ExportError
from iterft_lite.files import writing
from iterft_lite.gguf.file import Array, GgufFile, Tensor, ensure_room

CUTS: Mapping[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
}
"""Pre-tokenizers by GGUF's name, in the form of tokenizer.json."""

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""GGUF's names of a Llama's tensors and Hugging Face's."""


def unpack_llama(path: Path, folder: Path) -> Path:
    """Write a Hugging Face folder from a GGUF file; gives `folder`.

    Args:
        path: The GGUF.
        folder: Made if missing.

    Raises:
        ExportError: If the file is no Llama with a tokenizer of a kind that is known here.
        NoRoom: If the disk has no room.
    """
    file = GgufFile(path)
    cut = str(file.value("tokenizer.ggml.pre"))
    if file.architecture != "llama" or cut not in CUTS:
        raise ExportError(
            f"`{path}` is a `{file.architecture}` whose tokenizer cuts text as `{cut}`: no folder is made of that"
        )
    numbers = sum(tensor.rows * tensor.shape[-1] for tensor in file.tensors.values())
    ensure_room(folder, 2 * numbers + (8 << 20), f"`{folder.name}`")
    _write_json(folder / "tokenizer.json", _tokenizer(file, CUTS[cut]))
    _write_json(folder / "tokenizer_config.json", _named(file))
    with writing(folder / "chat_template.jinja") as temporary:
        temporary.write_text(str(file.value("tokenizer.chat_template")), encoding="utf-8")
    _write_weights(file, folder / "model.safetensors")
    _write_json(folder / "config.json", _config(file))  # last: a folder with it is whole
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _config(file: GgufFile) -> dict[str, Any]:
    def of(key: str) -> Any:
        return file.value(f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(np.float32(of("attention.layer_norm_rms_epsilon")).astype(str)),
        "rope_theta": of("rope.freq_base"),
        "vocab_size": len(file.value("tokenizer.ggml.tokens")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
    }


def _named(file: GgufFile) -> dict[str, Any]:
    tokens = file.value("tokenizer.ggml.tokens")
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.value(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    return {**named, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _tokenizer(file: GgufFile, cut: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer.json: byte-level pairs, no byte fallback, no blank put first."""
    tokens, types = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], **flags} for index, kind in enumerate(types) if kind == TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "post_processor": None,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in file.value("tokenizer.ggml.merges")],
        },
    }


def _write_weights(file: GgufFile, path: Path) -> None:
    """model.safetensors, every number in bfloat16 (format: https://github.com/huggingface/safetensors#format)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, parts = 0, []
    for tensor in file.tensors.values():
        size = 2 * tensor.rows * tensor.shape[-1]
        name = _name(tensor.name)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        parts.append(tensor)
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with writing(path) as temporary, temporary.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for tensor in parts:
            numbers = _in_order(dequantize(file.rows(tensor), tensor.kind).reshape(tensor.shape), tensor, file)
            out.write(np.ascontiguousarray(quantize(numbers, GGMLQuantizationType.BF16)).tobytes())


def _name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in BLOCK:
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{parts[3]}"
    if parts[0] in ENDS:
        return f"{ENDS[parts[0]]}.{parts[1]}"
    raise ExportError(f"the GGUF's `{name}` has no place in a Llama")


def _in_order(numbers: Array, tensor: Tensor, file: GgufFile) -> Array:
    """Query and key rows as Hugging Face has them: the two halves of each head one after the other, not interleaved."""
    part = tensor.name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return numbers
    heads = int(file.value("llama.attention.head_count" + ("_kv" if part == "attn_k" else "")))
    rows, columns = numbers.shape
    return numbers.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
