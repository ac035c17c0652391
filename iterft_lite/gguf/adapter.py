"""A PEFT adapter in GGUF's terms: A and B by tensor name, merged by `merge.py` or written as a LoRA GGUF here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from iterft_lite.errors import ExportError
from iterft_lite.files import writing
from iterft_lite.gguf.base import Base
from iterft_lite.gguf.file import Array, ensure_room
from iterft_lite.gguf.names import gguf_name, tensor_names
from iterft_lite.gguf.weights import Weight, read_weights

KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LowRank:
    """The update of one matrix: scale * b @ a.

    Attributes:
        a: float32 [rank, columns].
        b: float32 [rows, rank], rows in the order of the base GGUF.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    a: Array
    b: Array
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter whose every part has its place in a base GGUF.

    Attributes:
        alpha: The adapter's `lora_alpha`.
        updates: By GGUF name of the matrix.
    """

    alpha: float
    updates: Mapping[str, LowRank]


def read_adapter(folder: Path, base: Base) -> Adapter:
    """Read a PEFT LoRA adapter for a base.

    Raises:
        ExportError: If it is not a plain LoRA adapter, or does not fit the base.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"`{folder}` is not a PEFT adapter folder: {error}") from error
    weights = read_weights(folder, "adapter_model*.safetensors")
    problems = _not_plain(config, weights)
    if problems:
        raise ExportError(
            f"the adapter in `{folder}` cannot be expressed in GGUF: {'; '.join(problems)}",
            hint="merge it with peft into the Hugging Face model, and export that model without an adapter",
        )
    architecture = base.file.architecture
    names = tensor_names(architecture, int(base.file.value(f"{architecture}.block_count")))
    modules: dict[str, dict[str, Weight]] = {}
    for key, weight in weights.items():
        found = KEY.fullmatch(key)
        assert found is not None  # `_not_plain` has looked
        modules.setdefault(found["module"], {})[found["side"]] = weight
    updates = {}
    for module, sides in modules.items():
        name = _fitting(folder, base, module, gguf_name(names, f"{module}.weight"), sides)
        a, b = sides["A"].float32(), _in_order(sides["B"].float32(), base.orders[name])
        updates[name] = LowRank(a, b, _scale(config, module, len(a)))
    return Adapter(float(config["lora_alpha"]), updates)


def _not_plain(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> list[str]:
    """What is in an adapter besides A and B, a phrase each."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"it is of the type {config.get('peft_type')}, not LORA")
    for key, phrase in (
        ("use_dora", "it is a DoRA adapter (magnitudes besides A and B)"),
        ("modules_to_save", f"it carries whole modules (`modules_to_save = {config.get('modules_to_save')}`)"),
        ("fan_in_fan_out", "its matrices are transposed (`fan_in_fan_out`)"),
        ("lora_bias", "it has biases (`lora_bias`)"),
        ("trainable_token_indices", "it trains single tokens (`trainable_token_indices`)"),
        ("target_parameters", "it adapts parameters instead of modules (`target_parameters`)"),
        ("layer_replication", "it repeats layers (`layer_replication`)"),
    ):
        if config.get(key):
            problems.append(phrase)
    if config.get("bias", "none") != "none":
        problems.append(f"it has biases (`bias = {config['bias']}`)")
    others = sorted(key for key in weights if not KEY.fullmatch(key))
    if others and not problems:
        problems.append(f"it holds `{others[0]}`" + (f" and {len(others) - 1} more that are no A or B" if others[1:] else ""))
    if not weights:
        problems.append("it has no adapter_model.safetensors")
    return problems


def _fitting(folder: Path, base: Base, module: str, name: str | None, sides: Mapping[str, Weight]) -> str:
    """The GGUF name of an adapted module, if A, B and the base's matrix fit together."""
    if name is None or name not in base.file.tensors:
        raise ExportError(f"the adapter in `{folder}` adapts `{module}`, for which the base GGUF has no tensor")
    if set(sides) != {"A", "B"}:
        raise ExportError(f"the adapter in `{folder}` has only one of A and B for `{module}`")
    shape = (sides["B"].shape[0], sides["A"].shape[-1])
    if shape != base.file.tensors[name].shape or sides["A"].shape[0] != sides["B"].shape[-1]:
        raise ExportError(
            f"the adapter in `{folder}` does not fit: `{module}` is {base.file.tensors[name].shape} in the base, "
            f"A is {sides['A'].shape}, B is {sides['B'].shape}",
            hint="was it trained on another model?",
        )
    if name not in base.orders:
        raise ExportError(
            f"llama.cpp stores `{module}` in another form than Hugging Face; the adapter cannot be carried over",
            hint="merge it with peft into the Hugging Face model, and export that model without an adapter",
        )
    return name


def _in_order(b: Array, order: Array) -> Array:
    return b[order] if order.size else b


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as peft matches it
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def write_lora(adapter: Adapter, base: Base, path: Path, *, quant: Literal["f32", "f16"] = "f32") -> int:
    """Write an adapter as a LoRA GGUF, which llama.cpp lays over the base; gives its size in bytes.

    llama.cpp scales each update by alpha / rank; where ours is scaled otherwise (rsLoRA), B takes up the difference.

    Args:
        adapter: Read for that base.
        base: Names the architecture.
        path: Of the new file.
        quant: Number format of A and B.

    Raises:
        NoRoom: If the disk has no room for it.
    """
    size = sum(update.a.nbytes + update.b.nbytes for update in adapter.updates.values())
    ensure_room(path.parent, size + (1 << 20), f"the adapter `{path.name}`")
    writer = gguf.GGUFWriter(None, base.file.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if quant == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    dtype = np.float32 if quant == "f32" else np.float16
    for name, update in adapter.updates.items():
        usual = adapter.alpha / update.a.shape[0]
        b = update.b if update.scale == usual else update.b * np.float32(update.scale / usual)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(update.a, dtype))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, dtype))
    with writing(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path.stat().st_size
