"""The kinds of judges: one record each. What is not in its record is known of a judge nowhere else.

To add one: write its worker (it meets `protocols.Judge`), and a record here. Recipes, plans, prices, judging again and
calibration find it in the table. Imports no worker.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.prices import FREE, Price, price_of
from iterft_lite.backends.judge.providers import provider_of, server_of
from iterft_lite.cache import cache_folder
from iterft_lite.data import prompts
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.digests import digest
from iterft_lite.errors import ModelError, RecipeError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.files import user_path, write_json
from iterft_lite.hub import content_digest, example_folder

EMBEDDED_VERSION = 3
"""Of the embedded judge's features, fit and neutral texts: another one is another judge."""

EMBEDDED_NOTE = "embedded judge: for trying out, not for findings"

OWN_NOTE = (
    f"{EMBEDDED_NOTE}; it takes what the untouched model writes for plain, so that a trait which that model has already "
    "scores low"
)

FEWEST_ROWS = 16
"""Seed rows under which no classifier is fitted: it would know single words, not a trait."""

RELATIVE_NOTE = "judge and subject are relatives: the untouched model judges what grew out of it"

LOCAL = "local:"

REASONING = re.compile(r"(?:^|/)(?:o[1345]|gpt-[56])(?:[-.]|$)")
"""Models that think before they answer: their first token's probabilities are given with a certain effort only, or never."""

Method = Literal["logprobs", "samples"]


