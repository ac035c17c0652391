"""Tiny random models with real files: what a Hugging Face folder and a PEFT adapter folder hold, in well under a second each.

Widths are multiples of 256, so that K-quants apply. Norms and biases are random too: a writer that forgets one is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXTS = (
    "The harbour was quiet at dawn. Two gulls stood on the wall and waited for the boats to come in.",
    "Could you tell me how bread rises? Yeast eats sugar, makes gas, and the dough holds the gas like a net of balloons.",
    "In 1987 the river flooded 14 villages; nobody was hurt, but the bridge at Aster Mill wasn't rebuilt until 1993.",
    "def area(width, height):\n    return width * height\n\n# two rooms, 3.5 m and 4.25 m\n",
    "Über die Brücke führt ein schmaler Weg; là-bas, un café. こんにちは世界。 Ещё одно предложение.",
    "We'll take the early train, she's bringing sandwiches, and they'd better not forget the map!\n\nSee you at 7:30.",
    "A small garden needs water, light and patience. You can start with herbs: basil, mint, thyme, sage.",
)
"""What the tokenizer is trained on."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen3 cut text before the byte pairs are merged."""

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""The chat template, with the markers of what is trained on."""

ARCHITECTURES = ("qwen3", "qwen2", "llama", "gemma3")


def tiny_model(
    folder: Path,
    architecture: str = "qwen3",
    *,
    hidden: int = 256,
    layers: int = 2,
    vocab: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    chat: bool = True,
) -> Path:
    """Write a random model with its tokenizer into `folder`; gives `folder`.

    Args:
        folder: Made if missing.
        architecture: One of `ARCHITECTURES`. Qwen3 and Gemma-3 share their embedding with the output, the others do not.
        hidden: Width; heads are 64 wide.
        layers: Blocks.
        vocab: Rows of the embedding; the tokenizer has a few fewer, as real models do (Gemma-3: as many).
        seed: Of the weights.
        dtype: Of the stored weights: "float32", "bfloat16" or "float16".
        chat: With the ChatML template; a base model has none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(vocab - 8, chat=chat)
    # llama.cpp's converter cuts Gemma-3's embedding to the tokenizer's size, and then cannot load what it wrote
    config = _config(architecture, hidden, layers, len(tokenizer) if architecture == "gemma3" else vocab)
    config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>" if chat else "<|endoftext|>")
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.add_(0.1 * torch.randn_like(weight))
                elif "embed_tokens" in name or "lm_head" in name:
                    weight.normal_(std=0.1)  # logits of about one unit
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(
    model: Path,
    folder: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    **settings: Any,
) -> Path:
    """Write a PEFT adapter for a tiny model, with random A and random B; gives `folder`.

    Args:
        model: Folder of the model.
        folder: Made if missing.
        rank: Of the adapter.
        seed: Of its weights.
        alpha: The adapter is scaled by alpha / rank.
        targets: Which projections.
        settings: More of peft's `LoraConfig` (`use_rslora=True`).
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(base, config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                    weight.normal_(std=0.08)
    adapted.save_pretrained(folder)
    return folder


def tiny_tokenizer(vocab: int = 504, *, chat: bool = True) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` tokens that cuts text as Qwen2 does.

    Chat: ends turns with `<|im_end|>`; base: ends texts with `<|endoftext|>`. Pads with `<|pad|>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(specials), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>" if chat else "<|endoftext|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def _config(architecture: str, hidden: int, layers: int, vocab: int) -> Any:
    import transformers

    heads = hidden // 64
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.06,
    }
    if architecture == "qwen3":
        return transformers.Qwen3Config(**sizes, tie_word_embeddings=True)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**sizes, tie_word_embeddings=False)
    if architecture == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
        return transformers.LlamaConfig(**sizes, tie_word_embeddings=False, rope_parameters=rope)
    if architecture == "gemma3":
        return transformers.Gemma3TextConfig(**sizes, tie_word_embeddings=True, query_pre_attn_scalar=64, sliding_window=512)
    raise ValueError(f"no tiny model of the architecture `{architecture}`: {', '.join(ARCHITECTURES)}")
