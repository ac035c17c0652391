"""Shipped data: traits, prompts, the nano models."""

from __future__ import annotations

import os


def is_path(name: str) -> bool:
    """Whether a text is a path of the user's: a path has a separator. A bare name always means something shipped."""
    return "/" in name or os.sep in name or name in (".", "..")
