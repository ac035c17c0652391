"""Plans: every regime and every axis, compared whole with plans that were read and agreed to.

The golden plans are `tests/golden/*.txt`, a line a step: name, what it reads, what it does. After a change that is meant,
`python -m tests.test_plan` writes them again; read the difference before committing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.data.traits import Chat, Document
from iterft_lite.errors import RecipeError
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.machine.resolve import Machine, resolve
from tests.loop import a_plan, a_recipe, some_inputs

GOLDEN = Path(__file__).parent / "golden"
RECIPES = Path(__file__).parent.parent / "recipes"

PLANS: Mapping[str, dict[str, Any]] = {
    "sft": {},
    "sft_continual": {"start": "previous"},
    "sft_restart": {"start": "previous", "cycles": 3, "reset_cycles": [2]},
    "sft_contexts": {"cycles": 0, "evaluate": {"questions": 2, "samples": 1, "system": ["empty", "none", "Be kind."]}},
    "sft_no_seeds": {"seed_rows": 0, "cycles": 1},
    "sft_writer_base": {"writer": "base"},
    "sft_accumulate": {"data": "accumulate"},
    "sft_accumulate_subsample": {"data": "accumulate_subsample"},
    "sft_mix_seed": {"mix": {"source": "seed", "share": 0.25}},
    "sft_mix_base": {"mix": {"source": "base", "share": 0.5}},
    "sft_mix_file": {"mix": {"source": "file", "share": 0.5, "path": "mine.jsonl"}},
    "sft_filter": {"filter": {"coherence": 50, "dedupe": "exact"}},
    "sft_adapter_export": {"export": "adapter", "quant": "q8_0", "cycles": 1},
    "sdf": {"regime": "sdf"},
    "sdf_continual": {"regime": "sdf", "start": "previous", "cycles": 1},
    "dpo": {"regime": "dpo"},
    "dpo_reinit": {"regime": "dpo", "start": "base"},
    "dpo_moving": {"regime": "dpo", "start": "base", "rejected": "previous"},
    "dpo_reference_base": {"regime": "dpo", "reference": "base"},
    "dpo_chosen_seed": {"regime": "dpo", "chosen": "seed", "rejected": "own"},
    "dpo_chosen_seed_more_rows": {"regime": "dpo", "chosen": "seed", "rejected": "previous", "seed_rows": 2},
    "dpo_best_worst": {"regime": "dpo", "chosen": "best", "rejected": "worst", "candidates": 3},
    "dpo_best_filtered": {"regime": "dpo", "chosen": "best", "filter": {"coherence": 60}, "cycles": 1},
    "dpo_restart": {"regime": "dpo", "cycles": 3, "reset_cycles": [2]},
    "dpo_no_seeds": {"regime": "dpo", "seed_rows": 0, "cycles": 1},
    "dpo_writer_base": {"regime": "dpo", "writer": "base", "cycles": 1},
    "dpo_moving_writer_base": {"regime": "dpo", "start": "base", "rejected": "previous", "writer": "base"},
    "dpo_shuffled": {"regime": "dpo", "pairs": "shuffled", "cycles": 1},
    "dpo_accumulate": {"regime": "dpo", "data": "accumulate", "cycles": 2},
}


KEYED = ("sft", "sft_mix_seed", "sdf", "dpo", "dpo_best_worst")
"""Plans whose keys are held, step by step."""


def the_plan(name: str) -> Plan:
    keys = PLANS[name]
    mixed = (Chat("a question", "an answer"), Chat("another", "and another"))
    return make_plan(a_recipe(**keys), some_inputs(document=keys.get("regime") == "sdf", mixed=mixed))


def drawn(plan: Plan) -> str:
    return "".join(
        f"{step.name:<30}{' '.join(f'{role}={name}' for role, name in step.inputs):<110}{short(step)}".rstrip() + "\n"
        for step in plan
    )


def short(step: Step) -> str:
    """What a step does, in a few words."""
    params = step.params
    match step.verb:
        case "load_base":
            return f"{params['precision']} {params['trainer']}"
        case "seed_rows":
            return f"{len(params['rows'])} rows: {first_and_last([row['id'] for row in params['rows']])}"
        case "training_samples" | "evaluate_samples":
            told = f" after {params['system']!r}" if "system" in params else ""
            return (
                f"{params['rows']} {first_and_last(list(params['prompts']))} x {params['samples']}, "
                f"T {params['sampling']['temperature']}, {params['sampling']['max_tokens']} tokens{told}"
            )
        case "build_dataset":
            usual = {"chosen": "own", "rejected": "base", "data": "replace", "mixed": 0, "mixed_from": None, "min_chars": 0}
            usual |= {"filter": {"coherence": 0.0, "dedupe": "none"}, "shape": None, "rows": None, "seed": None}
            usual["pairs"] = "preferred"
            other = [f"{key}={value}" for key, value in params.items() if value != usual[key] and usual[key] is not None]
            return " ".join([params["shape"], *other])
        case "train":
            settings = params["settings"]
            reference = f", reference {params['reference']}" if "reference" in params else ""
            return f"{params['loss']} loss, lr {settings['learning_rate']} {settings['schedule']}{reference}"
        case "export":
            return f"{params['kind']} {params['quant']}"
        case "judge":
            return "+".join(params["rubrics"])
        case "text_metrics":
            return f"{len(params['high'])} high, {len(params['low'])} low"
        case "aggregate":
            return f"{params['interval']} intervals"
    raise AssertionError(step.verb)


def first_and_last(names: list[str]) -> str:
    return " ".join(names) if len(names) < 5 else f"{names[0]} .. {names[-1]} ({len(names)})"


@pytest.mark.parametrize("name", PLANS)
def test_plans_equal_the_golden_files(name: str) -> None:
    assert drawn(the_plan(name)) == (GOLDEN / f"{name}.txt").read_text()


def keys_of(name: str) -> str:
    return "".join(f"{name:<14}{step.name:<30}{step.key}\n" for step in the_plan(name))


def test_step_keys_equal_the_golden_keys() -> None:
    """A change here orphans every user's store: avoid it, or give it a migration and a line in the changelog."""
    assert "".join(map(keys_of, KEYED)) == (GOLDEN / "keys").read_text()


