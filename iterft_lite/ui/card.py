"""The model card of what is shared: Markdown in which nothing that others wrote is read as Markdown, HTML or YAML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from iterft_lite import __version__
from iterft_lite.app.share import ANSWERS, SCORES, asked_of, refuse_secrets, report_of, shared_cells, write_shared
from iterft_lite.engine.study import is_study
from iterft_lite.files import disk_errors, write_text
from iterft_lite.hub import is_name
from iterft_lite.metrics.across_seeds import Estimate
from iterft_lite.report.cells import CellReport
from iterft_lite.report.report import verdict_sentences, version_sentence
from iterft_lite.report.study import StudyReport, study_report
from iterft_lite.report.study_words import arm_sentences, study_sentence, study_sentences, verdict_words
from iterft_lite.ui.figures import write_png
from iterft_lite.ui.foreign import one_line
from iterft_lite.ui.html import TEMPLATES
from iterft_lite.ui.study_figures.kinds import Wanted, write_figure
from iterft_lite.ui.text import null_arm_sentence, plain_sentence, score_text

STUDY_FIGURE = "study.png"

MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~$:@-])")
"""What Markdown may read as a mark (a bare address too, which becomes a link)."""


def share(root: Path, to: Path) -> None:
    """Write a folder that others can use: see `app/share.py`.

    Raises:
        FolderError: If there is nothing to share, or the folder is not empty.
        UserError: If a key of this machine would go out.
    """
    cells, name = shared_cells(root), root.resolve().name
    study = study_report(cells, [root], name) if is_study(root) else None
    write_shared(cells, to)
    with disk_errors(to):
        (to / "curves").mkdir()
    for cell in cells:
        write_png(report_of(cell), to / "curves" / f"{cell.name}.png")
    if study is not None:
        write_figure("sweep", study, Wanted(), {"png": to / STUDY_FIGURE}, None)
    write_text(to / "README.md", card(name, cells, study))
    refuse_secrets(to)


def card(name: str, cells: Sequence[CellReport], study: StudyReport | None = None) -> str:
    """The model card of a run, or of a study's cells."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": markdown, "score": score_text, "url": quote, "interval": _interval, "verdict": verdict_words}
    first = report_of(cells[0])
    return environment.get_template("card.md").render(
        head=_head(cells),
        name=name,
        cells=[(cell.name, report_of(cell), asked_of(cell)) for cell in cells],
        figure=STUDY_FIGURE if study else f"curves/{cells[0].name}.png",
        sentence=study_sentence(study) if study else plain_sentence(first),
        verdicts=[*study_sentences(study), *arm_sentences(study)] if study else verdict_sentences(first.verdict),
        experiments=study.everything if study else (),
        traits=sorted({(str(report_of(cell).manifest["trait"]), str(report_of(cell).manifest["summary"])) for cell in cells}),
        notes=list(dict.fromkeys(note for cell in cells for note in _notes(cell))),
        version=__version__,
    )


def _interval(change: Estimate) -> str:
    """`+12.0 [3.1, 20.9]`; "" where there is none."""
    if change.mean is None:
        return ""
    ends = "" if change.low is None or change.high is None else f" [{change.low:+.1f}, {change.high:+.1f}]"
    return f"{change.mean:+.1f}{ends}"


def _head(cells: Sequence[CellReport]) -> dict[str, Any]:
    """The card's head, which the hub and `datasets` read."""
    models = {str(asked_of(cell)["model"]).partition("@")[0] for cell in cells}
    base = sorted(model for model in models if is_name(model))
    return {
        "library_name": "peft",
        **({"base_model": base} if base else {}),
        "tags": ["iterft_lite", "iterated-finetuning", "lora"],
        "configs": [
            {"config_name": "answers", "data_files": ANSWERS, "default": True},
            {"config_name": "scores", "data_files": SCORES},
        ],
    }


def _notes(cell: CellReport) -> list[str]:
    """What a reader must know of a run besides its numbers."""
    report = report_of(cell)
    told = [null_arm_sentence(report.recipe), version_sentence(report)]
    unfinished = "" if report.complete else "it is not finished: later cycles are missing"
    judge = str(report.judge["note"])
    return [f"{cell.name}: {note}" for note in (*told, unfinished) if note] + ([judge] if judge else [])


def markdown(text: object) -> str:
    """A text that Markdown shows as it is, on one line."""
    return MARKS.sub(r"\\\1", html.escape(one_line(text, 500), quote=False))
