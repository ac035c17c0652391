"""A run as it goes on: the live view on a terminal, and its plain-line twin."""

from __future__ import annotations

import time
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
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.hub import title as model_title
from iterft_lite.protocols import Progress
from iterft_lite.ui.chart import chart
from iterft_lite.ui.console import is_live
from iterft_lite.ui.tables import score_table
from iterft_lite.ui.text import clock, score_text

PLAIN_SECONDS = 10.0
"""Plain lines of one step are at least this far apart."""


class Doing:
    """A step that is being done, as the view knows it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.progress = Progress(0, 0, "")
        self.started = time.monotonic()
        self._first: tuple[float, int, int] | None = None

    def move(self, progress: Progress) -> None:
        """Take progress in."""
        if self._first is None:
            # what was there before this sitting counts for no rate
            self._first = (time.monotonic(), progress.done, progress.tokens)
        self.progress = progress

    def rate(self) -> str:
        """`812 tokens/s, 12 s left`, as far as it can be told."""
        if self._first is None:
            return ""
        since, done, tokens = self._first
        passed, gained = time.monotonic() - since, self.progress.done - done
        if passed < 0.5 or gained <= 0:
            return ""
        words = [f"{(self.progress.tokens - tokens) / passed:,.0f} tokens/s"] if self.progress.tokens > tokens else []
        if left := self.progress.total - self.progress.done:
            words.append(f"{clock(left * passed / gained)} left")
        return ", ".join(words)


class View:
    """Follows a run: a live view on a terminal, plain lines elsewhere.

    Args:
        plan: What is being run.
        trait: Name of the trait.
        judge: Who judges; a stand-in is labelled as one.
        console: Where to draw.
    """

    def __init__(self, plan: Plan, *, trait: str, judge: JudgeIdentity, console: Console) -> None:
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
        self.notes: list[str] = []
        self.started = time.monotonic()
        self._spoken: dict[str, tuple[float, Progress | None]] = {}
        self.live = Live(console=console, auto_refresh=True, refresh_per_second=4, get_renderable=self.render)

    def __enter__(self) -> View:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.doing.clear()
        if self.is_live:
            self.live.refresh()
            self.live.stop()

    def take(self, event: Event) -> None:
        """Take an event in, and show it."""
        step = event.step
        match event:
            case StepStarted():
                self.doing[step.name] = Doing(step)
                self._say(step, f"{VERBS[step.verb].words} ...")
            case StepProgress(progress=progress):
                doing = self.doing.setdefault(step.name, Doing(step))
                doing.move(progress)
                if progress.note:
                    self.notes.append(f"{step.name}: {progress.note}")
                    self._say(step, progress.note)
                self._say_progress(doing)
            case StepFinished(completion=completion, reused=reused):
                # the device does one step at a time: what was written again for this one is there too
                ended = [name for name, doing in self.doing.items() if doing.step.queue == step.queue == "device"]
                for name in (step.name, *ended):
                    self.doing.pop(name, None)
                self._take_results(step, completion, reused)
            case StepFailed(kind=kind):
                self._say(step, f"failed ({kind})")

    def _take_results(self, step: Step, completion: Completion, reused: bool) -> None:
        self.finished += 1
        self.seconds[step.cycle] = self.seconds.get(step.cycle, 0.0) + completion.seconds
        if step.verb == "build_dataset":
            self.rows[step.cycle] = completion.results["rows"]
        self.notes += [f"{step.name}: {note}" for note in completion.results.get("notes", ())]
        if step.verb == "aggregate":
            self.scores[step.cycle] = completion.results
            trait, coherence = (score_text(completion.results[scale]) for scale in ("trait", "coherence"))
            self._say(step, f"{self.trait} {trait.strip()}, coherence {coherence.strip()}")
        elif not reused:
            self._say(step, f"done in {clock(completion.seconds)}")

    # -- plain lines

    def _say(self, step: Step, text: str) -> None:
        if not self.is_live:
            total = len(self.plan.steps)
            self.console.print(f"[{self.finished}/{total}] {cycle_title(step.cycle)}, {step.name}: {text}", markup=False)

    def _say_progress(self, doing: Doing) -> None:
        name, now, progress = doing.step.name, time.monotonic(), doing.progress
        spoken, last = self._spoken.get(name, (doing.started, None))
        if not self.is_live and now - spoken >= PLAIN_SECONDS and progress != last:
            self._spoken[name] = now, progress
            rate = doing.rate()
            self._say(doing.step, f"{progress.done} of {progress.total} {progress.unit}" + (f", {rate}" if rate else ""))

    # -- live view

    def render(self) -> RenderableType:
        """The view as it stands."""
        recipe = self.plan.recipe
        model = model_title(recipe.model)
        title = f"[b]{recipe.regime}[/b]  model [b]{model}[/b]  trait [b]{self.trait}[/b]  judge {self.judge.name}"
        parts: list[RenderableType] = [self._table()]
        if len(self.scores) > 1:
            parts.append(chart(self.scores, recipe.cycles, self.trait))
        parts += [self._bars(), self._foot()]
        return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(0, 1))

    def _table(self) -> Table:
        table = score_table(self.trait)
        for number in sorted({*self.scores, *self.rows, *(doing.step.cycle for doing in self.doing.values())}):
            score = self.scores.get(number, {})
            table.add_row(
                cycle_title(number),
                score_text(score.get("trait")),
                score_text(score.get("coherence")),
                str(self.rows.get(number, "") if number >= 0 else ""),
                clock(self.seconds[number]) if number in self.seconds else "",
            )
        return table

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for doing in list(self.doing.values()):
            progress = doing.progress
            bar = ProgressBar(total=progress.total or 1, completed=progress.done, width=28, pulse=progress.total == 0)
            count = f"{progress.done}/{progress.total} {progress.unit}" if progress.total else ""
            table.add_row(
                Text(cycle_name(doing.step.cycle), style="bold"),
                VERBS[doing.step.verb].words,
                bar,
                count,
                Text(doing.rate(), style="dim"),
            )
        return table

    def _foot(self) -> Text:
        spent = time.monotonic() - self.started
        foot = Text(f"{self.judge.note}\n" if self.judge.note else "", style="bold red")
        foot.append(f"{self.finished} of {len(self.plan.steps)} steps, {clock(spent)}", style="not bold dim white")
        if left := self._left():
            foot.append(f", about {clock(left)} left", style="not bold dim white")
        for note in self.notes[-3:]:
            foot.append(f"\n{note}", style="yellow")
        return foot

    def _left(self) -> float | None:
        """Seconds that the cycles still to come will take, if they take as long as the mean of those that are done."""
        done = [number for number in self.scores if number >= 0]
        if not done:
            return None
        mean = sum(self.seconds[number] for number in done) / len(done)
        passed = sum(seconds for number, seconds in self.seconds.items() if number >= 0 and number not in self.scores)
        return max(0.0, mean * (self.plan.recipe.cycles + 1 - len(done)) - passed)
