"""Runs beside each other: what differs, what is shared, how far apart, in words, in the terminal and as a picture."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from click.testing import CliRunner
from rich.console import Console

from iterft_lite.engine.study import CELLS
from iterft_lite.errors import UserError
from iterft_lite.experiment.grid import Cell
from iterft_lite.metrics.across_seeds import Estimate
from iterft_lite.report.compare import Apart, Comparison, compare, sentences
from iterft_lite.report.study import read_study_report
from iterft_lite.report.study_words import study_sentence, study_sentences
from iterft_lite.ui.chart import chart_over
from iterft_lite.ui.cli import main
from iterft_lite.ui.comparison import show_comparison
from tests.made_up import make_study


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments of two trainings, the same at cycle 0."""
    cells = [Cell({"rows": rows, "seed": seed}) for rows in (4, 6) for seed in (1, 2)]
    return make_study(tmp_path_factory.mktemp("compare") / "two", cells, cycles=1, questions=4)


def test_a_comparison_lists_the_differing_recipe_keys(root: Path) -> None:
    found = compare([root / CELLS / "rows4_s1", root / CELLS / "rows6_s1"])
    assert found.settings == {"rows": (4, 6)}
    assert [side.name for side in found.sides] == ["rows4_s1", "rows6_s1"]
    assert found.apart[0].last == 1
    assert found.apart[0].by_cycle[-1].mean == 0
    assert found.apart[0].by_cycle[1].covers == "questions"
    assert found.notes == ()


def test_shared_steps_are_reported(root: Path) -> None:
    found = compare([root / CELLS / "rows4_s1", root / CELLS / "rows6_s1"])
    assert found.apart[0].shared == 0
    assert "B and A share every step up to cycle 0" in sentences(found)


def test_runs_that_differ_only_by_seed_form_one_side(root: Path) -> None:
    found = compare([root])
    assert [len(side.cells) for side in found.sides] == [2, 2]
    assert found.apart[0].change.covers == "questions and trainings"
    assert any("over questions and trainings, 4 questions" in sentence for sentence in sentences(found))


def test_sides_differ_by_nothing_where_they_have_the_same_models(root: Path) -> None:
    by_cycle = compare([root]).apart[0].by_cycle
    for shared in (-1, 0):  # what varies between seeds varies in both sides alike
        assert (by_cycle[shared].mean, by_cycle[shared].low, by_cycle[shared].high) == (0.0, 0.0, 0.0)
        assert by_cycle[shared].error is None
    assert by_cycle[1].error is not None


def test_two_trainings_of_one_experiment_are_compared_as_such(root: Path) -> None:
    found = compare([root / CELLS / "rows4_s2", root / CELLS / "rows4_s1"])
    assert found.settings == {"seed": (2, 1)}


def test_sides_keep_the_order_of_the_command_line(root: Path) -> None:
    found = compare([root / CELLS / "rows6_s1", root / CELLS / "rows4_s1"])
    assert found.settings == {"rows": (6, 4)}


def test_different_judges_are_reported_as_different_scales(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run.json"
    manifest = json.loads((root / CELLS / "rows6_s1" / "run.json").read_text())
    manifest["judge"]["name"], manifest["store"] = "somebody", str(root)
    copy.write_text(json.dumps(manifest))
    found = compare([root / CELLS / "rows4_s1", tmp_path])
    assert found.notes == ("different judges: their scores are not on one scale",)


def test_a_judge_fitted_on_another_untouched_model_is_another_judge(root: Path, tmp_path: Path) -> None:
    manifest = json.loads((root / CELLS / "rows6_s1" / "run.json").read_text()) | {"store": str(root)}
    everyday = next(step for step in manifest["steps"] if step["verb"] == "evaluate_samples")
    manifest["steps"].append({**everyday, "part": "everyday", "key": "0" * 64})
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    found = compare([root / CELLS / "rows4_s1", tmp_path])
    assert found.notes == ("judges fitted on different answers of untouched models: their scores are not on one scale",)


def test_a_single_run_cannot_be_compared(root: Path) -> None:
    with pytest.raises(UserError, match="there is one side to compare"):
        compare([root / CELLS / "rows4_s1"])


def test_the_terminal_shows_recipes_curves_and_differences(root: Path) -> None:
    result = CliRunner().invoke(main, ["compare", str(root)])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "A rows4: 2 trainings, sft, lucky, nano" in words
    assert "they differ in A B rows 4 6" in words
    assert "B - A" in words
    assert "B ends" in words


def test_an_unfinished_study_says_which_trainings_it_speaks_of_so_far(root: Path, tmp_path: Path) -> None:
    whole = study_sentences(read_study_report([root]))
    assert "2 experiments have two trainings: such intervals" in " ".join(whole)
    shutil.copytree(root, tmp_path / "two", symlinks=True)
    shutil.rmtree(tmp_path / "two" / CELLS / "rows6_s2")
    study = read_study_report([tmp_path / "two"])
    assert study_sentence(study) == "4 cells: 3 done, 1 not finished; 2 experiments of 2 trainings each"
    alone, *others = study_sentences(study)[-3:]
    assert alone.startswith("1 of 2 experiments have one training so far: their intervals cover questions only")
    assert others == [
        "1 experiment has two trainings so far: such intervals hold the truth in as few as 90 % of cases",
        "1 cell is not finished: verdicts are corrected for the experiments that have scores so far",
    ]


def test_sentences_say_which_side_moved_less_and_whether_a_difference_is_shown() -> None:
    unsure, sure = Estimate(-3.84, -29.1, 21.5, 1, 4), Estimate(-20.0, -30.0, -10.0, 1, 4)
    apart = [Apart({2: score}, change, 2, -1) for score, change in ((unsure, sure), (sure, replace(unsure, mean=2.0)))]
    found = sentences(cast(Comparison, SimpleNamespace(apart=apart)))
    assert [words.partition(" (")[0] for words in found] == [
        "B ends 3.8 points below A at cycle 2, no difference is shown",
        "from cycle 0 on it moved up 20.0 points less than A",
        "C ends 20.0 points below A at cycle 2",
        "from cycle 0 on it moved up 2.0 points more than A, no difference is shown",
    ]


def test_numbers_of_four_sides_are_whole_in_a_narrow_terminal(root: Path) -> None:
    found = compare([root / CELLS / f"rows{rows}_s{seed}" for rows in (4, 6) for seed in (1, 2)])
    assert len(found.sides) == 2
    four = replace(found, sides=(*found.sides, *found.sides), apart=found.apart * 3)
    for width in (60, 80, 120):
        shown = Console(width=width, file=(text := io.StringIO()))
        show_comparison(four, shown)
        assert "…" not in text.getvalue()


def test_overlapping_curves_are_both_visible() -> None:
    drawn = chart_over({"A": {0: 50.0, 1: 90.0}, "B": {0: 50.0, 1: 10.0}}, 1, {"A": "", "B": ""}).plain
    assert "AB" in drawn
    assert drawn.count("A") == 2


def test_a_comparison_is_written_as_a_picture_and_as_numbers(root: Path, tmp_path: Path) -> None:
    png, numbers = tmp_path / "apart.png", tmp_path / "apart.csv"
    result = CliRunner().invoke(main, ["compare", str(root), "--png", str(png), "--csv", str(numbers)])
    assert result.exit_code == 0, result.output
    assert png.stat().st_size > 0
    assert numbers.read_text().startswith("experiment,arm,rows,cycle")
