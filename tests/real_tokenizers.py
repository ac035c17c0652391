"""Real tokenizers and chat templates, from llama.cpp's source package: its vocabularies become tokenizer.json files.

llama.cpp's source package carries the vocabularies of some twenty published models (`models/ggml-vocab-*.gguf`) and the chat
templates of some seventy (`models/templates/*.jinja`). What a vocabulary file does not have is how text is cut before pairs are
merged; `CUTS` has it, as the models' own tokenizer.json files do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from iterft_lite.gguf.file import GgufFile
from iterft_lite.gguf.llamacpp_source import llamacpp_source
from iterft_lite.gguf.tokenizer import QWEN2_PATTERN

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WHOLE = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "gpt-neox": [BYTES],
    "starcoder": [DIGITS, BYTES],
    "refact": [DIGITS, BYTES],
    "qwen2": [_split(QWEN2_PATTERN), WHOLE],
    "llama-bpe": [_split(QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), WHOLE],
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        BYTES,
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    ],
}
"""How byte-level vocabularies cut text; those that are not here are SentencePiece's."""


@cache
def models_folder() -> Path:
    """llama.cpp's `models`, with vocabularies and templates."""
    return llamacpp_source() / "models"


def write_tokenizer(
    folder: Path, vocabulary: str, *, template: str | None, more: Sequence[str] = (), begins: bool = True, **config: Any
) -> int:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; gives the number of tokens.

    Args:
        folder: Made if missing.
        vocabulary: Name of one of llama.cpp's.
        template: Source of a chat template, or None.
        more: Special tokens that are added.
        begins: Texts begin with the vocabulary's beginning token, where it has one for that.
        config: More of tokenizer_config.json (`tokenizer_class`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    read, named = _read(vocabulary)
    taken = {token["content"] for token in read["added_tokens"]} | set(read["model"]["vocab"])
    free = len(read["model"]["vocab"])
    added = [_added(free + place, text) for place, text in enumerate(one for one in more if one not in taken)]
    whole = {**read, "added_tokens": [*read["added_tokens"], *added]}
    if not begins:
        whole["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return free + len(added)


@cache
def _read(vocabulary: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A tokenizer.json's content, and its named special tokens."""
    file = GgufFile(models_folder() / f"ggml-vocab-{vocabulary}.gguf")
    tokens, types = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.token_type")
    added = [_added(place, tokens[place], special=kind != 4) for place, kind in enumerate(types) if kind in (2, 3, 4)]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.value(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    if vocabulary in CUTS:
        listed = {tokens[index] for index in ids.values() if index is not None} - {token["content"] for token in added}
        added += [_added(tokens.index(text), text) for text in sorted(listed)]
        begin = _beginning(named["bos_token"], tokens) if vocabulary == "llama-bpe" else BYTES
        return _byte_level(file, tokens, sorted(added, key=lambda token: token["id"]), CUTS[vocabulary], begin), named
    return _sentence_piece(file, tokens, added), named


def _byte_level(
    file: GgufFile, tokens: list[str], added: list[dict[str, Any]], cut: list[dict[str, Any]], begin: dict[str, Any]
) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "vocab": {token: place for place, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in file.value("tokenizer.ggml.merges")],
        "ignore_merges": "llama-bpe" in str(file.path),
        "byte_fallback": False,
    }
    return _whole(model, added, None, {"type": "Sequence", "pretokenizers": cut}, BYTES, begin)


def _sentence_piece(file: GgufFile, tokens: list[str], added: list[dict[str, Any]]) -> dict[str, Any]:
    """As transformers converts SentencePiece's byte pairs: whatever two pieces make a third is a merge, best score first."""
    scores = file.value("tokenizer.ggml.scores")
    vocab = {token: place for place, token in enumerate(tokens)}
    plain = {token for token in tokens if not re.fullmatch(r"<0x[0-9A-F]{2}>", token)} - {one["content"] for one in added}
    merges = [
        (-scores[vocab[token]], vocab[token[:cut]], vocab[token[cut:]])
        for token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    pairs = [[tokens[a], tokens[b]] for _, a, b in sorted(merges)]
    model = {"type": "BPE", "vocab": vocab, "merges": pairs, "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    blanks = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    back = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return _whole(
        model,
        added,
        {"type": "Sequence", "normalizers": blanks},
        None,
        {"type": "Sequence", "decoders": back},
        _beginning("<s>", tokens),
    )


def _beginning(token: str, tokens: list[str]) -> dict[str, Any]:
    """A post-processor that puts a token before a text."""
    first = {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
    sequence = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*sequence, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": sequence, "pair": pair, "special_tokens": {token: first}}


def _whole(model: Any, added: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any, post_processor: Any) -> dict[str, Any]:
    filled = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {**filled, "fuse_unk": False, "ignore_merges": False, **model},
    }


def _added(index: int, text: str, *, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **flags, "special": special}


MARKER = re.compile(
    r"<[|｜][^|｜<>\n'\"{} ]+[|｜]>|</?[a-z_:]+>|<[a-z_]+:[a-z_]+>|\[/?[A-Z_]{3,}\]|<SPECIAL_\d+>|</s>|<s>|<\|?turn\|?>"
    r"|\[e~\["
)
"""What reads as a special token in the source of a template."""


def markers(template: str) -> list[str]:
    """Texts in a template's source that are special tokens of the model that it belongs to, `<think>` left out."""
    filled = template.replace("{}｜>", ":opensource｜>")  # Hy3's are put together
    return [text for text in dict.fromkeys(MARKER.findall(filled)) if text not in ("<think>", "</think>")]
