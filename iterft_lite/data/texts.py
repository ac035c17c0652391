"""The one gate for text that users bring: bytes become valid text here, or an error that says where.

UTF-8 with or without a mark at its beginning, UTF-16 and UTF-32 are read as what they are; what is none of them is taken for
Windows-1252 (which holds Latin-1's letters), and that is said. Halves of surrogate pairs and NULs, which JSON can hold, are
refused: no tokenizer knows them.
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
"""What a text may begin with, and the encoding that it says."""

BINARY = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""Control characters that no text holds."""

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
    """The text that some bytes are.

    Args:
        data: All of a file.
        what: The file, for notes and errors.

    Raises:
        ValueError: If they are no text.
    """
    encoding, note = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not {encoding.upper()} text, as its beginning says: byte {error.start}") from None
    if BINARY.search(text):
        raise ValueError(f"{what} is not a text file")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return Text(text, f"{what} is not UTF-8 and is read as {note}" if note else "")


def _encoding(data: bytes) -> tuple[str, str]:
    """The encoding of a text, and how to call it where it is a guess."""
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
        ValueError: If it is no text.
    """
    return decode(read_bytes(path, limit=limit), f"`{path}`")


def flaw(text: str) -> str:
    """What keeps a decoded text from being used, as the end of a sentence; "" for a good one."""
    half = SURROGATE.search(text)
    if half:
        return f"holds half of a surrogate pair (`\\u{ord(half[0]):04x}`): a character was cut in two"
    return "holds a NUL character" if "\0" in text else ""


# -- what must not be among what


def plain(text: str) -> str:
    """A text as it is compared with others: neither case nor white space counts."""
    return " ".join(text.split()).casefold()


def repeated(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places, from 0: of a text that was there before, and where it first was."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        before = first.setdefault(plain(text), place)
        if before != place:
            yield place, before


def common(texts: Sequence[str], others: Sequence[str], *, beginnings: bool = False) -> Iterator[tuple[int, int]]:
    """Pairs of places, from 0: of a text that is among others, and where among them.

    Args:
        texts: What is looked for.
        others: What is looked in.
        beginnings: Also where another begins with it.
    """
    found: dict[str, int] = {}
    for place, other in enumerate(others):
        found.setdefault(plain(other), place)
    for place, text in enumerate(texts):
        wanted = plain(text)
        if wanted in found:
            yield place, found[wanted]
        elif beginnings and wanted:
            where = next((there for other, there in found.items() if other.startswith(wanted)), None)
            if where is not None:
                yield place, where


def most_repeated(texts: Sequence[str]) -> tuple[int, int]:
    """How many of the texts are repetitions of earlier ones, and how often the most frequent one is there."""
    counts = Counter(map(plain, texts))
    return len(texts) - len(counts), max(counts.values(), default=0)
