"""The base GGUF: M[0] in GGUF at its stored precision, made once and cached under a digest of its content.

This module writes Qwen3 with Qwen2's pre-tokenizer directly, with gguf's writer. llama.cpp's converter (`convert.py`) does
every other model. Both give the same tensors (a test compares them).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from iterft_lite import hub
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.cache import cache_folder
from iterft_lite.errors import ExportError, ModelError
from iterft_lite.files import is_as_kept, keep_digest, read_object, user_path, writing
from iterft_lite.gguf.file import Array, GgufFile, ensure_room
from iterft_lite.gguf.llamacpp_source import llamacpp_source
from iterft_lite.gguf.names import gguf_name, load_orders, row_orders, save_orders, tensor_names
from iterft_lite.gguf.tokenizer import cuts_like_qwen2, vocabulary
from iterft_lite.gguf.weights import Weight, read_weights
from iterft_lite.hub import content_digest
from iterft_lite.programs import run_module

OnTensor = Callable[[int, int], None]
"""Called with the number of tensors done and their total."""


def no_op(done: int, total: int) -> None:
    """Ignore progress."""


LAYOUT = "2"
"""Part of a base's name in the cache. Raised when bases must be made again."""

FORMATS: dict[str, tuple[GGMLQuantizationType, LlamaFileType, str]] = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, "f32"),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, "f16"),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, "bf16"),
}
"""By safetensors' name of a number format: GGUF's format, the file type, and the converter's name for it."""


@dataclass(frozen=True)
class Base:
    """A converted base model.

    Attributes:
        folder: In the cache, with all files derived from this base.
        model: The Hugging Face folder of its source.
    """

    folder: Path
    model: Path

    @property
    def path(self) -> Path:
        """The GGUF file."""
        return self.folder / "model.gguf"

    @cached_property
    def file(self) -> GgufFile:
        """The GGUF file, opened."""
        return GgufFile(self.path)

    @cached_property
    def orders(self) -> dict[str, Array]:
        """How the converter ordered the rows of each matrix (`names.row_orders`)."""
        return load_orders(self.folder / "orders.npz")


def model_folder(model: str) -> Path:
    """The folder of a model: a folder itself, or a snapshot from the hub for a name.

    Raises:
        ModelError: If it is neither.
    """
    folder = user_path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"`{model}` has no config.json: it is not a Hugging Face model folder")
        return folder
    if not hub.is_name(model):
        raise ModelError(
            f"there is no folder `{model}`", hint="give a Hugging Face folder, or a name on the hub: `owner/model`"
        )
    return hub.fetch(model)


def base_gguf(model: str, on_tensor: OnTensor = no_op) -> Base:
    """The base GGUF of a model, from the cache or made now.

    Args:
        model: A Hugging Face folder or a name on the hub.
        on_tensor: Progress callback; llama.cpp's converter reports none.

    Raises:
        ModelError: If there is no such model.
        NoRoom: If the disk has no room for it.
        ExportError: If it cannot be expressed in GGUF.
    """
    folder = model_folder(model)
    config = read_object(folder / "config.json")
    refuse_quantised(model, config)
    direct = writes_directly(folder, config)
    method = "direct" if direct else f"llama.cpp-{importlib.metadata.version('llama-cpp-python')}"
    base = Base(cache_folder() / "bases" / f"{content_digest(folder)[:32]}-{method}-{LAYOUT}", folder)
    if (base.folder / "orders.npz").is_file() and is_as_kept(base.path):
        return base
    weights = read_weights(folder)
    ensure_room(base.folder, _bytes(weights) + (64 << 20), f"the base GGUF of `{model}`")
    if direct:
        write_qwen3(folder, config, weights, base.path, name=Path(hub.name_of(folder)).name, on_tensor=on_tensor)
    else:
        run_converter(folder, weights, base.path)
    keep_digest(base.path)
    with writing(base.folder / "orders.npz") as temporary:
        save_orders(temporary, row_orders(weights, base.file))
    return base


