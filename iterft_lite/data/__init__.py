"""What is shipped as data: traits, prompts, the nano models."""

from __future__ import annotations

import os


def is_path(name: str) -> bool:
    """Whether a text names a place of the user's own: a path has a separator; a bare name is a shipped thing's, always."""
    return "/" in name or os.sep in name or name in (".", "..")
