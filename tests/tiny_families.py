"""A tiny random model of every family of docs/models.md, with a real tokenizer and mostly a real chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.real_tokenizers import markers, models_folder, write_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""In the manner of Llama 2 and Mistral: markers that are plain text, a blank before replies."""


@dataclass(frozen=True)
class Case:
    """A family's stand-in.

    Attributes:
        family: Its name in `gguf.families.FAMILIES`.
        config: Class of transformers' configuration.
        vocabulary: Name of one of llama.cpp's.
        template: File of one of llama.cpp's, a source, or None for a base model.
        sizes: What the configuration has beside or instead of the usual sizes.
        loss: That it is trained with.
        named: More of tokenizer_config.json.
        begins: Texts begin with a beginning token, where the vocabulary has one for that.
    """

    family: str
    config: str
    vocabulary: str
    template: str | None
    sizes: dict[str, Any]
    loss: Literal["reply", "all", "preference"] = "reply"
    named: tuple[tuple[str, Any], ...] = ()
    begins: bool = True

    @property
    def id(self) -> str:
        """For people."""
        return self.family.replace(" ", "-")


ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}

CASES = (
    Case("Llama 3", "Llama", "starcoder", "meta-llama-Llama-3.2-3B-Instruct", {"rope_parameters": ROPE3, "tie": True}),
    Case("Llama 2", "Llama", "llama-spm", INSTRUCT, {}, "preference"),
    Case("Mistral", "Mistral", "llama-spm", "mistralai-Mistral-Nemo-Instruct-2407", {"sliding_window": 512}),
    Case("Qwen2", "Qwen2", "starcoder", "Qwen-Qwen2.5-7B-Instruct", {}, "preference"),
    Case("Qwen3", "Qwen3", "qwen2", "Qwen-Qwen3-0.6B", {"tie": True}),
    Case("Qwen3 MoE", "Qwen3Moe", "starcoder", CHATML, {**MOE, "norm_topk_prob": True}),
    Case("Qwen2 MoE", "Qwen2Moe", "starcoder", CHATML, {**MOE, "shared_expert_intermediate_size": 64}),
    Case(
        "Qwen3.5",
        "Qwen3_5Text",
        "starcoder",
        "Qwen3.5-4B",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    Case(
        "Gemma 2",
        "Gemma2",
        "llama-spm",
        "google-gemma-2-2b-it",
        {"query_pre_attn_scalar": 32, "sliding_window": 512, "tie": True},
    ),
    Case(
        "Gemma 3",
        "Gemma3Text",
        "llama-spm",
        "google-gemma-2-2b-it",
        {"query_pre_attn_scalar": 32, "sliding_window": 512, "num_hidden_layers": 6, "tie": True},
    ),
    Case("Phi-3", "Phi3", "phi-3", "microsoft-Phi-3.5-mini-instruct", {"sliding_window": 512, "num_key_value_heads": 4}),
    Case("SmolLM2", "Llama", "starcoder", CHATML, {"tie": True}, "reply", (("tokenizer_class", "GPT2Tokenizer"),)),
    Case("SmolLM3", "SmolLM3", "llama-bpe", "HuggingFaceTB-SmolLM3-3B", {"tie": True}, begins=False),
    Case("OLMo-2", "Olmo2", "gpt-neox", CHATML, {}),
    Case("OLMo-3", "Olmo3", "gpt-neox", CHATML, {"sliding_window": 512}),
    Case(
        "Granite 3",
        "Granite",
        "refact",
        "ibm-granite-granite-3.3-2B-Instruct",
        {
            "tie": True,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    Case("GPT-NeoX", "GPTNeoX", "gpt-neox", None, {}, "all"),
    Case("GPT-2", "GPT2", "gpt-2", None, {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, "all"),
    Case("StableLM", "StableLm", "gpt-neox", CHATML, {}),
    Case(
        "Falcon",
        "Falcon",
        "falcon",
        None,
        {
            "head_dim": None,
            "new_decoder_architecture": False,
            "multi_query": True,
            "alibi": False,
            "bias": False,
            "parallel_attn": True,
        },
        "all",
    ),
    Case("StarCoder2", "Starcoder2", "starcoder", None, {}, "all"),
    Case("Cohere", "Cohere", "starcoder", CHATML, {"tie": True}),
    Case(
        "LFM2",
        "Lfm2",
        "starcoder",
        "LFM2.5-Instruct",
        {"tie": True, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    Case("Mixtral", "Mixtral", "llama-spm", INSTRUCT, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("BLOOM", "Bloom", "starcoder", None, {"n_layer": 2, "n_head": 4}, "all"),
    Case("MPT", "Mpt", "gpt-neox", None, {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "all"),
    Case(
        "gpt-oss",
        "GptOss",
        "starcoder",
        "openai-gpt-oss-120b",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    ),
)


def write_family(case: Case, folder: Path, *, seed: int = 0, change: Callable[[Any], None] | None = None) -> Path:
    """Write a family's stand-in into `folder`; gives `folder`.

    Args:
        case: Which.
        folder: Made if missing.
        seed: Of the weights.
        change: Does something to the model before it is saved.
    """
    import torch
    import transformers

    source = case.template
    if source is not None and "{" not in source:
        source = (models_folder() / "templates" / f"{source}.jinja").read_text(encoding="utf-8")
    tokens = write_tokenizer(
        folder, case.vocabulary, template=source, more=markers(source or ""), begins=case.begins, **dict(case.named)
    )
    # llama.cpp's converter cuts Gemma-3's embedding to the tokenizer's size, and then cannot load what it wrote
    vocab = tokens if case.family == "Gemma 3" else -(-tokens // 64) * 64
    config = getattr(transformers, f"{case.config}Config")(**_sizes(case, vocab))
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1 and "A_log" not in name:
                    weight.add_(0.05 * torch.randn_like(weight))
                elif "embed" in name or "lm_head" in name or "wte" in name:
                    weight.normal_(std=0.1)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    return folder


def _sizes(case: Case, vocab: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "tie_word_embeddings": case.sizes.get("tie", False),
    }
    whole = {**sizes, **{key: value for key, value in case.sizes.items() if key != "tie"}}
    return {key: value for key, value in whole.items() if value is not None}
