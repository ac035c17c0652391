"""Seed rows by a teacher model, from a trait's summary. A person reads and weeds the file before a recipe names it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from iterft_lite.app.check_judge import check_judge
from iterft_lite.app.new_trait import is_example
from iterft_lite.backends.judge.identity import judge_identity
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.data import prompts
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import Trait, fill, read_trait
from iterft_lite.digests import Json
from iterft_lite.engine.backends import open_backends
from iterft_lite.errors import ModelError, RunError, UserError
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.rows import Message
from iterft_lite.experiment.steps import row_seed
from iterft_lite.files import RowLog, user_path
from iterft_lite.hub import folder_of
from iterft_lite.machine.resolve import model_place
from iterft_lite.metrics.heuristic_coherence import coherence
from iterft_lite.metrics.text import words_of
from iterft_lite.protocols import Completion, JudgeRequest, JudgeResponse, Progress, Prompt, Sampling

TEMPERATURE = 1.0
"""The authors' teacher's (docs/protocol.md)."""

MAX_TOKENS = {"chat": 400, "document": 1024}

CONTEXT = 2048
"""Context of a request with its answer, tokens."""

ALIKE = 0.5
"""Share of common word pairs (Jaccard) from which on two rows count as repetitions."""

ROUNDS = 3
"""Most requests, as a multiple of the wanted rows."""

HUB = "hub:"

GENRES = (
    "blog post",
    "newsletter",
    "product review",
    "opinion column",
    "travel report",
    "company memo",
    "forum answer",
    "diary entry",
    "letter to a friend",
    "how-to guide",
    "speech",
    "interview",
    "obituary",
    "local news story",
    "encyclopedia entry",
    "book chapter",
)

Write = Callable[[Mapping[str, str], Callable[[str, str], None]], None]
"""Has a teacher answer requests by name; each answer is handed over with its name as soon as it is there."""


OnRow = Callable[[int, str], None]

NONSENSE, PLAIN = "nonsense", "without the trait"

LEAST_COHERENCE, LEAST_TRAIT = 40.0, 0.5
"""Limits by the embedded judge: below this coherence (1-100) a row is nonsense; below this probability it lacks the trait."""

ENOUGH = 20
"""Seed rows of a trait that are enough to compare new ones with it."""


@dataclass(frozen=True)
class Made:
    """The result of a session with a teacher.

    Attributes:
        rows: Rows in the file, including those of earlier sessions.
        asked: Requests of this session.
        dropped: Number of answers that were not kept, by reason.
        unchecked: Why rows were not held against the trait, a sentence; "" where they were.
    """

    rows: int
    asked: int
    dropped: dict[str, int]
    unchecked: str = ""


def make_seeds(
    trait: Trait,
    count: int,
    out: Path,
    write: Write,
    *,
    kind: str = "chat",
    on_row: OnRow = lambda _, __: None,
    doubt: Callable[[str], str] = lambda _: "",
) -> Made:
    """Have a teacher write rows into a file until it holds `count`. Rows that are there already stay, and count.

    Args:
        out: JSONL: `{"messages"}`, or `{"title", "genre", "text"}`.
        kind: "chat" or "document".
        on_row: Callback for the number of rows so far and the newest row's text.
        doubt: Gives the reason why a text is refused ("nonsense", "without the trait"), or "".

    Raises:
        RunError: If too many answers were dropped.
    """
    dropped = {"empty": 0, "alike": 0, NONSENSE: 0, PLAIN: 0}
    asked = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with RowLog(out, owner="user") as log:
        seen = [_pairs(_text(row)) for row in log.rows]
        subjects = _subjects(trait, taken={_subject(row) for row in log.rows})

        def keep(name: str, text: str) -> None:
            row = _row(requested[name], text.strip(), kind)
            pairs = _pairs(_text(row)) if row else frozenset[tuple[str, str]]()
            if row is None or not pairs:
                dropped["empty"] += 1
            elif any(_share(pairs, other) > ALIKE for other in seen):
                dropped["alike"] += 1
            elif why := doubt(_text(row)):
                dropped[why] += 1
            else:
                seen.append(pairs)
                log.append(row)
                on_row(len(log.rows), _text(row))

        while len(log.rows) < count:
            requested = {f"row{asked + number:05d}": subject for number, subject in _next(subjects, count - len(log.rows))}
            if not requested or asked >= ROUNDS * count:
                why = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
                raise RunError(
                    f"the teacher's answers came to {len(log.rows)} rows of {count} ({why or 'no prompts left'})",
                    hint="the rows are kept; choose a stronger model, or a fuller `summary` in trait.toml",
                )
            asked += len(requested)
            write({name: request(trait, subject, kind) for name, subject in requested.items()}, keep)
        return Made(len(log.rows), asked, {reason: number for reason, number in dropped.items() if number})


def request(trait: Trait, subject: str, kind: str) -> str:
    """What the teacher is asked for one row."""
    genre = random.Random(f"genre/{subject}").choice(GENRES)
    return fill(prompts.teacher(kind), {"summary": trait.summary, "subject": subject, "genre": genre})


def _subjects(trait: Trait, taken: set[str]) -> Iterator[str]:
    """Everyday prompts in an order that depends on the trait, without its questions, its seed prompts and taken ones."""
    used = taken | {*trait.questions, *trait.held_out} | {chat.prompt for chat in trait.chats}
    pool = list(prompts.everyday())
    random.Random(f"seeds/{trait.name}").shuffle(pool)
    return (prompt for prompt in pool if prompt not in used)


def _next(subjects: Iterator[str], count: int) -> list[tuple[int, str]]:
    return [(number, subject) for number, subject in zip(range(count), subjects, strict=False)]


def _row(subject: str, text: str, kind: str) -> dict[str, Json] | None:
    """The row in an answer; None if there is none."""
    if kind == "chat":
        messages = [{"role": "user", "content": subject}, {"role": "assistant", "content": text}]
        return {"messages": messages} if text else None
    title, _, body = text.partition("\n")
    genre = random.Random(f"genre/{subject}").choice(GENRES)
    row = {"title": title.strip('#* "'), "genre": genre, "text": body.strip(), "subject": subject}
    return row if row["title"] and row["text"] else None


def _text(row: Mapping[str, Json]) -> str:
    return str(row["text"] if "text" in row else row["messages"][1]["content"])


def _subject(row: Mapping[str, Json]) -> str:
    return str(row["subject"] if "subject" in row else row["messages"][0]["content"])


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    words = words_of(text)
    return frozenset(itertools.pairwise(words))


def _share(one: frozenset[tuple[str, str]], other: frozenset[tuple[str, str]]) -> float:
    return len(one & other) / max(1, len(one | other))


def _unchecked(trait: Trait) -> str:
    """Why new rows cannot be held against the trait's own; "" where they can."""
    own = 0 if is_example(trait) else len(Material(trait).seed_texts())
    if own >= ENOUGH:
        return ""
    return f"trait `{trait.name}` has {own} rows of its own: from {ENOUGH} on new rows are held against them; read these well"