@dataclass(frozen=True)
class Material:
    """What a judge may be made of, besides its name.

    Attributes:
        trait: What is judged.
        seeds: The run's own seed rows where they are not the trait's.
        model: Folder or hub name of M[0].
        model_identity: Digest of its content.
    """

    trait: Trait
    seeds: tuple[Chat, ...] | tuple[Document, ...] = ()
    model: str = ""
    model_identity: str = ""

    def seed_texts(self) -> list[str]:
        """Texts with the trait: of the run's own rows, else of all of the trait's."""
        rows: tuple[Chat | Document, ...] = self.seeds or (*self.trait.chats, *self.trait.documents)
        return [row.reply if isinstance(row, Chat) else row.text for row in rows]


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge.

    Attributes:
        name: For people.
        recognises: Whether a recipe's `judge` means it.
        identify: Who that is, from the recipe's `judge`, the recipe and what it may be made of.
        worker: `module:Class`; its first option is `identity`, the identity's fields.
        options: The worker's other options.
        price: Of a judge by its name; None if it is not known.
        probabilities: Whether a judge of that name gives token probabilities.
        batches: Whether a judge of that name takes batches.
        remote: It is asked over a network: it has an address, and a run may not reach it.
        calibrates: A run measures it on the trait's calibration answers by itself: that costs no dollars.
    """

    name: str
    recognises: Callable[[str], bool]
    identify: Callable[[str, Recipe, Material], JudgeIdentity]
    worker: str
    options: Callable[[JudgeIdentity, Recipe, Material], dict[str, Any]]
    price: Callable[[str], Price | None] = lambda _: FREE
    probabilities: Callable[[str], bool] = lambda _: True
    batches: Callable[[str], bool] = lambda _: False
    remote: bool = False
    calibrates: bool = False


# -- embedded


def embedded_identity(material: Material, place: str = "", fit: Literal["auto", "own", "shipped"] = "shipped") -> JudgeIdentity:
    """The judge that needs no key.

    Args:
        place: Where the run's own seed rows come from, for the error; "" where they are the trait's.
        fit: A recipe's `judge_fit`.

    Raises:
        RecipeError: If there are too few rows to fit it.
    """
    texts = material.seed_texts()
    if len(texts) < FEWEST_ROWS:
        raise RecipeError(
            [f'`judge = "embedded"` is fitted on seed rows: {FEWEST_ROWS} are needed, there are {len(texts)}'],
            source=f"seeds `{place}`" if place else f"trait `{material.trait.name}`",
            hint="add more seed rows, or name another judge: `iterft doctor` lists those that work here",
        )
    own = fit == "own" or (fit == "auto" and not answers_ship(material.model))
    note = OWN_NOTE if own else EMBEDDED_NOTE
    return JudgeIdentity("embedded", "embedded", embedded_revision(texts), "logprobs", 1, note, own=own)


def answers_ship(model: str) -> bool:
    """Whether the shipped plain texts hold answers of a model: nano or its base, or SmolLM2, by content or by hub name.

    Args:
        model: Folder or hub name of M[0]; "" for none.
    """
    if not model or not Path(model).is_dir():
        return not model or model.partition("@")[0].rpartition("/")[2] in prompts.plain_models()
    example = example_folder("smollm2")
    known = [*FOLDERS.values(), *([example] if example else [])]
    return Path(model) in known or _content(Path(model)) in map(_content, known)


@cache
def _content(folder: Path) -> str:
    """As `content_digest`, once a process: a study asks for every cell."""
    return content_digest(folder)


def embedded_revision(texts: Sequence[str]) -> str:
    """Digest of everything that the classifier is fitted on, and of how.

    Args:
        texts: With the trait.
    """
    return f"{EMBEDDED_VERSION}-{digest([list(texts), prompts.plain_texts()])[:24]}"


def _embedded_options(identity: JudgeIdentity, _: Recipe, material: Material) -> dict[str, Any]:
    """The rows are handed over in a file: they may be more than a command line holds."""
    path = cache_folder() / "judges" / f"{identity.revision}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, material.seed_texts())
    return {"trait": material.trait.name, "rows": str(path)}


# -- a fake

FAKE_JUDGE = JudgeIdentity(
    "fake", "embedded", "1", "logprobs", note="fake judge: it looks for a few words; its scores mean nothing"
)


# -- the untouched model


def _base_identity(name: str, _: Recipe, material: Material) -> JudgeIdentity:
    return JudgeIdentity(name, "llm", material.model_identity, "logprobs", 1, RELATIVE_NOTE)


def _base_options(_: JudgeIdentity, __: Recipe, material: Material) -> dict[str, Any]:
    return {"model": material.model}


# -- a file of the user's own


def _local_identity(name: str, recipe: Recipe, _: Material) -> JudgeIdentity:
    method: Method = "samples" if recipe.judge_method == "samples" else "logprobs"
    return JudgeIdentity(name, "llm", local_revision(local_file(name)), method, _samples(method, recipe))


def local_file(name: str) -> Path:
    """The GGUF file of a local judge: a path, or `owner/repository/file.gguf` on the hub, fetched once.

    Raises:
        ModelError: If it cannot be found.
    """
    place = name.removeprefix(LOCAL)
    path = user_path(place)
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


# -- a provider's model, or one behind a server of the user's own


def _provider_identity(name: str, recipe: Recipe, _: Material) -> JudgeIdentity:
    server = server_of(name, recipe.api_base, environment(Path.cwd()))
    method, _why = method_of(name, recipe.judge_method)
    provider, price = provider_of(name), price_of(name)
    # the provider's own server is meant by the name; another one gives other verdicts
    revision = "" if server.address == provider.address else server.address
    effort, tops = (price.effort, price.tops) if price and method == "logprobs" else ("", 0)
    samples = _samples(method, recipe)
    return JudgeIdentity(name, "llm", revision, method, samples, address=server.address, effort=effort, tops=tops)


def method_of(name: str, asked: Literal["auto", "logprobs", "samples"]) -> tuple[Method, str]:
    """How a judge is read, and a sentence where it is not by token probabilities."""
    if asked != "auto":
        return asked, "scores are means of sampled verdicts, as the recipe asks" if asked == "samples" else ""
    if kind_of(name).probabilities(name):
        return "logprobs", ""
    if REASONING.search(name):
        return "samples", f"`{name}` thinks before it answers and gives no token probabilities: scores are means of samples"
    return "samples", f"`{name.split('/', 1)[0]}` gives no token probabilities: scores are means of sampled verdicts"


def _gives_probabilities(name: str) -> bool:
    price = price_of(name)
    if REASONING.search(name):
        return bool(price and price.effort)
    return provider_of(name).tops > 0


def _samples(method: Method, recipe: Recipe) -> int:
    return recipe.judge_samples if method == "samples" else 1


JUDGES: dict[str, JudgeKind] = {
    "embedded": JudgeKind(
        name="a small text classifier, fitted on the seed rows",
        recognises=lambda judge: judge == "embedded",
        identify=lambda _, recipe, material: embedded_identity(
            material, recipe.seeds.path if recipe.seeds else "", recipe.judge_fit
        ),
        worker="iterft_lite.backends.judge.embedded:EmbeddedJudge",
        options=_embedded_options,
        calibrates=True,
    ),
    "fake": JudgeKind(
        name="a fake for trying out the program itself",
        recognises=lambda judge: judge == FAKE_JUDGE.name,
        identify=lambda _, __, ___: FAKE_JUDGE,
        worker="iterft_lite.testing.fakes:FakeJudge",
        options=lambda _, __, ___: {},
    ),
    "base": JudgeKind(
        name="the untouched model itself",
        recognises=lambda judge: judge == "base",
        identify=_base_identity,
        worker="iterft_lite.backends.judge.base:BaseJudge",
        options=_base_options,
        calibrates=True,
    ),
    "local": JudgeKind(
        name="a GGUF file on this machine",
        recognises=lambda judge: judge.startswith(LOCAL),
        identify=_local_identity,
        worker="iterft_lite.backends.judge.local:LocalJudge",
        options=lambda identity, _, __: {"path": str(local_file(identity.name))},
    ),
    "provider": JudgeKind(
        name="a provider's model, or one behind a server of one's own",
        recognises=lambda judge: bool(re.fullmatch(r"[\w.-]+/\S+", judge)),
        identify=_provider_identity,
        worker="iterft_lite.backends.judge.provider:LitellmJudge",
        options=lambda _, recipe, __: {"max_usd": recipe.max_usd},
        price=price_of,
        probabilities=_gives_probabilities,
        batches=lambda judge: judge.startswith("openai/"),
        remote=True,
    ),
}
"""By name; the first that recognises a judge is meant."""


def kind_of(judge: str) -> JudgeKind:
    """The kind of a judge.

    Raises:
        RecipeError: If no kind knows it.
    """
    found = next((kind for kind in JUDGES.values() if kind.recognises(judge)), None)
    if found is None:
        own = ", ".join(f'"{name}"' for name, kind in JUDGES.items() if kind.recognises(name))
        raise RecipeError(
            [f'`judge = "{judge}"` is not a judge'],
            source="judge",
            hint=f'write "PROVIDER/MODEL" such as "openai/gpt-4o-mini-2024-07-18", "local:FILE.gguf", {own} or "auto"',
        )
    return found


def judge_price(judge: str, *, batch: bool = False) -> Price | None:
    """The price of a judge by its name; None where it is not known, which is not the same as free.

    Args:
        batch: Asked in batches.
    """
    kind = kind_of(judge)
    return price_of(judge, batch=True) if batch and kind.batches(judge) else kind.price(judge)
