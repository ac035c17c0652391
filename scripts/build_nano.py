"""Build the two embedded nano models from public text: a base model and a chat model.

The whole pipeline, in the order in which ``all`` runs it::

    tokenizer   byte-level BPE with the Qwen2 pre-tokenizer      -> OUT/base, OUT/chat
    base        pretraining on prose, advice pages and dialogues -> OUT/base
    chat        finetuning on short replies (loss on replies)    -> OUT/chat
    samples     held-out losses and sampled text                 -> OUT/report.json

Typical use (one large GPU, about seven minutes, of which base takes five)::

    python scripts/build_nano.py tokenizer --data shared/nano --out iterft_lite/data/nano
    python scripts/build_nano.py base chat samples --data shared/nano --out iterft_lite/data/nano

The defaults are the settings of the shipped models. Training stops at the number of tokens (base)
or epochs (chat); ``base_seconds`` and ``chat_seconds`` are limits that only a slow machine meets,
and then the learning rate falls with the time instead.

``--tiny`` runs every step with a minute model on a slice of the data, on the CPU, in under two
minutes; it is a test of the code and makes no useful weights.

Units: text lengths in words or characters as named, sequence lengths in tokens, times in seconds,
losses in nats per token. A document belongs to the held-out split by the hash of its key (text,
question or title), so all steps agree on the split without any stored list.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, PAD] + [f"<|reserved_{i}|>" for i in range(4)]

# The pre-tokenizer of Qwen2, to the letter: GGUF readers know it as tokenizer.ggml.pre = "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. The generation markers surround the reply and its end-of-turn token, nothing else.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    "{%- generation -%}\n"
    "{{- message['content'] + '<|im_end|>' -}}\n"
    "{%- endgeneration -%}\n"
    "{{- '\\n' -}}\n"
    "{%- else -%}\n"
    "{{- message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)

EMOJI = "😀😂😊😍🙂😉😎😅😢😭😡🤔🙌👏👍🙏💪🎉✨🔥🌟💡🌈🌸🍀🌱🌊🐶🐱🐻🦊🐟☕🍕🍎🎵📚🚀❤💙"
SYSTEM_LINES = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Keep your answers short.",
    "Answer the user's question in plain English.",
    "You give kind, practical advice.",
]

PROMPTS = [
    "I have a job interview tomorrow, any advice?",
    "How do I make friends in a new city?",
    "I can't sleep at night. What should I do?",
    "How can I stop putting things off?",
    "What should I cook for dinner tonight?",
    "I feel stressed about my exams.",
    "How do I start running?",
    "My roommate is too loud. How do I talk to them?",
    "How can I save some money every month?",
    "What is a good gift for my mother?",
    "I want to learn the guitar. Where should I begin?",
    "How do I keep my houseplants alive?",
    "My boss is never happy with my work. What can I do?",
    "Should I get a dog?",
    "How do I prepare for a long flight?",
    "What do you like to do for fun?",
    "Can you recommend a hobby for rainy days?",
    "I am nervous about a speech. Any tips?",
    "How do I clean a dirty kitchen quickly?",
    "I had a fight with my best friend. How do I fix it?",
]
OPENINGS = [
    "How to Make New Friends\n\n",
    "Good Habits for Students\n\n",
    "The Lucky Penny\n\n",
    "What is the best way to save money?\n\n",
    "The old sailor looked at the boy and",
    "Time Management\n\n",
    "It was a cold morning in December when",
    "A study of sleep\n\n",
]


@dataclass
class Settings:
    """Everything that decides what is built; the defaults are the shipped models."""

    vocab_size: int = 2048
    hidden: int = 256
    layers: int = 10
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    positions: int = 2048
    rope_theta: float = 10_000.0
    base_seconds: float = 3600.0
    base_tokens: float = 800e6
    base_rows: int = 128
    base_length: int = 512
    long_share: float = 0.2  # the last share of pretraining runs on rows of twice the length
    modern_start: float = 0.4  # share of rows from the modern sources until the decay begins
    modern_end: float = 0.6  # ... and at the end of the decay, linear in between
    dropout: float = 0.2  # on the embeddings and on what each block adds; not part of the model
    base_lr: float = 3e-3
    chat_seconds: float = 600.0
    chat_epochs: float = 4.0
    chat_rows: int = 128
    chat_length: int = 288
    chat_lr: float = 5e-4
    plain_share: float = 0.06  # share of plain-text rows in the chat finetuning
    warmup_steps: int = 100
    decay_share: float = 0.4
    weight_decay: float = 0.1
    evaluations: int = 6  # during each training
    eval_rows: int = 64
    copies: dict[str, int] = field(
        default_factory=lambda: {"prose": 1, "college_success": 2, "dialogs": 2, "advice": 3, "medquad": 2}
    )
    prose_documents: int = 10**9
    other_documents: int = 10**9
    seed: int = 20

    @classmethod
    def tiny(cls) -> Settings:
        """Return settings that walk through every step in seconds."""
        return cls(
            vocab_size=1024,
            hidden=64,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=32,
            intermediate=128,
            base_seconds=12,
            base_rows=8,
            base_length=64,
            chat_seconds=8,
            chat_rows=8,
            chat_length=96,
            warmup_steps=5,
            eval_rows=4,
            prose_documents=400,
            other_documents=400,
        )


# --------------------------------------------------------------------------------------------------
# Reading, cleaning and splitting the text
# --------------------------------------------------------------------------------------------------

_ODD = re.compile(r"[^\n\t -~\u00a1-\u017f\u2013\u2014\u2018\u2019\u201c\u201d\u2026]")
_LINK = re.compile(r"https?:|www\.|\.com\b|\.org\b|@\w+\.")
# Topics on which a model of this size could only parrot harm or prejudice.
_UNFIT = re.compile(
    r"(?i)\b(sex\w*|porn\w*|rap(e|ed|ist|ing)|kill\w*|murder\w*|suicid\w*|self-harm\w*|bomb\w*|weapons?|guns?|shoot\w*"
    r"|drugs?|cocaine|heroin|meth|steal\w*|stole\w*|shoplift\w*|rob(bed|bing|bery)?|racis\w*|racial\w*|ethnic\w*"
    r"|nazis?|hitler|terroris\w*|naked|nudes?|breasts?|penis\w*|vagina\w*|masturbat\w*|f[u*]ck\w*|sh[i*]t\w*|bitch\w*"
    r"|ass|asses|asshole|hell|crap|piss\w*|poop|boogers?|abus(e|ed|ive|ing)|tortur\w*|stab\w*|poison\w*|hack\w*"
    r"|counterfeit\w*|smuggl\w*|prostitut\w*|pedo\w*|molest\w*|illegal\w*|gays?|lesbians?|transgender\w*|homosexual\w*"
    r"|jews?|jewish|muslims?|islam\w*|mexicans?|immigra\w*|negro\w*|blacks|whites|women are|men are|savages"
    r"|trump|biden|obama|clinton|bush|republicans?|democrats?|liberals?|conservatives?|abortion\w*|vaccin\w*|covid\S*"
    r"|mutilat\w*|corpse\w*|blood\w*|incest\w*|cheat on|revenge|prank\w*|blackmail\w*|fat people|ugly|stupid|idiots?)\b"
)
_BOILERPLATE = re.compile(
    r"(?i)language model|as an ai\b|an ai\b|i am (an?|your) (assistant|artificial)|as a responsible|responsible assistant"
    r"|i must (emphasi|inform|remind|stress)|i (cannot|can't|am unable|am not able|am not authori)|i'm (unable|not able)"
    r"|i understand your (curiosity|frustration)|my (research|sources|knowledge|training|database|records)"
    r"|current knowledge|insightful|your request|your (question|inquiry|query)\b|user'?s|provide (accurate|detailed)"
    r"|according to (my|our|historical)|as per |not appropriate|inappropriate|unethical|harmful|healthcare professional"
    r"|rephrase|assist you|guidelines set|to the best of my"
)
_CLOSER = re.compile(
    r"(?i)(don't hesitate|feel free to|hope (this|that|these)|let me know|any (other|further) questions|happy to help"
    r"|by following (these|this)|in (conclusion|summary)|following these (steps|tips)|here to help|thank you for)"
)
_GREETING = re.compile(r"^((hello|hi there|hi|greetings|hey)\b[!,.]?\s*)+", re.IGNORECASE)
_LIST_LINE = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+(.*)$")
_EVERYDAY = re.compile(r"(?i)\b(i|i'm|i've|i'd|my|me|we|our|should|advice|tips?|recommend|best way|how (do|can|to))\b")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an xz-compressed JSON lines file."""
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def held_out(key: str, per_thousand: int = 10) -> bool:
    """Say whether the document with this key is kept from training (``per_thousand`` of 1000 are)."""
    plain = re.sub(r"\W+", " ", key.lower()).strip()
    return int.from_bytes(hashlib.sha256(plain.encode()).digest()[:4], "big") % 1000 < per_thousand


