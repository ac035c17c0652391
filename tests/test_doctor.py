"""What `iterft doctor` says of the machine, and how it measures it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.doctor import STEPS, measured_recipe, shortened
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.machine.resolve import resolve, this_machine
from iterft_lite.machine.timing import read_table
from iterft_lite.machine.work import ACTS
from iterft_lite.testing.fakes import fake_backends
from iterft_lite.ui.cli import main

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_shortened_for_measuring(path: Path) -> None:
    recipe = shortened(read_recipe(path, ["judge=openai/gpt-4o-mini-2024-07-18"]))
    resolved = resolve(recipe.model_copy(update={"model": "nano"}), this_machine())
    plan = make_plan(resolved.recipe, resolved.inputs)
    trainings = [step for step in plan if step.verb == "train"]
    assert len(trainings) == 2
    settings = recipe.train
    assert -(-recipe.rows // settings.batch_size) * settings.epochs <= 2 * STEPS
    assert resolved.inputs.judge.name == "embedded"  # measuring costs no dollars
    assert settings == read_recipe(path).train.model_copy(update={"epochs": settings.epochs})


def test_a_short_recipe_is_measured_as_it_is() -> None:
    recipe = measured_recipe("nano")
    assert shortened(recipe) == recipe


@pytest.mark.parametrize("options", [("--recipe", "nano_sft"), ("--measure", "--model", "nano", "--recipe", "nano_sft")])
def test_contradicting_options_are_refused(options: tuple[str, ...]) -> None:
    result = iterft("doctor", *options)
    assert result.exit_code == 2
    assert "go" in result.output


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "file/cache"))
    result = iterft("doctor", "--measure")
    assert result.exit_code == 2
    assert "hint: ITERFT_CACHE names another folder" in result.output


def test_measuring_leaves_no_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path))
    monkeypatch.setattr("iterft_lite.app.session.open_backends", lambda *_, **__: fake_backends())
    result = iterft("doctor", "--measure")
    assert result.exit_code == 1
    assert "nothing could be timed" in result.output
    # digests of the model's files, and the untouched model for adapters
    assert {path.name for path in tmp_path.iterdir()} == {"files.json", "bases"}


@pytest.mark.slow
def test_measuring_tells_the_next_plan_how_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path))
    measured = iterft("doctor", "--measure")
    assert measured.exit_code == 0, measured.output
    table = read_table()
    assert {sample.kind.act for sample in table} == set(ACTS)
    assert {sample.origin for sample in table} == {"doctor"}
    assert not list(tmp_path.glob("measuring-*"))
    said = " ".join(iterft("plan", "nano_sft").output.split())
    assert re.search(
        r"time about \S+ (s|min) \(.* to .*\) in all, .* a cycle; from `iterft doctor --measure` of this model", said
    )
    # its trainings are of the same loss, formats and threads as the recipe's: nothing had to be guessed
    assert "within a factor" not in said
