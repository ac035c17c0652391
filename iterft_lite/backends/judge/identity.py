"""Which judge a recipe means, and where it runs. Imports none of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from iterft_lite.backends.judge.batch_notes import FOLDER as BATCHES
from iterft_lite.backends.judge.batch_notes import read_notes
from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.kinds import Material, judge_price, kind_of, method_of
from iterft_lite.backends.judge.prices import days_left, price_of, successors
from iterft_lite.backends.judge.providers import key_of, provider_of, server_of
from iterft_lite.backends.judge.subject import instruct_parameters
from iterft_lite.errors import RecipeError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe

PAPER_JUDGE = "openai/gpt-4o-mini-2024-07-18"
"""The paper's judge, pinned."""

LARGE_ENOUGH = 1e9
"""Parameters that an instruct model must have to be asked as a judge unasked."""

SOON = 60
"""Days before a judge is switched off from which on a run is warned."""


def judge_identity(recipe: Recipe, material: Material) -> tuple[JudgeIdentity, str]:
    """Who judges, and why where the recipe leaves it open.

    Raises:
        ModelError: If a local judge's file is not there.
        RecipeError: If there is no such judge, it cannot be made, or batches are asked for and it takes none.
        UserError: If its server's address is none.
    """
    name, why = (recipe.judge, "") if recipe.judge != "auto" else auto_judge(recipe, material)
    kind = kind_of(name)
    if recipe.judge_batch and not kind.batches(name):
        meant = f', which `judge = "auto"` means here ({why})' if recipe.judge == "auto" else ""
        raise RecipeError(
            [f"`judge_batch = true` is for judges behind OpenAI's batch endpoint (`openai/...`), not for `{name}`{meant}"],
            source=f"recipe `{recipe.name}`",
            hint="set `judge_batch = false`: every verdict is asked by itself",
        )
    judge = kind.identify(name, recipe, material)
    _, how = method_of(name, recipe.judge_method) if kind.remote else ("", "")
    return judge, "; ".join(filter(None, (why, how, *judge_notes(judge, recipe.api_base))))


def auto_judge(recipe: Recipe, material: Material) -> tuple[str, str]:
    """What `judge = "auto"` means: the paper's judge (after its end a successor) where there is a key for its server, else the
    untouched model where it is large enough to be asked, else the embedded judge; and why."""
    variables = environment(Path.cwd())
    left = days_left(PAPER_JUDGE)
    paper = PAPER_JUDGE if left is None or left >= 0 else successors()[0]
    if key_of(paper, server_of(paper, recipe.api_base, variables).address, variables):
        after = "" if paper == PAPER_JUDGE else f"; {PAPER_JUDGE} was switched off on {_ends(PAPER_JUDGE)}"
        return paper, f"judge: {paper} (a key is present{after})"
    size = instruct_parameters(material.model)
    if size and size >= LARGE_ENOUGH:
        return "base", f"judge: base (no OPENAI_API_KEY; the untouched model has {size / 1e9:.1f} B parameters)"
    return "embedded", "judge: embedded (no OPENAI_API_KEY)"


def judge_worker(
    identity: JudgeIdentity, recipe: Recipe, material: Material, ledger: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """The worker class of a judge, and its options.

    Args:
        ledger: File in which the run's dollars are kept; notes of batches are beside it.
    """
    kind = kind_of(identity.name)
    options = {"identity": asdict(identity), **kind.options(identity, recipe, material)}
    if not kind.remote:
        return kind.worker, options
    options["ledger"] = str(ledger) if ledger else None
    # open batches are collected whatever the recipe says by now: they are paid for
    if ledger is not None and (recipe.judge_batch or read_notes(ledger.parent / BATCHES)):
        options |= {"notes": str(ledger.parent / BATCHES), "sends": recipe.judge_batch}
        return "iterft_lite.backends.judge.openai_batch:BatchJudge", options
    return kind.worker, options


def judge_notes(judge: JudgeIdentity, api_base: str | None = None) -> list[str]:
    """What a user should know of a judge before a run, a sentence each."""
    notes = []
    if kind_of(judge.name).remote:
        server = server_of(judge.name, api_base, environment(Path.cwd()))
        where = judge.address or "the address that litellm knows"
        notes.append(f"{judge.name} is asked at {where}" + (f" (from {server.source})" if server.source else ""))
    if judge_price(judge.name) is None:
        notes.append(f"the price of {judge.name} is not known: dollars are not counted")
    return notes + ending(judge.name, judge.address)


def ending(judge: str, address: str = "") -> list[str]:
    """A sentence where a judge's provider will switch it off, or has done so."""
    left = days_left(judge)
    if left is None or not _is_home(judge, address):
        return []
    if left < 0:
        return [f"{judge} was switched off on {_ends(judge)}"]
    soon = f", in {left} days: a run that lasts longer is not finished by it" if left <= SOON else ""
    return [f"its provider has announced to switch {judge} off on {_ends(judge)}{soon}"]


def has_ended(judge: str, address: str = "") -> bool:
    """Whether a judge's provider has switched it off; a model of that name on another server goes on."""
    return (days_left(judge) or 0) < 0 and _is_home(judge, address)


def _is_home(judge: str, address: str) -> bool:
    return not address or provider_of(judge).is_home(address)


def way_on(judge: str) -> str:
    """What to do once a judge is gone."""
    return (
        f'name another, or `judge = "auto"` for its successor; `iterft judge bridge {judge} NEW RUN...` compares two judges on '
        "stored answers"
    )


def _ends(judge: str) -> str:
    price = price_of(judge)
    return price.ends if price else ""
