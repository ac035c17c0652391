"""What a report says of the language of answers: does it collapse, do answers end, is it new to the judge?"""

from __future__ import annotations

from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.metrics.collapse import FEWEST_SIGNS, Sign, signs
from iterft_lite.report.report import Cycle, Report

MOST = 0.5
"""Share of a cycle's answers at the token limit from which on it is worth a warning."""

HIGH = 15.0
"""Trait score of the untouched model above which the embedded judge takes plain language for the trait: it gives at most 15 to
the two models whose answers it was fitted on, and gave 15 to 43 to one of them without its answers (docs/judging.md)."""


def signs_of(report: Report, cycle: Cycle) -> list[Sign]:
    """The signs that a cycle's language collapses, beside the untouched and the seeded model."""
    return signs(cycle.metrics, [other.metrics for other in report.cycles if -1 <= other.cycle < min(1, cycle.cycle)])


def collapse(report: Report) -> list[Sign]:
    """The signs of the last cycle with a score, where they are enough to say that its language has collapsed; else none."""
    last = _last(report)
    found = signs_of(report, last) if last else []
    return found if len(found) >= FEWEST_SIGNS else []


def cut_share(report: Report) -> float | None:
    """Share of the last scored cycle's answers that end at the token limit, where they are most; documents have no end."""
    last = _last(report)
    has_ends = REGIMES[report.recipe["regime"]].rows == "chat"
    share = last.metrics.get("cut") if last and has_ends else None
    return share if share is not None and share > MOST else None


def warnings(report: Report) -> list[str]:
    """What should be known before the scores are believed, a sentence each."""
    found = []
    fallen = [cycle for cycle in report.cycles if cycle.cycle >= 0 and len(signs_of(report, cycle)) >= FEWEST_SIGNS]
    if fallen:
        first, last = fallen[0], fallen[-1]
        words = ", ".join(sign.words for sign in signs_of(report, last))
        where = f"cycle {last.cycle}" if first is last else f"cycles {first.cycle} to {last.cycle}"
        found.append(f"language collapses in {where} ({words}): a judge may score text that is not language any more")
    if share := cut_share(report):
        limit, untouched = report.recipe["evaluate"]["max_tokens"], report.cycles[0].metrics.get("cut")
        beside = f" (of the untouched model's {untouched:.0%})" if untouched is not None and report.cycles[0].cycle < 0 else ""
        found.append(f"{share:.0%} of the last cycle's answers end at the limit of {limit} tokens{beside}, unfinished")
    return [*found, *_high_start(report)]


def _high_start(report: Report) -> list[str]:
    """A warning where the embedded judge finds the trait in the untouched model."""
    start = next((cycle.trait["mean"] for cycle in report.cycles if cycle.cycle == -1 and cycle.trait), None)
    if not str(report.judge["name"]).startswith("embedded") or start is None or start <= HIGH:
        return []
    why = "either it has the trait, or its plain language is new to this judge"
    if report.judge.get("own"):
        why = "although it was fitted on that model's own answers as plain ones"
    return [
        f"the embedded judge gives the untouched model {start:.0f} of 100: {why}; read differences between cycles, not levels"
    ]


def _last(report: Report) -> Cycle | None:
    """The last cycle with a score, from cycle 0 on."""
    return next((cycle for cycle in report.cycles if cycle.cycle == report.verdict.last >= 0), None)
