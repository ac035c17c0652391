"""A run in progress: the live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from iterft_lite.digests import Json
from iterft_lite.engine.completion import Completion
from iterft_lite.engine.run import Event, StepFailed, StepFinished, StepProgress, StepStarted
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step, cycle_name, cycle_title
from iterft_lite.hub import title as model_title
from iterft_lite.machine.countdown import Countdown
from iterft_lite.protocols import Progress
from iterft_lite.ui.chart import BELOW, CHART_ROWS, LEAST_ROWS, MOST_ROWS, TRAIT, chart, chart_step
from iterft_lite.ui.console import Safely, is_live
from iterft_lite.ui.foreign import one_line, safe
from iterft_lite.ui.tables import WARNING, CycleRow, cycle_table
from iterft_lite.ui.text import clock, score_text, time_left

PLAIN_SECONDS = 10.0
"""Shortest time between two plain lines of one step, seconds."""

WIDE = 114
"""Columns of a terminal that has room for a fresh answer on the right."""

REFRESHES = 2
"""Redraws a second: each takes 6 to 10 ms of a core that the run needs."""

LEAST_BAR = 8
"""Columns of a step's bar beside its count; a count that does not fit beside that is left out."""

CUT_COUNT = 16
"""So long a count of a step is shown in full; of a longer one ("120/480 in a batch at ...") the end may be cut."""

LATEST_SECONDS = 2.0
"""Seconds between two fresh answers: long enough to read one."""


class Doing:
    """The view's state of a step in progress."""

    def __init__(self, step: Step, now: Callable[[], float]) -> None:
        self.step = step
        self.progress = Progress(0, 0, "")
        self.started = now()
        self._now = now
        self._first: tuple[float, int] | None = None

    def move(self, progress: Progress) -> None:
        """Take progress in."""
        if self._first is None:
            # rows of an earlier session do not count for the rate
            self._first = (self._now(), progress.tokens)
        self.progress = progress

    def rate(self) -> str:
        """`812 tokens/s`; "" if it is not known."""
        if self._first is None:
            return ""
        since, tokens = self._first
        passed, gained = self._now() - since, self.progress.tokens - tokens
        return f"{gained / passed:,.0f} tokens/s" if passed >= 0.5 and gained > 0 else ""


