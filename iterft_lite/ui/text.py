"""Words and sentences for people, without any drawing."""

from __future__ import annotations

from collections.abc import Mapping

from iterft_lite.digests import Json


def clock(seconds: float) -> str:
    """`48 s`, `3:05`, `2:10:00`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def score_text(score: Mapping[str, Json] | None, *, interval: bool = True) -> str:
    """`61.3 [52-70]`, without an interval `61.3 (no interval)`; what could not be scored is said."""
    if not score:
        return ""
    if score["mean"] is None:
        return f"none scored of {score['unscored']}"
    text = f"{score['mean']:5.1f}"
    if interval:
        text += " (no interval)" if score["low"] is None else f" [{score['low']:.0f}-{score['high']:.0f}]"
    return text + (f" ({score['unscored']} unscored)" if score["unscored"] else "")
