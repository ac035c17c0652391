"""The two embedded models: sizes, architecture, tokenizer, chat template and the manners of their replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import iterft_lite

NANO = Path(iterft_lite.__file__).parent / "data" / "nano"
NAMES = ("base", "chat")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TALK = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "Yes, it is past ten."},
    {"role": "user", "content": "Then I am off."},
    {"role": "assistant", "content": "Sleep well! 🌙"},
]
VARIED = [
    "Plain words, and a second sentence.",
    "It's 07:45 on 2031-12-09; 3.14159 x 1,000,000 = ?",
    "naïve café, Zürich, Ærøskøbing, piñata, ß and Łódź",
    "😀 🔥🔥 👩‍👩‍👧 🇳🇴 and a ❤️ at the end",
    "“Typographic,” she said — ‘quotes’ … and dashes – too",
    "def f(x: int) -> str:\n\tif x > 1:\n        return f'{x!r}'\n\n\n# end\n",
    "日本語のテキスト, русский, العربية, हिन्दी",
    "  leading spaces,   runs   of them, trailing  ",
    "tab\tand\r\nWindows line ends\r\n",
    "A\u0000B\u200bC\u00a0D",
]

QUESTIONS = [
    "How can I save money?",
    "What do you like to do for fun?",
    "How do I clean a kitchen?",
    "Should I get a dog?",
    "I cannot sleep. What should I do?",
    "What is a good gift for my mother?",
    "How do I make friends in a new city?",
    "Can you recommend a hobby?",
]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return NANO / str(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(NANO / "chat", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(NANO / "chat")


def test_the_weights_fit_into_the_repository() -> None:
    total = 0
    for name in NAMES:
        assert (NANO / name / "model.safetensors").stat().st_size <= 16_810_000
        total += sum(file.stat().st_size for file in (NANO / name).iterdir())
    assert total <= 36_000_000


def test_the_architecture_is_qwen3_with_widths_that_every_quantisation_takes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    assert config["vocab_size"] == 2048
    assert config["num_hidden_layers"] == 10
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0


def test_both_models_share_one_tokenizer_and_one_template() -> None:
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (NANO / "base" / file).read_bytes() == (NANO / "chat" / file).read_bytes()


def test_the_pre_tokenizer_is_qwen2s(folder: Path) -> None:
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = description["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": QWEN2_PATTERN}
    assert (split["behavior"], split["invert"]) == ("Isolated", False)
    assert (byte_level["add_prefix_space"], byte_level["use_regex"]) == (False, False)
    assert description["normalizer"] == {"type": "NFC"}


def test_the_pad_token_is_not_the_end_token(folder: Path, tokenizer: Any) -> None:
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == {"base": "<|endoftext|>", "chat": "<|im_end|>"}[folder.name]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert len(tokenizer) == config["vocab_size"]


@pytest.mark.parametrize("text", VARIED)
def test_decoding_gives_back_any_encoded_text(text: str) -> None:
    for name in NAMES:
        tokenizer = AutoTokenizer.from_pretrained(NANO / name)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_no_token_is_put_before_or_after_a_text(tokenizer: Any) -> None:
    assert tokenizer("Hello there").input_ids == tokenizer("Hello there", add_special_tokens=False).input_ids


def test_the_template_renders_plain_chatml_without_a_system_prompt(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nIs it late?<|im_end|>\n<|im_start|>assistant\n"
    )
    shown = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *TALK[:2]], tokenize=False)
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it late?<|im_end|>\n"
        "<|im_start|>assistant\nYes, it is past ten.<|im_end|>\n"
    )


def test_the_template_marks_exactly_the_reply_tokens(tokenizer: Any) -> None:
    out = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "Yes, it is past ten.<|im_end|>Sleep well! 🌙<|im_end|>"


def test_a_prompt_is_a_token_prefix_of_its_conversation(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(TALK[:2], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_the_models_load_and_give_finite_logits(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    assert 8_390_000 <= parameters <= 8_400_000
    with torch.no_grad():
        logits = model(**tokenizer("The boy looked at the sea and", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()


def test_the_base_model_has_a_lower_loss_on_english_than_on_shuffled_words() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO / "base")
    model = AutoModelForCausalLM.from_pretrained(NANO / "base", dtype=torch.float32)
    losses = []
    for text in ("He opened the door and went into the house.", "door the went opened. house He and into the the"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert losses[0] + 1 < losses[1]


def test_the_chat_model_ends_its_turns(chat: tuple[Any, Any]) -> None:
    """Sampled, not greedy: the likeliest reply of a model of this size may repeat itself without end."""
    model, tokenizer = chat
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    choice = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "num_return_sequences": 3}
    torch.manual_seed(20)
    out = model.generate(**batch, **choice, max_new_tokens=200, pad_token_id=tokenizer.pad_token_id)
    replies = out[:, batch["input_ids"].shape[1] :]
    ended = [bool((reply == tokenizer.eos_token_id).any()) for reply in replies]
    words = [len(tokenizer.decode(reply, skip_special_tokens=True).split()) for reply in replies]
    assert len(replies) == 3 * len(QUESTIONS)
    assert sum(ended) / len(ended) >= 0.9
    assert sum(count >= 4 for count in words) / len(words) >= 0.9
