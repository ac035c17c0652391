"""Which judge a recipe means, and where it runs. Imports none of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from iterft_lite.backends.judge.batch_notes import FOLDER as BATCHES
from iterft_lite.backends.judge.batch_notes import read_notes
from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.prices import price_of
from iterft_lite.data.traits import Trait
from iterft_lite.errors import ModelError, RecipeError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe

PAPER_JUDGE = "openai/gpt-4o-mini-2024-07-18"
"""The paper's judge, pinned."""

KEY_VARIABLES: Mapping[str, str] = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
}
"""Where the providers' keys are looked for; never read further than for being there."""

EMBEDDED_VERSION = 2
"""Of the embedded judge's features and fit: another one is another judge."""

EMBEDDED_NOTE = "embedded judge: for trying out, not for findings"

NO_ODDS = frozenset(
    {"anthropic", "bedrock", "cohere", "cohere_chat", "gemini", "mistral", "ollama", "ollama_chat", "vertex_ai"}
)
"""Providers for which litellm 1.106.2 lists no `logprobs` with `top_logprobs` (`get_supported_openai_params`)."""

REASONING = re.compile(r"(?:^|/)(?:o[1345]|gpt-5)(?:[-.]|$)")
"""Models that think before they answer: their first token's odds are not given."""

LOCAL = "local:"

BATCHED = "openai/"
"""The judges that litellm 1.106.2 makes batches for in OpenAI's way and that give half the price for it; of anthropic's it only
reads what others made."""


def judge_identity(recipe: Recipe, trait: Trait) -> tuple[JudgeIdentity, str]:
    """Who judges, and why where the recipe leaves it open.

    Raises:
        ModelError: If a local judge's file is not there.
        RecipeError: If batches are asked for and it takes none.
    """
    name, why = recipe.judge, ""
    if name == "auto":
        key = bool(environment(Path.cwd()).get(KEY_VARIABLES["openai"]))
        name = PAPER_JUDGE if key else "embedded"
        why = f"judge: {name} ({'a key is present' if key else 'no OPENAI_API_KEY'})"
    if recipe.judge_batch and not name.startswith(BATCHED):
        meant = ', which `judge = "auto"` means without OPENAI_API_KEY' if recipe.judge == "auto" else ""
        raise RecipeError(
            [f"`judge_batch = true` is for judges behind OpenAI's batch endpoint (`openai/...`), not for `{name}`{meant}"],
            source=f"recipe `{recipe.name}`",
            hint="set `judge_batch = false`: every verdict is asked by itself",
        )
    if name == "embedded":
        return embedded_identity(trait), why
    method, note = method_of(name, "odds" if recipe.judge_method == "logprobs" else recipe.judge_method)
    samples = recipe.judge_samples if method == "samples" else 1
    judge = JudgeIdentity(name, "llm", _revision(name, recipe.api_base), method, samples, note)
    return judge, "; ".join(filter(None, (why, *judge_notes(judge))))


def embedded_identity(trait: Trait) -> JudgeIdentity:
    """The judge that needs no key."""
    return JudgeIdentity("embedded", "embedded", f"{EMBEDDED_VERSION}-{trait.evidence[:16]}", "odds", 1, EMBEDDED_NOTE)


def method_of(name: str, asked: Literal["auto", "odds", "samples"]) -> tuple[Literal["odds", "samples"], str]:
    """How a judge is read, and a sentence where it is not by odds."""
    if asked != "auto":
        return asked, "scores are means of sampled verdicts, as the recipe asks" if asked == "samples" else ""
    provider = name.split("/", 1)[0]
    if provider in NO_ODDS:
        return "samples", f"`{provider}` gives no token odds: scores are means of sampled verdicts"
    if REASONING.search(name):
        return "samples", f"`{name}` thinks before it answers and gives no token odds: scores are means of sampled verdicts"
    return "odds", ""


def _revision(name: str, api_base: str | None) -> str:
    """What pins a judge beside its name: a local file's content, a server's address (without user and password)."""
    if not name.startswith(LOCAL):
        return re.sub(r"(?<=://)[^/@]*@", "", api_base or "")
    return local_revision(local_file(name))


def local_file(name: str) -> Path:
    """The GGUF file of a local judge: a path, or `owner/repository/file.gguf` on the hub, fetched once.

    Raises:
        ModelError: If it cannot be found.
    """
    place = name.removeprefix(LOCAL)
    path = Path(place).expanduser()
    if path.is_file():
        return path.resolve()
    parts = place.split("/", 2)
    if len(parts) == 3 and parts[2].endswith(".gguf") and not place.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2]))
        except Exception as error:  # no such file, no network, no permission
            raise ModelError(f"judge `{name}` cannot be fetched: {type(error).__name__}") from None
    raise ModelError(
        f'there is no file `{place}` for `judge = "{name}"`',
        hint='give the path of a GGUF file, or a file on the hub as "local:OWNER/REPOSITORY/FILE.gguf"',
    )


def local_revision(path: Path) -> str:
    """Digest of a GGUF file's size and its first and last megabytes: vocabulary, settings, and the last tensors."""
    size, ends = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        ends.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        ends.update(file.read(1 << 20))
    return f"{size:x}-{ends.hexdigest()[:16]}"


def judge_worker(
    identity: JudgeIdentity, recipe: Recipe, trait: Trait, ledger: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """The worker class of a judge, and its options.

    Args:
        ledger: File in which the run's dollars are kept; notes of batches are beside it.
    """
    if identity.kind == "embedded":
        return "iterft_lite.backends.judge.embedded:EmbeddedJudge", {"trait": str(trait.folder)}
    options: dict[str, Any] = {"identity": asdict(identity)}
    if identity.name.startswith(LOCAL):
        return "iterft_lite.backends.judge.local:LocalJudge", options | {"path": str(local_file(identity.name))}
    options |= {"api_base": recipe.api_base, "max_usd": recipe.max_usd, "ledger": str(ledger) if ledger else None}
    # what is out in batches is collected whatever the recipe says by now: it is paid for
    if ledger is not None and (recipe.judge_batch or read_notes(ledger.parent / BATCHES)):
        options |= {"notes": str(ledger.parent / BATCHES), "sends": recipe.judge_batch}
        return "iterft_lite.backends.judge.openai_batch:BatchJudge", options
    return "iterft_lite.backends.judge.provider:LitellmJudge", options


def judge_notes(judge: JudgeIdentity) -> list[str]:
    """What a user should know of a judge before a run, a sentence each."""
    price, notes = price_of(judge.name), []
    if price is None:
        notes.append(f"the price of {judge.name} is not known: dollars are not counted")
    elif price.ends:
        notes.append(f"its provider has announced to switch {judge.name} off on {price.ends}")
    return notes