class View:
    """Follows a run: a live view on a terminal, plain lines elsewhere.

    Args:
        plan: The run's plan.
        trait: Name of the trait.
        judge: The judge; a judge that is not for findings is labelled.
        console: The terminal.
        forecast: Forecast seconds of each step, by name (see `machine/forecast.py`).
        guessed: The forecast is another machine's: the time left is said with a doubt until cycle 0 has scores.
        latest: Gives the newest text of a step, "" if there is none. Shown if there is room.
        now: The clock, seconds.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        trait: str,
        judge: JudgeIdentity,
        console: Console,
        forecast: Mapping[str, float] | None = None,
        guessed: bool = False,
        latest: Callable[[Step], str] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = now
        self.plan = plan
        self.trait = trait
        self.judge = judge
        self.console = console
        self.is_live = is_live(console)
        self.scores: dict[int, dict[str, Json]] = {}
        self.rows: dict[int, int] = {}
        self.seconds: dict[int, float] = {}
        self.doing: dict[str, Doing] = {}
        self.finished = 0
        self._over: set[str] = set()
        self.notes: list[str] = []
        self.started = self.now()
        self.countdown = Countdown(plan, forecast or {})
        self._guessed = guessed
        self._latest = latest
        self._fresh: tuple[float, str, str] = (0.0, "", "")
        self._spoken: dict[str, tuple[float, Progress | None]] = {}
        self.live = Live(
            console=console, auto_refresh=True, refresh_per_second=REFRESHES, get_renderable=lambda: Safely(self.render())
        )

    def __enter__(self) -> View:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.doing.clear()
        if self.is_live:
            # a run that ends well is followed by its report, which has the same table
            self.live.transient = kind is None and self.finished >= len(self.plan.steps)
            self.live.refresh()
            self.live.stop()

    def take(self, event: Event) -> None:
        """Show an event."""
        step, now = event.step, self.now()
        match event:
            case StepStarted():
                self.doing[step.name] = Doing(step, self.now)
                self.countdown.began(step, now)
                self._say(step, f"{step.words} ...")
            case StepProgress(progress=progress):
                doing = self.doing.setdefault(step.name, Doing(step, self.now))
                doing.move(progress)
                self.countdown.moved(step, progress.done, progress.total, now)
                if progress.note:
                    self.notes.append(f"{step.name}: {progress.note}")
                    self._say(step, progress.note)
                self._say_progress(doing)
            case StepFinished(completion=completion, reused=reused):
                self._over.add(step.name)
                for name in self._over:  # inputs that were written again for this step are finished too
                    self.doing.pop(name, None)
                self.countdown.done(step, completion.seconds, reused=reused)
                self._take_results(step, completion, reused)
            case StepFailed(kind=kind):
                self._say(step, f"failed ({kind})")

    def _take_results(self, step: Step, completion: Completion, reused: bool) -> None:
        self.finished += 1
        self.seconds[step.cycle] = self.seconds.get(step.cycle, 0.0) + completion.seconds
        if step.verb == "build_dataset":
            self.rows[step.cycle] = completion.results["rows"]
        for note in completion.results.get("notes", ()):
            self.notes.append(f"{step.name}: {note}")
            self._say(step, note)
        if step.verb == "aggregate":
            self.scores[step.cycle] = completion.results
            trait, coherence = (score_text(completion.results[scale]) for scale in ("trait", "coherence"))
            left = self._left()
            self._say(step, f"{self.trait} {trait.strip()}, coherence {coherence.strip()}" + (f"; {left}" if left else ""))
        elif not reused:
            self._say(step, f"done in {clock(completion.seconds)}")

    def _left(self) -> str:
        """`about 4:50 left` of the run, `perhaps` where it is a guess; "" if it is not known, and at the end."""
        if self.finished >= len(self.plan.steps):
            return ""
        left = self.countdown.left(self.now())
        if left is None or left < 1:
            return ""
        return time_left(left, "perhaps" if self._guessed and 0 not in self.scores else "about")

    # -- plain lines

    def _say(self, step: Step, text: str) -> None:
        if not self.is_live:
            total = len(self.plan.steps)
            line = f"[{self.finished}/{total}] {cycle_title(step.cycle)}, {step.name}: {one_line(text)}"
            self.console.print(line, markup=False, soft_wrap=True)

    def _say_progress(self, doing: Doing) -> None:
        name, now, progress = doing.step.name, self.now(), doing.progress
        spoken, last = self._spoken.get(name, (doing.started, None))
        if not self.is_live and now - spoken >= PLAIN_SECONDS and progress != last:
            self._spoken[name] = now, progress
            words = [f"{progress.done} of {progress.total} {progress.unit}", doing.rate(), self._left()]
            self._say(doing.step, ", ".join(filter(None, words)))

    # -- live view

    def render(self) -> RenderableType:
        """The present view in the terminal's size. On a small one the chart shrinks first, then the table; the foot stays."""
        width, height = self.console.size
        inner = max(20, width - 4)
        room = height - 2
        below: list[RenderableType] = [
            self._bars(inner),
            self._foot(inner, notes=3 if height >= 30 else 1 if height >= 16 else 0),
        ]
        room -= sum(self._lines(part, inner) for part in below)
        parts = [*self._body(inner, room), *below]
        return Panel(Group(*parts), title=self._title(inner), title_align="left", border_style="cyan", padding=(0, 1))

    def _title(self, width: int) -> Text:
        recipe = self.plan.recipe
        words = [recipe.regime, model_title(recipe.model), self.trait, f"judge {self.judge.name}"]
        while len(words) > 1 and sum(map(len, words)) + 2 * len(words) > width - 2:
            words = words[:-1]
        return Text(one_line("  ".join(words)), style="bold", overflow="ellipsis")

    def _lines(self, part: RenderableType, width: int) -> int:
        return len(self.console.render_lines(part, self.console.options.update(width=width, height=None), pad=False))

    def _body(self, width: int, room: int) -> list[RenderableType]:
        """Table and chart, and on a wide screen the newest answer beside them."""
        beside = width >= WIDE and self._latest is not None
        left = max(width * 3 // 5, 76) if beside else width
        parts: list[RenderableType] = []
        rows = self._cycle_rows()
        free = room - 1 - len(rows) - BELOW
        cycles = self.plan.recipe.cycles
        has_chart = len(self.scores) > 1 and free >= LEAST_ROWS and chart_step(cycles, left)
        if len(rows) > room - 1:
            rows = rows[len(rows) - max(1, room - 1) :]
        if room > 1 and rows:
            parts.append(cycle_table(rows, self.trait, self.console, left))
        if has_chart:
            tall = min(MOST_ROWS if room > 40 else CHART_ROWS, free)
            parts.append(chart(self.scores, cycles, self.trait, rows=tall, width=left))
        if not beside or not parts:
            return parts
        lines = sum(self._lines(part, left) for part in parts)
        return [_side_by_side(Group(*parts), left, self._answer(width - left - 2, max(lines, min(room, 8))))]

    def _cycle_rows(self) -> list[CycleRow]:
        numbers = {*self.scores, *self.rows, *(doing.step.cycle for doing in list(self.doing.values()))}
        return [
            CycleRow(
                number,
                self.scores.get(number, {}).get("trait"),
                self.scores.get(number, {}).get("coherence"),
                self.rows.get(number, 0) if number >= 0 else 0,
                self.seconds.get(number),
            )
            for number in sorted(numbers)
        ]

    def _answer(self, width: int, lines: int) -> Text:
        """The newest text that any step is writing, cut to a box."""
        looked, name, text = self._fresh
        now = self.now()
        if self._latest is not None and now - looked >= LATEST_SECONDS:
            for doing in list(self.doing.values()):
                if found := self._latest(doing.step):
                    name, text = f"{cycle_name(doing.step.cycle)}, {doing.step.words}", safe(found)
            self._fresh = (now, name, text)
        shown = Text(f"{name}\n" if name else "", style="dim").append(text, style="not dim")
        wrapped = shown.wrap(self.console, width)
        return Text("\n").join(wrapped[:lines])

    def _bars(self, width: int) -> Table:
        """A line for each step in progress, in columns. Leaves out what does not fit, the rate first."""
        table, doing = Table.grid(padding=(0, 1)), list(self.doing.values())
        lines = [(cycle_name(each.step.cycle), each.step.words, *self._counted(each)) for each in doing]
        wide, counted, rated = _beside(lines, width)
        for each, (name, what, count, rate) in zip(doing, lines, strict=True):
            cells: list[RenderableType] = [Text(name, style="bold", no_wrap=True)]
            cells.append(Text(what, no_wrap=True, overflow="ellipsis"))
            if wide >= 4:
                total = each.progress.total
                cells.append(ProgressBar(total=total or 1, completed=each.progress.done, width=min(28, wide), pulse=total == 0))
            if counted:
                cells.append(Text(one_line(count, counted), no_wrap=True))
            if rated:
                cells.append(Text(rate, style="dim", no_wrap=True))
            table.add_row(*cells)
        return table

    def _counted(self, doing: Doing) -> tuple[str, str]:
        """How far a step is, and how fast and how long still; "" where that is not known."""
        progress = doing.progress
        left = self.countdown.left_of(doing.step, self.now())
        rate = ", ".join(filter(None, (doing.rate(), time_left(left) if left and progress.total else "")))
        return f"{progress.done}/{progress.total} {progress.unit}" if progress.total else "", rate

    def _foot(self, width: int, *, notes: int) -> Text:
        foot = Text(f"{self.judge.note}\n" if self.judge.note else "", style=WARNING)
        spent, left, steps = clock(self.now() - self.started), self._left(), len(self.plan.steps)
        line = ", ".join(filter(None, (f"{self.finished} of {steps} steps", spent, left)))
        if len(line) > width:
            left = left.removeprefix("about ").removeprefix("perhaps ")
            line = ", ".join(filter(None, (f"{self.finished}/{steps} steps", spent, left)))
        foot.append(line, style="not bold default")
        for note in self.notes[len(self.notes) - notes :] if notes else ():
            shown = Text(one_line(note), style=f"not bold {TRAIT}")
            shown.truncate(width, overflow="ellipsis")
            foot.append("\n").append(shown)
        return foot


def _beside(lines: Sequence[tuple[str, str, str, str]], width: int) -> tuple[int, int, int]:
    """Columns for the bars, the counts and the rates of lines (cycle, words, count, rate); 0 for what does not fit."""
    if not lines:
        return 0, 0, 0
    name, words, count, rate = (max(map(len, column)) for column in zip(*lines, strict=True))
    free, least = width - name - words - 3, min(count, CUT_COUNT)
    for rated in (rate, 0):
        spare = free - least - 1 - (rated + 1 if rated else 0) - LEAST_BAR
        if spare >= 0:
            more = min(spare, count - least)
            return LEAST_BAR + spare - more, least + more, rated
    return free, 0, 0


def _side_by_side(left: RenderableType, width: int, right: RenderableType) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=width)
    table.add_column()
    table.add_row(left, right)
    return table
