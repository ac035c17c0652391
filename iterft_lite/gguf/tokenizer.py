"""A Hugging Face tokenizer in GGUF's terms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from iterft_lite.errors import ExportError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What llama.cpp's `qwen2` pre-tokenizer does (src/llama-vocab.cpp quotes it), as Qwen2's tokenizer.json writes it."""


BLANK = "\u2581"
"""SentencePiece's character for a blank."""


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


def ignores_merges(folder: Path) -> bool:
    """Whether the tokenizer takes a word that is a token as one token, even if no merges lead to it."""
    try:
        read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return bool(read["model"].get("ignore_merges"))


def _steps(part: dict[str, Any] | None, of: str = "pretokenizers") -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[of]) if part["type"] == "Sequence" else [part]


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary in GGUF's terms.

    Attributes:
        tokens: By id.
        scores: What is merged first scores highest.
        types: GGUF's of each token.
        blank_first: A blank is put before a text, and after a special token.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    blank_first: bool


def sentence_pieces(folder: Path, size: int) -> Pieces | None:
    """The vocabulary of a tokenizer.json that SentencePiece's byte pairs were converted to; None for any other tokenizer.

    tokenizer.json has merges in the order of the scores that SentencePiece gave their results, and no scores: a token's is here
    minus the place of the first merge that makes it.

    Args:
        folder: Of the model.
        size: Rows of the embedding.

    Raises:
        ExportError: As `piece_tokenizer`.
    """
    read = piece_tokenizer(folder)
    if read is None:
        return None
    model, vocab = read["model"], read["model"]["vocab"]
    tokens, types = vocabulary(folder, size)
    for byte in range(256):
        types[vocab[f"<0x{byte:02X}>"]] = int(TokenType.BYTE)
    if model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = int(TokenType.UNKNOWN)
    scores = [-1e6] * size
    for place, merge in enumerate(model["merges"]):
        made = vocab.get("".join(merge.split(" ") if isinstance(merge, str) else merge))
        if made is not None and scores[made] == -1e6:
            scores[made] = -float(place)
    return Pieces(tokens, scores, types, _puts_blank_first(read))


def piece_tokenizer(folder: Path) -> dict[str, Any] | None:
    """A tokenizer.json that SentencePiece's byte pairs were converted to; None for any other tokenizer.

    Raises:
        ExportError: If it falls back to bytes that it has no tokens for: llama.cpp would abort.
    """
    try:
        read: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if read["model"].get("type") != "BPE" or not _writes_blanks_as_pieces(read):
        return None
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in read["model"]["vocab"]]
    if missing:
        raise ExportError(
            f"the tokenizer in `{folder}` has no tokens for {len(missing)} of the 256 bytes (`<0x{missing[0]:02X}>`), which a "
            "vocabulary of SentencePiece's kind falls back to: llama.cpp would abort",
            hint="give the tokenizer.json that its makers publish, or tokenizer.model beside it",
        )
    return read


def _writes_blanks_as_pieces(read: dict[str, Any]) -> bool:
    """Whether a tokenizer.json replaces blanks by SentencePiece's character."""
    steps = [*_steps(read.get("normalizer"), "normalizers"), *_steps(read.get("pre_tokenizer"))]
    replaced = any(step["type"] == "Replace" and step.get("content") == BLANK for step in steps)
    return replaced or any(step["type"] == "Metaspace" for step in steps)


def _puts_blank_first(read: dict[str, Any]) -> bool:
    """Whether it puts a blank before every piece of text; one that is put before whole texts only meets none in a chat."""
    steps = [*_steps(read.get("normalizer"), "normalizers"), *_steps(read.get("pre_tokenizer"))]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") == "always")
        for step in steps
    )


def vocabulary(folder: Path, size: int) -> tuple[list[str], list[int]]:
    """All tokens of a BPE tokenizer by id, and GGUF's type of each.

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