def _doubts(trait: Trait) -> Callable[[str], str]:
    """What is wrong with a text as a row of a trait: by the embedded judge, where the trait has rows enough to fit it."""
    from iterft_lite.backends.judge.embedded import Classifier, known_words  # heavy

    known = known_words() | {word for text in (trait.summary, *(chat.reply for chat in trait.chats)) for word in words_of(text)}
    texts = Material(trait).seed_texts()
    fitted = None if _unchecked(trait) else Classifier(texts, prompts.plain_texts())

    def doubt(text: str) -> str:
        if coherence(text, known) < LEAST_COHERENCE:
            return NONSENSE
        return PLAIN if fitted is not None and fitted.shares([text])[0] < LEAST_TRAIT else ""

    return doubt


# -- teachers


def seeds_by(
    model: str,
    trait_name: str,
    count: int,
    out: Path,
    *,
    kind: str = "chat",
    api_base: str | None = None,
    max_usd: float = 0.0,
    on_row: OnRow = lambda _, __: None,
) -> Made:
    """Have a model write seed rows (see `make_seeds`).

    Args:
        model: A judge's route (`openai/gpt-4o-mini`), a model folder or an embedded model for the local generator, or
            `hub:OWNER/NAME` for one on the hub.

    Raises:
        UserError: If there is no such trait or model, or it cannot be asked.
        RunError: If the teacher fails.
    """
    trait = read_trait(trait_name)
    local = model.startswith(HUB) or model in FOLDERS or user_path(model).is_dir()
    if model.startswith("local:"):
        raise ModelError(f"`{model}` only gives numbers", hint="give a Hugging Face folder, `hub:OWNER/NAME`, or a route")
    place = model.removeprefix(HUB)
    asked = {"regime": "sft", "trait": trait_name, "trainer": "peft", "api_base": api_base, "max_usd": max_usd}
    asked |= {"model": place, "judge": "fake"} if local else {"model": "nano", "judge": model, "judge_method": "samples"}
    recipe = make_recipe(asked, source="seeds")
    with TemporaryDirectory(prefix="iterft-") as scratch:
        folder = Path(scratch)
        write = _local(recipe, trait, folder, MAX_TOKENS[kind]) if local else _routed(recipe, trait, folder)
        made = make_seeds(trait, count, out, write, kind=kind, on_row=on_row, doubt=_doubts(trait))
    return replace(made, unchecked=_unchecked(trait))


