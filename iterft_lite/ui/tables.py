"""What commands print: the tables of a report, of a plan, of a list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from iterft_lite.app.held_out import HeldOut
from iterft_lite.digests import Json
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import cycle_name, cycle_title
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.hub import title as model_title
from iterft_lite.report.language import warnings
from iterft_lite.report.replication import Replication
from iterft_lite.report.report import Cycle, Report, beside_scores, export_sentences, verdict_sentences, version_sentence
from iterft_lite.ui.chart import COHERENCE, TRAIT, chart, chart_step
from iterft_lite.ui.foreign import one_line, safe
from iterft_lite.ui.text import (
    clock,
    context_rows,
    judge_sentence,
    null_arm_sentence,
    plain_sentence,
    plan_sentence,
    score_text,
)

WARNING = "bold red3"

LABELLED = re.compile(r"([a-z]+): (.*)", re.DOTALL)
"""A sentence on a choice, with what it is about before it."""

CONTEXT_WIDTH = 32
"""Characters of a system message in a table."""


def plain_table(*columns: str, left: int = 1) -> Table:
    """A table without lines whose cells never wrap; the first columns are aligned to the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    return table


# -- the table of cycles


@dataclass(frozen=True)
class CycleRow:
    """One line of the table of cycles.

    Attributes:
        cycle: The paper's number; -1 the untouched model.
        trait, coherence: Scores as in a report; None where there is none yet.
        rows: Rows that the cycle's model was trained on; 0 where it is none or not known.
        seconds: That its steps took; None where none is finished.
    """

    cycle: int
    trait: Mapping[str, Json] | None
    coherence: Mapping[str, Json] | None
    rows: int
    seconds: float | None


def cycle_table(rows: Sequence[CycleRow], trait: str, console: Console, width: int) -> Table:
    """Scores by cycle, in the fullest form that fits a width: cells are left out or shortened, never wrapped."""
    forms = [_cycle_table(rows, trait, form) for form in _FORMS]
    return first_that_fits(forms, console, width) or forms[-1]


def first_that_fits(tables: Iterable[Table], console: Console, width: int) -> Table | None:
    """The first of some tables, the fullest first, that needs no more than a width; None if none does."""
    wide = console.options.update(width=1000)
    return next((table for table in tables if Measurement.get(console, wide, table).maximum <= width), None)


@dataclass(frozen=True)
class _Form:
    """What a table of cycles shows."""

    titles: bool = True
    seconds: bool = True
    rows: bool = True
    interval: bool = True
    scale: bool = True


_FORMS = (
    _Form(),
    _Form(titles=False),
    _Form(titles=False, seconds=False),
    _Form(titles=False, seconds=False, rows=False),
    _Form(titles=False, seconds=False, rows=False, scale=False),
    _Form(titles=False, seconds=False, rows=False, scale=False, interval=False),
)


def _cycle_table(rows: Sequence[CycleRow], trait: str, form: _Form) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("cycle", no_wrap=True)
    table.add_column(f"{trait} (1-100)" if form.scale else trait, style=TRAIT, no_wrap=True)
    table.add_column("coherence", style=COHERENCE, no_wrap=True)
    if form.rows:
        table.add_column("trained on", justify="right", no_wrap=True)
    if form.seconds:
        table.add_column("time", justify="right", no_wrap=True)
    for row in rows:
        cells = [
            cycle_title(row.cycle) if form.titles else cycle_name(row.cycle),
            score_text(row.trait, interval=form.interval),
            score_text(row.coherence, interval=form.interval),
            *([str(row.rows or "")] if form.rows else []),
            *(["" if row.seconds is None else clock(row.seconds)] if form.seconds else []),
        ]
        table.add_row(*map(Text, cells))
    return table


# -- a report


def show_report(report: Report, console: Console, *, full: bool = False) -> None:
    """What came of a run: a sentence, the table of cycles, the chart; with `full` every number and rule."""
    recipe, trait = report.recipe, one_line(report.manifest["trait"])
    name, model = one_line(recipe["name"]), one_line(model_title(recipe["model"]))
    console.print(f"{name}: {recipe['regime']}, model {model}, trait {trait}, seed {recipe['seed']}", markup=False)
    if arm := null_arm_sentence(recipe):
        console.print(arm)
    if not report.complete:
        console.print("this run is not finished", style=TRAIT)
    console.print()
    console.print(plain_sentence(report), style="bold", markup=False)
    for warning in warnings(report):
        console.print(warning, style=WARNING, markup=False)
    if report.judge["note"]:
        console.print(safe(report.judge["note"]), style=WARNING, markup=False)
    console.print()
    console.print(cycle_table([_cycle_row(cycle) for cycle in report.cycles], trait, console, console.width))
    console.print()
    _show_chart(report, console)
    _show_contexts(report, console)
    if full:
        _show_details(report, console)
    for sentence in export_sentences(report):
        console.print(safe(sentence), style="dim", markup=False)
    console.print(safe(judge_sentence(report.judge)), style="dim", markup=False)
    if changes := version_sentence(report):
        console.print(changes, style=TRAIT, markup=False)


def _cycle_row(cycle: Cycle) -> CycleRow:
    rows = cycle.train_rows if cycle.cycle >= 0 else 0
    return CycleRow(cycle.cycle, cycle.trait, cycle.coherence, rows, sum(cycle.seconds.values()))


