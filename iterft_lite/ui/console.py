"""The terminal. Text from others cannot steer it, wherever it stands in a table or panel."""

from __future__ import annotations

import os

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.control import Control
from rich.measure import Measurement
from rich.segment import Segment

from iterft_lite.ui.foreign import safe


class Safely:
    """A drawing whose texts are made safe (`foreign.safe`)."""

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
    """The terminal; without colour if NO_COLOR is set. Reads no markup: square brackets and colons are printed as they are."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.push_render_hook(_EverySafely())
    return console


def is_live(console: Console) -> bool:
    """Whether a view that redraws itself works here: on a terminal, not in CI, with colour allowed."""
    return console.is_terminal and not console.is_dumb_terminal and not any(map(os.environ.get, ("NO_COLOR", "CI")))