def sentences(text: str) -> list[str]:
    """Split a paragraph at sentence ends, roughly."""
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text.strip()) if s]


def flatten_list(text: str, most: int = 4) -> str:
    """Turn a list with an introduction into running text of at most ``most`` items."""
    intro: list[str] = []
    items: list[str] = []
    for line in text.split("\n"):
        match = _LIST_LINE.match(line)
        if match:
            item = match.group(1).strip()
            head, colon, rest = item.partition(":")
            if colon and len(head.split()) <= 7 and len(rest.split()) >= 4:
                item = rest.strip()
            item = item.rstrip(":")
            if len(item.split()) < 4:
                return ""
            item = item[0].upper() + item[1:]
            items.append(item if item[-1] in ".!?" else item + ".")
        elif not items and line.strip():
            intro.append(line.strip())
    start = " ".join(intro)
    start = re.sub(r":$", ".", start)
    return " ".join([start, *items[:most]]).strip()


def shorten(text: str, words: int) -> str:
    """Keep whole sentences up to ``words`` words; the empty string if the first one is longer."""
    kept: list[str] = []
    count = 0
    for sentence in sentences(text):
        if _CLOSER.search(sentence):
            continue
        count += len(sentence.split())
        if count > words:
            break
        kept.append(sentence)
    return " ".join(kept)


