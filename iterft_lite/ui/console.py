"""The terminal that everything is shown in."""

from __future__ import annotations

import os

from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """The terminal; without colour where NO_COLOR is set."""
    return Console(stderr=stderr, highlight=False)


def is_live(console: Console) -> bool:
    """Whether a view that redraws itself makes sense: a terminal, not CI, colour allowed."""
    return console.is_terminal and not console.is_dumb_terminal and not any(map(os.environ.get, ("NO_COLOR", "CI")))
