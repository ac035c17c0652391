"""The completion record of a finished step: what it found out, and digests of everything that it rests on.

    completion.json   {"format": 3, "key", "seconds", "results", "files", "inputs", "versions", "step", "digest"}

`files` names every file of the step with bytes and SHA-256, of a GGUF over its pieces; `step` is the digest of step.json;
`digest` is the digest of the record without itself: a changed number in it is found. Version 0.1 wrote `sealed.json` without
the last two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from iterft_lite.digests import LEAST_PIECE, Json, digest
from iterft_lite.errors import FileError, StoreError
from iterft_lite.files import read_object, write_json

FORMAT = 3

RECORD = "completion.json"
OLD_RECORD = "sealed.json"
"""The record's name in version 0.1."""

BOOKKEEPING = frozenset({"tokens_in", "tokens_out", "usd", "seconds", "cached", "calls"})
"""Fields of a verdict beside its score, which no step reads."""


class _KnownFile(BaseModel):
    """An entry of `files` in the record's file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    piece_bytes: int | None = Field(default=None, ge=LEAST_PIECE)
    rows: str | None = None


class _Record(BaseModel):
    """A completion record's file."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(pattern="^[0-9a-f]{64}$")
    seconds: float = Field(ge=0, allow_inf_nan=False)
    results: dict[str, Any]
    files: dict[str, _KnownFile]
    inputs: dict[str, str] | None = None
    versions: dict[str, str] = {}
    format: int = FORMAT
    step: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Completion:
    """The completion record of a step.

    Attributes:
        key: The step's.
        seconds: Spent on it, all sessions together.
        results: What the step found out, for the report; JSON.
        files: Relative path to SHA-256 and bytes; of rows that were appended also `rows`, a digest without their order; of a
            model's GGUF also `piece_bytes`, the size of the pieces over whose SHA-256s the digest is (since format 3).
        inputs: By role, the `result` of each step that was read, as it was then; None where version 0.1 did not note it.
        versions: Of the libraries that made the step (`versions.py`); empty in such records.
        step: Digest of step.json; "" in such records.
    """

    key: str
    seconds: float
    results: dict[str, Json]
    files: dict[str, dict[str, Json]]
    inputs: dict[str, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    step: str = ""

    @cached_property
    def result(self) -> str:
        """The identity of this result among results of the same step, 64 hex digits: over the key and the files' contents.

        Times, prices, versions and the order in which rows finished are left out: no step goes by them. A file that `keep`
        removed counts as it was, and a step that was done again and came to the same is the same.
        """
        return digest([self.key, {name: known.get("rows", known["sha256"]) for name, known in self.files.items()}])


def read_completion(folder: Path, hint: Callable[[], str] = str) -> Completion | None:
    """A step folder's completion record; None if there is none.

    Args:
        hint: Called for a damaged record: says what to do. It may read the whole store.

    Raises:
        StoreError: If it was changed, or is of another shape or a newer format.
    """
    for name in (RECORD, OLD_RECORD):
        path = folder / name
        try:
            return _parsed(path, read_object(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except FileError as error:
            raise StoreError(error.message, hint=hint() or error.hint) from None
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
            raise StoreError(f"`{path}` is not a completion record: {what}", hint=hint() or None) from None
        except (ValueError, RecursionError):  # no finite number, or nested too deeply: no digest can be taken of it
            raise StoreError(f"`{path}` is not a completion record: it holds what none can", hint=hint() or None) from None
    return None


def _parsed(path: Path, value: dict[str, Json]) -> Completion:
    if path.name == OLD_RECORD:
        value = {**value, "results": value.get("facts"), "format": 1}
        value.pop("facts", None)
    record = _Record.model_validate(value)
    if record.format > FORMAT:
        raise FileError(
            f"`{path}` is of format {record.format}, this version reads up to {FORMAT}",
            hint="update iterft_lite",
        )
    if record.format > 1 and record.digest != _own_digest(value):
        raise FileError(f"`{path}` was changed after the step was finished (checksum)")
    files = {name: known.model_dump(exclude_none=True) for name, known in record.files.items()}
    return Completion(record.key, record.seconds, record.results, files, record.inputs, record.versions, record.step)


def _own_digest(value: Mapping[str, Json]) -> str:
    return digest({name: each for name, each in value.items() if name != "digest"})


def write_completion(folder: Path, completion: Completion) -> None:
    """Declare a step finished."""
    value: dict[str, Json] = {"format": FORMAT, **asdict(completion)}
    # the digest is over the value as it will be read back: JSON turns tuples into lists
    value = json.loads(json.dumps(value))
    write_json(folder / RECORD, {**value, "digest": _own_digest(value)})


def rows_digest(rows: Iterable[Mapping[str, Json]]) -> str:
    """SHA-256 of rows in any order, without the bookkeeping of verdicts."""
    plain = [{key: _without(value) if isinstance(value, dict) else value for key, value in row.items()} for row in rows]
    lines = sorted(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in plain)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _without(value: Mapping[str, Json]) -> dict[str, Json]:
    return {key: each for key, each in value.items() if key not in BOOKKEEPING}
