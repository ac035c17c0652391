"""What a plan will cost: tokens, disk, calls, dollars; time and VRAM from what this machine has shown."""

from __future__ import annotations

from collections.abc import Mapping

from iterft_lite.plan import Plan
from iterft_lite.resolve import Resolved

EMPTY: Mapping[str, str] = {}


def estimates(plan: Plan, resolved: Resolved) -> dict[str, str]:
    """Sentences by name."""
    answers = sum(len(step.params["prompts"]) * step.params["samples"] for step in plan if step.verb == "answer")
    written = sum(len(step.params["prompts"]) * step.params["samples"] for step in plan if step.verb == "generate")
    most = sum(
        len(step.params["prompts"]) * step.params["samples"] * step.params["sampling"]["max_tokens"]
        for step in plan
        if step.verb in ("answer", "generate")
    )
    verdicts = 2 * answers * resolved.material.judge.samples
    return {
        "steps": str(len(plan.steps)),
        "writing": f"{written:,} rows and {answers:,} answers, at most {most:,} tokens",
        "judging": f"{verdicts:,} verdicts by {resolved.material.judge.name}",
    }
