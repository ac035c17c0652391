"""Finding things: keys, recipes, runs, what was meant by a misspelt word, a recipe for this machine, what is in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from iterft_lite.app.own_recipe import begin
from iterft_lite.app.recipe_reference import recipe_keys, schema_text
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.recipes import SCHEMA, recipe_folder, recipe_names, recipe_path
from iterft_lite.errors import UserError
from iterft_lite.experiment.recipe import Recipe, read_recipe
from iterft_lite.experiment.recipe_keys import key_names, near_key
from iterft_lite.machine.fit import GIB, largest_that_fits, vram_table
from iterft_lite.ui.cli import main
from tests.loop import small_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and fake backends behind the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def iterft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def printed(*arguments: str | Path) -> str:
    result = iterft(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: str | Path) -> str:
    result = iterft(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


# -- what was meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("cycels", "cycles"),
        ("train.batchsize", "train.batch_size"),
        ("sample.max_new_tokens", "sample.max_tokens"),
        ("lerning", "train.learning_rate"),
        ("colour", ""),
    ],
)
def test_a_wrong_recipe_key_is_answered_with_the_right_one(written: str, meant: str) -> None:
    assert near_key(written, key_names(Recipe)) == meant


def test_a_misspelt_recipe_or_command_is_answered_with_similar_names() -> None:
    assert "did you mean `nano_sft`" in refused("plan", "nano_stf")
    assert "there is no command `rnu`; did you mean `iterft run`?" in refused("rnu")


def test_a_study_given_as_a_recipe_and_a_recipe_given_as_a_study_are_answered_with_the_command() -> None:
    assert "it is a study: `iterft sweep plan nano_sft_grid`" in refused("plan", "nano_sft_grid")
    assert "it is a recipe: `iterft plan nano_sft`" in refused("sweep", "plan", "nano_sft")
    Path("recipe.toml").write_text(small_recipe())
    Path("study.toml").write_text('base = "recipe.toml"\n[sweep.grid]\nrows = [4, 5]\n')
    assert "is a study, not a recipe" in refused("run", "study.toml")
    assert "`iterft sweep plan study.toml` plans it" in refused("plan", "study.toml")
    assert "is a recipe, not a study" in refused("sweep", "recipe.toml", "--out", "new")
    assert "`iterft plan recipe.toml` plans it" in refused("sweep", "plan", "recipe.toml")


def test_a_bare_name_means_the_shipped_recipe_even_beside_a_file(tmp_path: Path) -> None:
    (tmp_path / "nano_sft").mkdir()
    assert recipe_path("nano_sft") == recipe_folder() / "nano_sft.toml"
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        recipe_path("./nano_sft")
    (tmp_path / "mine.toml").write_text(small_recipe())
    assert "a file of your own is given with its ending: mine.toml" in refused("plan", "mine")


def test_without_a_command_iterft_says_where_to_start() -> None:
    assert "iterft run nano_sft" in printed()


# -- keys and the schema


def test_every_recipe_key_has_a_meaning_and_allowed_values() -> None:
    assert [key.name for key in recipe_keys() if not key.about.endswith(".") or not key.kind] == []  # whole sentences
    assert "train.learning_rate number, above 0; 0.00015 in sft" in printed("keys", "learning")
    assert "no recipe key has `learnig_rate`" in refused("keys", "learnig_rate")


def test_the_shipped_schema_matches_the_recipe_class() -> None:
    assert (recipe_folder() / SCHEMA).read_text() == schema_text(), "run scripts/build_reference.py"


def allowed(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """A table's properties, whichever way the schema points to it."""
    for option in [schema, *schema.get("anyOf", []), *schema.get("allOf", [])]:
        if "$ref" in option:
            return dict(whole["$defs"][option["$ref"].rpartition("/")[2]])
    return schema


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_has_only_keys_of_the_schema(name: str) -> None:
    schema = json.loads(schema_text())
    recipe = tomllib.loads(recipe_path(name).read_text())
    assert set(schema["required"]) <= set(recipe) <= set(schema["properties"])
    for key, value in recipe.items():
        if isinstance(value, dict):
            assert set(value) <= set(allowed(schema["properties"][key], schema)["properties"])


# -- recipes of one's own


def test_a_shipped_recipe_is_shown_and_copied_but_never_overwrites_a_file(tmp_path: Path) -> None:
    assert 'regime = "sft"' in printed("recipes", "show", "nano_sft")
    assert "iterft run mine.toml" in printed("recipes", "copy", "nano_sft", "mine.toml")
    assert (tmp_path / "mine.toml").read_text().startswith("# iterft run mine.toml\n")
    copy, shipped = (read_recipe(path).model_dump(exclude={"name"}) for path in (Path("mine.toml"), recipe_path("nano_sft")))
    assert copy == shipped
    assert "`mine.toml` already exists" in refused("recipes", "copy", "nano_sft", "mine.toml")
    printed("recipes", "copy", "nano_dpo", "mine.toml", "--force")


