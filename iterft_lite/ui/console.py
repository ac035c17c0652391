"""The terminal that everything is shown in. Nothing that others wrote steers it, wherever in a table or panel it stands."""

from __future__ import annotations

import os

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.control import Control
from rich.measure import Measurement
from rich.segment import Segment

from iterft_lite.ui.foreign import safe


class Safely:
    """Something drawn, without what its texts would have the terminal do (`foreign.safe`)."""

    def __init__(self, drawn: RenderableType) -> None:
        self.drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The same segments, safe."""
        for segment in console.render(self.drawn, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """As wide as what is drawn."""
        return Measurement.get(console, options, self.drawn)


class _EverySafely(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [each if isinstance(each, Control) else Safely(each) for each in renderables]


def make_console(*, stderr: bool = False) -> Console:
    """The terminal; without colour where NO_COLOR is set. Square brackets and colons are what they are, no markup."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.push_render_hook(_EverySafely())
    return console


def is_live(console: Console) -> bool:
    """Whether a view that redraws itself makes sense: a terminal, not CI, colour allowed."""
    return console.is_terminal and not console.is_dumb_terminal and not any(map(os.environ.get, ("NO_COLOR", "CI")))
