"""Which judge a recipe means, and where it runs. Imports none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from iterft_lite.backends import JudgeIdentity
from iterft_lite.recipe import Recipe
from iterft_lite.traits import Trait

PAPER_JUDGE = "openai/gpt-4o-mini-2024-07-18"
"""The paper's judge, pinned."""

KEY_VARIABLES: Mapping[str, str] = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
}
"""Where the providers' keys are looked for; never read further than for being there."""

EMBEDDED_NOTE = "embedded judge: for trying out, not for findings"


def judge_identity(recipe: Recipe, trait: Trait) -> tuple[JudgeIdentity, str]:
    """Who judges, and why where the recipe leaves it open."""
    name, why = recipe.judge, ""
    if name == "auto":
        key = bool(os.environ.get(KEY_VARIABLES["openai"]))
        name = PAPER_JUDGE if key else "embedded"
        why = f"judge: {name} ({'a key is present' if key else 'no OPENAI_API_KEY'})"
    if name == "embedded":
        return JudgeIdentity("embedded", "embedded", trait.evidence[:16], "odds", 1, EMBEDDED_NOTE), why
    method = "samples" if name.split("/", 1)[0] == "anthropic" else "odds"
    samples = recipe.judge_samples if method == "samples" else 1
    return JudgeIdentity(name, "llm", "", "samples" if method == "samples" else "odds", samples), why


def judge_worker(identity: JudgeIdentity, recipe: Recipe, trait: Trait) -> tuple[str, dict[str, Any]]:
    """The worker class of a judge, and its options."""
    if identity.kind == "embedded":
        return "iterft_lite.backends.judge_embedded:EmbeddedJudge", {"trait": str(trait.folder)}
    options = {"name": identity.name, "samples": identity.samples, "api_base": recipe.api_base, "max_usd": recipe.max_usd}
    return "iterft_lite.backends.judge_litellm:LitellmJudge", options