def test_init_writes_a_recipe_for_this_machine_and_plans_it(tmp_path: Path) -> None:
    said = printed("init", "mine", "--gpu", "0", "--trait", "bliss", "--judge", "embedded")
    assert "wrote mine.toml" in said
    assert "trait bliss, model nano" in said
    recipe = read_recipe(tmp_path / "mine.toml")
    assert (recipe.trait, recipe.model, recipe.judge) == ("bliss", "nano", "embedded")
    assert "# " in (tmp_path / "mine.toml").read_text()  # the comments are kept
    assert "already exists" in refused("init", "mine", "--gpu", "0", "--trait", "bliss", "--judge", "embedded")


def test_init_asks_again_for_an_unusable_answer_and_plans_for_the_named_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.ui.commands.recipes._can_ask", lambda: True)
    answers = "-3\n12\ngpt4\nopnai/gpt-4o\nembedded\npirate\nbliss\n"
    result = CliRunner().invoke(main, ["init"], input=answers)
    said = " ".join(result.output.split())
    assert result.exit_code == 0, said
    for complaint in (
        "-3.0 is not in the range",
        '`judge = "gpt4"` is not a judge',
        "did you mean `openai`?",
        "no trait `pirate`",
    ):
        assert complaint in said
    assert "wrote bliss_sft.toml" in said
    assert "11 GiB are free: they take turns" in said


def test_init_checks_its_options_before_it_writes(tmp_path: Path) -> None:
    refused("init", "mine", "--gpu", "0", "--judge", "gpt4")
    refused("init", "mine", "--gpu", "0", "--judge", "opnai/gpt-4o")
    refused("init", "mine", "--gpu", "0", "--judge", "local:missing.gguf")
    refused("init", "mine", "--gpu", "-1")
    assert "there is no model `./mine`" in refused("init", "mine", "--judge", "embedded", "--model", "./mine")
    assert list(tmp_path.iterdir()) == []


def test_init_begins_with_a_trait_that_has_rows_for_the_regime() -> None:
    assert "trait bliss" in printed("init", "documents", "--regime", "sdf", "--judge", "embedded")
    said = refused("init", "none", "--regime", "sdf", "--judge", "embedded", "--trait", "lucky")
    assert "trait `lucky` has no seed rows for SDF hint: these have: bliss, misalignment, nvidia" in said
    assert not Path("none.toml").exists()


@pytest.mark.parametrize("regime", ["sft", "sdf", "dpo"])
@pytest.mark.parametrize("gib", [0.0, 8.0, 24.0])
def test_a_recipe_for_any_machine_can_be_read_and_its_model_fits(tmp_path: Path, regime: str, gib: float) -> None:
    (tmp_path / "own.toml").write_text(begin(regime, gib, judge="embedded", trait="bliss").text)
    recipe = read_recipe(tmp_path / "own.toml")
    assert recipe.regime == regime
    assert recipe.model.startswith("nano") == (gib == 0)
    if gib:
        needs = {name: need.in_turns for model, need in vram_table(regime) for name in (model.name, model.base)}
        assert needs[recipe.model] <= gib * GIB


@pytest.mark.parametrize(
    ("model", "rate"), [(str(FOLDERS["nano"]), 1e-3), ("somebody/seven-billion", 1.5e-4)], ids=["small", "not here"]
)
def test_a_recipe_for_ones_own_model_begins_from_settings_for_its_size(tmp_path: Path, model: str, rate: float) -> None:
    (tmp_path / "own.toml").write_text(begin("sft", 0, judge="embedded", trait="bliss", model=model).text)
    recipe = read_recipe(tmp_path / "own.toml")
    assert (recipe.model, recipe.train.learning_rate) == (model, rate)


def test_a_larger_gpu_never_gets_a_smaller_model() -> None:
    names = [None, *(model.name for model, _ in vram_table("sft"))]
    chosen = [names.index(largest_that_fits("sft", gib)) for gib in range(40)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] == len(names) - 1


def test_a_plan_says_how_much_memory_a_gpu_needs() -> None:
    assert "8 GiB are free: too little" in printed("plan", "sft", "--gpu", "8", "--set", "judge=embedded")
    assert "they take turns" in printed("plan", "sft", "--gpu", "12", "--set", "judge=embedded")
    assert "a first guess from Qwen3-4B (4,022 M parameters) on an H200" in printed("plan", "sft", "--gpu", "12")
    here = printed("plan", "sft", "--set", "judge=embedded")
    assert "c2-train" not in here
    assert "c2-train" in printed("plan", "sft", "--set", "judge=embedded", "--steps")


# -- runs


