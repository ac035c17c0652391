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
from iterft_lite.app.share import ANSWERS, SCORES, SharedRun, refuse_secrets, shared_runs, without_places, write_shared
from iterft_lite.files import disk_errors, write_text
from iterft_lite.hub import is_name
from iterft_lite.report.report import verdict_sentences, version_sentence
from iterft_lite.ui.figures import write_png
from iterft_lite.ui.foreign import one_line
from iterft_lite.ui.html import TEMPLATES
from iterft_lite.ui.text import null_arm_sentence, plain_sentence, score_text

FIGURES = 6
"""Curves that the card shows; all are in the folder."""

MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~$:@-])")
"""What Markdown may read as a mark (a bare address too, which becomes a link)."""


def share(root: Path, to: Path) -> None:
    """Write a folder that others can use: see `app/share.py`.

    Raises:
        FolderError: If there is nothing to share, or the folder is not empty.
        UserError: If a key of this machine would go out.
    """
    runs = shared_runs(root)
    write_shared(runs, to)
    with disk_errors(to):
        (to / "curves").mkdir()
    for run in runs:
        write_png(run.report, to / "curves" / f"{run.name}.png")
    write_text(to / "README.md", card(root.resolve().name, runs))
    refuse_secrets(to)


def card(name: str, runs: Sequence[SharedRun]) -> str:
    """The model card."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": markdown, "score": score_text, "url": quote}
    reports = {run.name: run.report for run in runs}
    return environment.get_template("card.md").render(
        head=_head(runs),
        name=name,
        runs=runs,
        figures=runs[:FIGURES],
        sentences={name: plain_sentence(report) for name, report in reports.items()},
        verdicts={name: verdict_sentences(report.verdict) for name, report in reports.items()},
        notes=list(dict.fromkeys(note for run in runs for note in _notes(run))),
        seeds=len({run.recipe["seed"] for run in runs}),
        version=__version__,
    )


def _head(runs: Sequence[SharedRun]) -> dict[str, Any]:
    """The card's head, which the hub and `datasets` read."""
    models = {str(run.recipe["model"]).partition("@")[0] for run in runs}
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


def _notes(run: SharedRun) -> list[str]:
    """What a reader must know of a run besides its numbers."""
    told = [null_arm_sentence(run.report.recipe), version_sentence(run.report), str(run.report.judge["note"])]
    unfinished = "" if run.report.complete else "it is not finished: later cycles are missing"
    return [f"{run.name}: {without_places(note)}" for note in (*told, unfinished) if note]


def markdown(text: object) -> str:
    """A text that Markdown shows as it is, on one line."""
    return MARKS.sub(r"\\\1", html.escape(one_line(text, 500), quote=False))
