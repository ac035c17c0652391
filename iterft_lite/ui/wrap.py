"""Lines that end at words."""

from __future__ import annotations

import re
import textwrap

QUOTED = re.compile(r"`[^`\n]*`")
"""A command, path or value: never broken, so that it can be copied."""


def wrapped(text: str, width: int) -> str:
    """A text with no line longer than a width, where words allow it. Indented lines that are no list item stay as they are."""
    return "\n".join(part for line in text.split("\n") for part in _parts(line, width))


def _parts(line: str, width: int) -> list[str]:
    item = line.startswith("  - ")
    if line.startswith(" ") and not item:
        return [line]
    joined = QUOTED.sub(lambda found: found[0].replace(" ", "\0"), line)
    parts = textwrap.wrap(
        joined, max(20, width), subsequent_indent="    " if item else "", break_long_words=False, break_on_hyphens=False
    )
    return [part.replace("\0", " ") for part in parts] or [""]
