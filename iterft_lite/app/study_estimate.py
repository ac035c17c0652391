"""What a study would do, cost and take: its distinct steps, each counted once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from iterft_lite.app.calibrate_seeds import GRID, MOST
from iterft_lite.app.study_plan import Calibration, PlannedCell, StepsOfAll, StudyPlan, steps_of
from iterft_lite.app.sweep_time import together
from iterft_lite.experiment.grid import chosen
from iterft_lite.experiment.steps import Step
from iterft_lite.machine.estimate import StepCost, disk_meanwhile, step_costs
from iterft_lite.machine.plan_words import about, size_words, vram_sentence
from iterft_lite.machine.resolve import Machine, this_machine
from iterft_lite.machine.timing import read_table
from iterft_lite.machine.work import Span

PLACES = (1, 2, 4)
"""Numbers of GPUs that hours are given for."""


@dataclass(frozen=True)
class StudyEstimate:
    """What a study comes to.

    Attributes:
        lines: Sentences by what they are of.
        notes: What a user should know besides.
        names: Of the cells, in the order in which they are run.
    """

    lines: dict[str, str]
    notes: tuple[str, ...]
    names: tuple[str, ...]


def estimate_study(
    study: StudyPlan,
    only: Sequence[str] = (),
    machine: Machine | None = None,
    limit: int | None = None,
    finished: Collection[str] | None = None,
) -> StudyEstimate:
    """What the cells of a study would do.

    Args:
        only: `key=value` texts: these cells alone.
        limit: The first cells alone.
        machine: Where it would run; this one if None.
        finished: Keys of the steps that are to be reused; None where nothing is to be.

    Raises:
        UserError: If a cell cannot be planned: every problem of every cell at once.
    """
    machine, cells = machine or this_machine(), study.guessed()
    planned = study.planned((chosen(cells, only) if only else cells)[:limit])
    steps, costs = steps_of(each.plan for each in planned), costs_by_key(planned, machine)
    distinct = [costs[key] for key in steps.distinct]
    largest = max(planned, key=lambda each: len(each.plan.steps))
    arms = sum(bool(each.cell.arm) for each in planned)
    passing = max(disk_meanwhile(each.plan, each.prepared.resolved) for each in planned)
    lines = {
        "cells": f"{len(planned) - arms}" + (f" and {arms} of null arms" if arms else ""),
        "steps": _steps_sentence(steps),
        "time": _time_sentence(steps, costs, machine),
        "GPU memory": vram_sentence(largest.prepared.resolved, machine),
        "judging": _dollars_sentence(steps, costs),
        "disk": f"about {size_words(sum(cost.disk for cost in distinct))} once it is over, as `keep` leaves it"
        + (f"; until then up to {size_words(passing)} more for each cell that is being run" if passing else ""),
    }
    if finished is not None:
        lines["reused"] = reused_sentence(steps.distinct.values(), finished, costs)
    if searches := study.searches(only, limit):
        lines["calibration"] = _calibration_sentence(searches)
    return StudyEstimate(lines, tuple(largest.prepared.resolved.choices), tuple(each.name for each in planned))


def costs_by_key(planned: Sequence[PlannedCell], machine: Machine | None = None) -> dict[str, StepCost]:
    """What each distinct step of some cells costs, by key.

    Args:
        machine: Where they would run; this one if None.
    """
    samples = read_table()
    found: dict[str, StepCost] = {}
    for each in planned:
        if any(step.key not in found for step in each.plan):
            found |= step_costs(each.plan, each.prepared.resolved, samples, machine)
    return found


def _steps_sentence(steps: StepsOfAll) -> str:
    saved = steps.asked - len(steps.distinct)
    trained = _of(steps, "train")
    return (
        f"{len(steps.distinct):,} distinct of {steps.asked:,} in all cells: sharing saves {saved:,} "
        f"({saved / max(1, steps.asked):.0%}); {len(trained):,} models to train"
    )


def _of(steps: StepsOfAll, verb: str) -> list[Step]:
    return [step for step in steps.distinct.values() if step.verb == verb]


def _time_sentence(steps: StepsOfAll, costs: Mapping[str, StepCost], machine: Machine) -> str:
    """Hours by number of GPUs."""
    spans = {places: _time(steps.distinct.values(), costs, places) for places in PLACES}
    if not spans[1].mid:
        return "not known: acts of these models were never timed on this machine; `iterft doctor --measure` does"
    where = "GPU" if machine.gpu else "machine"
    return "; ".join(f"{about(span)} on {places} {where}{'s' * (places > 1)}" for places, span in spans.items())


def _time(steps: Iterable[Step], costs: Mapping[str, StepCost], places: int = 1) -> Span:
    """Seconds of some steps on a number of places."""
    spans = [(step, costs[step.key].seconds) for step in steps]
    return Span(*(together(((step, getattr(span, end)) for step, span in spans), places) for end in ("low", "mid", "high")))


def reused_sentence(steps: Iterable[Step], finished: Collection[str], costs: Mapping[str, StepCost]) -> str:
    """What `--reuse` saves of some steps, and what is left to do.

    Args:
        steps: Each once.
        finished: Keys of the steps that are there.
        costs: By key.
    """
    every = list(steps)
    there, left = ([step for step in every if (step.key in finished) is is_there] for is_there in (True, False))
    if not there:
        return f"none of the {len(every):,} steps: the folders of `--reuse` hold no such step"
    saved, needed = _time(there, costs), _time(left, costs)
    words = f"{len(there):,} of {len(every):,} steps" + (f", {about(saved)}" if saved.mid else "")
    if not left:
        return f"{words}: nothing is left to do"
    dollars = sum(costs[step.key].usd or 0.0 for step in left)
    rest = [about(needed)] * bool(needed.mid) + [f"at most ${dollars:.2f}"] * bool(dollars)
    return words + (f"; the others take {' and '.join(rest)}" if rest else "")


def _dollars_sentence(steps: StepsOfAll, costs: Mapping[str, StepCost]) -> str:
    judged = _of(steps, "judge")
    prices = [costs[step.key].usd for step in judged]
    if any(price is None for price in prices):
        return f"{len(judged):,} rounds of verdicts; the judge's price is not known"
    dollars = sum(price or 0.0 for price in prices)
    return f"{len(judged):,} rounds of verdicts, " + (f"at most ${dollars:.2f} in all" if dollars else "free")


def _calibration_sentence(calibrations: Sequence[Calibration]) -> str:
    """How many models are trained to find the seed rows."""
    tried = math.ceil(math.log2(MOST / GRID))
    many = sum(1 + tried * len(each.thresholds) for each in calibrations)
    searches = len(calibrations)
    return (
        f"first {searches} search{'es' if searches > 1 else ''} for seed rows, at most {many} models more; the numbers of rows "
        "above are placeholders until then"
    )