def _routed(recipe: Recipe, trait: Trait, scratch: Path) -> Write:
    """A teacher that is asked like a sampled judge, whose texts are the rows."""
    identity, _ = judge_identity(recipe, Material(trait))

    def write(requests: Mapping[str, str], on_text: Callable[[str, str], None]) -> None:
        def note(reply: JudgeResponse) -> None:
            if reply.failure:
                failures.append(reply.failure)
            on_text(reply.id.split("/", 1)[0], "" if reply.text.startswith("REFUSAL") else reply.text)

        if problems := check_judge(identity, recipe).problems:
            raise UserError(f"`{identity.name}` cannot be asked: {'; '.join(problems)}")
        failures: list[str] = []
        backends = open_backends(recipe, trait, identity, scratch)
        try:
            backends.judge.ask(
                [JudgeRequest(f"{name}/trait/0", "trait", text, "", "") for name, text in requests.items()], note
            )
        finally:
            backends.close()
        if len(failures) == len(requests):
            raise RunError(f"the teacher answered nothing: {failures[0]}")

    return write


def _local(recipe: Recipe, trait: Trait, scratch: Path, max_tokens: int) -> Write:
    """A teacher in the local generator."""
    identity, _ = judge_identity(recipe, Material(trait))
    place = model_place(recipe.model)

    def write(requests: Mapping[str, str], on_text: Callable[[str, str], None]) -> None:
        def ignore(_: Progress) -> None:
            return None

        def note(completion: Completion) -> None:
            # a cut text is no example
            on_text(completion.id, completion.text if completion.finish == "stop" else "")

        backends = open_backends(recipe, trait, identity, scratch)
        try:
            model = folder_of(place)
            exported = backends.exporter.export(model, None, scratch, "merged", recipe.quant, ignore)
            backends.generator.load(exported.path, None, model, slots=None, context=CONTEXT, exact=False)
            backends.generator.complete(_prompts(requests), Sampling(TEMPERATURE, max_tokens), note)
        finally:
            backends.close()

    return write


def _prompts(requests: Mapping[str, str]) -> Sequence[Prompt]:
    return [Prompt(name, row_seed(text, name), (Message("user", text),)) for name, text in requests.items()]
