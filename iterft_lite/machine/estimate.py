"""What a plan will cost, step by step: seconds, disk, dollars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iterft_lite.backends.judge.kinds import judge_price
from iterft_lite.backends.judge.prices import tokens_of
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.machine.forecast import Forecast, forecast
from iterft_lite.machine.memory import shape_of, takes_turns
from iterft_lite.machine.resolve import Machine, Resolved, this_machine
from iterft_lite.machine.timing import Sample, setup_of
from iterft_lite.machine.work import NOTHING, Span, rows_asked

LOGPROB_REPLY, SAMPLE_REPLY = 4, 400
"""Tokens that a judge writes where its probabilities are read, and where its text is (a reasoning model's thoughts
included)."""

ADAPTER_BYTES = 4
"""Bytes of a number in a trained adapter's file."""


@dataclass(frozen=True)
class StepCost:
    """What one step costs.

    Attributes:
        seconds: On this machine; zeros for a step that takes next to no time, or where nothing is known.
        disk: Bytes of the step's folder once the run is over, as the recipe's `keep` leaves it: exported models and adapters; 0
            where the model's size is not known.
        usd: Dollars at most; None where the judge's price is not known.
    """

    seconds: Span
    disk: int
    usd: float | None


def step_costs(
    plan: Plan, resolved: Resolved, samples: Sequence[Sample], machine: Machine | None = None
) -> dict[str, StepCost]:
    """What each step of a plan costs, by its key: plans that share steps are added up over distinct keys.

    Args:
        samples: What was timed (`timing.read_table`).
        machine: Where it would run; this one if None.
    """
    seconds, disk = time_needed(plan, resolved, samples, machine).steps, disk_left(plan, resolved)
    return {step.key: StepCost(seconds.get(step.name, NOTHING), disk.get(step.name, 0), _usd(plan, step)) for step in plan}


def time_needed(plan: Plan, resolved: Resolved, samples: Sequence[Sample], machine: Machine | None = None) -> Forecast:
    """How long a plan will take; arguments as for `step_costs`."""
    machine, shape = machine or this_machine(), shape_of(resolved.model)
    swap = takes_turns(resolved.recipe, resolved.model, machine)
    return forecast(plan, setup_of(resolved, machine, swap=swap, parameters=shape.parameters if shape else 0), samples)


# -- disk


def disk_left(plan: Plan, resolved: Resolved) -> dict[str, int]:
    """Bytes that steps leave, by name. An untouched model that adapters are laid over lies in the cache, once for all runs."""
    recipe, shape = plan.recipe, shape_of(resolved.model)
    if shape is None:
        return {}
    adapter = shape.layers * recipe.train.lora_rank * sum(map(sum, shape.matrices)) * ADAPTER_BYTES
    merged = shape.stored(recipe.quant)
    trained, exports = ([step for step in plan if step.verb == verb] for verb in ("train", "export"))
    first = 1 if recipe.keep == "ends" else len(trained)
    left = {step.name: adapter for step in (*trained[:first], *trained[-1:])}
    for step in exports:
        is_trained, is_last = "adapter" in dict(step.inputs), step is exports[-1]
        is_merged = recipe.export == "merged" or (recipe.export == "auto" and is_trained)
        if is_merged and (recipe.keep == "all" or (recipe.keep == "last" and is_last)):
            left[step.name] = merged
        elif is_trained and recipe.export != "merged" and (recipe.keep != "ends" or is_last):
            left[step.name] = adapter
    return left


def disk_meanwhile(plan: Plan, resolved: Resolved) -> int:
    """Bytes of merged files, at most, that are there while a run goes on, beside those of `disk_left`.

    A model is merged while the one before still answers; a merged untouched model may then be there too.
    """
    recipe, shape = plan.recipe, shape_of(resolved.model)
    if shape is None or recipe.keep == "all":
        return 0
    at_once = {"adapter": 0, "auto": 2, "merged": 3}[recipe.export]
    return max(0, at_once - (recipe.keep == "last")) * shape.stored(recipe.quant)


# -- dollars


def judging_usd(plan: Plan) -> float | None:
    """Dollars for all verdicts if every answer is as long as it may be and none is cached; None if a price is not known."""
    dollars = [_usd(plan, step) for step in plan]
    return None if None in dollars else sum(filter(None, dollars))


def _usd(plan: Plan, step: Step) -> float | None:
    """Dollars of a step at most; None if the judge's price is not known."""
    if step.verb != "judge":
        return 0.0
    judge = step.params["judge"]
    price = judge_price(judge["name"], batch=plan.recipe.judge_batch)
    if price is None:
        return None
    source = plan.inputs(step)["answers"]
    answers, longest = rows_asked(source), source.params["sampling"]["max_tokens"]
    questions = sum(map(tokens_of, source.params["prompts"].values())) * int(source.params["samples"])
    reply = LOGPROB_REPLY if judge["method"] == "logprobs" else SAMPLE_REPLY
    asked = [questions + answers * (tokens_of(rubric) + longest) for rubric in step.params["rubrics"].values()]
    return float(sum(judge["samples"] * price.usd(sent, reply * answers) for sent in asked))
