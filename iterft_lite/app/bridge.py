"""From one judge to the next: both score the same stored answers and calibration answers, so that a curve can be continued.

When a provider switches a judge off, another takes its place. This says where the two agree, where the new one scores higher,
and which verdicts on amplification it would change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iterft_lite.app.agreement import scores_of
from iterft_lite.app.calibrate_judge import kept_scores
from iterft_lite.app.named_judge import Named, identity_in
from iterft_lite.app.rejudge import report_by
from iterft_lite.errors import UserError
from iterft_lite.experiment.rows import SCALES
from iterft_lite.metrics.agreement import spearman
from iterft_lite.metrics.intervals import Interval, change_interval
from iterft_lite.report.report import read_report

BANDS = ((1.0, 25.0), (25.0, 50.0), (50.0, 75.0), (75.0, 100.0))
"""Bands of the old judge's scores that are compared separately. Only the last one includes its upper end."""

DRAWS = 1000
"""Draws of prompts for the interval of a rank correlation."""

Answer = tuple[str, str, int, int]
"""The identity of an answer: run, prompt, cycle, sample. Answers to one prompt are not independent."""


@dataclass(frozen=True)
class BridgeRow:
    """Two judges on some answers.

    Attributes:
        where: "stored answers" or "calibration answers".
        scale: Trait or coherence.
        band: Scores of the old judge that the answers have, "all" or from-to.
        answers, prompts: Their numbers; intervals are over prompts.
        spearman, low, high: Rank correlation with its 95 % interval; None where there is none.
        bias: New minus old, points, with its 95 % interval.
    """

    where: str
    scale: str
    band: str
    answers: int
    prompts: int
    spearman: float | None
    low: float | None
    high: float | None
    bias: Interval


@dataclass(frozen=True)
class Flip:
    """A run whose verdict depends on the judge.

    Attributes:
        run: Its folder.
        old, new: The verdict's word by each judge.
    """

    run: str
    old: str
    new: str


@dataclass(frozen=True)
class Bridge:
    """Two judges compared.

    Attributes:
        old, new: Who.
        rows: By place, scale and band.
        runs: How many.
        flips: Those whose verdicts differ.
        missing: What could not be compared, a sentence each.
    """

    old: str
    new: str
    rows: tuple[BridgeRow, ...]
    runs: int
    flips: tuple[Flip, ...]
    missing: tuple[str, ...]


def bridge(old: Named, new: Named, runs: Sequence[Path]) -> Bridge:
    """Compare two judges on the answers that both scored, and on the calibration answers of the runs' traits.

    Raises:
        FolderError: If one of them has not judged a run.
        UserError: If there is nothing that both scored.
    """
    stored = {scale: _stored(old, new, runs, scale) for scale in SCALES}
    if not any(stored.values()):
        raise UserError(f"`{old}` and `{new}` scored no answer both", hint="name runs that both have judged")
    rows = [row for scale, pairs in stored.items() for row in _rows("stored answers", scale, pairs)]
    known, missing = _calibration(old, new, runs)
    rows += [row for scale, pairs in known.items() for row in _rows("calibration answers", scale, pairs)]
    flips = [Flip(str(run), report_by(run, old).verdict.word, report_by(run, new).verdict.word) for run in runs]
    differ = tuple(flip for flip in flips if flip.old != flip.new)
    return Bridge(str(old), str(new), tuple(rows), len(runs), differ, tuple(missing))


def _stored(old: Named, new: Named, runs: Sequence[Path], scale: str) -> dict[Answer, tuple[float, float]]:
    """Both judges' scores of each answer."""
    found: dict[Answer, tuple[float, float]] = {}
    for run in runs:
        one, other = scores_of(run, old)[scale], scores_of(run, new)[scale]
        for cycle, answer in one.keys() & other.keys():
            found[str(run), answer[0], cycle, answer[1]] = one[cycle, answer], other[cycle, answer]
    return found