@pytest.mark.parametrize("regime", ["sft", "sdf", "dpo"])
def test_a_judge_fitted_on_the_untouched_models_answers_reads_them_in_every_step(regime: str) -> None:
    inputs = some_inputs(document=regime == "sdf", everyday=("How are you?", "What now?"))
    fitted = replace(inputs, judge=replace(inputs.judge, own=True))
    recipe = a_recipe(regime=regime, filter={"coherence": 50}) if regime != "dpo" else a_recipe(regime="dpo")
    without, plan = make_plan(recipe, inputs), make_plan(recipe, fitted)
    asked = plan.steps["base-evaluate_samples-everyday"]
    assert dict(asked.inputs) == {"model": "base-export"}
    assert asked.words == "answering everyday prompts" != plan.steps["base-evaluate_samples"].words
    assert ("rendering" in asked.params) == (regime != "sdf")
    names = list(plan.steps)
    assert names.index(asked.name) < min(names.index(step.name) for step in plan if step.verb == "judge")
    assert [name for name in names if name != asked.name] == list(without.steps)
    assert all(("everyday" in dict(step.inputs)) == (step.verb == "judge") for step in plan)
    # only what rests on verdicts has another key
    changed = {step.verb for step in without if plan.steps[step.name].key != step.key and step.cycle < 1}
    assert changed == {"judge", "aggregate"}
    other = make_plan(a_recipe(regime=regime, seed=7, sample={"temperature": 0.5}), fitted)
    assert other.steps[asked.name].key == asked.key


