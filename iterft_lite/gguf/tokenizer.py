"""A Hugging Face tokenizer in GGUF's terms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from iterft_lite.errors import ExportError, FileError, ModelError
from iterft_lite.files import read_object

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
    read = read_tokenizer(folder)
    if read is None:
        return False
    with _shape(folder):
        return _cuts_like_qwen2(read)


def _cuts_like_qwen2(read: dict[str, Any]) -> bool:
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
    read = read_tokenizer(folder)
    return read is not None and bool(read["model"].get("ignore_merges"))


def read_tokenizer(folder: Path) -> dict[str, Any] | None:
    """A model folder's tokenizer.json; None if there is none.

    Raises:
        ModelError: If it cannot be read, or is no tokenizer's.
    """
    try:
        read = read_object(folder / "tokenizer.json")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except FileError as error:
        raise ModelError(error.message, hint=error.hint) from None
    if not isinstance(read.get("model"), dict):
        raise ModelError(f"`{folder}/tokenizer.json` is not a tokenizer's: it has no `model`")
    return read


@contextlib.contextmanager
def _shape(folder: Path) -> Iterator[None]:
    """Turn what comes of a tokenizer.json of another shape into an error of ours.

    Raises:
        ModelError: For it.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ModelError(f"`{folder}/tokenizer.json` is not a tokenizer's: {type(error).__name__} {error}") from None


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
    read = read_tokenizer(folder)
    with _shape(folder):
        if read is None or read["model"].get("type") != "BPE" or not _writes_blanks_as_pieces(read):
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
    read = read_tokenizer(folder)
    if read is None:
        raise ExportError(f"there is no `{folder}/tokenizer.json`")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    with _shape(folder):
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
