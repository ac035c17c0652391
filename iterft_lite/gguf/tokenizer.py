"""A Hugging Face tokenizer in GGUF's terms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from iterft_lite.errors import ExportError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What llama.cpp's `qwen2` pre-tokenizer does (src/llama-vocab.cpp quotes it), as Qwen2's tokenizer.json writes it."""


def cuts_like_qwen2(folder: Path) -> bool:
    """Whether a model's tokenizer is byte-level BPE that cuts text into words exactly as Qwen2's does.

    Everything that decides token ids must agree: the pattern and how it is used, no byte fallback, no merges passed over,
    no normalisation but NFC (which llama.cpp leaves to the caller).
    """
    try:
        read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    model, steps = read["model"], _steps(read.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges") or model.get("dropout"):
        return False
    if (read.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"} or [step["type"] for step in steps] != [
        "Split",
        "ByteLevel",
    ]:
        return False
    split, bytes_ = steps
    return (
        split["pattern"] == {"Regex": QWEN2_PATTERN}
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and not bytes_["add_prefix_space"]
        and not bytes_["use_regex"]
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def vocabulary(folder: Path, size: int) -> tuple[list[str], list[int]]:
    """All tokens of a byte-level BPE tokenizer by id, and GGUF's type of each.

    Args:
        folder: Of the model.
        size: Rows of the embedding; ids without a token are filled up with unused ones.

    Raises:
        ExportError: If the tokenizer has more tokens than the embedding has rows.
    """
    read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    added = {token["content"]: token for token in read["added_tokens"]}
    ids = {**read["model"]["vocab"], **{content: token["id"] for content, token in added.items()}}
    if max(ids.values()) >= size:
        raise ExportError(f"the tokenizer in `{folder}` has a token {max(ids.values())}, the model only {size} embeddings")
    for token, index in ids.items():
        tokens[index], types[index] = token, _type(added.get(token))
    return tokens, types


def _type(added: dict[str, Any] | None) -> int:
    if added is None:
        return int(TokenType.NORMAL)
    # markers like <|im_start|> are never text, whether or not the tokenizer calls them special; <think> is
    marker = added["content"].startswith("<|") and added["content"].endswith("|>")
    return int(TokenType.CONTROL if added["special"] or marker else TokenType.USER_DEFINED)
