"""Text that others wrote (models, judges, files, names in recipes and run folders), made safe to show.

A terminal obeys escape sequences, and matplotlib reads dollar signs as mathematics. All text from outside this program passes
through here: `safe` for terminals (`console.py` calls it for all that rich draws), `mathtext` for figures.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

from iterft_lite.files import valid_text

SEQUENCE = re.compile(
    r"""\x1b\[[0-?]*[ -/]*[@-~]                 # CSI: colours, moving, clearing
      | \x9b[0-?]*[ -/]*[@-~]
      | (?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?  # OSC, DCS: titles, links, clipboard
      | \x1b[ -/]*[0-~]?                        # the rest
    """,
    re.VERBOSE,
)
"""Escape sequences of terminals (ECMA-48)."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ufff9-\ufffb]")
"""Invisible characters that steer: control characters except tab and newline, and marks of reading direction."""


def safe(text: object) -> str:
    """A text without anything that a terminal obeys. Keeps line ends."""
    return CONTROL.sub("", SEQUENCE.sub("", valid_text(str(text)).replace("\r\n", "\n")))


def one_line(text: object, limit: int = 200) -> str:
    """A name, or the beginning of a text, on one line."""
    line = " ".join(safe(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def mathtext(text: object) -> str:
    """A text for matplotlib, with escaped dollar signs."""
    return safe(text).replace("$", r"\$")


def tolerate_terminals() -> None:
    """Make standard output and error print a replacement for characters outside their encoding, in place of raising."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # none, closed, or not a terminal's
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def silence_output() -> None:
    """Write nothing more to standard output: it failed, and would fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
