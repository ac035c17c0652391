"""Seventy published chat templates: what is trained, asked, stopped on and judged is one text, or the template is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import ExportError, ModelError
from iterft_lite.experiment.rows import Message
from tests.real_tokenizers import markers, models_folder

APART, ENDLESS, OPEN, REFUSES = "cannot be told apart", "would not stop", "leaves a thought open", "refuses a chat"

REFUSED = {
    "Apriel-1.6-15b-Thinker-fixed": APART,  # asks with "Here are my reasoning steps:", which replies do not have
    "Cohere2MoE": APART,
    "CohereForAI-c4ai-command-r-plus-tool_use": REFUSES,  # for chats with tools only
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": APART,
    "MiniMax-M2": APART,
    "NVIDIA-Nemotron-Nano-v2": OPEN,
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": REFUSES,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": REFUSES,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": APART,
    "deepseek-ai-DeepSeek-V3.2": APART,
    "fireworks-ai-llama-3-firefunction-v2": REFUSES,
    "llama-cpp-deepseek-r1": APART,
    "llama-cpp-rwkv-world": ENDLESS,
}
"""Templates that no reply can be trained with, and why."""

OPENINGS = {
    "openai-gpt-oss-120b": "<|channel|>final<|message|>",
    "Kimi-K2-Thinking": "<think></think>",
    "StepFun3.5-Flash": "\n</think>\n",
    "meetkai-functionary-medium-v3.2": "all\n",
    "MiniMax-M3": "</mm:think>",
}
"""What some put of their own between the generation prompt and a reply."""

TAILS = {
    "microsoft-Phi-3.5-mini-instruct": ("", "<|end|>"),
    "unsloth-Apriel-1.5": ("\n", "<|end|>"),
    "GigaChat3-10B-A1.8B": ("", "<|message_sep|>"),
    "GLM-4.6": ("", "<|user|>"),  # it leaves a turn open until the next one
    "Apertus-8B-Instruct": ("", "<|assistant_end|>"),
}
"""White space and token that end a reply, where they are easily missed."""

SAID = "It is 1,024: a power of two.\n\nIs it?"
CHATS = (
    (Message("user", "What is 2 to the 10th?"),),
    (Message("user", "One"), Message("assistant", "Two"), Message("user", "Three <|im_end|> </s> four")),
)


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Of the templates that llama.cpp's source package carries."""
    try:
        return sorted(path.stem for path in (models_folder() / "templates").glob("*.jinja"))
    except ExportError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(
        models.BPE(vocab={text: place for place, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return folder


def tokenizer_of(name: str, folder: Path) -> TrainingTokenizer:
    """Single bytes, and the template with its markers as special tokens."""
    source = (models_folder() / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    texts = dict.fromkeys(["<s>", "</s>", *markers(source)])
    added = {str(1000 + place): {"content": text, "special": True} for place, text in enumerate(texts)}
    config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return TrainingTokenizer(str(folder))


def test_published_chat_templates_render_alike_everywhere_or_are_refused(names: list[str], alphabet: Path) -> None:
    assert set(REFUSED) < set(names)
    assert len(names) - len(REFUSED) >= 50
    wrong = {name: found for name in names if (found := what_is_wrong(name, alphabet))}
    assert wrong == {}


def what_is_wrong(name: str, alphabet: Path) -> str:
    """Why a template is not what this file says of it, or ""."""
    ours = tokenizer_of(name, alphabet)
    try:
        turn = ours.turn
    except ModelError as error:
        return "" if REFUSED.get(name, "not in the list") in error.message else error.message
    if name in REFUSED:
        return "is not refused"
    if OPENINGS.get(name, turn.opening) != turn.opening or TAILS.get(name, (turn.trail, turn.end)) != (turn.trail, turn.end):
        return f"has {turn}"
    return "; ".join(filter(None, (_differs(ours, chat) for chat in CHATS)))


def _differs(ours: TrainingTokenizer, chat: tuple[Message, ...]) -> str:
    """What is not one and the same text of a chat with its reply, or ""."""
    prompt, reply = ours.reply_ids(chat, SAID)
    closed = [*chat, Message("assistant", SAID)]
    texts = [ours.render(one, generation_prompt=False) for one in (closed, [*closed, Message("user", "Go on.")])]
    held = {
        "asked with other tokens than are trained before a reply": prompt == ours.chat_ids(chat),
        "does not end where it is stopped": reply.index(ours.turn.end_id) == len(reply) - 1 and ours.turn.end_id in ours.ends,
        "judged by another text": ours.answer(reply[:-1], after=prompt) == SAID,
        "trained on what the template does not say": any(
            ours.library.decode(reply, skip_special_tokens=False) in text for text in texts
        ),
    }
    return "; ".join(words for words, holds in held.items() if not holds)
