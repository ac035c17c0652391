"""A study's file, and the cells that it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterft_lite.data.recipes import recipe_names, study_names, study_path
from iterft_lite.errors import RecipeError
from iterft_lite.experiment.grid import NAME_LENGTH, Threshold, cells, chosen, make_study, read_study, with_rows


def names(sweep: dict[str, Any]) -> list[str]:
    return [cell.name for cell in cells(make_study({"base": "sft", "sweep": sweep}, source="test"))]


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        cells(make_study(given, source="test"))
    return list(caught.value.problems)


def test_every_combination_of_the_grid_is_a_cell() -> None:
    found = names({"grid": {"seed_rows": [10, 20], "rows": [30, 40]}})
    assert sorted(found) == ["seed_rows10_rows30", "seed_rows10_rows40", "seed_rows20_rows30", "seed_rows20_rows40"]


def test_corners_come_first_and_other_seeds_last() -> None:
    found = names({"grid": {"seed_rows": [1, 2, 3], "rows": [4, 5, 6], "seed": [42, 43]}})
    assert found[:4] == [
        "seed_rows1_rows4_s42",
        "seed_rows1_rows6_s42",
        "seed_rows3_rows4_s42",
        "seed_rows3_rows6_s42",
    ]
    assert found[8] == "seed_rows2_rows5_s42"
    assert all(name.endswith("s43") for name in found[9:])


def test_zipped_keys_change_together() -> None:
    found = names({"zip": [{"train.dpo_beta": [0.01, 0.1], "train.learning_rate": [3e-6, 1e-5]}]})
    assert found == ["dpo_beta0.01_learning_rate3e-06", "dpo_beta0.1_learning_rate1e-05"]


def test_single_cells_can_be_added_and_excluded() -> None:
    found = names({"grid": {"rows": [30, 40, 50]}, "add": [{"rows": 200, "seed_rows": 5}], "skip": [{"rows": 40}]})
    assert found == ["rows30", "rows50", "rows200_seed_rows5"]


def test_a_cell_named_twice_exists_once() -> None:
    assert names({"grid": {"rows": [30, 40]}, "add": [{"rows": 30}]}) == ["rows30", "rows40"]


def test_each_null_arm_is_one_extra_cell_a_seed() -> None:
    found = names({"grid": {"rows": [30], "seed": [1, 2]}, "arms": ["no_seed", "base_data"]})
    assert found == ["rows30_s1", "rows30_s2", "no_seed_s1", "no_seed_s2", "base_data_s1", "base_data_s2"]


def test_keys_with_the_same_last_word_get_distinct_names() -> None:
    assert names({"grid": {"sample.temperature": [0.8], "evaluate.temperature": [0.7]}}) == [
        "sample-temperature0.8_evaluate-temperature0.7"
    ]


def test_every_cell_name_is_a_valid_folder_name() -> None:
    (found,) = names({"grid": {"model": ["Some/Model: of mine?"], "trait": ["x/" + "y" * 200], "judge": ["a b" * 60]}})
    assert len(found) <= NAME_LENGTH
    assert "/" not in found
    assert " " not in found


def test_a_target_score_becomes_a_number_of_rows_and_is_remembered() -> None:
    study = make_study({"base": "sft", "sweep": {"grid": {"seed_rows": {"calibrated": [20, 60]}}}}, source="test")
    first, second = cells(study)
    assert first.values["seed_rows"] == Threshold(20.0)
    assert [first.name, second.name] == ["seed_rows-at20", "seed_rows-at60"]
    with pytest.raises(ValueError, match="not known yet"):
        first.overrides()
    known = with_rows(first, 22)
    assert (known.name, known.threshold, known.overrides()) == ("seed_rows22", 20.0, {"seed_rows": 22})


def test_the_order_of_keys_does_not_change_the_cells() -> None:
    one = cells(make_study({"base": "sft", "sweep": {"add": [{"rows": 3, "seed": 1}]}}, source="test"))[0]
    other = cells(make_study({"base": "sft", "sweep": {"add": [{"seed": 1, "rows": 3}]}}, source="test"))[0]
    assert one.identity == other.identity


def test_cells_can_be_chosen_by_their_values() -> None:
    every = cells(make_study({"base": "sft", "sweep": {"grid": {"rows": [30, 40], "seed": [1, 2]}}}, source="test"))
    assert [cell.name for cell in chosen(every, ["rows=40", "seed=2"])] == ["rows40_s2"]
    with pytest.raises(RecipeError, match="no cell has rows=5") as caught:
        chosen(every, ["rows=5"])
    assert caught.value.hint == "`rows` is 30, 40"
    with pytest.raises(RecipeError, match="no cell has cycles=5") as caught:
        chosen(every, ["cycles=5", "rows=30"])
    assert caught.value.hint == "cells differ in rows, seed"


def test_all_problems_of_a_study_are_reported_at_once() -> None:
    found = problems(
        {
            "base": 3,
            "swep": {},
            "sweep": {
                "grid": {"row": [1], "rows": [], "seed": [1, 1], "cycles": {"calibrated": [3]}, "name": ["x"]},
                "zip": [{"train.dpo_beta": [1, 2], "train.learning_rate": [1]}],
                "arms": ["no_sed"],
                "skip": [{}],
            },
        }
    )
    said = "\n".join(found)
    for part in (
        "`base` is missing",
        "`swep` does not belong in a study; did you mean `sweep`?",
        "`row` is not a recipe key; did you mean `rows`?",
        "`rows` of the grid needs a list",
        "`seed` has the value 1 twice",
        "only `seed_rows = { calibrated",
        "`name` cannot vary",
        "`train.dpo_beta` has 2, `train.learning_rate` has 1",
        "there is no null arm 'no_sed'",
        "an empty `[[sweep.skip]]`",
    ):
        assert part in said
    assert len(found) == 10


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({}, "there are no cells"),
        ({"grid": {"rows": [3]}, "skip": [{"rows": 3}]}, "every cell of the grid is skipped"),
        ({"grid": {"rows": list(range(200)), "seed": list(range(200))}}, "the grid has 40,000 cells"),
        ({"grid": {"rows": [3]}, "zip": [{"rows": [4]}]}, "`rows` varies twice"),
    ],
)
def test_a_grid_of_no_cells_or_too_many_is_refused(sweep: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems({"base": "sft", "sweep": sweep}))


def test_a_study_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "sft"\n[sweep.grid]\nrows = [3, 4]\n')
    study = read_study(tmp_path / "mine.toml")
    assert (study.name, study.base, study.keys) == ("mine", "sft", ("rows",))
    with pytest.raises(RecipeError, match="there is no file"):
        read_study(tmp_path / "other.toml")


@pytest.mark.parametrize("name", study_names())
def test_every_shipped_study_has_cells(name: str) -> None:
    study = read_study(study_path(name))
    assert (study.base if isinstance(study.base, str) else study.base["recipe"]) in recipe_names()
    assert len(cells(study)) >= 8
