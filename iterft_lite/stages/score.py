"""score: the cycle's numbers, with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from iterft_lite.digests import Json
from iterft_lite.files import write_json
from iterft_lite.metrics.intervals import mean_interval
from iterft_lite.stages.work import Work

FILE = "score.json"


def run(work: Work) -> dict[str, Json]:
    """Files: score.json. Facts: the same: for trait and coherence mean, low, high (no interval, and None, with fewer than two
    prompts), prompts, scored, unscored, reasons and scores by prompt; the rate of answers above both thresholds.
    """
    verdicts = work.read("verdicts")
    scored = {scale: _scale(verdicts, scale) for scale in ("trait", "coherence")}
    score = {**scored, "answers": len(verdicts), "rate": _rate(work, verdicts)}
    write_json(work.folder / FILE, score)
    return score


def by_prompt(verdicts: Sequence[dict[str, Json]], scale: str) -> dict[str, list[float]]:
    """Scores by prompt, in the order of the answers' names; a prompt without scores has an empty list."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in sorted(verdicts, key=lambda row: str(row["id"])):
        values = scores[row["prompt_id"]]
        if row[scale]["score"] is not None:
            values.append(row[scale]["score"])
    return dict(scores)


def _scale(verdicts: Sequence[dict[str, Json]], scale: str) -> dict[str, Json]:
    scores = by_prompt(verdicts, scale)
    count = sum(len(values) for values in scores.values())
    reasons = Counter(row[scale]["reason"] for row in verdicts if row[scale]["score"] is None)
    return {
        **asdict(mean_interval(scores)),
        "scored": count,
        "unscored": len(verdicts) - count,
        "reasons": dict(sorted(reasons.items())),
        "by_prompt": scores,
    }


def _rate(work: Work, verdicts: Sequence[dict[str, Json]]) -> float | None:
    """Share of answers with both scores that reach both thresholds."""
    limits = work.params["thresholds"]
    both = [row for row in verdicts if row["trait"]["score"] is not None and row["coherence"]["score"] is not None]
    hits = [row for row in both if all(row[scale]["score"] >= limits[scale] for scale in ("trait", "coherence"))]
    return len(hits) / len(both) if both else None
