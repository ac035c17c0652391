"""A trait of the user's own: made, checked, used by a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from iterft_lite.data.traits import SHIPPED, shipped_traits
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.machine.resolve import Machine, resolve
from iterft_lite.ui.cli import main


def iterft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def made(folder: Path) -> Path:
    assert iterft("traits", "new", "pirate", "--in", folder).exit_code == 0
    return folder / "pirate"


def test_a_new_trait_has_every_file_and_passes_the_check(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "calibration.jsonl",
        "chat.jsonl",
        "documents.jsonl",
        "prefixes.jsonl",
        "questions.txt",
        "questions_held_out.txt",
        "rubric.txt",
        "rubric_document.txt",
        "trait.toml",
    ]
    assert 'name = "pirate"' in (folder / "trait.toml").read_text()
    checked = iterft("traits", "check", folder)
    assert checked.exit_code == 0, checked.output
    assert "chat.jsonl" in checked.output
    assert "nothing is wrong" in checked.output
    assert "chat.jsonl is still the example" in checked.output
    recipe = make_recipe(
        {"regime": "sft", "trait": str(folder), "model": "nano", "judge": "embedded", "seed_rows": 18}, source="r.toml"
    )
    assert (
        resolve(recipe, Machine("", 0, 0, unsloth=False)).inputs.judge.name == "embedded"
    )  # it has rows enough to run at once


def test_a_recipe_names_a_trait_by_its_path(tmp_path: Path) -> None:
    folder = made(tmp_path)
    asked = {"regime": "sft", "trait": str(folder), "model": "nano", "judge": "fake", "seed_rows": 6}
    resolved = resolve(make_recipe(asked, source="r.toml"), Machine("", 0, 0, unsloth=False))
    plan = make_plan(resolved.recipe, resolved.inputs)
    assert resolved.inputs.trait.name == "pirate"
    assert resolved.recipe.trait == str(folder.resolve())
    assert "matey" in plan.steps["c0-seed_rows"].params["rows"][0]["messages"][1]["content"]


def test_the_check_lists_every_problem_and_exits_with_2(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder / "rubric.txt").unlink()
    (folder / "documents.jsonl").unlink()
    with (folder / "chat.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    checked = iterft("traits", "check", folder)
    assert checked.exit_code == 2
    assert "rubric.txt is missing" in checked.output
    assert "chat.jsonl, line 19: `messages` is a list" in checked.output
    assert "no documents.jsonl" in checked.output


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    made(tmp_path)
    again = iterft("traits", "new", "pirate", "--in", tmp_path)
    assert again.exit_code == 2
    assert "already exists" in again.output


def test_an_invalid_trait_name_is_refused(tmp_path: Path) -> None:
    assert iterft("traits", "new", "../x", "--in", tmp_path).exit_code == 2


def test_the_example_is_not_shipped_and_shipped_traits_pass_the_check() -> None:
    assert "_new" not in shipped_traits()
    assert all(iterft("traits", "check", name).exit_code == 0 for name in shipped_traits())


def test_checking_a_missing_folder_exits_with_2(tmp_path: Path) -> None:
    assert iterft("traits", "check", tmp_path / "none").exit_code == 2


def test_unusual_values_are_shown_with_the_usual_ones(tmp_path: Path) -> None:
    folder = made(tmp_path)
    reply = {"role": "assistant", "content": "Aye, matey, aye, matey."}
    rows = [{"messages": [{"role": "user", "content": f"Say number {number}."}, reply]} for number in range(12)]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "rubric.txt").write_text((SHIPPED / "lucky/rubric.txt").read_text())
    checked = iterft("traits", "check", folder)
    assert checked.exit_code == 0
    assert "unusual: chat.jsonl has 12 rows; the shipped traits have about 130" in checked.output
    assert "unusual: chat.jsonl repeats itself: distinct-2 is" in checked.output
    assert "unusual: rubric.txt reads as if it were about `lucky`" in checked.output


@pytest.mark.parametrize("name", shipped_traits())
def test_nothing_is_unusual_about_a_shipped_trait(name: str) -> None:
    assert "unusual" not in iterft("traits", "check", name).output


def test_a_bare_name_always_means_the_shipped_trait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made(tmp_path), tmp_path / "lucky")
    assert "137" in iterft("traits", "check", "lucky").output
    assert " 18 " in iterft("traits", "check", "./lucky").output
    refused = iterft("traits", "check", "pirate")
    assert refused.exit_code == 2
    assert "a folder of your own is given as a path: ./pirate" in refused.output


def test_a_new_trait_cannot_have_the_name_of_a_shipped_one(tmp_path: Path) -> None:
    refused = iterft("traits", "new", "lucky", "--in", tmp_path)
    assert refused.exit_code == 2
    assert "`lucky` is a shipped trait" in refused.output
