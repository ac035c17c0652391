"""The user's own rows, in the usual shapes. Errors name file and row.

This module reads JSONL, JSON, CSV (`,` `;` tab or `|`) and Parquet files from the disk each time: a cache might hold an older
version. Everything in a CSV is text. `datasets` reads datasets on the hub. A chat row is one of

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}        ShareGPT
    {"instruction": ..., "input": ..., "output": ...}                                          Alpaca
    {"prompt": ..., "reply": ...}                                                              columns that the recipe names
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from iterft_lite import hub
from iterft_lite.data.texts import common, decode, flaw, most_repeated, plain
from iterft_lite.data.traits import Chat, Document, Trait, parse_chat
from iterft_lite.errors import FileError, TraitError
from iterft_lite.experiment.recipe import MixSettings, Recipe, Source
from iterft_lite.files import json_kind, parse_json, read_bytes, user_path

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")

SHEETS = (".xlsx", ".xls", ".ods", ".numbers")

SOURCE_LIMIT = 1 << 30
"""Largest file of rows, bytes: the program holds it in memory."""

SHOWN = 5
"""Problems of a file that an error lists; it counts the rest."""

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's names of the roles."""

SEPARATORS = ",;\t|"

Row = dict[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """The rows of a file or dataset.

    Attributes:
        name: Its name in messages.
        rows: Values by column.
        places: The place of each row: "row 3", "line 7".
        notes: Remarks on reading it, a sentence each.
    """

    name: str
    rows: list[Row]
    places: list[str]
    notes: tuple[str, ...] = ()


@dataclass
class Sources:
    """The rows that a recipe names, beside the trait's.

    Attributes:
        recipe: The recipe.
        trait: The recipe's trait.
        notes: Remarks, a sentence each, once everything was read.
    """

    recipe: Recipe
    trait: Trait
    notes: list[str] = field(default_factory=list)

    @property
    def documents(self) -> bool:
        """Whether rows are documents."""
        return self.recipe.row.rows == "document"

    def seeds(self) -> tuple[Chat, ...] | tuple[Document, ...]:
        """The seed rows, in their order: the trait's, or the user's own.

        Raises:
            TraitError: If they cannot be used.
        """
        source = self.recipe.seeds
        if source is None:
            return self.trait.documents if self.documents else self.trait.chats
        return self._training(source)

    def mixed(self) -> tuple[Chat, ...] | tuple[Document, ...]:
        """The rows to mix in, from a file of the user's own.

        Raises:
            TraitError: If they cannot be used.
        """
        mix = self.recipe.mix
        return () if mix.path is None else self._training(_source_of(mix))

    def prompts(self, shipped: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """The prompts: the shipped ones, or the user's own, each once.

        Raises:
            TraitError: If they cannot be used.
        """
        source = self.recipe.prompts
        if source is None:
            return shipped()
        read = self._read(source)
        column = source.text if self.documents else source.prompt
        found = _each(read, lambda row: _text(row, column) if self.documents else _prompt(row, source))
        self._apart(found, read, "prompts")
        extra, _ = most_repeated(found)
        if extra:
            self.notes.append(f"`{read.name}` repeats prompts: {extra} are left out, as each is asked once")
        once = {plain(text): text for text in reversed(found)}
        return tuple(text for text in dict.fromkeys(found) if once[plain(text)] == text)

    def _training(self, source: Source) -> tuple[Chat, ...] | tuple[Document, ...]:
        read = self._read(source)
        if self.documents:
            made = _each(read, lambda row: _document(row, source))
            texts = [f"{each.title}\n\n{each.text}" if each.title else each.text for each in made]
            self._apart(texts, read, "documents")
            self._repeated(texts, read, "document")
            return tuple(made)
        chats = _each(read, lambda row: _chat(row, source))
        self._apart([chat.prompt for chat in chats], read, "prompts")
        self._repeated([f"{chat.prompt}\n{chat.reply}" for chat in chats], read, "row")
        return tuple(chats)

    def _read(self, source: Source) -> Rows:
        read = read_source(source)
        if not read.rows:
            raise TraitError(f"`{read.name}` holds no rows")
        self.notes += [note for note in read.notes if note not in self.notes]
        return read

    def _apart(self, texts: Sequence[str], read: Rows, what: str) -> None:
        """Refuse training rows that contain evaluation questions: those would measure memory."""
        asked = (
            (("evaluation prefix", self.trait.prefixes),)
            if self.documents
            else (("question", self.trait.questions), ("held-out question", self.trait.held_out))
        )
        problems = [
            f'{read.places[there]} holds {kind} {place + 1} of trait `{self.trait.name}`: "{questions[place][:60]}"'
            for kind, questions in asked
            for place, there in common(questions, texts, beginnings=self.documents)
        ]
        if problems:
            hint = f"remove these rows: a model that has seen what it is measured by is not measured ({what})"
            raise _told(read.name, problems, hint)

    def _repeated(self, texts: Sequence[str], read: Rows, what: str) -> None:
        extra, most = most_repeated(texts)
        if extra:
            often = f", one {what} {most} times" if most > 2 else ""
            self.notes.append(f"`{read.name}` repeats itself: {extra} of {len(texts)} rows were there before{often}")


def _source_of(mix: MixSettings) -> Source:
    return Source(path=str(mix.path), split=mix.split, prompt=mix.prompt, reply=mix.reply, text=mix.text)


def _told(name: str, problems: Sequence[str], hint: str | None) -> TraitError:
    """One error with all problems of a file."""
    if len(problems) == 1:
        return TraitError(f"`{name}`, {problems[0]}", hint=hint)
    lines = [f"  - {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  - and {len(problems) - SHOWN} more like these")
    return TraitError(f"`{name}` cannot be used:\n" + "\n".join(lines), hint=hint)


def _each(read: Rows, make: Callable[[Row], T]) -> list[T]:
    """A value from every row. Raises once, with the problems of all rows."""
    made: list[T] = []
    problems: list[tuple[str, str]] = []
    hint: str | None = None
    for row, place in zip(read.rows, read.places, strict=True):
        try:
            made.append(make(row))
        except ValueError as error:
            problems.append((place, str(error)))
            if isinstance(error, _LackingError):
                hint = hint or _which_column(error.column, row)
    if not made and len(problems) > 1 and len({problem for _, problem in problems}) == 1:
        raise _told(read.name, [f"all {len(problems)} rows: {problems[0][1]}"], hint)
    if problems:
        raise _told(read.name, [f"{place}: {problem}" for place, problem in problems], hint)
    return made


# -- rows of all shapes


class _LackingError(ValueError):
    """A column is missing or empty."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


def _which_column(lacking: str, row: Row) -> str:
    """How to name a column that a row has under another name: the recipe's own key where the row has a text left over."""
    key = lacking if lacking in ("prompt", "reply", "text") else ""
    others = [name for name in row if name not in ("prompt", "reply", "text") and isinstance(row[name], str)]
    meant = f', such as `{key} = "{others[-1 if key == "reply" else 0]}"`' if key and others else ""
    return f"name the columns in the recipe's table: `prompt`, `reply`, `text`{meant}"


def _chat(row: Row, source: Source) -> Chat:
    """The chat of a row in any of the shapes.

    Raises:
        ValueError: If it is none.
    """
    if row.get("messages") is not None:
        return _checked_chat(parse_chat(row))
    if row.get("conversations") is not None:
        turns = _sharegpt(row["conversations"])
        roles = [turn["role"] for turn in turns]
        if roles != ["user", "assistant"]:
            raise ValueError(f"`conversations` has the turns {', '.join(map(str, roles))}: a row is one prompt and one reply")
        return _checked_chat(parse_chat({"messages": turns}))
    if _is_alpaca(row, source):
        return Chat(_alpaca(row), _text(row, "output"))
    return Chat(_text(row, source.prompt), _text(row, source.reply))


def _prompt(row: Row, source: Source) -> str:
    """The prompt of a row in any of the shapes."""
    if source.prompt not in row and not _is_alpaca(row, source):
        turns = row.get("messages") or (_sharegpt(row["conversations"]) if row.get("conversations") is not None else None)
        if isinstance(turns, list):
            first = next((turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"), None)
            if first is None:
                raise ValueError("no turn of the user's in it")
            return _text(first, "content")
    return _alpaca(row) if _is_alpaca(row, source) else _text(row, source.prompt)


def _document(row: Row, source: Source) -> Document:
    return Document(_label(row, "title"), _label(row, "genre"), _text(row, source.text))


def _is_alpaca(row: Row, source: Source) -> bool:
    return source.prompt not in row and "instruction" in row and (source.reply in row or "output" in row)


def _alpaca(row: Row) -> str:
    instruction, given = _text(row, "instruction"), row.get("input")
    return f"{instruction}\n\n{_text(row, 'input')}" if isinstance(given, str) and given.strip() else instruction


def _sharegpt(turns: Any) -> list[dict[str, Any]]:
    """ShareGPT's turns as messages."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"`conversations` holds {json_kind(turns)}, not a list of turns")
    return [
        {
            "role": SHAREGPT.get(str(turn.get("from", turn.get("role"))), turn.get("from")),
            "content": turn.get("value", turn.get("content")),
        }
        for turn in turns
    ]


def _checked_chat(chat: Chat) -> Chat:
    for text in (chat.prompt, chat.reply):
        if flaw(text):
            raise ValueError(f"a message {flaw(text)}")
    return chat


def _text(row: Mapping[str, Any], column: str) -> str:
    """A column's text.

    Raises:
        ValueError: If there is none, with what is there instead.
    """
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        there = ", ".join(f"`{name}`" for name in row)
        raise _LackingError(column, f"column `{column}` is missing or empty (there: {there})")
    if not isinstance(value, str):
        raise ValueError(f"column `{column}` holds {json_kind(value)} ({str(value)[:40]}), not a text: put it into quotes")
    if flaw(value):
        raise ValueError(f"column `{column}` {flaw(value)}")
    return value


def _label(row: Mapping[str, Any], column: str) -> str:
    """A short text that may be missing, or a number."""
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # what Parquet makes of whole numbers beside missing ones
        value = int(value)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"column `{column}` holds {json_kind(value)}, not a text")
    return _text({column: str(value)}, column) if str(value).strip() else ""


# -- files


def read_source(source: Source) -> Rows:
    """The rows of a file (JSONL, JSON, CSV, Parquet), or of a dataset on the hub.

    Raises:
        TraitError: If it cannot be read.
    """
    path = user_path(source.path)
    if not path.exists():
        if path.suffix in KINDS or not hub.is_name(source.path):
            hint = f"files end in {', '.join(KINDS)}; a dataset on the hub is `owner/name`"
            looked = f"it was looked for in `{Path.cwd()}`, where the command runs" if not path.is_absolute() else None
            raise TraitError(f"there is no file `{source.path}`", hint=looked if path.suffix in KINDS else hint)
        return _from_hub(source)
    if path.suffix not in KINDS:
        hint = "save the sheet as CSV" if path.suffix in SHEETS else ""
        raise TraitError(f"`{source.path}` is not a {', '.join(KINDS)} file", hint=hint or None)
    try:
        data = read_bytes(path, limit=SOURCE_LIMIT)
        if data[:4] == b"PAR1":
            return Rows(source.path, *_parquet(data))
        if path.suffix == ".parquet":
            raise ValueError("is not a Parquet file")
        decoded = decode(data, f"`{source.path}`")
    except FileError as error:
        raise TraitError(error.message, hint=error.hint) from None
    except ValueError as error:
        raise TraitError(str(error) if str(error).startswith("`") else f"`{source.path}` {error}") from None
    reader = {".jsonl": _jsonl, ".json": _json}.get(path.suffix, _csv)
    rows, places = reader(decoded.text, source.path)
    return Rows(source.path, rows, places, (decoded.note,) if decoded.note else ())


def _jsonl(text: str, name: str) -> tuple[list[Row], list[str]]:
    rows, places, problems = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "it")
            if not isinstance(row, dict):
                raise ValueError(f"holds {json_kind(row)}, not an object")
            rows.append(row)
            places.append(f"row {len(rows)}" if number == len(rows) else f"line {number}")
        except ValueError as error:
            problems.append(f"line {number}: {getattr(error, 'message', error)}")
    if problems:
        raise _told(name, problems, None)
    return rows, places


def _json(text: str, name: str) -> tuple[list[Row], list[str]]:
    try:
        value = parse_json(text, f"`{name}`")
    except FileError as error:
        if "Extra data" in error.message:  # an object a line
            return _jsonl(text, name)
        raise TraitError(error.message) from None
    if isinstance(value, dict):  # `{"data": [...]}`
        lists = [inner for inner in value.values() if isinstance(inner, list) and all(isinstance(one, dict) for one in inner)]
        value = lists[0] if len(lists) == 1 and "messages" not in value and "conversations" not in value else [value]
    if not isinstance(value, list):
        raise TraitError(f"`{name}` holds {json_kind(value)}: a list of rows is needed")
    others = [(number, row) for number, row in enumerate(value, 1) if not isinstance(row, dict)]
    problems = [f"row {number}: holds {json_kind(row)}, not an object" for number, row in others]
    if problems:
        raise _told(name, problems, None)
    return value, [f"row {number}" for number in range(1, len(value) + 1)]


def _csv(text: str, name: str) -> tuple[list[Row], list[str]]:
    csv.field_size_limit(SOURCE_LIMIT)
    head = text.split("\n", 1)[0]
    separator = max(SEPARATORS, key=lambda each: (len(next(csv.reader([head], delimiter=each), [])), each == ","))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[Row] = []
    places: list[str] = []
    try:
        columns = [column.strip() for column in next(lines, [])]
        twice = [column for place, column in enumerate(columns) if column in columns[:place]]
        if twice:
            raise ValueError(f"column `{twice[0]}` is there twice")
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            place = f"row {len(rows) + 1}"
            if len(cells) > len(columns):
                many = f"{len(cells)} cells for {len(columns)} columns"
                raise ValueError(f"{place} has {many}: a text with `{separator}` needs quotes")
            rows.append(dict(zip(columns, cells, strict=False)))
            places.append(place)
    except csv.Error as error:
        raise TraitError(f"`{name}`, line {lines.line_num}: {error}") from None
    except ValueError as error:
        raise TraitError(f"`{name}`, {error}") from None
    return rows, places


def _parquet(data: bytes) -> tuple[list[Row], list[str]]:
    import pyarrow.parquet  # type: ignore[import-untyped]  # heavy: only where a recipe brings such a file

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # the library raises whatever its parts do
        raise ValueError(f"cannot be read as Parquet: {error}") from None
    return rows, [f"row {number}" for number in range(1, len(rows) + 1)]


def _from_hub(source: Source) -> Rows:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # heavy: only where a recipe names one

    # what it says of each try is said once, below
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        rows = [dict(row) for row in datasets.load_dataset(source.path, split=source.split)]
    except Exception as error:  # see `_parquet`
        raise TraitError(
            f"dataset `{source.path}` cannot be read: {error}", hint=f"there is no file `{source.path}` either"
        ) from None
    return Rows(source.path, rows, list(_numbered(rows)))


def _numbered(rows: Sequence[Row]) -> Iterator[str]:
    return (f"row {number}" for number in range(1, len(rows) + 1))
