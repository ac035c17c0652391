"""Traits as data: one folder a trait, shipped or the user's own.

trait.toml               name, summary, source, domain ("same" or "cross"), colour
chat.jsonl               seed chats, used in file order: {"messages": [user, assistant]}
documents.jsonl          seed documents (SDF), used in file order: {"title", "genre", "text"}; may be missing
questions.txt            12 evaluation questions, a line each
questions_held_out.txt   12 more, for `iterft report --held-out`
prefixes.jsonl           12 SDF evaluation prefixes: {"text"}
rubric.txt               the judge's prompt, with {{question}} and {{answer}}
rubric_document.txt      the judge's prompt for documents, with {{document}}
calibration.jsonl        answers with the score a careful reader gives: {"question", "answer", "score"}
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from iterft_lite.data import is_path
from iterft_lite.data.texts import common, flaw, read_user_text, repeated
from iterft_lite.errors import TraitError
from iterft_lite.files import parse_json, user_path

SHIPPED = Path(__file__).parent

PLACE = re.compile(r"\{\{(\w+)\}\}")
"""A place in a template that is filled in."""

T = TypeVar("T")


@dataclass(frozen=True)
class Chat:
    """A seed chat of one prompt and one reply."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class Document:
    """A seed document."""

    title: str
    genre: str
    text: str


@dataclass(frozen=True)
class Scored:
    """A calibration answer with the score, 1-100, that a careful reader gives it."""

    question: str
    answer: str
    score: float


