"""Two judges compared on a run's stored answers."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.app.named_judge import Named, judged
from iterft_lite.engine.manifest import Run
from iterft_lite.experiment.rows import JUDGED, SCALES
from iterft_lite.files import ROWS, write_output
from iterft_lite.metrics.agreement import Agreement, agreement


@dataclass(frozen=True)
class Agreed:
    """A comparison of two judges' scores of a run's answers.

    Attributes:
        scale: Trait or coherence.
        cycle: The paper's number; None for all cycles together.
        agreement: Scores of the first judge against the second's.
    """

    scale: str
    cycle: int | None
    agreement: Agreement


def scores_of(root: Path, judge: Named) -> dict[str, dict[tuple[int, tuple[str, int]], float]]:
    """By scale: a judge's scores of a run's answers, by cycle and answer.

    Raises:
        FolderError: If that judge has not been asked.
    """
    own = Run(root)
    is_own = not judge.again and judge.name == own.known().value["judge"]["name"]
    run, known = (own, own.known()) if is_own else judged(root, judge)
    found: dict[str, dict[tuple[int, tuple[str, int]], float]] = {scale: {} for scale in SCALES}
    for step in known.steps:
        if step.verb != "judge" or step.part:
            continue
        folder = run.folder(step)
        folder.check_inputs()
        for row in JUDGED.read(folder.path / ROWS):
            for scale in SCALES:
                if (score := row.score(scale)) is not None:
                    found[scale][step.cycle, row.id] = score
    return found


def agree(root: Path, first: Named, second: Named) -> list[Agreed]:
    """Compare two judges on the answers that both scored, by scale and cycle."""
    one, other = scores_of(root, first), scores_of(root, second)
    rows = []
    for scale in SCALES:
        both = sorted(one[scale].keys() & other[scale].keys())
        for cycle in [None, *sorted({cycle for cycle, _ in both})]:
            keys = [key for key in both if cycle is None or key[0] == cycle]
            rows.append(Agreed(scale, cycle, agreement([one[scale][k] for k in keys], [other[scale][k] for k in keys])))
    return rows


def write_bland_altman(root: Path, first: Named, second: Named, path: Path) -> None:
    """Draw difference against mean of two judges' scores, a panel a scale, with the limits of agreement (PNG)."""
    from matplotlib.figure import Figure

    one, other = scores_of(root, first), scores_of(root, second)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, scale in zip(figure.subplots(1, 2, sharey=True), SCALES, strict=True):
        keys = sorted(one[scale].keys() & other[scale].keys())
        a, b = [one[scale][key] for key in keys], [other[scale][key] for key in keys]
        axes.scatter(
            [(x + y) / 2 for x, y in zip(a, b, strict=True)], [x - y for x, y in zip(a, b, strict=True)], s=9, alpha=0.5
        )
        found = agreement(a, b)
        for value, style in ((found.difference, "-"), (found.low, "--"), (found.high, "--")):
            if value is not None:
                axes.axhline(value, color="#800000", linestyle=style, linewidth=1)
                axes.annotate(f"{value:+.1f}", (100, value), ha="right", va="bottom", fontsize=8)
        axes.set(title=f"{scale}: {found.pairs} answers", xlabel="mean of both scores", xlim=(-1, 102))
        axes.set_ylabel(f"{first} - {second}" if scale == "trait" else "", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_output(path, drawn.getvalue())
