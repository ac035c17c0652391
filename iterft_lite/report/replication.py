"""A run held against published scores. What counts as agreement stands before anything is compared.

A score agrees where its whole 95 % interval lies within the margin around the published one, differs where all of it lies
outside, and else cannot be told (two one-sided tests; Schuirmann 1987). The seed rows of a publication are not ours, so that
their number says nothing: a run is held against the published curve of as many rows a cycle that begins where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from iterft_lite.data.published import Cell, Published
from iterft_lite.digests import Json
from iterft_lite.errors import UserError
from iterft_lite.report.report import Report

Word = Literal["agrees", "differs", "cannot be told", "nothing to compare"]


@dataclass(frozen=True)
class Check:
    """One number held against a published one.

    Attributes:
        what: Which.
        published: The published value, and the margin to either side.
        ours: `mean [low-high]`, or why there is none.
    """

    what: str
    published: str
    ours: str
    word: Word


@dataclass(frozen=True)
class Replication:
    """A run beside a publication.

    Attributes:
        deviations: Settings in which they differ, a clause each.
        checks: Every number.
        word: "differs" if one does; "agrees" if all do; else what stands in the way.
    """

    deviations: tuple[str, ...]
    checks: tuple[Check, ...]
    word: Word


def replicate(report: Report, published: Published) -> Replication:
    """Hold a run against published scores.

    Raises:
        UserError: If they are of another trait: no number of theirs says anything about it.
    """
    trait, theirs = report.recipe["trait"], published.settings["trait"]
    if trait != theirs:
        raise UserError(
            f"the published scores `{published.name}` are of the trait {theirs}, this run's is {trait}",
            hint=f"`iterft run {published.recipe} --out DIR` asks for what was published",
        )
    checks = tuple(_checks(report, published))
    words = [check.word for check in checks]
    order: tuple[Word, ...] = ("differs", "nothing to compare", "cannot be told", "agrees")
    return Replication(tuple(_deviations(report, published)), checks, next(word for word in order if word in words))


def _deviations(report: Report, published: Published) -> Iterator[str]:
    for key, value in published.settings.items():
        ours = report.recipe
        for part in key.split("."):
            ours = ours.get(part, {})
        # a model of the hub is pinned to a commit
        if ours != value and str(ours).partition("@")[0] != value:
            yield f"`{key}` is {ours!r}, published {value!r}"
    yield f"judged by {report.judge['model'] or report.judge['name']}, published by {published.judge}"


def _checks(report: Report, published: Published) -> Iterator[Check]:
    means = {cycle.cycle: cycle for cycle in report.cycles}
    untouched = means.get(-1)
    for scale, value in published.untouched.items():
        score = getattr(untouched, scale) if untouched else None
        yield _held(f"untouched {scale}", value, published.margins["untouched"], score)
    margin = published.margins["score"]
    first = means[0].trait if 0 in means else None
    cell = _nearest(published, report.recipe["rows"], first)
    if cell is None:
        alike = [each for each in published.cells if each.rows == report.recipe["rows"]]
        begins = f"begin at {', '.join(f'{each.scores[0]:.0f}' for each in alike)}" if alike else "none of as many rows a cycle"
        yield Check("curve", begins, f"begins at {_shown(first)}", "nothing to compare")
        return
    for cycle, value in enumerate(cell.scores):
        known = means.get(cycle)
        yield _held(f"cycle {cycle} ({cell.seed_rows} seed rows there)", value, margin, known.trait if known else None)
    change = report.verdict.trait
    # a change over fewer cycles than were published is another quantity
    if report.verdict.last == len(cell.scores) - 1:
        moved = {"mean": change.mean, "low": change.low, "high": change.high}
        yield _held(f"change to cycle {report.verdict.last}", cell.scores[-1] - cell.scores[0], margin, moved)


def _nearest(published: Published, rows: int, first: Mapping[str, Json] | None) -> Cell | None:
    """The published curve of as many rows that begins nearest, if that is within the margin."""
    mean = first["mean"] if first else None
    alike = [cell for cell in published.cells if cell.rows == rows]
    if mean is None or not alike:
        return None
    near = min(alike, key=lambda cell: abs(cell.scores[0] - mean))
    return near if abs(near.scores[0] - mean) <= published.margins["score"] else None


def _held(what: str, value: float, margin: float, ours: Mapping[str, Any] | None) -> Check:
    told = f"{value:.1f} +-{margin:.0f}"
    if not ours or ours["mean"] is None or ours["low"] is None:
        return Check(what, told, _shown(ours), "nothing to compare")
    # An equivalence test: agreement needs the whole interval inside the margin. A wide interval that contains the published
    # value proves nothing either way.
    inside = value - margin <= ours["low"] and ours["high"] <= value + margin
    outside = ours["high"] < value - margin or ours["low"] > value + margin
    return Check(what, told, _shown(ours), "agrees" if inside else "differs" if outside else "cannot be told")


def _shown(score: Mapping[str, Any] | None) -> str:
    if not score or score["mean"] is None:
        return "no score"
    return f"{score['mean']:.1f}" + ("" if score["low"] is None else f" [{score['low']:.1f} to {score['high']:.1f}]")