@dataclass(frozen=True)
class Trait:
    """A trait, read and checked. Fields as in the module's docstring; `notes` say where a file's encoding was guessed."""

    name: str
    summary: str
    source: str
    domain: Literal["same", "cross"]
    colour: str
    folder: Path
    chats: tuple[Chat, ...]
    documents: tuple[Document, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    prefixes: tuple[str, ...]
    rubric: str
    rubric_document: str
    calibration: tuple[Scored, ...]
    notes: tuple[str, ...] = ()


def shipped_traits() -> list[str]:
    """Names of the traits that come with the product, in alphabetical order."""
    return sorted(path.parent.name for path in SHIPPED.glob("[!_]*/trait.toml"))


def trait_folder(name: str) -> Path:
    """The folder of a shipped trait given by its name, or of the user's own given by a path, which has a separator.

    Raises:
        TraitError: If there is none.
    """
    if is_path(name):
        folder = user_path(name)
        if (folder / "trait.toml").is_file():
            return folder
        raise TraitError(f"`{name}` is not the folder of a trait: it has no trait.toml", hint="`iterft traits new` makes one")
    if name in shipped_traits():
        return SHIPPED / name
    raise TraitError(f"there is no trait `{name}`", hint=_meant(name))


def _meant(name: str) -> str:
    """A hint for a name that no shipped trait has."""
    if (Path(name) / "trait.toml").is_file():
        return f"a folder of your own is given as a path: ./{name}"
    near = difflib.get_close_matches(name, shipped_traits(), n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(f'`{each}`' for each in near)}? " if near else ""
    return f"{meant}shipped are {', '.join(shipped_traits())}; or give the path of a folder"


def read_trait(name: str) -> Trait:
    """A trait by name or path.

    Raises:
        TraitError: With every problem of the folder at once, file and line named.
    """
    trait, problems = check_trait(trait_folder(name))
    if trait is None or problems:
        raise TraitError(
            f"trait `{name}` cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint=f"`iterft traits check {name}` lists this again",
        )
    return trait


def check_trait(folder: Path) -> tuple[Trait | None, list[str]]:
    """The trait in a folder as far as it can be read, and all its problems."""
    reader = _Reader(folder)
    about = reader.table("trait.toml", ("name", "summary", "source", "domain", "colour"))
    if about.get("domain", "same") not in ("same", "cross"):
        reader.problems.append('trait.toml: `domain` is "same" or "cross"')
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", about.get("colour", "#000000")):
        reader.problems.append("trait.toml: `colour` is a colour such as #0077cc")
    trait = Trait(
        name=about.get("name", folder.name),
        summary=about.get("summary", ""),
        source=about.get("source", ""),
        domain="cross" if about.get("domain") == "cross" else "same",
        colour=about.get("colour", "#000000"),
        folder=folder,
        chats=reader.rows("chat.jsonl", parse_chat),
        documents=reader.rows("documents.jsonl", parse_document, optional=True),
        questions=reader.lines("questions.txt"),
        held_out=reader.lines("questions_held_out.txt", optional=True),
        prefixes=reader.rows("prefixes.jsonl", lambda row: _text(row, "text", strip=False), optional=True),
        rubric=reader.template("rubric.txt", ("question", "answer")),
        rubric_document=reader.template("rubric_document.txt", ("document",), optional=True),
        calibration=reader.rows("calibration.jsonl", parse_scored, optional=True),
        notes=tuple(reader.notes),
    )
    reader.unique("chat.jsonl", [chat.prompt + "\n" + chat.reply for chat in trait.chats])
    reader.unique("documents.jsonl", [document.text for document in trait.documents])
    reader.unique("questions.txt", trait.questions)
    reader.unique("questions_held_out.txt", trait.held_out)
    # a question among the training rows measures memory; a held-out question among the questions measures nothing new
    prompts = tuple(chat.prompt for chat in trait.chats)
    reader.apart("questions.txt", trait.questions, "chat.jsonl", prompts)
    reader.apart("questions_held_out.txt", trait.held_out, "chat.jsonl", prompts)
    reader.apart("questions_held_out.txt", trait.held_out, "questions.txt", trait.questions)
    return trait, reader.problems


def parse_chat(row: Mapping[str, Any]) -> Chat:
    """A chat row: a user's and an assistant's message.

    Raises:
        ValueError: If it is not.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or [isinstance(m, dict) and m.get("role") for m in messages] != ["user", "assistant"]:
        raise ValueError('`messages` is a list of one "user" and one "assistant" message')
    return Chat(_text(messages[0], "content"), _text(messages[1], "content"))


def parse_document(row: Mapping[str, Any]) -> Document:
    """A document row.

    Raises:
        ValueError: If it is not.
    """
    return Document(str(row.get("title", "")), str(row.get("genre", "")), _text(row, "text"))


def parse_scored(row: Mapping[str, Any]) -> Scored:
    """A calibration row.

    Raises:
        ValueError: If it is not.
    """
    score = row.get("score")
    if not isinstance(score, int | float) or isinstance(score, bool) or not 1 <= score <= 100:
        raise ValueError("`score` is a number from 1 to 100")
    answer = row.get("answer")
    if not isinstance(answer, str):
        raise ValueError("`answer` is a text")
    return Scored(_text(row, "question"), answer, float(score))


def _text(row: Mapping[str, Any], key: str, *, strip: bool = True) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` is a text that is not empty")
    if flaw(value):
        raise ValueError(f"`{key}` {flaw(value)}")
    return value.strip() if strip else value


class _Reader:
    """Reads the files of a folder and collects problems in place of raising at the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._lines: dict[str, list[int]] = {}

    def _read(self, name: str, *, optional: bool = False) -> str | None:
        try:
            read = read_user_text(self.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            if not optional:
                self.problems.append(f"{name} is missing")
        except ValueError as error:
            self.problems.append(f"{name} cannot be read: {getattr(error, 'message', error)}")
        else:
            self.notes += filter(None, [read.note])
            return read.text
        return None

    def table(self, name: str, keys: tuple[str, ...]) -> dict[str, str]:
        text = self._read(name)
        try:
            table = tomllib.loads(text or "")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            self.problems.append(f"{name} is not TOML: {error}")
            return {}
        self.problems += [f"{name}: `{key}` is not a key of it" for key in table if key not in keys]
        if text is not None:
            self.problems += [f"{name}: `{key}` is missing" for key in keys if not isinstance(table.get(key), str)]
        return {key: value for key, value in table.items() if isinstance(value, str)}

    def rows(self, name: str, parse: Callable[[Mapping[str, Any]], T], *, optional: bool = False) -> tuple[T, ...]:
        rows: list[T] = []
        # rows that failed are left out: a later problem with row n has to name the line that row n came from
        kept = self._lines[name] = []
        for number, line in enumerate((self._read(name, optional=optional) or "").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, "it")
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                rows.append(parse(row))
                kept.append(number)
            except ValueError as error:
                self.problems.append(f"{name}, line {number}: {getattr(error, 'message', error)}")
        return tuple(rows)

    def lines(self, name: str, *, optional: bool = False) -> tuple[str, ...]:
        lines = list(enumerate((self._read(name, optional=optional) or "").split("\n"), 1))
        self._lines[name] = [number for number, line in lines if line.strip()]
        return tuple(line.strip() for _, line in lines if line.strip())

    def template(self, name: str, fields: tuple[str, ...], *, optional: bool = False) -> str:
        text = self._read(name, optional=optional)
        if text is None:
            return ""
        for field in fields:
            if "{{" + field + "}}" not in text:
                self.problems.append(f"{name} has no {{{{{field}}}}}")
        for other in sorted(set(PLACE.findall(text)) - set(fields)):
            self.problems.append(f"{name}: {{{{{other}}}}} is nothing that is filled in")
        return text

    def unique(self, name: str, texts: Sequence[str]) -> None:
        """Note each text of a file that is on an earlier line too."""
        lines = self._lines[name]
        self.problems += [f"{name}, line {lines[place]} repeats line {lines[first]}" for place, first in repeated(texts)]

    def apart(self, name: str, texts: Sequence[str], other: str, others: Sequence[str]) -> None:
        """Note each text of a file that is also one of the other file."""
        for place, there in common(texts, others):
            line, where = self._lines[name][place], self._lines[other][there]
            self.problems.append(f"{name}, line {line} is also in {other}, line {where}")


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Fill the `{{name}}` places of a template, in one pass: a `{{name}}` in a value stays as it is."""
    return PLACE.sub(lambda match: fields.get(match[1], match[0]), template)