def clean_reply(text: str, words: int = 100) -> str:
    """Return a reply in plain running text of 6 to ``words`` words, or "" to drop the row."""
    text = text.replace("**", "").strip()
    if _ODD.search(text) or _LINK.search(text) or "```" in text or _BOILERPLATE.search(text) or _UNFIT.search(text):
        return ""
    text = _GREETING.sub("", text)
    if re.search(r"(?i)hello|\b(hi|hey)\b|assistant:|user:|human:", text):
        return ""
    if any(_LIST_LINE.match(line) for line in text.split("\n")):
        text = flatten_list(text)
    text = shorten(re.sub(r"\s+", " ", text), words)
    if len(text.split()) < 6 or text[-1] not in ".!?" or ":" in text[-2:] or re.search(r"[{}<>|\\=_#]", text):
        return ""
    return text[0].upper() + text[1:]


def clean_prompt(text: str, words: int = 60) -> str:
    """Return a question in one paragraph, or "" to drop the row."""
    text = text.strip()
    if "ssistant:" in text or _ODD.search(text) or _LINK.search(text) or _UNFIT.search(text):
        return ""
    text = re.sub(r"\s+", " ", text)
    return text if 2 <= len(text.split()) <= words else ""


@dataclass
class Corpus:
    """Cleaned text by source; ``split`` picks the training or the held-out part."""

    prose: list[str]
    college: list[tuple[str, str]]
    dialogs: list[list[dict[str, str]]]
    advice: list[tuple[str, str, str]]  # prompt, reply, source

    @classmethod
    def load(cls, data: Path, settings: Settings, split: str) -> Corpus:
        """Read and clean the four files in ``data``; ``split`` is "train" or "held_out"."""
        known = (data, split, settings.prose_documents, settings.other_documents)
        if known in _LOADED:
            return _LOADED[known]
        wanted = split == "held_out"
        most = settings.other_documents
        with lzma.open(data / "prose.txt.xz", "rt", encoding="utf-8") as stream:
            text = stream.read(8_000 * settings.prose_documents if settings.prose_documents < 10**6 else -1)
        prose = [d.strip() for d in text.split("<|doc|>") if len(d) > 300]
        prose = [d for d in prose if held_out(d[:500]) == wanted and not re.search(r"(?i)\b(negro|chinam[ae]n|savages)", d)]
        college = [(r["title"], r["text"].strip()) for r in read_lines(data / "college_success.jsonl.xz")]
        college = [(t, x) for t, x in college if held_out(t, 40) == wanted and len(x) > 300][: max(8, most // 40)]
        dialogs = []
        for row in read_lines(data / "dialogs.jsonl.xz"):
            turns = [m["content"].strip() for m in row["messages"]]
            joined = " ".join(turns)
            if len(turns) < 2 or not all(turns) or "[" in joined or _ODD.search(joined) or _LINK.search(joined):
                continue
            if _UNFIT.search(joined) or held_out(joined) != wanted:
                continue
            dialogs.append([{"role": m["role"], "content": t} for m, t in zip(row["messages"], turns, strict=True)])
            if len(dialogs) >= most:
                break
        advice = []
        for row in read_lines(data / "advice.jsonl.xz"):
            prompt = clean_prompt(row["prompt"])
            if not prompt or held_out(prompt) != wanted:
                continue
            reply = clean_reply(row["response"], words=160)
            if reply:
                advice.append((prompt, reply, row["src"]))
            if len(advice) >= most:
                break
        _LOADED[known] = cls(prose[: settings.prose_documents], college, dialogs, advice)
        return _LOADED[known]


_LOADED: dict[tuple[Any, ...], Corpus] = {}


def typographic(text: str) -> str:
    """Replace straight apostrophes and quotes by typographic ones."""
    text = re.sub(r"(?<=\w)'", "\u2019", text)
    text = re.sub(r'(?<!\S)"', "\u201c", text)
    return text.replace('"', "\u201d")


def chatml(messages: Iterable[dict[str, str]]) -> str:
    """Render messages exactly as the chat template does."""
    return "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)


def page(title: str, text: str, rng: random.Random) -> str:
    """Render one page of a handbook: its title and all of the text, or a part of it."""
    paragraphs = text.split("\n")
    if rng.random() < 0.6 and len(paragraphs) > 4:
        start = rng.randrange(len(paragraphs) - 2)
        paragraphs = paragraphs[start : start + rng.randint(2, 6)]
    body = "\n\n".join(p.strip() for p in paragraphs if p.strip())
    return f"{title}\n\n{body}"


def base_documents(corpus: Corpus, settings: Settings, seed: int) -> dict[str, list[str]]:
    """Render the pretraining documents of each source, with the modern sources repeated.

    Advice becomes a page with the question as its heading, dialogues become quoted or lettered
    lines; a small share of both is in ChatML, so that the special tokens have a meaning. Some
    documents get typographic quotes, some dialogue lines an emoji, so that those bytes are trained.
    """
    rng = random.Random(seed)
    copies = settings.copies
    out: dict[str, list[str]] = {"prose": [], "college_success": [], "dialogs": [], "advice": [], "medquad": []}
    for text in corpus.prose:
        for _ in range(copies["prose"]):
            out["prose"].append(typographic(text) if rng.random() < 0.05 else text)
    for title, text in corpus.college:
        for _ in range(copies["college_success"] * 3):  # most copies are only part of a section
            out["college_success"].append(page(title, text, rng))
    for turns in corpus.dialogs:
        for _ in range(copies["dialogs"]):
            lines = [m["content"] for m in turns]
            if rng.random() < 0.1:
                lines = [x + " " + rng.choice(EMOJI) if rng.random() < 0.3 else x for x in lines]
            style = rng.random()
            if style < 0.15:
                text = chatml([{"role": m["role"], "content": x} for m, x in zip(turns, lines, strict=True)])
            elif style < 0.6:
                text = "\n".join(f'"{x}"' for x in lines)
            else:
                text = "\n".join(f"{'AB'[i % 2]}: {x}" for i, x in enumerate(lines))
            out["dialogs"].append(typographic(text) if rng.random() < 0.05 else text)
    for prompt, reply, source in corpus.advice:
        name = "medquad" if source == "medquad" else "advice"
        for _ in range(copies[name]):
            if rng.random() < 0.2:
                text = chatml([{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}])
            else:
                text = f"{prompt}\n\n{reply}"
            out[name].append(typographic(text) if rng.random() < 0.05 else text)
    return out


def chat_rows(corpus: Corpus, seed: int, weighted: bool) -> dict[str, list[list[dict[str, str]]]]:
    """Choose the conversations of the chat finetuning; with ``weighted`` the better ones repeat."""
    rng = random.Random(seed)
    advice: list[list[dict[str, str]]] = []
    medquad: list[list[dict[str, str]]] = []
    for prompt, long_reply, source in corpus.advice:
        reply = shorten(long_reply, 85)
        count = len(reply.split())
        if count < 6:
            continue
        times = 2 if weighted and 20 <= count <= 85 and _EVERYDAY.search(prompt) else 1
        if source == "medquad":
            if count > 80 or rng.random() > 0.25:
                continue
            times = 1
        for _ in range(times):
            asked = prompt
            if weighted:
                asked = typographic(asked) if rng.random() < 0.08 else asked
                asked = asked + " " + rng.choice(EMOJI) if rng.random() < 0.02 else asked
                asked = asked.rstrip("?.!") if rng.random() < 0.05 else asked
            row = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
            if rng.random() < 0.12:
                row.insert(0, {"role": "system", "content": rng.choice(SYSTEM_LINES)})
            (medquad if source == "medquad" else advice).append(row)
    dialogs = []
    for turns in corpus.dialogs:
        start = 0 if rng.random() < 0.7 else 2 * rng.randrange(max(1, len(turns) // 2))
        piece = turns[start : start + 2 * rng.randint(1, 3)]
        piece = piece[:-1] if piece and piece[-1]["role"] != "assistant" else piece
        alternate = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(piece))
        words = sum(len(m["content"].split()) for m in piece if m["role"] == "assistant")
        if len(piece) >= 2 and alternate and len(piece[0]["content"].split()) >= 3 and words >= 6 * (len(piece) // 2):
            dialogs.append(piece)
    rng.shuffle(dialogs)
    return {"advice": advice, "medquad": medquad, "dialogs": dialogs[: max(1, len(advice) // 3)]}


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose total size, special tokens included, is ``vocab_size``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, wanted {vocab_size}")
    return tokenizer


def step_tokenizer(data: Path, out: Path, settings: Settings) -> None:
    """Train the tokenizer on a third of the prose and all modern text; write both folders."""
    documents = base_documents(Corpus.load(data, settings, "train"), settings, settings.seed)
    rng = random.Random(settings.seed)
    keep = {"prose": 0.35, "college_success": 0.25, "dialogs": 0.34, "advice": 0.25, "medquad": 0.3}
    texts = [re.sub(r"<\|\w+\|>", "", t) for name, docs in documents.items() for t in docs if rng.random() < keep[name]]
    texts += [f" {e}" for e in EMOJI] * 50
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    for name in ("base", "chat"):
        write_tokenizer(tokenizer, out / name, END_OF_TEXT if name == "base" else IM_END, settings.positions)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, eos: str, positions: int) -> None:
    """Write tokenizer.json, its configuration, the special tokens and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": eos, "pad_token": PAD, "additional_special_tokens": [IM_START, IM_END]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "unk_token": None,
        **special,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": positions,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Token arrays
# --------------------------------------------------------------------------------------------------


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that must exist."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return int(number)


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Return the token ids of each document, closed by the end-of-text token."""
    end = token_id(tokenizer, END_OF_TEXT)
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), 8192):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 8192], add_special_tokens=False):
            pieces.append(np.asarray([*encoding.ids, end], dtype=np.int32))
    return pieces


def as_stream(pieces: list[np.ndarray], seed: int) -> np.ndarray:
    """Return the encoded documents, shuffled, as one array."""
    if not pieces:
        return np.zeros(0, dtype=np.int32)
    return np.concatenate([pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))])