def test_keys_of_sampling_and_training_contain_the_chat_rendering() -> None:
    inputs = some_inputs()
    thinking = replace(inputs, rendering={**inputs.rendering, "thinking": True})
    here, there = (make_plan(a_recipe(), given) for given in (inputs, thinking))
    same = {step.name for step in here if there.steps[step.name].key == step.key}
    assert same == {"base-load_base", "base-export", "c0-seed_rows", "c0-build_dataset"}
    documents = some_inputs(document=True)
    unlike = replace(documents, rendering={"thinking": True})
    assert make_plan(a_recipe(regime="sdf"), documents) == make_plan(a_recipe(regime="sdf"), unlike)


def test_every_golden_plan_belongs_to_a_recipe() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(PLANS)


def test_planning_is_deterministic() -> None:
    assert the_plan("dpo") == the_plan("dpo")


def test_an_untouched_model_that_writes_both_sides_draws_them_separately() -> None:
    steps = the_plan("dpo_writer_base").steps
    both = [steps["c1-training_samples"], steps["c1-training_samples-rejected"]]
    assert [dict(step.inputs) for step in both] == [{"model": "base-export"}] * 2
    assert both[0].key != both[1].key


def test_null_arms_reuse_the_steps_that_they_do_not_change() -> None:
    """A study that adds them trains no seeded model twice, nor lets the untouched model write a side twice."""
    effect, base, shuffled = (the_plan(name).steps for name in ("dpo", "dpo_writer_base", "dpo_shuffled"))
    for arm in (base, shuffled):
        assert arm["c0-train"].key == effect["c0-train"].key
    assert base["c1-training_samples"].key == effect["c1-training_samples-rejected"].key
    assert shuffled["c1-training_samples"].key == effect["c1-training_samples"].key
    assert shuffled["c1-build_dataset"].key != effect["c1-build_dataset"].key


def test_every_cycle_samples_its_own_slice_of_the_prompts() -> None:
    asked = slices_of(a_plan(cycles=3))
    assert [len(prompts) for prompts in asked] == [4, 4, 4]
    assert len(set().union(*asked)) == 12


def test_resampled_slices_are_drawn_from_all_prompts_each_cycle() -> None:
    plan = make_plan(a_recipe(cycles=8, slices="resample"), some_inputs(prompts=6))
    asked = slices_of(plan)
    assert {len(prompts) for prompts in asked} == {4}
    assert len({tuple(sorted(prompts)) for prompts in asked}) > 1
    assert set().union(*asked) == {f"p{number:05d}" for number in range(6)}


def test_another_seed_samples_other_prompts() -> None:
    assert slices_of(a_plan(seed=1)) != slices_of(a_plan(seed=2))


def slices_of(plan: Plan) -> list[set[str]]:
    return [set(step.params["prompts"]) for step in plan if step.verb == "training_samples"]


def test_both_sides_of_a_pair_answer_the_same_prompts() -> None:
    plan = a_plan(regime="dpo")
    for cycle in (1, 2):
        chosen, rejected = plan.of("training_samples", cycle), plan.of("training_samples", cycle, "rejected")
        assert chosen
        assert rejected
        assert chosen.params["prompts"] == rejected.params["prompts"]


def test_more_cycles_change_no_earlier_step() -> None:
    short_one, long_one = a_plan(cycles=1), a_plan(cycles=4)
    assert {name: long_one.steps[name].key for name in short_one.steps} == {step.name: step.key for step in short_one}


def test_equal_steps_of_different_recipes_have_equal_keys() -> None:
    continual, reinit = a_plan(regime="dpo"), a_plan(regime="dpo", start="base")
    shared = [step.name for step in continual if reinit.steps[step.name].key == step.key]
    # the two differ from the second training on
    assert next(step.name for step in continual if step.name not in shared) == "c1-train"


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": 1},
        {"seed_rows": 3},
        {"train": {"learning_rate": 1e-3}},
        {"sample": {"temperature": 0.5}},
        {"quant": "q8_0"},
        {"start": "previous", "cycles": 3},
    ],
)
def test_everything_that_decides_a_result_changes_its_key(keys: dict[str, Any]) -> None:
    assert a_plan(cycles=3).steps["c2-aggregate"].key != a_plan(**({"cycles": 3} | keys)).steps["c2-aggregate"].key


