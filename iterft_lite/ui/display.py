"""Everything that is shown in a terminal: the live view, its plain-line twin, and tables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from iterft_lite.app.held_out import HeldOut
from iterft_lite.digests import Json
from iterft_lite.engine.run import Event, StepFinished, StepProgress, StepStarted
from iterft_lite.engine.store import Seal
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step, cycle_name, cycle_title
from iterft_lite.hub import title as model_title
from iterft_lite.protocols import Progress
from iterft_lite.report.report import Cycle, Report, verdict_sentences, version_sentence

CHART_ROWS = 11
CHART_STEP = 7
"""Columns a cycle takes in the chart."""

PLAIN_SECONDS = 10.0
"""Plain lines of one step are at least this far apart."""

DOING: Mapping[str, str] = {
    "base": "loading the base model",
    "seed": "reading seed rows",
    "generate": "writing the next data",
    "compose": "composing training rows",
    "train": "training",
    "export": "exporting to GGUF, checking",
    "answer": "answering the questions",
    "judge": "judging",
    "measure": "measuring without a judge",
    "score": "scoring",
}


def make_console(*, stderr: bool = False) -> Console:
    """The terminal; without colour where NO_COLOR is set."""
    return Console(stderr=stderr, highlight=False)


def is_live(console: Console) -> bool:
    """Whether a view that redraws itself makes sense: a terminal, not CI, colour allowed."""
    return console.is_terminal and not console.is_dumb_terminal and not any(map(os.environ.get, ("NO_COLOR", "CI")))


def clock(seconds: float) -> str:
    """`48 s`, `3:05`, `2:10:00`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def score_text(score: Mapping[str, Json] | None, *, interval: bool = True) -> str:
    """`61.3 [52-70]`, without an interval `61.3 (no interval)`; what could not be scored is said."""
    if not score:
        return ""
    if score["mean"] is None:
        return f"none scored of {score['unscored']}"
    text = f"{score['mean']:5.1f}"
    if interval:
        text += " (no interval)" if score["low"] is None else f" [{score['low']:.0f}-{score['high']:.0f}]"
    return text + (f" ({score['unscored']} unscored)" if score["unscored"] else "")


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
                # the device does one step at a time: what was restored for this one is there
                if step.lane == "device":
                    self.doing = {name: doing for name, doing in self.doing.items() if doing.step.lane != step.lane}
                self.doing[step.name] = Doing(step)
                self._say(step, f"{DOING[step.verb]} ...")
            case StepProgress(progress=progress):
                doing = self.doing.setdefault(step.name, Doing(step))
                doing.move(progress)
                if progress.note:
                    self.notes.append(f"{step.name}: {progress.note}")
                    self._say(step, progress.note)
                self._say_progress(doing)
            case StepFinished(seal=seal, reused=reused):
                self.doing.pop(step.name, None)
                self._take_seal(step, seal, reused)

    def _take_seal(self, step: Step, seal: Seal, reused: bool) -> None:
        self.finished += 1
        self.seconds[step.cycle] = self.seconds.get(step.cycle, 0.0) + seal.seconds
        if step.verb == "compose":
            self.rows[step.cycle] = seal.facts["rows"]
        self.notes += [f"{step.name}: {note}" for note in seal.facts.get("notes", ())]
        if step.verb == "score":
            self.scores[step.cycle] = seal.facts
            trait, coherence = (score_text(seal.facts[scale]) for scale in ("trait", "coherence"))
            self._say(step, f"{self.trait} {trait.strip()}, coherence {coherence.strip()}")
        elif not reused:
            self._say(step, f"done in {clock(seal.seconds)}")

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
                DOING[doing.step.verb],
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