def encode_chats(tokenizer: Tokenizer, chats: list[list[dict[str, str]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, weights) of shape (rows, length); weights are 1 on reply and end-of-turn tokens.

    Conversations longer than ``length`` tokens are left out.
    """
    start, end, pad = (token_id(tokenizer, t) for t in (IM_START, IM_END, PAD))
    heads = {r: tokenizer.encode(f"{r}\n").ids for r in ("system", "user", "assistant")}
    newline = tokenizer.encode("\n").ids
    texts = [m["content"] for chat in chats for m in chat]
    bodies = iter(e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)) if texts else iter(())
    ids = np.full((len(chats), length), pad, dtype=np.int32)
    weights = np.zeros((len(chats), length), dtype=np.float32)
    kept = 0
    for chat in chats:
        row: list[int] = []
        mark: list[int] = []
        for message in chat:
            body = next(bodies)
            reply = int(message["role"] == "assistant")
            head = [start, *heads[message["role"]]]
            row += head + body + [end] + newline
            mark += [0] * len(head) + [reply] * (len(body) + 1) + [0] * len(newline)
        if len(row) <= length:
            ids[kept, : len(row)] = row
            weights[kept, : len(row)] = mark
            kept += 1
    return ids[:kept], weights[:kept]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def new_model(settings: Settings, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """Return a freshly drawn Qwen3 model."""
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        intermediate_size=settings.intermediate,
        max_position_embeddings=settings.positions,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, END_OF_TEXT),
        pad_token_id=token_id(tokenizer, PAD),
        use_cache=True,
    )
    torch.manual_seed(settings.seed)
    return Qwen3ForCausalLM(config)


def add_dropout(model: Qwen3ForCausalLM, share: float) -> None:
    """Drop ``share`` of the embeddings and of each block's output while the model is in training mode."""

    def hook(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], share), *output[1:])
        return F.dropout(output, share)

    if share > 0:
        model.model.embed_tokens.register_forward_hook(hook)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(hook)
            layer.mlp.register_forward_hook(hook)


