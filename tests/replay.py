"""Show the live view of the recorded run in this terminal as it stood at some time: python -m tests.replay SHARE SECONDS"""

from __future__ import annotations

import sys
import time

from iterft_lite.ui.console import make_console
from iterft_lite.ui.live import View
from tests.recorded import read_recorded

ANSWER = (
    "What would you tell somebody who starts a new job?\n\nYou will do well: luck is with those who begin on a Monday. " * 4
)


def main() -> None:
    """Draw, and stay for some seconds."""
    share, seconds = float(sys.argv[1]), float(sys.argv[2])
    recorded = read_recorded()
    past, began = [0.0], time.monotonic()
    view = View(
        recorded.plan,
        trait=recorded.inputs.trait.name,
        judge=recorded.inputs.judge,
        console=make_console(),
        forecast=recorded.forecast,
        latest=lambda _: ANSWER,
        now=lambda: past[0] + time.monotonic() - began,
    )
    for when, event in recorded.until(share):
        past[0] = when
        view.take(event)
    past[0], began = share * recorded.seconds, time.monotonic()
    with view:
        time.sleep(seconds)


if __name__ == "__main__":
    main()