def score_table(trait: str) -> Table:
    """An empty table of cycles."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("cycle", no_wrap=True)
    table.add_column(f"{trait} (1-100)", style="yellow", no_wrap=True)
    table.add_column("coherence", style="green", no_wrap=True)
    table.add_column("trained on", justify="right")
    table.add_column("time", justify="right")
    return table


def chart(scores: Mapping[int, Mapping[str, Json]], cycles: int, trait: str) -> Text:
    """Trait and coherence by cycle on a grid of characters, 0 to 100 from bottom to top."""
    grid = [[" "] * (CHART_STEP * (cycles + 2)) for _ in range(CHART_ROWS)]
    styles: dict[tuple[int, int], str] = {}

    def put(row: int, column: int, mark: str, style: str) -> None:
        grid[row][column] = mark
        styles[row, column] = style

    def place(value: float) -> int:
        return round((1 - value / 100) * (CHART_ROWS - 1))

    base = scores.get(-1, {}).get("trait")
    if base and base["mean"] is not None:
        for column in range(0, len(grid[0]), 2):
            put(place(base["mean"]), column, "-", "red")
    for number, score in sorted(scores.items()):
        column = CHART_STEP * (number + 1) + CHART_STEP // 2
        for scale, mark, style, offset in (("coherence", "o", "green", 1), ("trait", "●", "yellow", 0)):
            value = score[scale]
            if value["mean"] is None:
                continue
            if scale == "trait" and value["low"] is not None:
                for row in range(place(value["high"]), place(value["low"]) + 1):
                    put(row, column, "│", "yellow")
            put(place(value["mean"]), column + offset, mark, f"bold {style}")
    text = Text()
    for row, line in enumerate(grid):
        label = f"{100 - 100 * row // (CHART_ROWS - 1):>4} " if row % 5 == 0 else "     "
        text.append(label + "│", style="dim")
        for column, mark in enumerate(line):
            text.append(mark, style=styles.get((row, column), ""))
        text.append("\n")
    text.append("     └" + "─" * len(grid[0]) + "\n      ", style="dim")
    for number in range(-1, cycles + 1):
        text.append(cycle_name(number).center(CHART_STEP), style="bold" if number in scores else "dim")
    text.append("\n      ")
    text.append("●", style="bold yellow")
    text.append(f" {trait} with 95 % interval   ")
    text.append("o", style="bold green")
    text.append(" coherence   ")
    text.append("- -", style="red")
    text.append(" untouched model")
    return text


# -- what commands print


def show_report(report: Report, console: Console) -> None:
    """The table, the chart and the verdicts of a run."""
    recipe, trait, model = report.recipe, report.manifest["trait"], model_title(report.recipe["model"])
    console.print(f"[b]{recipe['name']}[/b]: {recipe['regime']}, model {model}, trait {trait}, seed {recipe['seed']}")
    judge = report.judge
    cost = f", ${judge['usd']:.4f}" if judge["kind"] == "llm" else ""
    if cost and judge["planned_usd"] is None:
        cost = ", dollars not known"
    elif cost and judge["planned_usd"]:
        cost += f" (planned: at most ${judge['planned_usd']:.4f})"
    console.print(f"judge: {judge['model'] or judge['name']}; {judge['calls']} calls{cost}")
    if judge["note"]:
        console.print(judge["note"], style="bold red")
    table = score_table(trait)
    measured = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    trained = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("cycle", "rate", "words", "a sentence", "distinct-2", "repeats", "symbols"):
        measured.add_column(name, justify="left" if name == "cycle" else "right", no_wrap=True)
    pairs = recipe["regime"] == "dpo"
    for name in ("cycle", "PPL (M0)", "PPL with trait", "PPL without", *(("DPO margin", "pairs right") if pairs else ())):
        trained.add_column(name, justify="left" if name == "cycle" else "right", no_wrap=True)
    for cycle in report.cycles:
        table.add_row(*_score_row(cycle))
        measured.add_row(*_measured_row(cycle))
        trained.add_row(*_trained_row(cycle)[: len(trained.columns)])
    console.print(table)
    console.print(measured)
    console.print(trained)
    scores = {cycle.cycle: {"trait": cycle.trait, "coherence": cycle.coherence} for cycle in report.cycles if cycle.trait}
    if scores:
        console.print(chart(scores, recipe["cycles"], trait))
    console.print()
    for sentence in verdict_sentences(report.verdict):
        console.print(sentence, style="bold" if sentence.startswith("interval") else "")
    if not report.complete:
        console.print("this run is not finished", style="yellow")
    if changes := version_sentence(report):
        console.print(changes, style="yellow", markup=False)


def _score_row(cycle: Cycle) -> list[str]:
    return [
        cycle_title(cycle.cycle),
        score_text(cycle.trait),
        score_text(cycle.coherence),
        str(cycle.train_rows) if cycle.cycle >= 0 else "",
        clock(sum(cycle.seconds.values())),
    ]


def _measured_row(cycle: Cycle) -> list[str]:
    measures = cycle.measures
    return [
        cycle_name(cycle.cycle),
        "" if cycle.rate is None else f"{cycle.rate:.0%}",
        _number(measures.get("words"), ".0f"),
        _number(measures.get("words_per_sentence"), ".1f"),
        _number(measures.get("distinct_2"), ".2f"),
        _number(measures.get("repeated_4"), ".2f"),
        _number(measures.get("non_alphabetic"), ".1%"),
    ]


def _trained_row(cycle: Cycle) -> list[str]:
    """Perplexity of the answers under M[0], of this model on held-out texts with and without the trait; DPO's own measures."""
    measures, training = cycle.measures, cycle.training
    return [
        cycle_name(cycle.cycle),
        _number(measures.get("perplexity_base"), ".1f"),
        _number(measures.get("perplexity_high"), ".1f"),
        _number(measures.get("perplexity_low"), ".1f"),
        _number(training.get("margin"), "+.3f"),
        _number(training.get("accuracy"), ".0%"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show_held_out(held_out: HeldOut, trait: str, console: Console) -> None:
    """Scores and verdicts on the held-out questions."""
    console.print("\n[b]held-out questions[/b]")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("cycle", f"{trait} (1-100)", "coherence", "rate", "answers"):
        table.add_column(name, no_wrap=True)
    for cycle, score in sorted(held_out.scores.items()):
        cells = (score_text(score["trait"]), score_text(score["coherence"]), _number(score["rate"], ".0%"))
        table.add_row(cycle_title(cycle), *cells, str(score["answers"]))
    console.print(table)
    for sentence in verdict_sentences(held_out.verdict):
        console.print(sentence, style="bold" if sentence.startswith("interval") else "")


def show_plan(plan: Plan, choices: Sequence[str], estimates: Mapping[str, str], console: Console) -> None:
    """A plan, step by step, with what it will cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("step", "reads", "does", "key"):
        table.add_column(name, no_wrap=name in ("step", "key"))
    for step in plan:
        reads = ", ".join(f"{role} {name}" for role, name in step.inputs)
        table.add_row(step.name, reads, _summary(step), step.key[:10])
    console.print(table)
    for choice in choices:
        console.print(choice)
    for name, text in estimates.items():
        console.print(f"[b]{name}[/b]: {text}")


def _summary(step: Step) -> str:
    """A step's parameters in a few words."""
    params = step.params
    match step.verb:
        case "seed":
            return f"{len(params['rows'])} rows"
        case "generate" | "answer":
            sampling = params["sampling"]
            asked = f"{len(params['prompts'])} prompts" + (f" x {params['samples']}" if params["samples"] > 1 else "")
            return f"{asked}, T {sampling['temperature']}, up to {sampling['max_tokens']} tokens"
        case "train":
            settings = params["settings"]
            return (
                f"{params['loss']} loss, lr {settings['learning_rate']:g} {settings['schedule']}, "
                f"batch {settings['batch_size']}, {settings['epochs']} epoch(s), rank {settings['lora_rank']}, "
                f"base {settings['base']}"
            )
        case "export":
            return f"{params['kind']} {params['quant']}"
        case "judge":
            return f"{', '.join(params['rubrics'])} by {params['judge']['name']}"
        case "compose":
            data = params.get("data", "replace")
            return f"{params['shape']}, {data}" + (f", {params['mixed']} mixed in" if params.get("mixed") else "")
        case _:
            return ""


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """A plain table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
