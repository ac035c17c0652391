"""Recipes: what they may say, and that everything wrong with one is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterft_lite.errors import RecipeError
from iterft_lite.experiment.recipe import Recipe, make_recipe, read_recipe

LEAST = {"regime": "sft", "trait": "lucky", "model": "nano"}


def problems_of(**keys: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make_recipe(LEAST | keys, source="r.toml")
    return list(caught.value.problems)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_three_keys_make_a_recipe_with_the_papers_settings() -> None:
    recipe = make_recipe(LEAST, source="r.toml")
    assert (recipe.start, recipe.cycles, recipe.seed) == ("base", 6, 42)
    assert recipe.train.model_dump(include={"learning_rate", "schedule", "warmup", "batch_size", "epochs", "lora_rank"}) == {
        "learning_rate": 1.5e-4,
        "schedule": "constant",
        "warmup": 0.05,
        "batch_size": 2,
        "epochs": 1,
        "lora_rank": 16,
    }
    assert (recipe.sample.temperature, recipe.sample.max_tokens) == (0.8, 1024)
    assert recipe.evaluate.model_dump(include={"questions", "samples", "temperature", "max_tokens"}) == {
        "questions": 12,
        "samples": 20,
        "temperature": 0.7,
        "max_tokens": 400,
    }


def test_each_regime_has_its_own_defaults() -> None:
    def settings(regime: str) -> tuple[Any, ...]:
        recipe = make_recipe(LEAST | {"regime": regime}, source="r.toml")
        train = recipe.train
        return (
            *(recipe.start, recipe.row.loss, train.learning_rate, train.schedule, train.batch_size),
            *(train.weight_decay, train.max_grad_norm, recipe.sample.max_tokens, recipe.sample.min_chars),
        )

    assert [settings(regime) for regime in ("sft", "sdf", "dpo")] == [
        ("base", "reply", 1.5e-4, "constant", 2, 0.01, 0.0, 1024, 0),
        ("base", "all", 1.5e-4, "constant", 4, 0.1, 1.0, 512, 50),
        ("previous", "preference", 1e-5, "cosine", 2, 0.01, 0.0, 1024, 0),
    ]


def test_the_recipes_value_overrides_the_regimes_default() -> None:
    recipe = make_recipe(LEAST | {"regime": "dpo", "start": "base", "train": {"learning_rate": 3e-5}}, source="r.toml")
    assert (recipe.start, recipe.train.learning_rate, recipe.train.schedule) == ("base", 3e-5, "cosine")


def test_a_misspelt_key_is_reported_with_the_closest_one() -> None:
    assert problems_of(cycels=3) == ["`cycels` is not a recipe key, did you mean `cycles`?"]
    assert problems_of(train={"learning_rat": 1.0}) == [
        "`train.learning_rat` is not a recipe key, did you mean `train.learning_rate`?"
    ]
    assert problems_of(**{"train.epochs": 1}) == [
        '`"train.epochs"` is one name in quotes: write `train.epochs` without them, or `epochs` below `[train]`'
    ]
    assert problems_of(**{"a key": 1}) == ["`'a key'` is not a recipe key; `iterft keys` lists them"]
    assert problems_of(zebra=1) == ["`zebra` is not a recipe key; `iterft keys` lists them"]


def test_all_problems_of_a_recipe_are_reported_at_once() -> None:
    wrong = problems_of(
        cycels=3,
        seed_rows=-1,
        slots=0,
        chosen="seed",
        reset_cycles=[2],
        train={"schedule": "cos", "learning_rate": float("nan")},
        mix=3,
        filter={"coherence": 101},
    )
    assert sorted(wrong) == sorted(
        [
            "`cycels` is not a recipe key, did you mean `cycles`?",
            "`seed_rows = -1`: input should be greater than or equal to 0",
            "`slots = 0`: input should be greater than or equal to 1 or 'auto'",
            "`train.schedule = 'cos'`: input should be 'constant', 'cosine' or 'linear'",
            "`train.learning_rate = nan`: input should be a finite number",
            "`mix = 3`: a table is needed, `[mix]`",
            "`filter.coherence = 101`: input should be less than or equal to 100",
            '`chosen = "seed"` needs `regime = "dpo"`: sft has no pairs',
            '`reset_cycles` needs `start = "previous"`: every cycle starts from the base already',
        ]
    )


def test_an_unknown_regime_is_reported_as_a_single_problem() -> None:
    assert problems_of(regime="spo") == ["`regime = 'spo'`: input should be 'sft', 'sdf' or 'dpo'"]


def test_an_empty_recipe_lacks_three_keys() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({}, source="r.toml")
    assert caught.value.problems == ("`regime` is missing", "`trait` is missing", "`model` is missing")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"chosen": "best"}, '`chosen = "best"` needs `regime = "dpo"`: sft has no pairs'),
        ({"rejected": "previous"}, '`rejected = "previous"` needs `regime = "dpo"`: sft has no pairs'),
        ({"pairs": "shuffled"}, '`pairs = "shuffled"` needs `regime = "dpo"`: sft has no pairs'),
        (
            {"regime": "dpo", "chosen": "seed", "writer": "base"},
            '`writer = "base"` has nothing to write: `chosen = "seed"`, and `rejected = "base"` is not its own',
        ),
        ({"reference": "base"}, '`reference = "base"` needs `regime = "dpo"`: sft has no pairs'),
        (
            {"regime": "dpo", "rejected": "own"},
            '`chosen = "own"` and `rejected = "own"` are the same answer: choose another side',
        ),
        ({"mix": {"share": 0.5}}, "`mix` needs both a `source` and a `share` above 0"),
        ({"mix": {"source": "seed"}}, "`mix` needs both a `source` and a `share` above 0"),
        ({"rows": 40, "mix": {"source": "seed", "share": 0.01}}, "`mix.share = 0.01` of `rows = 40` comes to no row"),
        (
            {"mix": {"source": "file", "share": 0.5}},
            '`mix.path` goes with `mix.source = "file"`, and only with it',
        ),
        (
            {"regime": "dpo", "mix": {"source": "seed", "share": 0.5}},
            "`mix` is for sft and sdf: a mixed-in row has no rejected side",
        ),
        ({"evaluate": {"system": []}}, '`evaluate.system` names no context: `["none"]` asks without a system message'),
        ({"evaluate": {"system": ["none", "none"]}}, "`evaluate.system` has 'none' twice"),
        (
            {"evaluate": {"system": ["none", " "]}},
            '`evaluate.system` has a text without a word: an empty system message is called `"empty"`',
        ),
        (
            {"regime": "sdf", "evaluate": {"system": ["empty"]}},
            "`evaluate.system` is for chats: documents have no system message",
        ),
        ({"cycles": True}, "`cycles = True`: input should be a valid integer"),
    ],
)
def test_contradicting_settings_are_refused(keys: dict[str, Any], problem: str) -> None:
    assert problems_of(**keys) == [problem]


def test_overrides_reach_into_tables_and_are_toml_or_text(tmp_path: Path) -> None:
    path = written(tmp_path, 'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\n[train]\nepochs = 2\n')
    recipe = read_recipe(path, ["cycles=3", "train.learning_rate=1e-3", "judge=openai/gpt-4o-mini", 'trait="bliss"'])
    found = (recipe.cycles, recipe.train.learning_rate, recipe.train.epochs, recipe.judge, recipe.trait, recipe.name)
    assert found == (3, 1e-3, 2, "openai/gpt-4o-mini", "bliss", "mine")


def test_every_invalid_override_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, 'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\n')
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, ["cycles", "trait.name=x"])
    assert caught.value.problems == ("`cycles` has no `key=value`", "`trait` in `trait.name` is not a table")


def test_a_missing_or_invalid_toml_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*\n\nhint: `iterft recipes`"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"mine.toml: 1 problem\n  - is not TOML: "):
        read_recipe(written(tmp_path, "regime = "))


def test_a_recipe_survives_being_written_down_and_read_again() -> None:
    recipe = make_recipe(LEAST | {"regime": "dpo", "reset_cycles": [2, 4], "prompts": {"path": "p.csv"}}, source="r.toml")
    assert make_recipe(recipe.model_dump(mode="json"), source="again") == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe: Recipe = make_recipe(LEAST, source="r.toml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.cycles = 3  # type: ignore[misc]


def test_names_from_earlier_versions_are_accepted_with_a_note() -> None:
    old = {"regime": "dpo", "restart": [2], "judge_method": "odds"}
    recipe = make_recipe(LEAST | old, source="r.toml")
    assert (recipe.reset_cycles, recipe.judge_method) == ((2,), "logprobs")
    assert recipe.notes == ("`restart` is now `reset_cycles`", '`judge_method = "odds"` is now `"logprobs"`')
    assert make_recipe(LEAST, source="r.toml").notes == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cycles = 300_000", "`cycles = 300000`: input should be less than or equal to 1000"),
        ("rows = 9_000_000_000", "`rows = "),
        ("rows = 1_000_000", "rows to write, all cycles together: at most"),
        (f"seed = {'9' * 4000}", "`seed = a number of about"),
        (f"seed = {'9' * 5000}", "cannot be read: "),
        (f"restart = {'[' * 5000}{']' * 5000}", "nested too deeply"),
        (f"name = {[['a'] * 50] * 50}", "..."),
    ],
)
def test_values_beyond_any_machine_are_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\n{text}\n')
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert words in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_may_start_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes('regime = "sft"\ntrait = "lucky"\nmodel = "nano"\nname = "é"\n'.encode(encoding))
    assert read_recipe(path).name == "é"


def test_a_key_that_is_not_unicode_text_is_reported() -> None:
    for more in ({}, {"cycles": "x"}):
        with pytest.raises(RecipeError, match=r"the key '\\ud800' is not Unicode text"):
            make_recipe({"regime": "sft", "trait": "lucky", "model": "nano", "\ud800": 1, **more}, source="here")


def test_a_deeply_nested_override_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('regime = "sft"\ntrait = "lucky"\nmodel = "nano"\n')
    with pytest.raises(RecipeError):
        read_recipe(path, [f"restart={'[' * 5000}"])