def _calibration(
    old: Named, new: Named, runs: Sequence[Path]
) -> tuple[dict[str, dict[Answer, tuple[float, float]]], list[str]]:
    """Both judges' scores of the calibration answers of the runs' traits and of coherence."""
    found: dict[str, dict[Answer, tuple[float, float]]] = {}
    missing: dict[str, None] = {}
    for run in runs:
        trait = str(read_report(run).recipe["trait"])
        kept = [kept_scores(*identity_in(run, judge), trait) for judge in (old, new)]
        for judge, scores in zip((old, new), kept, strict=True):
            if not scores:
                missing[f"{judge} on {trait}: `iterft judge calibrate --judge {judge} --trait {trait}` scores its answers"] = (
                    None
                )
        for scale in kept[0].keys() & kept[1].keys():
            for place, (one, other) in enumerate(zip(kept[0][scale], kept[1][scale], strict=True)):
                if one is not None and other is not None:
                    subject = trait if scale == "trait" else scale
                    found.setdefault(scale, {})[subject, f"k{place}", 0, 0] = one, other
    return found, list(missing)


def _rows(where: str, scale: str, pairs: Mapping[Answer, tuple[float, float]]) -> Iterator[BridgeRow]:
    """All answers, and those in each band that has any."""
    if not pairs:
        return
    rho = spearman([one for one, _ in pairs.values()], [other for _, other in pairs.values()])
    low, high = _ranks_interval(pairs) if rho is not None else (None, None)
    yield _row(where, scale, "all", pairs, rho, low, high)
    for start, end in BANDS:
        inside = {key: pair for key, pair in pairs.items() if start <= pair[0] < end or pair[0] == end == BANDS[-1][1]}
        if inside:
            yield _row(where, scale, f"{start:.0f} to {end:.0f}", inside, None, None, None)


def _row(
    where: str,
    scale: str,
    band: str,
    pairs: Mapping[Answer, tuple[float, float]],
    rho: float | None,
    low: float | None,
    high: float | None,
) -> BridgeRow:
    before, after = defaultdict(list), defaultdict(list)
    for (run, prompt, _, _), (one, other) in sorted(pairs.items()):
        before[f"{run} {prompt}"].append(one)
        after[f"{run} {prompt}"].append(other)
    return BridgeRow(where, scale, band, len(pairs), len(before), rho, low, high, change_interval(before, after))


def _ranks_interval(pairs: Mapping[Answer, tuple[float, float]]) -> tuple[float | None, float | None]:
    """95 % interval of a rank correlation: percentiles of a bootstrap that draws whole prompts."""
    clusters: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (run, prompt, _, _), pair in sorted(pairs.items()):
        clusters[run, prompt].append(pair)
    groups, draw = [np.asarray(values) for values in clusters.values()], np.random.default_rng(0)
    if len(groups) < 2:
        return None, None
    found = []
    for _ in range(DRAWS):
        drawn = np.concatenate([groups[place] for place in draw.integers(0, len(groups), len(groups))])
        rho = spearman(drawn[:, 0].tolist(), drawn[:, 1].tolist())
        if rho is not None:
            found.append(rho)
    if len(found) < DRAWS // 2:
        return None, None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def as_table(found: Bridge) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table for a publication."""
    header = (
        "answers of",
        "scale",
        f"score by {found.old}",
        "answers",
        "Spearman",
        f"{found.new} - {found.old}",
        "95 % interval",
    )
    rows: list[tuple[str, ...]] = []
    for row in found.rows:
        rho = "" if row.spearman is None else f"{row.spearman:.2f}"
        if row.low is not None and row.high is not None:
            rho += f" ({row.low:.2f} to {row.high:.2f})"
        bias = "" if row.bias.mean is None else f"{row.bias.mean:+.1f}"
        ends = "" if row.bias.low is None or row.bias.high is None else f"{row.bias.low:+.1f} to {row.bias.high:+.1f}"
        rows.append((row.where.removesuffix(" answers"), row.scale, row.band, str(row.answers), rho, bias, ends))
    return header, rows


def as_markdown(found: Bridge) -> str:
    """The table in Markdown, with the verdicts that change."""
    header, rows = as_table(found)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, "", *sentences(found), ""])


def sentences(found: Bridge) -> list[str]:
    """Sentences: the verdicts that change, and what could not be compared."""
    said = [f"{len(found.flips)} of {found.runs} verdicts differ"]
    said += [f"{flip.run}: {flip.old} by {found.old}, {flip.new} by {found.new}" for flip in found.flips]
    return said + [f"not compared: {sentence}" for sentence in found.missing]