def _show_chart(report: Report, console: Console) -> None:
    scores = {cycle.cycle: {"trait": cycle.trait, "coherence": cycle.coherence} for cycle in report.cycles if cycle.trait}
    cycles = report.recipe["cycles"]
    if scores and chart_step(cycles, console.width):
        console.print(chart(scores, cycles, report.manifest["trait"], width=console.width))
        console.print()


def _show_contexts(report: Report, console: Console) -> None:
    """The trait's score by cycle in each evaluation context, where there is more than one."""
    if rows := context_rows(report):
        console.print(f"{one_line(report.manifest['trait'])} by system message", style="bold", markup=False)
        console.print("all else in this report is after the first of them", markup=False)
        columns = {one_line(context, CONTEXT_WIDTH): list(cells.values()) for context, cells in rows}
        _show_columns(columns, list(rows[0][1]), console)


def _show_details(report: Report, console: Console) -> None:
    """Every measure by cycle, as many columns side by side as fit, and both verdicts in full."""
    columns: dict[str, list[str]] = {}
    for cycle in report.cycles:
        for name, cell in _measures(report, cycle):
            columns.setdefault(name, []).append(cell)
    names = [cycle_name(cycle.cycle) for cycle in report.cycles]
    _show_columns(columns, names, console)
    for sentence in verdict_sentences(report.verdict):
        console.print(sentence, style="bold" if sentence.startswith("interval") else "", markup=False)


def _show_columns(columns: Mapping[str, Sequence[str]], names: Sequence[str], console: Console) -> None:
    """Columns by cycle, as many side by side as fit."""
    for block in _blocks(columns, names, console.width):
        table = plain_table("cycle", *block)
        for number, name in enumerate(names):
            table.add_row(name, *(columns[column][number] for column in block))
        console.print(table)
        console.print()


def _blocks(columns: Mapping[str, Sequence[str]], names: Sequence[str], width: int) -> Iterator[list[str]]:
    """Columns in groups that fit a width, each beside the cycles' names."""
    first = max(map(len, ("cycle", *names)))
    block: list[str] = []
    used = first
    for name, cells in columns.items():
        wide = max(map(len, (name, *cells))) + 2
        if block and used + wide > width - 2:
            yield block
            block, used = [], first
        block.append(name)
        used += wide
    if block:
        yield block


def _measures(report: Report, cycle: Cycle) -> Iterator[tuple[str, str]]:
    """Name and figure of what is measured beside the scores."""
    yield "rate", "" if cycle.rate is None else f"{cycle.rate:.0%}"
    yield from beside_scores(report, cycle)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show_held_out(held_out: HeldOut, trait: str, console: Console) -> None:
    """Scores and verdicts on the held-out questions."""
    console.print("\nheld-out questions", style="bold")
    table = plain_table("cycle", f"{trait} (1-100)", "coherence", "rate", "answers", left=3)
    narrow = console.width < 80
    for cycle, score in sorted(held_out.scores.items()):
        cells = (score_text(score["trait"]), score_text(score["coherence"]), _number(score["rate"], ".0%"))
        table.add_row(cycle_name(cycle) if narrow else cycle_title(cycle), *cells, str(score["answers"]))
    console.print(table)
    for sentence in verdict_sentences(held_out.verdict):
        console.print(sentence, style="bold" if sentence.startswith("interval") else "", markup=False)


def show_replication(out: str, found: Replication, about: str, console: Console) -> None:
    """A run beside published scores: what differs in the settings, every number, and what that comes to."""
    console.print(f"{one_line(out)}: {found.word}", style="bold", markup=False)
    console.print(f"held against {about}", markup=False)
    for deviation in found.deviations:
        console.print(f"- {safe(deviation)}", style="dim", markup=False)
    rows = [(check.what, check.published, check.ours, check.word) for check in found.checks]
    show_table(("", "published", "this run", ""), rows, console)


def show_plan(
    plan: Plan, choices: Sequence[str], estimates: Mapping[str, str], console: Console, *, steps: bool = False
) -> None:
    """What a plan will do and cost; with `steps` each of its steps too."""
    recipe = plan.recipe
    console.print(one_line(f"{recipe.name}: {plan_sentence(recipe)}", 1000), style="bold", markup=False)
    console.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in estimates.items():
        grid.add_row(Text(name, style="bold"), Text(safe(text)))
    for name, text in _labelled(choices):
        grid.add_row(Text(safe(name), style="bold"), Text(safe(text)))
    console.print(grid)
    if steps:
        console.print()
        _show_steps(plan, console)


def _labelled(choices: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Sentences with the word and colon that they begin with apart; a word is said once for those that follow each other."""
    last = ""
    for choice in choices:
        found = LABELLED.fullmatch(choice)
        name, text = (found[1], found[2]) if found else (last, choice)
        yield ("" if name == last else name), text
        last = name


def _show_steps(plan: Plan, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("step", "reads", "does", "key"):
        table.add_column(name, no_wrap=name in ("step", "key"))
    for step in plan:
        reads = ", ".join(f"{role} {name}" for role, name in step.inputs)
        table.add_row(step.name, reads, VERBS[step.verb].summary(step.params), step.key[:10])
    console.print(table)


def show_entries(entries: Iterable[tuple[str, str, str]], console: Console) -> None:
    """A list of names, each with what it is and, below, a sentence: readable at every width."""
    for name, kind, about in entries:
        line = Text(one_line(name), style="bold").append(f"  {one_line(kind)}", style="not bold dim")
        console.print(line, soft_wrap=False)
        if about:
            console.print(Padding(Text(safe(about)), (0, 0, 0, 4), expand=False))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """A plain table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    console.print(table)
