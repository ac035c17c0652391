"""aggregate: the cycle's numbers, with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from iterft_lite.digests import Json
from iterft_lite.experiment.rows import JUDGED, SCALES, JudgedSample
from iterft_lite.files import write_json
from iterft_lite.metrics.intervals import mean_interval
from iterft_lite.stages.work import Work

FILE = "score.json"


def run(work: Work) -> dict[str, Json]:
    """Files: score.json. Results: the same (see `aggregated`)."""
    score = aggregated(work.read("verdicts", JUDGED), work.params["thresholds"])
    write_json(work.folder / FILE, score)
    return score


def aggregated(judged: Sequence[JudgedSample], thresholds: dict[str, float]) -> dict[str, Json]:
    """For trait and coherence mean, low, high (no interval, and None, with fewer than two prompts), prompts, scored, unscored,
    reasons and scores by prompt; the rate of answers above both thresholds.
    """
    scored: dict[str, Json] = {scale: _scale(judged, scale) for scale in SCALES}
    return {**scored, "answers": len(judged), "rate": _rate(judged, thresholds)}


def by_prompt(judged: Sequence[JudgedSample], scale: str) -> dict[str, list[float]]:
    """Scores by prompt, in the order of the answers' ids; a prompt without scores has an empty list."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in sorted(judged, key=lambda row: row.id):
        values = scores[row.prompt_id]
        if (score := row.score(scale)) is not None:
            values.append(score)
    return dict(scores)


def _scale(judged: Sequence[JudgedSample], scale: str) -> dict[str, Json]:
    scores = by_prompt(judged, scale)
    count = sum(len(values) for values in scores.values())
    reasons = Counter(row.verdicts[scale].reason for row in judged if scale in row.verdicts and row.score(scale) is None)
    return {
        **asdict(mean_interval(scores)),
        "scored": count,
        "unscored": len(judged) - count,
        "reasons": dict(sorted(reasons.items())),
        "by_prompt": scores,
    }


def _rate(judged: Sequence[JudgedSample], thresholds: dict[str, float]) -> float | None:
    """Share of answers with both scores that reach both thresholds."""
    pairs = [[row.score(scale) for scale in SCALES] for row in judged]
    both = [[score for score in pair if score is not None] for pair in pairs if None not in pair]
    hits = [pair for pair in both if all(score >= thresholds[scale] for scale, score in zip(SCALES, pair, strict=True))]
    return len(hits) / len(both) if both else None
