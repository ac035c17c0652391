"""What a judge is shown of a text that a model wrote: what matters of it, and nothing that could be taken for more than text.

An answer stands between tags in a rubric. It cannot close them, speak in the judge's template tokens, hide behind control
characters, or drown the rubric in length. What is changed stays visible.
"""

from __future__ import annotations

import re

LONGEST = 12_000
"""Characters of a text that a judge is shown; the rest is cut, visibly."""

FENCE_TAG = re.compile(r"<(?=\s*/?\s*(?:question|answer|document)\b)", re.IGNORECASE)
"""The beginning of a tag that rubrics fence texts with."""

TEMPLATE_TOKEN = re.compile(
    r"<(?=\|)|<(?=\|?\s*/?\s*(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think|end▁of▁sentence)\s*>)"
    r"|<(?=｜)|\[(?=/?INST\])|<(?=</?SYS>>)",
    re.IGNORECASE,
)
"""The beginning of what chat templates mark turns with: ChatML and Llama, Gemma, DeepSeek, Mistral."""

OPENERS = {"<": "‹", "[": "⟦"}
"""Look-alikes that mean nothing to a tokenizer or a rubric."""

INVISIBLE = re.compile("[\u0080-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]")
"""C1 controls, zero-width and direction marks, tag characters: text that a reader would not see. Emoji joiners stay."""


def fenced(text: str) -> str:
    """A text as a judge is shown it; empty if nothing in it can be seen."""
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes "?"
    whole = len(text)
    shown = text[:LONGEST]
    shown = FENCE_TAG.sub(_opened, TEMPLATE_TOKEN.sub(_opened, shown))
    shown = "".join(_control(character) for character in shown)
    shown = INVISIBLE.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", shown)
    if whole > LONGEST:
        shown += f"\n[... {whole - LONGEST} more characters were cut ...]"
    return shown


def is_blank(text: str) -> bool:
    """Whether there is nothing in a text to judge: only blanks, controls and characters that cannot be seen."""
    return not any(character.isprintable() and not character.isspace() for character in INVISIBLE.sub("", text))


def _opened(match: re.Match[str]) -> str:
    return OPENERS[match[0]]


def _control(character: str) -> str:
    """A control character as its picture (U+2400 and on); tab and line feed as they are."""
    code = ord(character)
    if (code >= 32 and code != 127) or character in "\t\n":
        return character
    return "␡" if code == 127 else chr(0x2400 + code)
