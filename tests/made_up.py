"""Studies whose scores are made up, and folders of studies made by the fakes: what tests of figures, tables and pages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iterft_lite.app.session import open_run
from iterft_lite.digests import digest
from iterft_lite.engine.study import CELLS, StudyCell, StudyFolder
from iterft_lite.experiment.grid import Cell
from iterft_lite.report.cells import CellReport
from iterft_lite.report.report import Report, read_report, with_scores
from iterft_lite.report.study import StudyReport, study_report
from tests.loop import small_recipe

Curve = Callable[[Mapping[str, Any]], Sequence[tuple[float, float]]]
"""Trait and coherence by cycle, from the untouched model on, of a cell with these values."""


def make_study(root: Path, cells: Sequence[Cell], recipe: str = "", **small: Any) -> Path:
    """A study's folder, its cells run by the fakes."""
    (root.parent / f"{root.name}.toml").write_text(recipe or small_recipe(**small))
    for cell in cells:
        settings = [f"{key}={value}" for key, value in cell.overrides().items()]
        with open_run(root.parent / f"{root.name}.toml", settings, root / CELLS / cell.name, store=root) as opened:
            list(opened.events())
    StudyFolder(root).write_manifest({"name": root.name, "base": {}}, [StudyCell.of(cell) for cell in cells])
    return root


def a_report(root: Path) -> Report:
    """A run of seven cycles by the fakes."""
    (root / "one.toml").write_text(small_recipe(cycles=6, questions=4))
    with open_run(root / "one.toml", (), root / "one") as opened:
        list(opened.events())
    return read_report(root / "one")


def with_curve(report: Report, cell: Cell, curve: Sequence[tuple[float, float]], prompts: int = 12, samples: int = 4) -> Report:
    """The same run with made-up scores and metrics around a curve, and with the cell's values in its recipe."""
    random = np.random.default_rng(int(digest(dict(cell.overrides()))[:8], 16))
    ease = {f"q{n:02d}": random.normal(0, 9) for n in range(prompts)}
    facts = {}
    for number, means in enumerate(curve):
        facts[number - 1] = {
            scale: {
                "scored": prompts * samples,
                "unscored": 0,
                "reasons": {},
                "by_prompt": {
                    prompt: [float(np.clip(mean + own + random.normal(0, 12), 1, 100)) for _ in range(samples)]
                    for prompt, own in ease.items()
                },
            }
            for scale, mean in zip(("trait", "coherence"), means, strict=True)
        }
    scored = with_scores(report, facts, report.judge, {})
    cycles = [
        replace(cycle, metrics=_metrics(*curve[cycle.cycle + 1], random))
        for cycle in scored.cycles
        if cycle.cycle + 1 < len(curve)
    ]
    recipe = dict(report.recipe)
    for key, value in cell.overrides().items():
        table, _, last = key.rpartition(".")
        recipe = {**recipe, table: {**recipe[table], last: value}} if table else {**recipe, last: value}
    return replace(scored, cycles=tuple(cycles), manifest={**report.manifest, "recipe": recipe})


def _metrics(trait: float, coherence: float, random: np.random.Generator) -> dict[str, Any]:
    return {
        "perplexity_base": float(3 + 40 * np.exp(-coherence / 25) + 0.05 * trait + random.normal(0, 0.2)),
        "words_per_sentence": float(6 + coherence / 9 + random.normal(0, 0.4)),
        "words": 80.0,
    }


def made_up(report: Report, cells: Sequence[Cell], curve: Curve, *, diverged: Mapping[str, int] | None = None) -> StudyReport:
    """A study of such runs; `diverged` names cells and the cycle at which they ended."""
    found = []
    for cell in cells:
        stop = (diverged or {}).get(cell.name)
        failure = {"step": f"c{stop}-train", "kind": "result", "message": "the loss is no number any more", "hint": None}
        made = with_curve(report, cell, list(curve(cell.values))[: None if stop is None else stop + 1])
        told = None if stop is None else failure
        made = replace(made, complete=stop is None, failure=told)
        state: Any = "done" if stop is None else "result"
        values = cell.overrides()
        found.append(CellReport(cell.name, Path(cell.name), values, cell.arm, cell.threshold, state, told, made))
    return study_report(found, name="made up")
