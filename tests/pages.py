"""What the tests of both pages share: a browser, and the colours of a template."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping

from iterft_lite.ui.html import TEMPLATES, contrast

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

READABLE = 4.5
"""Contrast of small text to its background at least (WCAG 2.1, level AA)."""

TEXT = (("ink", "back"), ("ink", "panel"), ("soft", "back"), ("soft", "panel"), ("warn", "warn-back"), ("baseline", "back"))
"""Colours of text on their backgrounds, which both pages have."""


def palettes(template: str) -> list[dict[str, str]]:
    """A page's colours by name: light, then dark."""
    style = (TEMPLATES / template).read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]
    return [colours[0], colours[0] | colours[1]]


def unreadable(colours: Mapping[str, str], *more: tuple[str, str]) -> list[tuple[str, str]]:
    """The pairs of `TEXT`, and of more, that cannot be read; white on a badge too."""
    pairs = [pair for pair in (*TEXT, *more) if contrast(colours[pair[0]], colours[pair[1]]) < READABLE]
    return pairs if contrast("#ffffff", colours["badge"]) >= READABLE else [*pairs, ("white", "badge")]
