"""What a run knows of its batches: a note and the requests of each, in the run's folder.

    LOGS/batches/NAME.json    which questions, the provider's name for the batch, the answers that have come so far
    LOGS/batches/NAME.jsonl   the requests, as they are uploaded

They are in the run's folder, not beside the verdict cache, because the dollars and the rows are the run's, and because whoever
copies the folder to another machine goes on there. A folder that has lost them loses nothing that is paid for: the batch
carries the digest of its requests, and the provider lists its batches.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from iterft_lite.digests import Json, digest
from iterft_lite.files import read_record, read_rows, write_json, write_rows

FOLDER = "batches"

Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class BatchNote:
    """Questions that go through the batch endpoint together, until all are answered; it may take more than one batch.

    Attributes:
        path: Of the note.
        asked: By verdict key, the question that pays for it.
        made: When (seconds since 1970).
        number: Batches that have ended so far.
        file, batch: The provider's names for the uploaded requests and the batch; "" before it has given them.
        replies: By verdict key, what has come; fields of `JudgeResponse`.
        reasons: By verdict key, why its last try gave none.
        lost: By verdict key, dollars of tries that gave none.
        charged: By batch that has ended, its dollars.
        full_since: Since when the provider's queue has been full for it; 0 if it is not.
    """

    path: Path
    asked: dict[str, str]
    made: float = field(default_factory=time.time)
    number: int = 0
    file: str = ""
    batch: str = ""
    replies: dict[str, dict[str, Json]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    lost: dict[str, Dollars] = field(default_factory=dict)
    charged: dict[str, Dollars] = field(default_factory=dict)
    full_since: float = 0.0

    @property
    def rest(self) -> list[str]:
        """Verdict keys without a reply, in order."""
        return sorted(self.asked.keys() - self.replies.keys())

    @property
    def digest(self) -> str:
        """What the next batch, or the open one, is known by at the provider."""
        return digest([self.rest, self.number])

    def save(self) -> None:
        """Write the note as a whole."""
        write_json(self.path, {name: value for name, value in asdict(self).items() if name != "path"})

    def write_requests(self, requests: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the requests, by verdict key."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self._requests, [requests[key] for key in self.rest])

    def requests(self) -> list[dict[str, Json]]:
        """The requests that have no reply."""
        rest = set(self.rest)
        return [row for row in read_rows(self._requests) if row.get("custom_id") in rest]

    def remove(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)
        self._requests.unlink(missing_ok=True)

    @property
    def _requests(self) -> Path:
        return self.path.with_suffix(".jsonl")


def new_note(folder: Path, asked: Mapping[str, str]) -> BatchNote:
    """A note that is not written yet."""
    return BatchNote(folder / f"{digest(sorted(asked))[:16]}.json", dict(asked))


def read_notes(folder: Path) -> list[BatchNote]:
    """The notes in a folder, the oldest first; a running judge may remove one while they are read.

    Raises:
        FileError: If one is damaged.
    """
    notes = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            notes.append(read_record(path, BatchNote, {"path": path}))
    return sorted(notes, key=lambda note: (note.made, note.path.name))


def batches_out(root: Path) -> list[int]:
    """Questions of each batch that the runs in a folder, and other judges on their answers, have at a provider now."""
    # os.walk passes over folders that a run removes meanwhile
    folders = sorted(
        Path(place) / FOLDER for place, names, _ in os.walk(root) if Path(place).name == "logs" and FOLDER in names
    )
    return [len(note.rest) for folder in folders for note in read_notes(folder) if note.batch and note.rest]
