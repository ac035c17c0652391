"""Words and sentences for people, without any drawing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from iterft_lite.digests import Json
from iterft_lite.experiment.null_arms import null_arms_of
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.steps import cycle_name
from iterft_lite.hub import title
from iterft_lite.metrics.intervals import Interval
from iterft_lite.report.language import collapse, cut_share
from iterft_lite.report.report import Cycle, Report

COLLAPSED = {
    "amplified": "The scores rose while the language collapsed",
    "judge not reliable here": "The scores rose while the language collapsed, by a judge that is not reliable on this trait",
}
"""Beginning of the sentence for collapsed language, in place of the verdict's."""

READ = "read the answers"
"""Advice if coherence moved with the trait: a broken model can score high or low."""


def clock(seconds: float) -> str:
    """`48 s`, `3:05`, `2:10:00`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_left(seconds: float, how_sure: str = "about") -> str:
    """`about 45 s left`, `about 4:50 left`: rounded, so that it counts down steadily."""
    step = 1 if seconds < 10 else 5 if seconds < 120 else 10 if seconds < 600 else 60
    return f"{how_sure} {clock(step * round(seconds / step))} left"


def score_text(score: Mapping[str, Json] | None, *, interval: bool = True) -> str:
    """`61.3 [52-70]`, without an interval `61.3 (no interval)`; unscored answers are mentioned."""
    if not score:
        return ""
    if score["mean"] is None:
        return f"none scored of {score['unscored']}"
    text = f"{score['mean']:5.1f}"
    if interval:
        text += " (no interval)" if score["low"] is None else f" [{score['low']:.0f}-{score['high']:.0f}]"
    return text + (f" ({score['unscored']} unscored)" if score["unscored"] else "")


def context_rows(report: Report) -> list[tuple[str, dict[str, str]]]:
    """The trait's mean and interval by evaluation context and cycle; none where there is one context alone."""
    contexts = list(dict.fromkeys(context for cycle in report.cycles for context in cycle.contexts))
    if len(contexts) < 2:
        return []
    scores = {cycle.cycle: {name: found.get("trait") for name, found in cycle.contexts.items()} for cycle in report.cycles}
    return [
        (
            context,
            {cycle_name(cycle): score_text(found.get(context)).strip() for cycle, found in scores.items()},
        )
        for context in contexts
    ]


# -- the result of a run


def plain_sentence(report: Report) -> str:
    """The result of a run in one sentence: `The trait faded: 69 to 22 of 100 (change -47, interval -60 to -34); ...`."""
    verdict = report.verdict
    if verdict.word == "too early":
        return "Too early to say: a verdict needs two scored cycles from cycle 0 on."
    said = {
        "amplified": "The trait grew",
        "decayed": "The trait faded",
        "no change shown": "No change of the trait is shown",
        "too few prompts": "Too few prompts for a verdict",
        "judge not reliable here": "The scores rose, but this judge is not reliable on this trait",
    }[verdict.word]
    moved = verdict.word in ("amplified", "decayed")
    language = _coherence(verdict.coherence, moved=moved)
    if collapse(report):
        language = f"; {READ}" if verdict.word in COLLAPSED else f"; the language collapsed: {READ}"
        said = COLLAPSED.get(verdict.word, said)
    share = cut_share(report)
    unfinished = f"; {share:.0%} of the last answers end at the token limit" if share else ""
    return f"{said}{_from_to(report)}{language}{unfinished}."


def _from_to(report: Report) -> str:
    """`: 69 to 22 of 100 (change -47, interval -60 to -34)`."""
    change = report.verdict.trait
    means = {cycle.cycle: _mean(cycle) for cycle in report.cycles}
    first, last = means.get(0), means.get(report.verdict.last)
    if first is None or last is None or change.mean is None:
        return ""
    return f": {first:.0f} to {last:.0f} of 100 (change {change.mean:+.0f}{_bounds(change)})"


def _mean(cycle: Cycle) -> float | None:
    return cycle.trait["mean"] if cycle.trait else None


def _bounds(change: Interval) -> str:
    if change.low is None or change.high is None:
        return ", no interval"
    return f", interval {change.low:+.0f} to {change.high:+.0f}"


def _coherence(change: Interval, *, moved: bool) -> str:
    """A remark on coherence, if it moved or is low."""
    if change.mean is None or change.low is None or change.high is None:
        return ""
    also = " too" if moved else ""
    if change.high < 0:
        return f"; coherence fell{also}: {READ}"
    return "; coherence rose" if change.low > 0 else "; no change of coherence is shown"


def judge_sentence(judge: Mapping[str, Json]) -> str:
    """The judge, its number of verdicts, and their price."""
    text = f"judge: {judge['model'] or judge['name']}; {judge['calls']} calls"
    if judge["kind"] != "llm":
        return text
    planned = f" (planned: at most ${judge['planned_usd']:.4f})" if judge["planned_usd"] else ""
    return f"{text}, dollars not known" if judge["planned_usd"] is None else f"{text}, ${judge['usd']:.4f}{planned}"


def plan_sentence(recipe: Recipe) -> str:
    """What a recipe does, in one sentence."""
    rows = "documents" if recipe.row.rows == "document" else "pairs" if recipe.loss_record.compares else "chats"
    many = recipe.cycles > 1
    starts = ("each " if many else "") + ("from the base" if recipe.start == "base" else "from the one before")
    whose = f"rows of {Path(recipe.seeds.path).name}" if recipe.seeds else "seed rows"
    seeded = f"M1 on {recipe.seed_rows} {whose}, then " if recipe.seed_rows else ""
    more = f"{recipe.cycles} more model{'s' * many} on {recipe.rows} {rows} of {'their' if many else 'its'} own"
    cycles = f"{more}, {starts}" if recipe.cycles else "no more"
    what = f"{recipe.regime.upper()}, trait {Path(recipe.trait).name}, model {title(recipe.model)}: {seeded}{cycles}"
    return "; ".join(filter(None, (what, null_arm_sentence(recipe.model_dump()))))


def null_arm_sentence(recipe: Mapping[str, Json]) -> str:
    """What a null arm leaves out: `null arm: no seed rows, M1 is M0`; "" for other recipes."""
    arms = null_arms_of(recipe)
    return f"null arm: {'; '.join(arm.words for arm in arms)}" if arms else ""