def refuse_quantised(model: str, config: dict[str, Any]) -> None:
    """Raise ExportError for a checkpoint in bitsandbytes' format: llama.cpp cannot read it."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitsandbytes":
        raise ExportError(
            f"`{model}` is stored in bitsandbytes' 4 or 8 bits, from which no GGUF can be made",
            hint="name the 16-bit model; the trainer loads it in 4 bits by itself",
        )


def writes_directly(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a model is a plain Qwen3 whose tokenizer is known to agree with llama.cpp's `qwen2`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        config.get("architectures") == ["Qwen3ForCausalLM"]
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and _rope_theta(config) is not None
        and not any(config.get(key) for key in ("quantization_config", "attention_bias", "use_sliding_window"))
        and any(folder.glob("model*.safetensors"))
        and cuts_like_qwen2(folder)
    )


def _rope_theta(config: dict[str, Any]) -> float | None:
    found = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    return None if found is None else float(found)


def write_qwen3(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Weight],
    path: Path,
    *,
    name: str,
    on_tensor: OnTensor = no_op,
) -> None:
    """Write a Qwen3 model as GGUF, in the number format of its weights; norms in float32.

    Args:
        folder: The Hugging Face folder.
        config: What its config.json holds.
        weights: What its safetensors files hold.
        path: The new file.
        name: The model's name in the metadata.
        on_tensor: Progress callback.

    Raises:
        ExportError: If a weight has no place in GGUF.
        StoreError: If the disk is full.
    """
    names = tensor_names("qwen3", config["num_hidden_layers"])
    kind, file_type, _ = main_format(weights)
    tied = config.get("tie_word_embeddings", False)
    placed: dict[str, Weight] = {}
    for theirs, weight in weights.items():
        if tied and theirs == "lm_head.weight":
            continue
        ours = gguf_name(names, theirs)
        if ours is None:
            raise ExportError(f"the weight `{theirs}` of `{folder}` has no place in a Qwen3 GGUF")
        placed[ours] = weight
    writer = gguf.GGUFWriter(None, "qwen3")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_vocabulary(writer, folder, config)
    for ours, weight in placed.items():
        of = kind if len(weight.shape) > 1 else GGMLQuantizationType.F32
        size = prod(weight.shape) * (4 if of == GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(ours, weight.shape, np.dtype(np.uint16), size, raw_dtype=of)
    with writing(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, weight in enumerate(placed.values(), start=1):
            writer.write_tensor_data(_in_format(weight, kind if len(weight.shape) > 1 else GGMLQuantizationType.F32))
            on_tensor(done, len(placed))
        writer.close()


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head)
    writer.add_value_length(head)


def _add_vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokens, types = vocabulary(folder, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True)
    special.add_special_token["bos"] = False  # prompts are complete token ids
    special.add_to_gguf(writer, quiet=True)
    end = _end_of_turn(folder)
    if end is not None:
        writer.add_eot_token_id(end)


def main_format(weights: dict[str, Weight]) -> tuple[GGMLQuantizationType, LlamaFileType, str]:
    """The number format of most of a model's matrices; bfloat16 if GGUF does not have it."""
    sizes: Counter[str] = Counter()
    for weight in weights.values():
        if len(weight.shape) > 1:
            sizes[weight.kind] += prod(weight.shape)
    kind = sizes.most_common(1)[0][0] if sizes else "BF16"
    return FORMATS.get(kind, FORMATS["BF16"])


def _in_format(weight: Weight, kind: GGMLQuantizationType) -> Array:
    """A weight's numbers in one of GGUF's plain formats. Weights stored in that format keep their bits."""
    if FORMATS[weight.kind][0] == kind:
        return weight.stored()
    made: Array = gguf.quants.quantize(weight.float32(), kind)
    return made


def _bytes(weights: dict[str, Weight]) -> int:
    return sum(prod(weight.shape) * (4 if weight.kind == "F32" else 2) for weight in weights.values())


