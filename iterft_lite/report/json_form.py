"""A report for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from iterft_lite.digests import Json
from iterft_lite.experiment.rows import SCALES
from iterft_lite.metrics.intervals import Interval
from iterft_lite.report.language import signs_of, warnings
from iterft_lite.report.report import Report


def as_json(report: Report) -> dict[str, Json]:
    """The machine-readable form. Keys are a contract: later versions add, they do not rename."""
    recipe = report.recipe
    return {
        "recipe": recipe,
        "regime": recipe["regime"],
        "trait": report.manifest["trait"],
        "model": recipe["model"],
        "judge": report.judge,
        "cycles": [
            {
                "cycle": cycle.cycle,
                "trait": _score_json(cycle.trait),
                "coherence": _score_json(cycle.coherence),
                "rate": cycle.rate,
                "answers": cycle.answers,
                "contexts": [_context_json(context, score) for context, score in cycle.contexts.items()],
                "train_rows": cycle.train_rows,
                "dropped": cycle.dropped,
                "measures": cycle.metrics,
                "metrics": cycle.metrics,
                "signs": [sign.metric.name for sign in signs_of(report, cycle)],
                "training": cycle.training,
                "export": cycle.export,
                "seconds": cycle.seconds,
                "peak_vram": cycle.peak_vram,
            }
            for cycle in report.cycles
        ],
        "warnings": warnings(report),
        "verdict": asdict(report.verdict),
        "versions": report.manifest["versions"],
        "version_changes": report.version_changes,
        "complete": report.complete,
        "failure": report.failure,
    }


def _score_json(score: Mapping[str, Json] | None) -> dict[str, Json]:
    kept = ("mean", "low", "high", "prompts", "scored", "unscored", "reasons")
    empty: dict[str, Json] = {**asdict(Interval(None, None, None)), "scored": 0, "unscored": 0, "reasons": {}}
    return {key: score[key] for key in kept} if score else empty


def _context_json(context: str, score: Mapping[str, Json]) -> dict[str, Json]:
    scales: dict[str, Json] = {scale: _score_json(score.get(scale)) for scale in SCALES}
    return {"system": context, **scales, "rate": score.get("rate"), "answers": score.get("answers", 0)}
