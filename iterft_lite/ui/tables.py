"""What commands print: the tables of a report, of a plan, of a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterft_lite.app.held_out import HeldOut
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import cycle_name, cycle_title
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.hub import title as model_title
from iterft_lite.report.report import Cycle, Report, verdict_sentences, version_sentence
from iterft_lite.ui.chart import chart
from iterft_lite.ui.text import clock, score_text


def score_table(trait: str) -> Table:
    """An empty table of cycles."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("cycle", no_wrap=True)
    table.add_column(f"{trait} (1-100)", style="yellow", no_wrap=True)
    table.add_column("coherence", style="green", no_wrap=True)
    table.add_column("trained on", justify="right")
    table.add_column("time", justify="right")
    return table


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
    metrics = cycle.metrics
    return [
        cycle_name(cycle.cycle),
        "" if cycle.rate is None else f"{cycle.rate:.0%}",
        _number(metrics.get("words"), ".0f"),
        _number(metrics.get("words_per_sentence"), ".1f"),
        _number(metrics.get("distinct_2"), ".2f"),
        _number(metrics.get("repeated_4"), ".2f"),
        _number(metrics.get("non_alphabetic"), ".1%"),
    ]


def _trained_row(cycle: Cycle) -> list[str]:
    """Perplexity of the answers under M[0], of this model on held-out texts with and without the trait; DPO's own measures."""
    metrics, training = cycle.metrics, cycle.training
    return [
        cycle_name(cycle.cycle),
        _number(metrics.get("perplexity_base"), ".1f"),
        _number(metrics.get("perplexity_high"), ".1f"),
        _number(metrics.get("perplexity_low"), ".1f"),
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
        table.add_row(step.name, reads, VERBS[step.verb].summary(step.params), step.key[:10])
    console.print(table)
    for choice in choices:
        console.print(choice)
    for name, text in estimates.items():
        console.print(f"[b]{name}[/b]: {text}")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """A plain table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
