"""From one judge to the next: the paired comparison, what flips, and what it rests on."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from iterft_lite.app import bridge as bridges
from iterft_lite.app.bridge import as_markdown, bridge
from iterft_lite.app.named_judge import judge_folder, named
from iterft_lite.engine.manifest import Run
from iterft_lite.errors import UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.testing.judge_server import StubProcess
from tests.test_judges_compared import PAPER, iterft, run

__all__ = ["run"]  # a finished run through fake backends

OTHER = named("openai/other")


def test_the_bridge_equals_the_hand_computed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = {(cycle, (f"q{q}", s)): 1 + 10.0 * q + s + 30 * cycle for cycle in (0, 1) for q in range(6) for s in range(2)}
    new = {key: score + (10 if score >= 50 else 0) for key, score in old.items()}
    scores = {"old": {"trait": old, "coherence": {}}, "new": {"trait": new, "coherence": {}}}
    monkeypatch.setattr(bridges, "scores_of", lambda _, judge: scores[judge.name])
    monkeypatch.setattr(bridges, "_calibration", lambda *_: ({}, ["nothing was calibrated"]))
    words = {"old": "amplified", "new": "static"}

    class Shown:
        def __init__(self, word: str) -> None:
            self.verdict = type("Verdict", (), {"word": word})

    monkeypatch.setattr(bridges, "report_by", lambda _, judge: Shown(words[judge.name]))
    found = bridge(named("old"), named("new"), [tmp_path])
    rows = {row.band: row for row in found.rows}
    assert list(rows) == ["all", "1 to 25", "25 to 50", "50 to 75", "75 to 100"]
    assert (rows["all"].answers, rows["all"].prompts) == (24, 6)
    assert rows["all"].spearman == pytest.approx(1.0)
    assert rows["all"].low == pytest.approx(1.0)
    assert (rows["25 to 50"].bias.mean, rows["50 to 75"].bias.mean) == (0.0, 10.0)
    by_hand = [sum(new[key] - old[key] for key in old if key[1][0] == f"q{q}") / 4 for q in range(6)]
    assert rows["all"].bias.mean == pytest.approx(sum(by_hand) / 6)
    assert rows["all"].bias.low is not None
    assert rows["all"].bias.high is not None
    assert rows["all"].bias.low < rows["all"].bias.mean < rows["all"].bias.high
    assert [(flip.old, flip.new) for flip in found.flips] == [("amplified", "static")]
    table = as_markdown(found)
    assert "1 of 1 verdicts differ" in table
    assert "not compared: nothing was calibrated" in table


@pytest.mark.slow
def test_a_runs_scores_are_converted_from_one_judge_to_another(run: Path, tmp_path: Path) -> None:
    with StubProcess() as stub:
        options = ("--api-base", stub.api_base)
        assert iterft("judge", run, "--judge", PAPER, *options).exit_code == 0
        missing = iterft("judge", "bridge", "fake", PAPER, run)
        assert f"iterft judge calibrate --judge {PAPER} --trait lucky" in " ".join(missing.output.split())
        assert iterft("judge", "calibrate", "--judge", PAPER, "--trait", "lucky", *options).exit_code == 0
        assert iterft("judge", "bridge", PAPER, f"{PAPER}#1", run).exit_code == 2
    result = iterft("judge", "bridge", "fake", PAPER, run, "--md", tmp_path / "bridge.md")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "bridge.md").read_text()
    assert re.search(r"\| stored \| trait \| all \| 24 \| 1\.00 \(", text)
    assert "0 of 1 verdicts differ" in text


def test_judges_without_a_common_answer_have_no_bridge(run: Path) -> None:
    with Run(judge_folder(run, OTHER)) as folder:
        about = {"judge": str(OTHER), "identity": asdict(JudgeIdentity(OTHER.name, "llm", "", "logprobs"))}
        folder.write_manifest(about, ())
    with pytest.raises(UserError, match="scored no answer both"):
        bridge(named("fake"), OTHER, [run])