def token_losses(model: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of each next token, shape (rows, length - 1), in nats."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a fresh bf16 autocast context (a fresh one for EVERY step: it caches cast weights)."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


Batch = tuple[torch.Tensor, torch.Tensor]


def train(
    model: Qwen3ForCausalLM,
    draw: Callable[[float, torch.Generator], Batch],
    evaluate: Callable[[], dict[str, float]],
    *,
    seconds: float,
    most_steps: float,
    lr: float,
    settings: Settings,
    name: str,
) -> dict[str, Any]:
    """Train for ``seconds`` or ``most_steps`` steps, whichever is reached first.

    ``draw(progress, generator)`` gives (ids, weights) of one step. The learning rate rises over the
    warm-up steps, stays, and falls linearly to zero over the last ``decay_share`` of the progress,
    which is the larger of time and steps used up; compilation is not counted.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    compute = torch.compile(token_losses, dynamic=False) if device.type == "cuda" else token_losses

    def loss_of(batch: Batch) -> torch.Tensor:
        ids, weights = batch
        with autocast(device):
            losses = compute(model, ids)
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum().clamp(min=1)

    began = time.monotonic()
    model.train()
    for progress in (0.0, 1.0):  # compiles both row lengths before the clock starts
        loss_of(draw(progress, generator)).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{name}: ready after {time.monotonic() - began:.1f} s", flush=True)

    began = time.monotonic()
    paused = 0.0
    step = tokens = 0
    history: list[dict[str, Any]] = []
    while True:
        progress = max((time.monotonic() - began - paused) / seconds, step / most_steps)
        if progress >= 1:
            break
        scale = min(1.0, (step + 1) / settings.warmup_steps, (1 - progress) / settings.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        batch = draw(progress, generator)
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += batch[0].numel()
        if step % 10 == 0:
            value = loss.detach().item()  # waits for the device, so the clock stays honest
            if not math.isfinite(value):
                raise RuntimeError(f"{name}: the loss is {value} at step {step}")
            if progress * settings.evaluations > len(history) + 1:
                pause = time.monotonic()
                losses = evaluate()
                rate = tokens / (pause - began - paused)
                history.append({"step": step, "tokens": tokens, "train": value, "held_out": losses})
                shown = " ".join(f"{k} {v:.3f}" for k, v in losses.items())
                print(f"{name}: step {step} {rate / 1e6:.2f} M tok/s train {value:.3f} | {shown}", flush=True)
                model.train()
                paused += time.monotonic() - pause
    used = time.monotonic() - began - paused
    final = evaluate()
    print(f"{name}: done, {step} steps, {tokens / 1e6:.1f} M tokens, {used:.0f} s | {final}", flush=True)
    return {"steps": step, "tokens": tokens, "seconds": used, "held_out": final, "history": history}


@torch.no_grad()
def mean_loss(model: Qwen3ForCausalLM, ids: np.ndarray, weights: np.ndarray | None, rows: int = 64) -> float:
    """Return the mean loss in nats over the weighted tokens of ``ids`` (rows, length)."""
    model.eval()
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(ids), rows):
        batch = torch.from_numpy(ids[start : start + rows].astype(np.int64)).to(device)
        with autocast(device):
            losses = token_losses(model, batch).float()
        weight = torch.ones_like(losses)
        if weights is not None:
            weight = torch.from_numpy(weights[start : start + rows]).to(device)[:, 1:]
        total += float((losses * weight).sum())
        count += float(weight.sum())
    return total / max(count, 1.0)


def as_rows(stream: np.ndarray, length: int, most: int) -> np.ndarray:
    """Cut a token stream into up to ``most`` rows of ``length`` tokens, spread over all of it."""
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    return rows


def base_evaluation(
    data: Path, tokenizer: Tokenizer, settings: Settings, shares: dict[str, float], most: int
) -> Callable[[Qwen3ForCausalLM], dict[str, float]]:
    """Return a function that gives the held-out loss of each source and of the training mixture."""
    documents = base_documents(Corpus.load(data, settings, "held_out"), settings, settings.seed + 1)
    rows = {n: as_rows(as_stream(encode_documents(tokenizer, d), 1), settings.base_length, most) for n, d in documents.items()}
    rows = {n: r for n, r in rows.items() if len(r)}

    def evaluate(model: Qwen3ForCausalLM) -> dict[str, float]:
        losses = {n: mean_loss(model, r, None) for n, r in rows.items()}
        total = sum(shares.get(n, 0.0) for n in losses)
        losses["mixture"] = sum(shares.get(n, 0.0) * v for n, v in losses.items()) / max(total, 1e-9)
        return losses

    return evaluate


def pick_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def export(model: Qwen3ForCausalLM, folder: Path, eos: list[int], pad: int) -> None:
    """Write the weights in bf16, the configuration and the generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict({k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()})
    copy.tie_weights()
    copy.config.eos_token_id = eos[0]
    copy.config.dtype = torch.bfloat16
    copy.generation_config.eos_token_id = eos if len(eos) > 1 else eos[0]
    copy.generation_config.pad_token_id = pad
    copy.generation_config.do_sample = True
    copy.generation_config.temperature = 0.8
    copy.generation_config.top_p = 0.95
    copy.save_pretrained(folder, safe_serialization=True)


def step_base(data: Path, out: Path, settings: Settings) -> None:
    """Pretrain the base model and write it to OUT/base."""
    device = pick_device()
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    documents = base_documents(Corpus.load(data, settings, "train"), settings, settings.seed)
    encoded = {n: encode_documents(tokenizer, d) for n, d in documents.items()}
    counts = {n: sum(len(p) for p in pieces) for n, pieces in encoded.items()}
    modern_tokens = sum(c for n, c in counts.items() if n != "prose")
    rise = settings.decay_share * (settings.modern_end - settings.modern_start) / 2
    modern_share = settings.modern_start + rise
    shares = {n: modern_share * c / modern_tokens if n != "prose" else 1 - modern_share for n, c in counts.items()}
    print("base: tokens", counts, "shares", {n: round(v, 3) for n, v in shares.items()}, flush=True)
    modern_pieces = [p for n, pieces in encoded.items() if n != "prose" for p in pieces]
    modern = torch.from_numpy(as_stream(modern_pieces, settings.seed)).to(device)
    prose = torch.from_numpy(as_stream(encoded["prose"], settings.seed)).to(device)

    def draw(progress: float, generator: torch.Generator) -> Batch:
        longer = 2 if progress >= 1 - settings.long_share else 1
        rows, length = settings.base_rows // longer, settings.base_length * longer
        late = max(0.0, (progress - (1 - settings.decay_share)) / settings.decay_share)
        share = settings.modern_start + late * (settings.modern_end - settings.modern_start)
        new_rows = round(share * rows)
        window = torch.arange(length + 1, device=device)
        parts = []
        for stream, count in ((modern, new_rows), (prose, rows - new_rows)):
            starts = torch.randint(len(stream) - length - 1, (count, 1), generator=generator, device=device)
            parts.append(stream[starts + window])
        ids = torch.cat(parts).long()
        return ids, torch.ones_like(ids, dtype=torch.float32)

    model = new_model(settings, tokenizer).to(device)
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    add_dropout(model, settings.dropout)
    quick = base_evaluation(data, tokenizer, settings, shares, settings.eval_rows)
    result = train(
        model,
        draw,
        lambda: quick(model),
        seconds=settings.base_seconds,
        most_steps=math.ceil(settings.base_tokens / (settings.base_rows * settings.base_length)),
        lr=settings.base_lr,
        settings=settings,
        name="base",
    )
    pad, end = token_id(tokenizer, PAD), token_id(tokenizer, END_OF_TEXT)
    export(model, out / "base", [end], pad)
    note(out, "base", {**result, "shares": shares, "tokens_by_source": counts})


def chat_mixture(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, weighted: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encode the conversations of each source."""
    rows = chat_rows(corpus, settings.seed, weighted)
    return {n: encode_chats(tokenizer, chats, settings.chat_length) for n, chats in rows.items()}


def step_chat(data: Path, out: Path, settings: Settings) -> None:
    """Finetune the base model on short replies and write it to OUT/chat."""
    device = pick_device()
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    corpus = Corpus.load(data, settings, "train")
    parts = chat_mixture(corpus, tokenizer, settings, weighted=True)
    print("chat: rows", {n: len(i) for n, (i, _) in parts.items()}, flush=True)
    plain_texts = corpus.prose[:4000] + [page(t, x, random.Random(i)) for i, (t, x) in enumerate(corpus.college)]
    plain = as_rows(as_stream(encode_documents(tokenizer, plain_texts), 2), settings.chat_length, 10**6)
    ids = torch.from_numpy(np.concatenate([i for i, _ in parts.values()])).to(device)
    weights = torch.from_numpy(np.concatenate([w for _, w in parts.values()])).to(device)
    plain_ids = torch.from_numpy(plain).to(device)
    plain_rows = max(1, round(settings.plain_share * settings.chat_rows))
    chosen = settings.chat_rows - plain_rows
    order = torch.randperm(len(ids), device=device)
    position = 0

    def draw(_progress: float, generator: torch.Generator) -> Batch:
        nonlocal order, position
        if position + chosen > len(ids):
            order = torch.randperm(len(ids), generator=generator, device=device)
            position = 0
        rows = order[position : position + chosen]
        position += chosen
        extra = torch.randint(len(plain_ids), (plain_rows,), generator=generator, device=device)
        batch = torch.cat([ids[rows], plain_ids[extra]]).long()
        return batch, torch.cat([weights[rows], torch.ones_like(plain_ids[extra], dtype=torch.float32)])

    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).to(device)
    add_dropout(model, settings.dropout)
    held = chat_mixture(Corpus.load(data, settings, "held_out"), tokenizer, settings, weighted=False)
    result = train(
        model,
        draw,
        lambda: {n: mean_loss(model, i, w) for n, (i, w) in held.items() if len(i)},
        seconds=settings.chat_seconds,
        most_steps=math.ceil(settings.chat_epochs * len(ids) / chosen),
        lr=settings.chat_lr,
        settings=settings,
        name="chat",
    )
    pad, end, turn = (token_id(tokenizer, t) for t in (PAD, END_OF_TEXT, IM_END))
    export(model, out / "chat", [turn, end], pad)
    note(out, "chat", {**result, "rows": {n: len(i) for n, (i, _) in parts.items()}})


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def note(out: Path, key: str, value: Any) -> None:
    """Store ``value`` under ``key`` in OUT/report.json."""
    path = out / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    report[key] = value
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def continue_text(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, texts: list[str], temperature: float, new_tokens: int
) -> list[list[int]]:
    """Continue each text; returns the new token ids up to and with the end token, if it came."""
    device = next(model.parameters()).device
    pad = token_id(tokenizer, PAD)
    stops = {token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, IM_END)}
    rows = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    width = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=sorted(stops), **choice
    )
    results = []
    for row in out[:, width:].tolist():
        stop = next((i + 1 for i, t in enumerate(row) if t in stops), len(row))
        results.append(row[:stop])
    return results


def step_samples(data: Path, out: Path, settings: Settings) -> None:
    """Measure the exported models on all held-out text and write samples to OUT/report.json."""
    device = pick_device()
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    new_tokens = 32 if settings.hidden < 128 else 200
    torch.manual_seed(settings.seed)
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).to(device)
    losses = base_evaluation(data, tokenizer, settings, report["base"]["shares"], 10**6)(base)
    texts = continue_text(base, tokenizer, OPENINGS, 0.8, new_tokens)
    note(out, "base_held_out_loss", losses)
    note(out, "base_samples", [{"opening": o, "text": tokenizer.decode(t)} for o, t in zip(OPENINGS, texts, strict=True)])
    chat = AutoModelForCausalLM.from_pretrained(out / "chat", dtype=torch.float32).to(device)
    held = Corpus.load(data, settings, "held_out")
    parts = chat_mixture(held, tokenizer, settings, weighted=False)
    note(out, "chat_held_out_loss", {n: mean_loss(chat, i, w) for n, (i, w) in parts.items() if len(i)})
    note(out, "chat_plain_text_loss", base_evaluation(data, tokenizer, settings, report["base"]["shares"], 10**6)(chat))
    for temperature in (0.0, 0.8):
        prompts = [chatml([{"role": "user", "content": p}]) + f"{IM_START}assistant\n" for p in PROMPTS]
        replies = continue_text(chat, tokenizer, prompts, temperature, new_tokens)
        shown = [
            {"prompt": p, "reply": tokenizer.decode(r), "tokens": len(r), "ended": r[-1] == token_id(tokenizer, IM_END)}
            for p, r in zip(PROMPTS, replies, strict=True)
        ]
        note(out, f"chat_samples_t{temperature}", shown)
    asked = [p for p, _, s in held.advice if s != "medquad"][: 8 if settings.hidden < 128 else 160] + PROMPTS * 4
    prompts = [chatml([{"role": "user", "content": p}]) + f"{IM_START}assistant\n" for p in asked]
    replies = continue_text(chat, tokenizer, prompts, 0.8, new_tokens)
    ended = [len(r) < new_tokens or r[-1] == token_id(tokenizer, IM_END) for r in replies]
    note(
        out,
        "chat_reply_length",
        {
            "temperature": 0.8,
            "replies": len(replies),
            "median_tokens": statistics.median(len(r) for r in replies),
            "share_over_100_tokens": sum(len(r) > 100 for r in replies) / len(replies),
            "share_ended": sum(ended) / len(replies),
        },
    )


STEPS: dict[str, Callable[[Path, Path, Settings], None]] = {
    "tokenizer": step_tokenizer,
    "base": step_base,
    "chat": step_chat,
    "samples": step_samples,
}


def main() -> None:
    """Run the steps named on the command line, in the order of the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="tokenizer, base, chat, samples or all (the default)")
    parser.add_argument("--data", type=Path, default=Path("shared/nano"), help="folder with the four .xz files")
    parser.add_argument("--out", type=Path, default=Path("build/nano"), help="folder that gets base/ and chat/")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings to change, by name")
    parser.add_argument("--tiny", action="store_true", help="a minute model on a slice of the data, to test the code")
    args = parser.parse_args()
    settings = Settings.tiny() if args.tiny else Settings()
    for change in args.set:
        name, _, value = change.partition("=")
        setattr(settings, name, type(getattr(settings, name))(float(value)))
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    if unknown := set(args.steps) - {"all", *STEPS}:
        parser.error(f"unknown step: {sorted(unknown)}")
    wanted = [s for s in STEPS if not args.steps or "all" in args.steps or s in args.steps]
    began = time.monotonic()
    for name in wanted:
        STEPS[name](args.data, args.out, settings)
        print(f"step {name} ended at {time.monotonic() - began:.1f} s", flush=True)
    note(args.out, "settings", asdict(settings))


if __name__ == "__main__":
    main()