def test_a_run_is_stored_under_runs_and_found_as_the_newest(tmp_path: Path) -> None:
    Path("first.toml").write_text(small_recipe())
    Path("second.toml").write_text(small_recipe(trait="bliss"))
    assert "there is no run in `runs`" in printed("runs")
    assert "there is no folder `nowhere`" in refused("runs", "nowhere")
    Path("study.toml").write_text('base = "first.toml"\n[sweep.grid]\nrows = [4, 5]\n')
    assert "1 of 2 cells, 30 of 46 steps" in printed("sweep", "study.toml", "--out", "studies/a", "--plain", "--limit", "1")
    assert printed("runs", "studies") == "studies/a is a study: `iterft sweep status studies/a`, `iterft runs studies/a`"
    assert "there is no run in `runs`" in refused("report")
    for at, name in enumerate(("first", "second")):
        printed("run", f"{name}.toml")
        os.utime(tmp_path / f"runs/{name}/run.json", (at, at))
    assert printed("report").startswith("runs/second, the newest run: second: sft")
    listed = printed("runs")
    assert listed.index("runs/second sft, bliss, nano finished") < listed.index("runs/first")


def test_reusing_an_empty_folder_is_fine(tmp_path: Path) -> None:
    Path("first.toml").write_text(small_recipe())
    (tmp_path / "runs").mkdir()
    assert "note: there is nothing in `runs` yet" in printed("run", "first.toml", "--reuse", "runs")


def test_a_calibration_ends_with_commands_to_paste() -> None:
    Path("first.toml").write_text(small_recipe())
    said = printed(
        "calibrate", "first.toml", "--out", "how many", "--threshold", "5", "--most", "4", "--set", "evaluate.samples=1"
    )
    assert "iterft run first.toml --set evaluate.samples=1 --set seed_rows=" in said
    assert "--reuse 'how many' --out" in said


def test_a_calibration_that_reaches_nothing_says_what_may_help() -> None:
    Path("first.toml").write_text(small_recipe())
    said = printed("calibrate", "first.toml", "--out", "a", "--threshold", "100", "--most", "4")
    assert "a model with 4 seed rows:" in said
    assert "4 seed rows are the most that were tried. Stronger: `--most` above 4," in said
    assert "run with one of them" not in said


def test_a_shortage_names_the_file_that_is_too_short(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {number}?", "reply": f"It is number {number}."} for number in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("first.toml").write_text(small_recipe())
    paths = [part for table in ("seeds", "prompts") for part in ("--set", f"{table}.path=mine.jsonl")]
    said = refused("plan", "first.toml", *paths)
    assert "mine.jsonl` has 3 seed chats" in said
    assert "mine.jsonl` has 3" in said.partition("8 prompts are needed (2 cycles of 4 rows, each asked once), but")[2]


# -- the cache, the shell


def test_clearing_the_cache_keeps_paid_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    for name in ("bases/one/model.gguf", "judges/one.json", "verdicts.sqlite", "timings.jsonl", "strange"):
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1_000_000)
    assert "bases 1.0 MB" in printed("cache")
    assert "5.0 MB in" in printed("cache")
    assert "other 1.0 MB" in printed("cache")
    printed("cache", "bases", "--free")
    assert not (tmp_path / "cache/bases").exists()
    printed("cache", "all", "--free")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["verdicts.sqlite"]
    assert "has no kind `base`" in refused("cache", "base", "--free")


def completed(words: str, place: int) -> list[str]:
    """What bash would offer."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv = ['iterft']; from iterft_lite.ui.cli import main; main(prog_name='iterft')",
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_ITERFT_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(place),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.split()]


def test_tab_completion_knows_recipes_keys_and_traits() -> None:
    assert "_ITERFT_COMPLETE" in printed("completion", "bash")
    assert completed("iterft run nano_s", 2) == ["nano_sdf", "nano_sft", "nano_sft_continual"]
    assert completed("iterft run nano_sft --set train.lora_r", 4) == ["train.lora_rank="]
    assert completed("iterft init --trait bl", 3) == ["bliss"]


def test_doctor_checks_a_judge_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.app.doctor._gpu_and_libraries", lambda: iter(()))
    assert "no answer from" in printed("doctor", "--judge", "ollama/qwen3:8b")
    assert "there is no key for https://api.openai.com/v1: set OPENAI_API_KEY" in printed(
        "doctor", "--judge", "openai/gpt-4o-mini"
    )


def pages(command: click.Command, words: tuple[str, ...] = ("iterft",)) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command's words and help."""
    yield words, command.get_help(click.Context(command, info_name=" ".join(words), max_content_width=200, terminal_width=200))
    for name, inner in getattr(command, "commands", {}).items():
        yield from pages(inner, (*words, name))


def test_no_summary_in_a_list_of_commands_is_cut_off_at_80_columns() -> None:
    pages_80 = {
        words: group.get_help(click.Context(group, info_name=" ".join(words), terminal_width=80))
        for words, group in groups(main)
    }
    assert [(words, line) for words, text in pages_80.items() for line in text.splitlines()[1:] if line.endswith("...")] == []


def groups(command: click.Command, words: tuple[str, ...] = ("iterft",)) -> Iterator[tuple[tuple[str, ...], click.Group]]:
    """Every group of commands, with its words."""
    if isinstance(command, click.Group):
        yield words, command
        for name, inner in command.commands.items():
            yield from groups(inner, (*words, name))


def test_every_help_page_has_an_example() -> None:
    lacking = [words for words, text in pages(main) if not any(line.startswith("    iterft ") for line in text.splitlines())]
    assert lacking == []
