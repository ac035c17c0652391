"""What judges have said, on disk, shared between runs: the same question is never paid twice."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from iterft_lite.cache import cache_folder
from iterft_lite.digests import digest
from iterft_lite.protocols import JudgeResponse

WAIT = 60.0
"""Seconds to wait while another process writes."""


def verdict_key(name: str, revision: str, method: Literal["odds", "samples"], prompt: str, sample: int) -> str:
    """What makes two questions the same: judge, revision, method, the whole filled rubric, and the sample's number."""
    return digest([name, revision, method, prompt, sample])


class VerdictCache:
    """Replies by key, in one SQLite file that several processes may use at once.

    A reply is in the file when `put` returns: a process killed later has lost nothing.

    Args:
        path: The file; the user's cache folder if None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "verdicts.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        # a write-ahead log without a sync each time: safe against killed processes, a power cut may cost the last replies
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, at REAL NOT NULL)")

    def get(self, key: str, ask_id: str) -> JudgeResponse | None:
        """The reply to an ask, now free of charge; None if nobody has asked that yet."""
        row = self._file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        known = json.loads(row[0])
        odds = tuple((str(text), float(share)) for text, share in known.pop("odds"))
        return replace(JudgeResponse(**known, odds=odds), id=ask_id, usd=0.0, seconds=0.0, cached=True)

    def put(self, key: str, reply: JudgeResponse) -> None:
        """Keep a reply. Failures are not kept: they are asked again. The first of two processes wins."""
        if not reply.failure:
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, json.dumps(vars(reply)), time.time()))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
