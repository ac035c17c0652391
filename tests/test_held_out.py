"""The held-out questions: asked on demand, of every finished model, in the run's own folder."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from iterft_lite.app.session import open_run
from iterft_lite.data.traits import read_trait
from iterft_lite.files import ROWS, read_rows
from iterft_lite.ui.cli import main
from tests.loop import small_recipe


def finished(root: Path, *, regime: str = "sft", trait: str = "lucky", model: str = "nano", steps: int | None = None) -> Path:
    recipe = root / "small.toml"
    recipe.write_text(small_recipe(regime=regime, trait=trait, model=model))
    with open_run(recipe, (), root / "run") as opened:
        events = opened.events()
        for number, _ in enumerate(events):
            if number == steps:
                events.close()
    return root / "run"


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_held_out_questions_are_asked_once_and_reported_beside_the_main_ones(tmp_path: Path) -> None:
    run = finished(tmp_path)
    assert "held_out" not in json.loads(iterft("report", run, "--json").stdout)
    assert iterft("report", run, "--held-out").exit_code == 0
    answers = read_rows(run / "by-name/c2-evaluate_samples-held_out" / ROWS)
    assert sorted({row["prompt"] for row in answers}) == sorted(read_trait("lucky").held_out)
    assert len(answers) == 12 * 2
    written = {path: path.stat().st_mtime_ns for path in run.glob("by-name/*held_out/*")}
    again = iterft("report", run, "--held-out", "--json")
    assert {path: path.stat().st_mtime_ns for path in run.glob("by-name/*held_out/*")} == written
    report = json.loads(again.stdout)
    assert sorted(report["held_out"]["scores"]) == ["-1", "0", "1", "2"]
    assert report["held_out"]["scores"]["2"]["trait"]["mean"] == 90.0
    assert report["held_out"]["verdict"]["word"] == "no change shown"
    # the verdict of the run itself rests on its own questions only
    assert [cycle["answers"] for cycle in report["cycles"]] == [6, 6, 6, 6]
    assert report["complete"]
    text = iterft("report", run, "--full").stdout
    assert "held-out questions" in text
    # the run asks 3 questions, too few for a verdict; 12 are held out
    assert text.count("too few prompts") == text.count("no change shown") == 1
    iterft("report", run, "--html", tmp_path / "page.html")
    assert "<h2>Held-out questions</h2>" in (tmp_path / "page.html").read_text()


def test_models_that_were_removed_are_written_again_and_removed_again(tmp_path: Path) -> None:
    run = finished(tmp_path)
    before = sorted(path.parent.name for path in run.glob("by-name/*/model.gguf"))
    assert before == ["c2-export"]
    assert iterft("report", run, "--held-out").exit_code == 0
    assert sorted(path.parent.name for path in run.glob("by-name/*/model.gguf")) == before


def test_models_that_cannot_be_written_again_are_not_asked_and_named(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run / "by-name/c1-train/adapter/texts.json").unlink()  # as `keep = "ends"` removes adapters of real models
    said = iterft("report", run, "--held-out", "--json")
    assert said.exit_code == 0
    assert 'not asked: c1, whose adapters `keep = "ends"` removed' in said.stderr
    report = json.loads(said.stdout)
    assert sorted(report["held_out"]["scores"]) == ["-1", "0", "2"]
    assert report["held_out"]["verdict"]["word"] == "no change shown"


def test_held_out_questions_on_an_unfinished_run_do_not_continue_it(tmp_path: Path) -> None:
    run = finished(tmp_path, steps=60)
    sealed = {path.parent.name for path in run.glob("by-name/*/completion.json")}
    assert "c2-aggregate" not in sealed
    assert iterft("report", run, "--held-out").exit_code == 0
    new = {path.parent.name for path in run.glob("by-name/*/completion.json")} - sealed
    exports = {name.removesuffix("-export") for name in sealed if name.endswith("-export")}
    assert new == {f"{cycle}-{verb}-held_out" for cycle in exports for verb in ("evaluate_samples", "judge", "aggregate")}


def test_a_run_can_be_continued_after_its_held_out_questions(tmp_path: Path) -> None:
    run = finished(tmp_path)
    iterft("report", run, "--held-out")
    with open_run(tmp_path / "small.toml", ["cycles=3"], run) as opened:
        list(opened.events())
    assert (run / "by-name/c3-aggregate/completion.json").exists()
    assert "held-out questions" in iterft("report", run).stdout


def test_documents_have_no_held_out_questions(tmp_path: Path) -> None:
    run = finished(tmp_path, regime="sdf", trait="bliss", model="nano-base")
    asked = iterft("report", run, "--held-out")
    assert asked.exit_code == 2
    assert "held-out questions are for chats" in asked.output


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert iterft("report", tmp_path, "--held-out").exit_code == 2


def test_a_report_shows_dpo_and_text_metrics(tmp_path: Path) -> None:
    run = finished(tmp_path, regime="dpo")
    text = iterft("report", run, "--full").stdout
    iterft("report", run, "--html", tmp_path / "page.html")
    assert "<th>DPO margin<th>pairs right" in (tmp_path / "page.html").read_text()
    for column in ("symbols", "PPL (M0)", "PPL with trait", "PPL without", "DPO margin", "pairs right"):
        assert column in text
    (tmp_path / "other").mkdir()
    assert "DPO margin" not in iterft("report", finished(tmp_path / "other"), "--full").stdout
