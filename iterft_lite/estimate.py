"""What a plan will cost: tokens, disk, calls, dollars; time and VRAM from what this machine has shown."""

from __future__ import annotations

from collections.abc import Mapping

from iterft_lite.backends.prices import price_of, prices_date, tokens_of
from iterft_lite.plan import Plan
from iterft_lite.resolve import Resolved
from iterft_lite.steps import Step

EMPTY: Mapping[str, str] = {}

ODDS_REPLY, SAMPLE_REPLY = 4, 400
"""Tokens that a judge writes where its odds are read, and where its text is (a reasoning model's thoughts included)."""


def estimates(plan: Plan, resolved: Resolved) -> dict[str, str]:
    """Sentences by name."""
    answers = sum(len(step.params["prompts"]) * step.params["samples"] for step in plan if step.verb == "answer")
    written = sum(len(step.params["prompts"]) * step.params["samples"] for step in plan if step.verb == "generate")
    most = sum(
        len(step.params["prompts"]) * step.params["samples"] * step.params["sampling"]["max_tokens"]
        for step in plan
        if step.verb in ("answer", "generate")
    )
    return {
        "steps": str(len(plan.steps)),
        "writing": f"{written:,} rows and {answers:,} answers, at most {most:,} tokens",
        "judging": judging_sentence(plan, resolved.material.judge.name),
    }


def judging_sentence(plan: Plan, name: str) -> str:
    """How many verdicts by whom, and for how many dollars at most."""
    steps = [step for step in plan if step.verb == "judge"]
    calls = sum(_asked(plan, step) * len(step.params["rubrics"]) * step.params["judge"]["samples"] for step in steps)
    usd = judging_usd(plan)
    if usd is None:
        return f"{calls:,} verdicts by {name}, whose price is not known"
    return f"{calls:,} verdicts by {name}" + (f", at most ${usd:.2f} (prices of {prices_date()})" if usd else ", no dollars")


def judging_usd(plan: Plan) -> float | None:
    """Dollars for all verdicts if every answer is as long as it may be and none is cached; None if the price is not known."""
    total = 0.0
    for step in plan:
        if step.verb != "judge":
            continue
        judge = step.params["judge"]
        price = price_of(judge["name"])
        if price is None:
            return None
        source = plan.inputs(step)["answers"]
        longest = source.params["sampling"]["max_tokens"]
        questions = sum(tokens_of(text) for text in source.params["prompts"].values()) * source.params["samples"]
        reply = ODDS_REPLY if judge["method"] == "odds" else SAMPLE_REPLY
        for rubric in step.params["rubrics"].values():
            sent = questions + _asked(plan, step) * (tokens_of(rubric) + longest)
            total += judge["samples"] * price.usd(sent, reply * _asked(plan, step))
    return total


def _asked(plan: Plan, step: Step) -> int:
    """Answers that a judge step reads."""
    source = plan.inputs(step)["answers"]
    return len(source.params["prompts"]) * int(source.params["samples"])