def run_converter(folder: Path, weights: dict[str, Weight], path: Path) -> None:
    """Have llama.cpp's converter write the base GGUF.

    Raises:
        ExportError: With what the converter said.
    """
    source = llamacpp_source()
    with writing(path) as temporary:
        arguments = [str(folder), "--outtype", main_format(weights)[2], "--outfile", str(temporary)]
        run_llamacpp_script(source, "convert_hf_to_gguf.py", folder, arguments, end=_end_of_turn(folder))
        refuse_vocabulary(GgufFile(temporary), folder)


def refuse_vocabulary(file: GgufFile, folder: Path) -> None:
    """Refuse a GGUF that would make llama.cpp abort: a SentencePiece vocabulary without a token for some byte.

    Raises:
        ExportError: With the first such byte.
    """
    if file.value("tokenizer.ggml.model") != "llama":
        return
    tokens = set(file.value("tokenizer.ggml.tokens"))
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in tokens and chr(byte) not in tokens]
    if missing:
        raise ExportError(
            f"llama.cpp's converter writes the tokenizer of `{folder}` as one of SentencePiece's kind, which has no token for "
            f"the byte 0x{missing[0]:02X}: llama.cpp would abort",
            hint="give the tokenizer files that the model's makers publish",
        )


def _end_of_turn(folder: Path) -> int | None:
    """The token that ends a reply in a model's chats."""
    tokenizer = TrainingTokenizer(str(folder))
    with contextlib.suppress(ModelError):  # no reply can be trained with this template, but documents can
        return tokenizer.turn.end_id if tokenizer.chat else None
    return None


def run_llamacpp_script(source: Path, script: str, model: Path, arguments: list[str], *, end: int | None = None) -> None:
    """Run one of llama.cpp's conversion scripts in a child process.

    Args:
        source: The folder of llama.cpp's sources.
        script: The script's file name.
        model: The Hugging Face folder that it reads.
        arguments: Arguments of the script.
        end: The token that ends a turn, to be written into the file.

    Raises:
        ExportError: With the script's last words, a remedy for known causes, and the log file of its whole output.
    """
    given = [str(source), script, str(model), *([] if end is None else ["--end", str(end)]), *arguments]
    done = run_module("iterft_lite.gguf.convert", given)
    if done.returncode == 0:
        return
    log = cache_folder() / "logs" / f"{script.removesuffix('.py')}.log"
    with writing(log) as temporary:
        temporary.write_text(done.stderr, encoding="utf-8")
    if done.returncode < 0:
        reason = f"it was ended by signal {-done.returncode}" + " (mostly: out of memory)" * (done.returncode == -9)
    else:
        reason = _last_words(done.stderr)
    version = importlib.metadata.version("llama-cpp-python")
    raise ExportError(
        f"the llama.cpp of llama-cpp-python {version} cannot convert `{model}` ({_architecture(model)}): {reason}\n"
        f"(all that its {script} said is in {log})",
        hint=_remedy(done.stderr),
    )


def _architecture(model: Path) -> str:
    try:
        return str(json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return "of no known architecture"


def _last_words(said: str) -> str:
    """The exception that ended a Python program, else the last line."""
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()] or ["it does not say why"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or lines)[-1]


def _remedy(said: str) -> str:
    """What can be done about a conversion that failed."""
    if "No module named 'sentencepiece'" in said or "No module named 'google" in said:
        return "`pip install sentencepiece protobuf`: this model's tokenizer needs them"
    if "BPE pre-tokenizer was not recognized" in said:
        return "llama.cpp does not know how this tokenizer cuts text; only those that cut as Qwen2's can be used all the same"
    if "No space left" in said:
        return "free some space, or set ITERFT_CACHE to a folder on a larger disk"
    return (
        "a newer llama.cpp may know it: ITERFT_LLAMA_CPP names a folder of its sources, and `pip install -U llama-cpp-python` "
        "brings one; docs/models.md lists what was tried"
    )
