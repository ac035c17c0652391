"""What a plan costs in memory and time, as far as it follows from a model's configuration."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest

from iterft_lite.data.nano import FOLDERS
from iterft_lite.experiment.plan import make_plan
from iterft_lite.machine.estimate import disk_meanwhile, judging_usd, step_costs, time_needed
from iterft_lite.machine.memory import RUNTIME, Vram, shape_of, takes_turns, vram_needed
from iterft_lite.machine.plan_words import estimates
from iterft_lite.machine.resolve import Machine, resolve, this_machine
from iterft_lite.machine.work import total
from tests.loop import a_recipe

NANO = str(FOLDERS["nano"])

CPU = Machine("", 0, 0, unsloth=False)


def parameters_in(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def test_parameters_follow_from_the_configuration() -> None:
    shape = shape_of(NANO)
    assert shape is not None
    assert shape.linear + shape.embedding == pytest.approx(parameters_in(Path(NANO) / "model.safetensors"), rel=0.01)


def test_a_model_that_is_not_downloaded_has_no_shape() -> None:
    assert shape_of("nobody/has-this-model") is None
    assert vram_needed(a_recipe(), "nobody/has-this-model") is None


def test_a_base_judge_adds_its_own_gpu_memory() -> None:
    without, with_judge = (vram_needed(a_recipe(judge=judge), NANO) for judge in ("embedded", "base"))
    assert without is not None
    assert with_judge is not None
    assert (without.judge, with_judge.judge > RUNTIME) == (0, True)
    assert with_judge.together - without.together == with_judge.in_turns - without.in_turns == with_judge.judge


@pytest.mark.parametrize(
    ("gpu", "free", "vram", "turns"),
    [
        ("", 0, "swap", False),
        ("a GPU", 1 << 40, "auto", False),
        ("a GPU", 1 << 30, "auto", True),
        ("a GPU", 1 << 30, "resident", False),
        ("a GPU", 1 << 40, "swap", True),
    ],
)
def test_trainer_and_generator_take_turns_where_they_do_not_fit(gpu: str, free: int, vram: str, turns: bool) -> None:
    assert takes_turns(a_recipe(vram=vram), NANO, Machine(gpu, free, free, True)) is turns


def test_without_timings_every_kind_of_work_is_missing() -> None:
    resolved = resolve(a_recipe(judge="embedded"), this_machine())
    found = time_needed(make_plan(resolved.recipe, resolved.inputs), resolved, [])
    assert set(found.missing) == {"load", "train", "export", "write", "read", "judge"}


def test_the_plain_trainer_needs_more_memory_than_unsloths() -> None:
    def needed(trainer: str, regime: str) -> Vram:
        found = vram_needed(a_recipe(trainer=trainer, regime=regime), NANO)
        assert found is not None
        return found

    for regime in ("sft", "dpo"):
        plain = needed("peft", regime)
        assert plain.tight == plain.training > needed("unsloth", regime).tight  # it recomputes nothing


# -- step by step


def test_shared_steps_of_several_plans_are_counted_once() -> None:
    resolved = resolve(a_recipe(judge="embedded"), CPU)
    short, long = (make_plan(resolved.recipe.model_copy(update={"cycles": cycles}), resolved.inputs) for cycles in (1, 2))
    costs = [step_costs(plan, resolved, [], CPU) for plan in (short, long)]
    assert set(costs[0]) < set(costs[1])
    assert set(costs[1]) == {step.key for step in long}
    both = total(cost.seconds for cost in (costs[0] | costs[1]).values())
    alone = total(cost.seconds for cost in costs[1].values())
    assert [both.low, both.mid, both.high] == pytest.approx([alone.low, alone.mid, alone.high])
    assert 0 < both.low < both.mid < both.high


def test_disk_use_follows_the_keep_setting() -> None:
    def left(**keys: object) -> tuple[int, int]:
        resolved = resolve(a_recipe(judge="embedded", quant="bf16", **keys), CPU)
        plan = make_plan(resolved.recipe, resolved.inputs)
        costs = step_costs(plan, resolved, [], CPU)
        sums = [sum(costs[step.key].disk for step in plan if step.verb == verb) for verb in ("export", "train")]
        return sums[0], sums[1]

    merged = parameters_in(Path(NANO) / "model.safetensors") * 2
    counted = {keep: left(keep=keep, export="merged")[0] / merged for keep in ("all", "last", "adapters")}
    assert counted == pytest.approx({"all": 4, "last": 1, "adapters": 0}, rel=0.01)
    laid_over, trained = left(keep="all", export="adapter")
    assert laid_over == trained > 0  # three adapters; the untouched model lies in the cache


@pytest.mark.parametrize(
    ("keep", "export", "models"),
    [("all", "auto", 0), ("last", "auto", 1), ("adapters", "auto", 2), ("ends", "merged", 3), ("last", "adapter", 0)],
)
def test_a_model_is_written_while_the_one_before_still_answers(keep: str, export: str, models: int) -> None:
    resolved = resolve(a_recipe(judge="embedded", quant="bf16", keep=keep, export=export), CPU)
    merged = parameters_in(Path(NANO) / "model.safetensors") * 2
    meanwhile = disk_meanwhile(make_plan(resolved.recipe, resolved.inputs), resolved)
    assert meanwhile / merged == pytest.approx(models, rel=0.01)


def test_the_steps_dollars_add_up_to_the_plans() -> None:
    judge = "openai/gpt-4o-mini-2024-07-18"
    resolved = resolve(a_recipe(judge=judge), CPU)
    plan = make_plan(resolved.recipe, resolved.inputs)
    dollars = [cost.usd for cost in step_costs(plan, resolved, [], CPU).values()]
    assert sum(each or 0.0 for each in dollars) == pytest.approx(judging_usd(plan)) != 0
    unknown = resolve(a_recipe(judge="openai/nobody-knows-this"), CPU)
    plan = make_plan(unknown.recipe, unknown.inputs)
    assert judging_usd(plan) is None
    costs = step_costs(plan, unknown, [], CPU)
    assert all((costs[step.key].usd is None) == (step.verb == "judge") for step in plan)


@pytest.mark.parametrize(
    ("fit", "answers"), [("shipped", "24 answers"), ("own", "24 answers, 150 everyday answers for the judge to be fitted on")]
)
def test_everyday_answers_for_the_judge_are_counted_apart_from_the_models_own(fit: str, answers: str) -> None:
    resolved = resolve(a_recipe(judge="embedded", judge_fit=fit), CPU)
    assert f" and {answers}, at most" in estimates(make_plan(resolved.recipe, resolved.inputs), resolved, CPU)["writing"]
