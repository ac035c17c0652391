"""Where what can be made again is kept: converted bases, verdicts, timings."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The user's cache for this program; `ITERFT_CACHE` names another."""
    given = os.environ.get("ITERFT_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("iterft_lite"))
