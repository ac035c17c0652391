"""The user's cache: converted bases, verdicts, timings. The program can make everything in it again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from iterft_lite.errors import FolderError


def cache_folder() -> Path:
    """The user's cache for this program; `ITERFT_CACHE` names another.

    Raises:
        FolderError: If this user has no home.
    """
    given = os.environ.get("ITERFT_CACHE")
    if given:
        return Path(given)
    try:
        return Path(platformdirs.user_cache_dir("iterft_lite")).expanduser()
    except (RuntimeError, KeyError):  # no HOME, and no user of this number
        raise FolderError(
            "this user has no home folder, so there is no place for converted models", hint="set ITERFT_CACHE to a folder"
        ) from None
