"""Two runs of one recipe with the real backends, one sequence at a time: every row, weight and number equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterft_lite.app.session import open_run
from iterft_lite.engine.run import StepFinished
from iterft_lite.files import ROWS, read_json, read_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "nano_dpo.toml"

SMALL = ("cycles=1", "seed_rows=6", "rows=6", "slots=1", "sample.max_tokens=40", "evaluate.questions=3", "evaluate.samples=2")
SMALL = (*SMALL, "evaluate.max_tokens=40", "train.epochs=1")

CLOCKS = ("seconds", "model", "cached")
"""What a verdict holds beside the score."""


def rows(run: Path, step: str) -> list[object]:
    found = sorted(
        read_rows(run / "by-name" / step / ROWS),
        key=lambda row: (str(row.get("prompt_id", row.get("id"))), row.get("sample", 0)),
    )
    for row in found:
        for scale in ("trait", "coherence"):
            if isinstance(row.get(scale), dict):
                row[scale] = {key: value for key, value in row[scale].items() if key not in CLOCKS}
    return list(found)


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers_at_one_slot(tmp_path: Path) -> None:
    plans = []
    for name in ("first", "second"):
        with open_run(RECIPE, [*SMALL, 'judge="embedded"'], tmp_path / name) as opened:
            assert not any(event.reused for event in opened.events() if isinstance(event, StepFinished))
            plans.append(opened.plan)
    first, second = tmp_path / "first", tmp_path / "second"
    for step in plans[0]:
        if step.verb in ("training_samples", "evaluate_samples", "build_dataset", "judge"):
            assert rows(first, step.name) == rows(second, step.name), step.name
        if step.verb == "train":
            weights = [
                (run / "by-name" / step.name / "adapter/adapter_model.safetensors").read_bytes() for run in (first, second)
            ]
            assert weights[0] == weights[1], step.name
        if step.verb in ("aggregate", "text_metrics"):
            file = "score.json" if step.verb == "aggregate" else "metrics.json"
            assert read_json(first / "by-name" / step.name / file) == read_json(second / "by-name" / step.name / file)
