"""The one gate for the user's text: bytes become valid text here, or an error that names the place.

Reads UTF-8 with or without a byte order mark, UTF-16 and UTF-32. Takes anything else for Windows-1252 (which includes Latin-1's
letters) and says so. Refuses halves of surrogate pairs and NULs, which JSON can hold: no tokenizer knows them.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.files import TEXT_LIMIT, read_bytes

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their encodings."""

BINARY = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""Control characters that do not occur in text."""

SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Text:
    """A decoded text.

    Attributes:
        text: Without a mark at its beginning; lines end in "\\n".
        note: A sentence where its encoding had to be guessed, else "".
    """

    text: str
    note: str = ""


def decode(data: bytes, what: str) -> Text:
    """Decode bytes as text.

    Args:
        data: All of a file.
        what: The file, for notes and errors.

    Raises:
        ValueError: If they are not text.
    """
    encoding, note = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not {encoding.upper()} text, as its beginning says: byte {error.start}") from None
    if BINARY.search(text):
        raise ValueError(f"{what} is not a text file")
    # a mark may stand twice: written by one program and kept as a character by the next
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return Text(text, f"{what} is not UTF-8 and is read as {note}" if note else "")


def _encoding(data: bytes) -> tuple[str, str]:
    """The encoding of a text, and its name for people if it is a guess."""
    # a mark decides. Without one, UTF-16 shows itself by its NULs; UTF-8 by being valid, which other encodings rarely are by
    # chance
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return encoding, ""
    if b"\0" in data[:4096]:  # letters of two bytes, of which one is NUL in most scripts' spaces and line ends
        odd, even = data[1:4096:2].count(0), data[:4096:2].count(0)
        return ("utf-16-le", "UTF-16") if odd >= even else ("utf-16-be", "UTF-16")
    try:
        data.decode()
    except UnicodeDecodeError:
        # five bytes are nothing in Windows-1252
        guess = "latin-1" if any(byte in data for byte in b"\x81\x8d\x8f\x90\x9d") else "cp1252"
        return guess, "Windows-1252 (Latin-1)"
    return "utf-8", ""


def read_user_text(path: Path, *, limit: int = TEXT_LIMIT) -> Text:
    """A text file of the user's.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        FileError: If it cannot be read (a ValueError too).
        ValueError: If it is not text.
    """
    return decode(read_bytes(path, limit=limit), f"`{path}`")


def flaw(text: str) -> str:
    """The reason why a decoded text cannot be used, as the end of a sentence; "" for a good one."""
    half = SURROGATE.search(text)
    if half:
        return f"holds half of a surrogate pair (`\\u{ord(half[0]):04x}`): a character was cut in two"
    return "holds a NUL character" if "\0" in text else ""


# -- repetitions and overlaps


def plain(text: str) -> str:
    """A text for comparison: without differences of case and white space."""
    return " ".join(text.split()).casefold()


def repeated(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Repetitions: pairs of indices, of a repeated text and of its first occurrence."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        before = first.setdefault(plain(text), place)
        if before != place:
            yield place, before


def common(texts: Sequence[str], others: Sequence[str], *, beginnings: bool = False) -> Iterator[tuple[int, int]]:
    """Overlaps: pairs of indices, of a text and of the same text among others.

    Args:
        texts: The texts to look for.
        others: The texts to look in.
        beginnings: Also find a text that another one begins with.
    """
    found: dict[str, int] = {}
    for place, other in enumerate(others):
        found.setdefault(plain(other), place)
    for place, text in enumerate(texts):
        wanted = plain(text)
        if wanted in found:
            yield place, found[wanted]
        elif beginnings and wanted:
            # quadratic, for the few texts that were not found whole
            where = next((there for other, there in found.items() if other.startswith(wanted)), None)
            if where is not None:
                yield place, where


def most_repeated(texts: Sequence[str]) -> tuple[int, int]:
    """The number of texts that repeat an earlier one, and the count of the most frequent text."""
    counts = Counter(map(plain, texts))
    return len(texts) - len(counts), max(counts.values(), default=0)
