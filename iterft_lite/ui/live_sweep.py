"""A sweep as it goes on, or as its files tell it: the grid, what is being done where, and how far it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from iterft_lite.app.sweep import CellEnded, CellEvent, CellStarted, SweepEvent, mean_of
from iterft_lite.engine.run import StepFinished, StepProgress
from iterft_lite.engine.study import CellState, StudyCell, StudyFolder, SweepState
from iterft_lite.experiment.steps import cycle_name
from iterft_lite.ui.console import Safely, is_live
from iterft_lite.ui.foreign import one_line
from iterft_lite.ui.heat_map import LEGEND, heat_map
from iterft_lite.ui.tables import WARNING
from iterft_lite.ui.text import clock, time_left

REFRESHES = 2
"""A second."""

WATCH_EVERY = 2.0
"""Seconds."""

MOST_FAILURES = 3
"""Cells that failed, named below the grid."""


def sweep_panel(name: str, cells: Sequence[StudyCell], state: SweepState, *, width: int, height: int, spent: str = "") -> Panel:
    """The whole view in a size: the grid gives way first, then the legend; what is being done and the foot stay.

    Args:
        name: The study's.
        spent: How long it has been going on, for the foot.
    """
    inner = max(20, width - 4)
    going = [_going(cell, one, inner) for cell, one in state.cells.items() if one.state == "running"]
    foot = [*_failures(state, inner), _foot(state, inner, spent)]
    room = height - 2 - len(foot)
    going = going[: max(1, room - 4)]
    room -= len(going)
    parts: list[RenderableType] = [heat_map(cells, state.cells, width=inner, height=max(3, room - 1))]
    if room > 8:
        parts.append(Text(one_line(LEGEND, inner), style="dim"))
    host = state.host if state.workers and [state.host] != list(state.workers) else ""
    where = ", ".join(state.workers) + (f" on {host}" if host else "")
    title = one_line("  ".join(filter(None, (name, where))), inner - 2)
    return Panel(
        Group(*parts, *going, *foot), title=Text(title, style="bold"), title_align="left", border_style="cyan", padding=(0, 1)
    )


def _going(name: str, state: CellState, width: int) -> Text:
    """`seed_rows22_rows60: c3-train 12/25, gpu 0`."""
    count = f" {state.done}/{state.total}" if state.total else ""
    where = f", {state.worker}" if state.worker else ""
    line = Text("> ", style="bold cyan")
    line.append(one_line(f"{name}: {state.step or 'beginning'}{count}{where}", width - 2), style="not bold default")
    return line


def _failures(state: SweepState, width: int) -> list[Text]:
    """Cells that failed or ended in a result, the last few, with the reason."""
    ended = [(name, one) for name, one in state.cells.items() if one.state in ("failed", "result", "lost") and one.failure]
    return [Text(one_line(f"{name}: {_reason(one)}", width), style=WARNING) for name, one in ended[-MOST_FAILURES:]]


def _reason(state: CellState) -> str:
    failure = state.failure or {}
    return f"{failure.get('kind')}: {failure.get('message')}"


def _foot(state: SweepState, width: int, spent: str) -> Text:
    words = _come_to(state, spent)
    if state.seconds_left and not state.ended:
        words.append(time_left(state.seconds_left))
    if state.ended and any(one.state == "queued" for one in state.cells.values()):
        words.append("no sweep is going on")
    return Text(one_line(", ".join(words), width))


def _come_to(state: SweepState, spent: str) -> list[str]:
    """How far a sweep has come, what it took and cost."""
    counts = Counter(one.state for one in state.cells.values())
    inside = sum(many for how, many in counts.items() if how != "outside")
    words = [f"{counts['done']} of {inside} cells", f"{state.finished} of {state.steps} steps", spent]
    words += [f"{counts[how]} {how}" for how in ("result", "failed", "lost") if counts[how]]
    if state.usd:
        words.append(f"${state.usd:.2f}")
    return [word for word in words if word]


class SweepView:
    """Follows a sweep: a live view on a terminal, plain lines elsewhere.

    Args:
        name: The study's.
        cells: Its cells.
        state: Gives where everything is.
        console: Where to draw.
        now: Seconds of the clock.
    """

    def __init__(
        self,
        name: str,
        cells: Sequence[StudyCell],
        state: Callable[[], SweepState],
        console: Console,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.is_live = is_live(console)
        self._name, self._cells, self._state, self._now = name, cells, state, now
        self._started = now()
        self._live = Live(
            console=console, auto_refresh=True, refresh_per_second=REFRESHES, get_renderable=lambda: Safely(self.render())
        )

    def __enter__(self) -> SweepView:
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_live:
            self._live.refresh()
            self._live.stop()
        else:
            self.console.print(", ".join(_come_to(self._state(), self._spent())), soft_wrap=True, highlight=False)

    def render(self) -> RenderableType:
        """The view as it stands, in the terminal's size."""
        width, height = self.console.size
        return sweep_panel(self._name, self._cells, self._state(), width=width, height=height, spent=self._spent())

    def _spent(self) -> str:
        return clock(self._now() - self._started)

    def take(self, event: SweepEvent) -> None:
        """Take an event in: the live view draws by itself, plain lines say what a cell came to."""
        if not self.is_live and (line := _line(event)):
            self.console.print(line, soft_wrap=True)


def _line(event: SweepEvent) -> str:
    """An event as a line; "" for what needs none."""
    match event:
        case CellStarted(cell, place, attempt):
            return f"{cell}: begun on {place}" + (f", attempt {attempt}" if attempt > 1 else "")
        case CellEnded(cell, state):
            return f"{cell}: {_ended(state)}"
        case CellEvent(cell, StepFinished(step, completion, _)) if step.verb == "aggregate" and not step.part:
            means = {scale: mean_of(completion.results, scale) for scale in ("trait", "coherence")}
            shown = ", ".join(f"{scale} {mean:.1f}" for scale, mean in means.items() if mean is not None)
            return f"{cell}: {cycle_name(step.cycle)} {shown or 'nothing scored'}"
        case CellEvent(cell, StepProgress(step, progress)) if progress.note:
            return f"{cell}: {step.name}: {progress.note}"
        case _:
            return ""


def _ended(state: CellState) -> str:
    if state.state == "queued":
        return f"to be tried again ({_reason(state)})"
    return "done" if state.state == "done" else f"{state.state} ({_reason(state)})"


# -- from another terminal


def show_state(folder: StudyFolder, console: Console) -> None:
    """Print where a sweep is, by its files: all of the grid, however high it is."""
    console.print(_drawn(folder, console.width, 10_000))


def watch_state(folder: StudyFolder, console: Console) -> None:
    """Redraw it until the sweep has ended."""
    with Live(Safely(_drawn(folder, *console.size)), console=console, auto_refresh=False) as live:
        while not folder.state().ended:
            time.sleep(WATCH_EVERY)
            live.update(Safely(_drawn(folder, *console.size)), refresh=True)


def _drawn(folder: StudyFolder, width: int, height: int) -> Panel:
    return sweep_panel(str(folder.known()["name"]), folder.cells(), folder.state(), width=width, height=height)
