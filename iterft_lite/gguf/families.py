"""Families of models, and problems of a model's folder that are visible before anything is loaded.

`FAMILIES` is the one table: docs/models.md and `iterft doctor --model` are made from it, and a test trains, exports, checks and
samples a tiny model of each family. `find_problems` reads config.json and the headers of the weight files only: no torch, no
download, a tenth of a second.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iterft_lite.errors import ExportError, FileError, IterftError, ModelError
from iterft_lite.files import read_object
from iterft_lite.gguf.llamacpp_source import find_source
from iterft_lite.gguf.tokenizer import piece_tokenizer
from iterft_lite.gguf.weights import Weight, is_whole, read_weights

Tier = Literal["supported", "merged only", "refused"]


@dataclass(frozen=True)
class Family:
    """Models of one architecture that behave alike in this program.

    Attributes:
        name: For people.
        architecture: As config.json names it.
        tier: Both exports are proven; the merged one only (llama.cpp does not lay LoRA over all that is adapted); or refused.
        examples: Published models of it.
        note: What is particular, a phrase; of a refused one the reason.
        table: Activations that llama.cpp's CPU code reads from a table in 16 bits (GELU): logits in f32 differ by thousandths.
        window: A sliding window that the configuration names is kept by llama.cpp, ignored by it, or there is none.
    """

    name: str
    architecture: str
    tier: Tier
    examples: str
    note: str = ""
    table: bool = False
    window: Literal["kept", "ignored", "none"] = "none"


FAMILIES = (
    Family("Llama 3", "LlamaForCausalLM", "supported", "Llama-3.2-1B-Instruct", "its template writes a date: one for all"),
    Family("Llama 2", "LlamaForCausalLM", "supported", "Llama-2-7b-chat, TinyLlama", "with or without tokenizer.model"),
    Family("SmolLM2", "LlamaForCausalLM", "supported", "SmolLM2-135M-Instruct", "tokenizer.json as it stands"),
    Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "supported",
        "SmolLM3-3B",
        "thinking switched off where it can be",
        window="ignored",
    ),
    Family("Mistral", "MistralForCausalLM", "supported", "Mistral-7B-Instruct-v0.3", window="ignored"),
    Family("Mixtral", "MixtralForCausalLM", "supported", "Mixtral-8x7B", "adapters on attention only", window="ignored"),
    Family("Qwen2", "Qwen2ForCausalLM", "supported", "Qwen2.5-0.5B-Instruct", window="ignored"),
    Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        "supported",
        "Qwen3-4B-Instruct-2507",
        "thinking switched off where it can be",
        window="ignored",
    ),
    Family(
        "Qwen3 MoE",
        "Qwen3MoeForCausalLM",
        "supported",
        "Qwen3-30B-A3B",
        "adapters on attention only",
        window="ignored",
    ),
    Family(
        "Qwen2 MoE",
        "Qwen2MoeForCausalLM",
        "supported",
        "Qwen1.5-MoE-A2.7B-Chat",
        "adapters on attention only",
        window="ignored",
    ),
    Family(
        "Qwen3.5",
        "Qwen3_5ForCausalLM",
        "supported",
        "Qwen3.5-4B",
        "linear attention; its convolutions get no adapter",
    ),
    Family("Gemma 2", "Gemma2ForCausalLM", "supported", "gemma-2-2b-it", table=True, window="kept"),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "supported",
        "gemma-3-1b-it",
        table=True,
        window="kept",
    ),
    Family("Phi-3", "Phi3ForCausalLM", "supported", "Phi-3.5-mini-instruct, Phi-4", window="ignored"),
    Family("OLMo-2", "Olmo2ForCausalLM", "supported", "OLMo-2-0425-1B-Instruct"),
    Family("OLMo-3", "Olmo3ForCausalLM", "supported", "Olmo-3-7B-Instruct", window="kept"),
    Family("Granite 3", "GraniteForCausalLM", "supported", "granite-3.3-2b-instruct"),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", "supported", "pythia-410m", "a base model: documents", table=True),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        "refused",
        "gpt2",
        "its matrices are stored transposed: an adapter cannot be carried over",
        table=True,
    ),
    Family("StableLM", "StableLmForCausalLM", "supported", "stablelm-2-1_6b-chat"),
    Family("Falcon", "FalconForCausalLM", "supported", "falcon-7b-instruct", table=True),
    Family(
        "StarCoder2",
        "Starcoder2ForCausalLM",
        "supported",
        "starcoder2-3b",
        "a base model: documents",
        table=True,
        window="ignored",
    ),
    Family("Cohere", "CohereForCausalLM", "supported", "c4ai-command-r-v01"),
    Family("LFM2", "Lfm2ForCausalLM", "supported", "LFM2-1.2B", "its short convolutions get no adapter"),
    Family("BLOOM", "BloomForCausalLM", "supported", "bloom-560m", "a base model: documents", table=True),
    Family("MPT", "MptForCausalLM", "refused", "mpt-7b", "llama.cpp's converter does not know this name of it", table=True),
    Family("gpt-oss", "GptOssForCausalLM", "refused", "gpt-oss-20b", "its weights are published in MXFP4 only"),
)
"""Families that the test of this table tries, with tiny random weights and real tokenizers."""


@dataclass(frozen=True)
class Problem:
    """Why a model cannot be used.

    Attributes:
        text: A sentence, without the model's name.
        remedy: What to do.
    """

    text: str
    remedy: str


def families_of(architecture: str) -> list[Family]:
    """Every family of an architecture; none if it was never tried."""
    return [family for family in FAMILIES if family.architecture == architecture]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, the language model's own part laid over the whole.

    Raises:
        ModelError: If there is none, or it is not a JSON object.
    """
    try:
        config = read_object(folder / "config.json")
    except (OSError, FileError) as error:
        raise ModelError(f"`{folder}/config.json` cannot be read: {error}") from None
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {}), "architectures": config.get("architectures")}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that config.json names first, or ""."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def refuse_problems(folder: Path, *, tokens: int = 0, weights: Literal["here", "on the hub"] = "here") -> None:
    """Refuse a model that cannot be used, with every reason at once.

    Args:
        folder: The Hugging Face folder.
        tokens: Of the longest row that is trained or asked.
        weights: As of `find_problems`.

    Raises:
        ModelError: With the reasons.
    """
    found = list(find_problems(folder, tokens=tokens, weights=weights))
    if found:
        reasons = "; ".join(problem.text for problem in found)
        raise ModelError(f"`{folder}` cannot be used: {reasons}", hint="; ".join(dict.fromkeys(each.remedy for each in found)))


