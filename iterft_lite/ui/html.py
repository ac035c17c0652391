"""The report as a self-contained page. Model output is untrusted: everything but the figure is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from iterft_lite.app.held_out import read_held_out
from iterft_lite.app.repeat import as_toml, repeat_command
from iterft_lite.digests import canonical
from iterft_lite.experiment.recipe_keys import flat
from iterft_lite.experiment.steps import cycle_name, cycle_title
from iterft_lite.files import write_output
from iterft_lite.hub import title
from iterft_lite.report.language import warnings
from iterft_lite.report.report import (
    Report,
    beside_scores,
    export_sentences,
    shown_samples,
    verdict_sentences,
    version_sentence,
)
from iterft_lite.ui.figures import svg
from iterft_lite.ui.text import clock, context_rows, null_arm_sentence, plain_sentence, score_text

TEMPLATES = Path(__file__).parent / "pages"


def write_html(root: Path, report: Report, path: Path, verdicts: Mapping[int, Path] | None = None) -> None:
    """Write the page of a run: what came of it, the command that repeats it, curve, numbers, every answer of every cycle.

    Args:
        report: Of the run, by its own judge or another.
        verdicts: Folders of the other judge's verdicts, by cycle.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "model": title,
        "cycle_name": cycle_name,
        "cycle_title": cycle_title,
        "clock": clock,
        "score": score_text,
    }
    settings = {
        key: value if isinstance(value, str) else canonical(value)
        for key, value in flat(report.recipe).items()
        if value not in (None, "", [])
    }
    held_out = read_held_out(root, report) if verdicts is None else None  # asked of the run's own judge
    colour = report.manifest["colour"]
    page = environment.get_template("report.html").render(
        report=report,
        recipe=report.recipe,
        on_trait=readable_on(colour),
        beside={cycle.cycle: beside_scores(report, cycle) for cycle in report.cycles},
        any_dropped=any(sum(cycle.dropped.values()) for cycle in report.cycles),
        curve=Markup(svg(report)),  # drawn here, from numbers and escaped labels
        null_arm=null_arm_sentence(report.recipe),
        sentence=plain_sentence(report),
        contexts=context_rows(report),
        warnings=warnings(report),
        export_sentences=export_sentences(report),
        sentences=verdict_sentences(report.verdict),
        version_changes=version_sentence(report),
        held_out=held_out,
        held_out_sentences=verdict_sentences(held_out.verdict) if held_out else [],
        samples=shown_samples(root, report, None, verdicts),
        settings=settings,
        command=repeat_command(report.manifest),
        toml=as_toml(report.manifest.get("asked") or report.recipe),
    )
    write_output(path, page)


def readable_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a background `#rrggbb`; one of them always has a contrast of 4.5."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours `#rrggbb`, 1 to 21 (WCAG 2.1, relative luminance)."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
