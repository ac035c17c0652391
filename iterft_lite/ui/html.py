"""The report as a self-contained page. Model output is untrusted: everything but the figure is escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from iterft_lite.app.held_out import read_held_out
from iterft_lite.digests import canonical
from iterft_lite.experiment.steps import cycle_name, cycle_title
from iterft_lite.files import write_output
from iterft_lite.hub import title
from iterft_lite.report.report import Report, shown_samples, verdict_sentences, version_sentence
from iterft_lite.ui.figures import svg
from iterft_lite.ui.text import clock, score_text

TEMPLATES = Path(__file__).parent / "pages"


def write_html(root: Path, report: Report, path: Path) -> None:
    """Write the page of a run: verdict, curve, numbers, samples of every cycle side by side, settings."""
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
        for key, value in _flat(report.recipe).items()
        if value not in (None, "", [])
    }
    held_out = read_held_out(root, report)
    page = environment.get_template("report.html").render(
        report=report,
        recipe=report.recipe,
        curve=Markup(svg(report)),  # drawn here, from numbers and escaped labels
        sentences=verdict_sentences(report.verdict),
        version_changes=version_sentence(report),
        held_out=held_out,
        held_out_sentences=verdict_sentences(held_out.verdict) if held_out else [],
        samples=shown_samples(root, report),
        settings=settings,
    )
    write_output(path, page)


def _flat(recipe: dict[str, object], prefix: str = "") -> dict[str, object]:
    """A recipe's keys with their tables in front."""
    flat: dict[str, object] = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