def find_problems(folder: Path, *, tokens: int = 0, weights: Literal["here", "on the hub"] = "here") -> Iterator[Problem]:
    """Reasons why a model cannot be trained, exported or sampled, as far as its files show.

    Args:
        folder: The Hugging Face folder.
        tokens: Of the longest row that is trained or asked.
        weights: Whether the files with the weights have to be in the folder.

    Raises:
        ModelError: If config.json cannot be read.
    """
    config = read_config(folder)
    if (folder / "adapter_config.json").is_file():
        yield Problem(
            "adapter_config.json lies beside config.json: transformers would lay that adapter over the model, "
            "and the GGUF would not have it",
            "merge the adapter into the model (peft's `merge_and_unload`), or take adapter_config.json out of the folder",
        )
    if weights == "here" or is_whole(folder):
        yield from _of_the_weights(folder, config)
    yield from _of_the_architecture(config, tokens)
    if not (folder / "tokenizer.model").is_file():
        try:
            piece_tokenizer(folder)
        except ExportError as error:
            yield Problem(error.message.replace(f" in `{folder}`", ""), error.hint or "")


def _of_the_weights(folder: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        weights = read_weights(folder)
    except IterftError as error:
        yield Problem(error.message, "download the file again")
        return
    if not weights:
        there = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        yield Problem(
            "its weights are in PyTorch's format only (pytorch_model.bin)" if there else "there is no model*.safetensors in it",
            "load it with transformers and `save_pretrained` it: that writes safetensors" if there else "download its weights",
        )
        return
    yield from _of_the_head(config, weights)


def _of_the_head(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> Iterator[Problem]:
    """`tie_word_embeddings` against what the files hold."""
    tied = config.get("tie_word_embeddings")
    embedding = next((name for name in weights if name.endswith("embed_tokens.weight")), None)
    head = next((name for name in weights if name.split(".")[-2:] == ["lm_head", "weight"]), None)
    if embedding is None or tied is None:
        return
    if tied and head and not _same(weights[embedding], weights[head]):
        yield Problem(
            f"config.json says `tie_word_embeddings = true`, but `{head}` is another matrix than `{embedding}`: "
            "transformers would pass over it, the GGUF would not",
            "set `tie_word_embeddings` to false if the head is the model's own, else take it out of the weight files",
        )
    if not tied and head is None:
        yield Problem(
            "config.json says `tie_word_embeddings = false`, but there is no `lm_head.weight`: "
            "transformers would draw a random one",
            "set `tie_word_embeddings` to true if the embedding is the head, else download the file that has it",
        )


def _same(one: Weight, other: Weight) -> bool:
    return (one.kind, one.shape) == (other.kind, other.shape) and bool(np.array_equal(one.stored(), other.stored()))


def _of_the_architecture(config: Mapping[str, Any], tokens: int) -> Iterator[Problem]:
    name = architecture_of(config)
    known = families_of(name)
    refused = next((family for family in known if family.tier == "refused"), None)
    if refused:
        yield Problem(f"{refused.name} ({name}): {refused.note}", "docs/models.md lists families that are supported")
    if name == "Qwen3MoeForCausalLM" and not config.get("norm_topk_prob"):
        yield Problem(
            "config.json says `norm_topk_prob = false`, and llama.cpp normalises the weights of this family's experts always",
            "the published models have `norm_topk_prob = true`: correct config.json if it was lost",
        )
    window = sliding_window(config)
    if window and window < tokens and any(family.window == "ignored" for family in known):
        yield Problem(
            f"{name} attends to {window} tokens (`sliding_window`) and rows have up to {tokens}: "
            "llama.cpp attends to all of them",
            f"set `train.max_length` and the `max_tokens` so that rows stay within {window} tokens",
        )
    if not known and name not in (convertible() or {name}):
        yield Problem(
            f"the llama.cpp that is here cannot convert {name or 'a model whose config.json names no architecture'}",
            "a newer llama.cpp may: ITERFT_LLAMA_CPP names a folder of its sources, "
            "`pip install -U llama-cpp-python` brings one",
        )


def sliding_window(config: Mapping[str, Any]) -> int:
    """Tokens that a layer attends to, where some layers do not attend to all; 0 where all do."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    used = config.get("use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return int(window) if window and used else 0


def convertible() -> frozenset[str]:
    """The architectures that llama.cpp's converter on this machine knows; empty where it is not here, or says it otherwise."""
    source = find_source()
    table = source / "conversion" / "__init__.py" if source else None
    if table is None or not table.is_file():
        return frozenset()
    found = re.search(r"TEXT_MODEL_MAP[^=]*= (\{.*?\n\})", table.read_text(encoding="utf-8"), re.DOTALL)
    return frozenset(ast.literal_eval(found[1])) if found else frozenset()