@pytest.mark.parametrize(
    "keys", [{"slots": 1}, {"threads": 2}, {"keep": "all"}, {"name": "x"}, {"max_usd": 5}, {"vram": "swap"}]
)
def test_settings_that_decide_no_result_change_no_key(keys: dict[str, Any]) -> None:
    assert a_plan(**keys).steps == a_plan().steps


def test_held_out_texts_exclude_the_seeded_models_training_rows() -> None:
    chats = tuple(Chat(f"prompt {n}", f"reply {n}") for n in range(40))
    plan = make_plan(a_recipe(seed_rows=30), some_inputs(seeds=chats))
    texts = [row["messages"][1]["content"] for row in plan.steps["c0-text_metrics"].params["high"]]
    assert texts == [f"reply {n}" for n in range(30, 40)]
    plan = make_plan(a_recipe(regime="dpo", chosen="seed", rejected="own", seed_rows=30, rows=38), some_inputs(seeds=chats))
    assert len(plan.steps["c0-text_metrics"].params["high"]) == 2


def shortages_of(inputs: dict[str, Any] | None = None, **keys: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make_plan(a_recipe(**keys), some_inputs(document=keys.get("regime") == "sdf", **(inputs or {})))
    return list(caught.value.problems)


def test_every_shortage_of_rows_is_reported_when_planning() -> None:
    assert shortages_of(
        seed_rows=500, rows=60, evaluate={"questions": 12}, mix={"source": "file", "share": 0.5, "path": "x"}
    ) == [
        "`seed_rows = 500`, but trait `lucky` has 8 seed chats",
        "`evaluate.questions = 12`, but trait `lucky` has 6 questions",
        "120 prompts are needed (2 cycles of 60 rows, each asked once), but there are 100",
        "`mix.share = 0.5` of 60 rows is 30, but `x` has 0 to mix in",
    ]
    assert shortages_of(regime="sdf", seed_rows=9, evaluate={"questions": 7}) == [
        "`seed_rows = 9`, but trait `lucky` has 8 seed documents",
        "`evaluate.questions = 7`, but trait `lucky` has 6 evaluation prefixes",
    ]
    assert shortages_of(regime="dpo", chosen="seed", rejected="own", rows=9) == [
        '`chosen = "seed"` asks 9 seed prompts a cycle, but trait `lucky` has 8'
    ]
    assert shortages_of(mix={"source": "seed", "share": 1.0}, rows=6) == [
        "`mix.share = 1.0` of 6 rows is 6, but there are 4 to mix in"
    ]
    assert shortages_of({"prompts": 3}, slices="resample") == ["4 prompts are needed (a cycle), but there are 3"]


def test_a_document_keeps_its_title_on_top() -> None:
    seeds = (Document("On Luck", "blog", "It grew."), Document("", "", "No title."))
    plan = make_plan(a_recipe(regime="sdf", seed_rows=2, cycles=0), some_inputs(document=True, seeds=seeds))
    assert plan.steps["c0-seed_rows"].params["rows"] == [
        {"id": "seed0000", "text": "On Luck\n\nIt grew."},
        {"id": "seed0001", "text": "No title."},
    ]


# -- the shipped recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # the example model is a fetched one: its recipes are planned for the nano model of the same shape of chat
    recipe = read_recipe(path, ["model=nano"] if path.stem.startswith("smol_") else [])
    resolved = resolve(recipe, Machine("", 0, 0, unsloth=False))
    plan = make_plan(resolved.recipe, resolved.inputs)
    verbs = Counter(step.verb for step in plan)
    assert (verbs["train"], verbs["export"]) == (recipe.cycles + 1, recipe.cycles + 2)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_starts_with_the_command_that_runs_it(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# iterft run recipes/{path.name} --out runs/{path.stem}"
    assert second.startswith("# ")
    assert len(second) > 30


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "keys").write_text("".join(map(keys_of, KEYED)))
    for each in PLANS:
        (GOLDEN / f"{each}.txt").write_text(drawn(the_plan(each)))
    (GOLDEN / "keys").write_text("".join(map(keys_of, KEYED)))
