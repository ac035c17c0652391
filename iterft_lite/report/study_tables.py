"""A study's numbers as tables: for programs as CSV, for papers as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from iterft_lite.digests import Json, canonical
from iterft_lite.experiment.steps import cycle_name
from iterft_lite.metrics.across_seeds import NOTHING, Estimate
from iterft_lite.metrics.catalogue import METRICS
from iterft_lite.report.cells import CellReport
from iterft_lite.report.study import RULES, Experiment, StudyReport

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""How a text begins that a spreadsheet computes: with a sign, or with its full-width form in East Asian ones."""

DIGITS = 4
"""Decimals of numbers in CSV: points of the judge's scale, and p-values, are not known any finer."""


@dataclass(frozen=True)
class Table:
    """Named columns and rows of values; None where there is none."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Json, ...], ...]


def as_csv(table: Table) -> str:
    """The table as comma-separated values. A text that a spreadsheet would compute gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_csv_cell(name) for name in table.columns])
    writer.writerows([_csv_cell(value) for value in row] for row in table.rows)
    return out.getvalue()


def _csv_cell(value: Json) -> Json:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, str) and value.lstrip().startswith(FORMULA):  # spreadsheets skip spaces, tabs and line ends
        return f"'{value}"
    return canonical(value) if isinstance(value, (list, dict)) else value


def as_markdown(table: Table) -> str:
    """The table in Markdown; numbers with one decimal, p-values with three."""
    rows = [[_markdown_cell(name, value) for name, value in zip(table.columns, row, strict=True)] for row in table.rows]
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(column: str, value: Json) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if column == "p" else f"{value:.1f}" if abs(value) >= 0.1 else f"{value:.2g}"
    text = value if isinstance(value, str) else canonical(value)
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\r", " "), ("\n", " ")):
        text = text.replace(sign, written)
    return text


def curve_table(study: StudyReport, experiments: Iterable[Experiment] | None = None) -> Table:
    """A row an experiment and cycle: scores with intervals, and what needs no judge."""
    heads = ("experiment", "arm", *study.keys, "cycle", "trainings", "prompts")
    scales = [f"{scale}{end}" for scale in ("trait", "coherence") for end in ("", "_low", "_high")]
    rows = [
        (
            *_names(each, study),
            cycle_name(number) if number < 0 else number,
            point.trait.trainings,
            point.trait.prompts,
            *_ends(point.trait),
            *_ends(point.coherence),
            *(point.metrics.get(name) for name in METRICS),
        )
        for each in (study.everything if experiments is None else experiments)
        for number, point in each.points.items()
    ]
    return Table((*heads, *scales, *METRICS), tuple(rows))


def verdict_table(study: StudyReport, experiments: Iterable[Experiment] | None = None) -> Table:
    """A row an experiment: how far the trait moved, what is said of it alone and among all, and the paper's rule."""
    shown = list(study.everything if experiments is None else experiments)
    arms = list(dict.fromkeys(name for each in shown for name in each.beside))
    heads = (
        "experiment",
        "arm",
        *study.keys,
        "seed rows found for",
        "trainings",
        "ended early",
        "cycle 0",
        "last cycle",
        "score",
    )
    change = ("change", "low", "high", "covers", "verdict", "p", "verdict among all", "coherence change", "largest late rise")
    paper = tuple(f"paper {reading} ({anchor})" for anchor in (0, 1) for reading in RULES)
    beside = tuple(f"{name}{end}" for arm in arms for name in (f"above {arm}",) for end in ("", " low", " high"))
    rows = [
        (
            *_names(each, study),
            each.cells[0].threshold,
            len(each.cells),
            _ended(each),
            _trait(each, 0),
            each.last if each.last >= 0 else None,
            _trait(each, each.last),
            *_ends(each.change),
            each.change.covers,
            each.word,
            each.p_value,
            "" if each.arm else each.corrected,
            each.coherence.mean,
            each.late_rise,
            *(_met(*each.rule(reading, anchor)) for anchor in (0, 1) for reading in RULES),
            *(end for arm in arms for end in _ends(each.beside.get(arm, NOTHING))),
        )
        for each in shown
    ]
    return Table((*heads, *change, *paper, *beside), tuple(rows))


def study_json(study: StudyReport) -> dict[str, Json]:
    """The machine-readable form. Keys are a contract: later versions add, they do not rename."""
    return {
        "name": study.name,
        **{of: study.said(of) for of in ("trait", "regime", "model", "judge")},
        "keys": list(study.keys),
        "cells": [_cell_json(cell) for cell in study.cells],
        "experiments": [_experiment_json(each) for each in study.experiments],
        "arms": [_experiment_json(each) for each in study.arms],
        "counts": study.counts,
        "false_alarms": asdict(study.false_alarms) if study.false_alarms else None,
        "steps": study.mark,
    }


def _cell_json(cell: CellReport) -> dict[str, Json]:
    return {
        "name": cell.name,
        "folder": str(cell.folder),
        "values": dict(cell.values),
        "arm": cell.arm,
        "state": cell.state,
        "failure": cell.failure,
    }


def _experiment_json(each: Experiment) -> dict[str, Json]:
    points = [{"cycle": n, **asdict(point)} for n, point in each.points.items()]
    return {
        "name": each.name,
        "values": dict(each.values),
        "arm": each.arm,
        "cells": [cell.name for cell in each.cells],
        "cycles": points,
        "change": asdict(each.change),
        "covers": each.change.covers,
        "coherence_change": asdict(each.coherence),
        "last": each.last,
        "verdict": each.word,
        "verdict_among_all": None if each.arm else each.corrected,
        "p": each.p_value,
        "late_rise": each.late_rise,
        "paper": {
            f"anchor {anchor}": {r: each.rule(r, anchor)[0] for r in RULES} | {"of": each.rule("any", anchor)[1]}
            for anchor in (0, 1)
        },
        "above_arms": {name: asdict(estimate) for name, estimate in each.beside.items()},
    }


def _names(experiment: Experiment, study: StudyReport) -> Sequence[Json]:
    return experiment.name, experiment.arm, *(experiment.values.get(key) for key in study.keys)


def _ends(estimate: Estimate) -> tuple[Json, Json, Json]:
    return estimate.mean, estimate.low, estimate.high


def _trait(experiment: Experiment, cycle: int) -> float | None:
    return experiment.points[cycle].trait.mean if cycle in experiment.points else None


def _met(count: int, of: int) -> str | None:
    """`2 of 3`; None where it cannot be said yet."""
    return f"{count} of {of}" if of else None


def _ended(experiment: Experiment) -> str:
    """Why trainings ended before their last cycle."""
    return "; ".join(f"{cell.name}: {reason(cell.failure)}" for cell in experiment.failures)


def reason(failure: object) -> str:
    """A failure in one line: where, and the message's first line."""
    if not isinstance(failure, dict):
        return "no word of it"
    message = str(failure.get("message") or "").strip().split("\n")[0]
    return ": ".join(filter(None, (str(failure.get("step") or ""), message))) or "no word of it"
