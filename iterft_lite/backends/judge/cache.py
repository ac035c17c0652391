"""What judges have said, on disk, shared between runs: the same question is never paid twice."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from iterft_lite.backends.judge.reply_size import valid
from iterft_lite.cache import cache_folder
from iterft_lite.digests import digest
from iterft_lite.protocols import JudgeResponse

WAIT = 60.0
"""Seconds to wait while another process writes."""

READ_BY = {"logprobs": "odds", "samples": "samples"}
"""How a method is named in keys: as version 0.1 did, so that what was paid for then is still found."""


def verdict_key(
    name: str, revision: str, method: Literal["logprobs", "samples"], prompt: str, sample: int, settings: str = ""
) -> str:
    """What makes two questions the same: judge, revision, method, settings, the whole filled rubric, and the sample's
    number."""
    return digest([name, revision, READ_BY[method], prompt, sample, *([settings] if settings else [])])


def reply_of(known: Mapping[str, Any]) -> JudgeResponse:
    """A reply out of its stored fields, also those of version 0.1."""
    fields = {("probabilities" if name == "odds" else name): value for name, value in known.items()}
    fields["probabilities"] = tuple((valid(text), float(share)) for text, share in fields.get("probabilities", ()))
    method = "text" if fields.get("method") == "text" else "logprobs"
    return JudgeResponse(**{**fields, "method": method, "text": valid(fields["text"]), "model": valid(fields.get("model"))})


class VerdictCache:
    """Replies by key, in one SQLite file that several processes may use at once.

    A reply is in the file when `put` returns: a process killed later has lost nothing. A question that one process is asking is
    claimed by it; another one waits for the reply instead of paying for it too.

    Args:
        path: The file; the user's cache folder if None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "verdicts.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        self._me = f"{socket.gethostname()} {os.getpid()} {id(self)}"
        # a write-ahead log without a sync each time: safe against killed processes, a power cut may cost the last replies
        _use_write_ahead_log(self._file)
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, at REAL NOT NULL)")
        self._file.execute("CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL)")

    def get(self, key: str, ask_id: str) -> JudgeResponse | None:
        """The reply to an ask, now free of charge; None if nobody has asked that yet."""
        row = self._file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        return replace(reply_of(json.loads(row[0])), id=ask_id, usd=0.0, seconds=0.0, cached=True)

    def put(self, key: str, reply: JudgeResponse) -> None:
        """Keep a reply. Failures are not kept: they are asked again. The first of two processes wins."""
        if not reply.failure:
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, json.dumps(vars(reply)), time.time()))
        self.release(key)

    def claim(self, key: str, seconds: float) -> bool:
        """Take a question, or hold on to it; False while another process that is alive has it.

        A claim ends with its reply, when it is released, with its process, or after some time without a word.

        Args:
            seconds: For how long.
        """
        now = time.time()
        row = self._file.execute("SELECT owner, until FROM claims WHERE key = ?", (key,)).fetchone()
        if row is not None and row[0] != self._me and row[1] > now and _is_alive(row[0]):
            return False
        # the owner is named again: of two who found the same dead claim one takes it
        if row is None:
            done = self._file.execute("INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", (key, self._me, now + seconds))
        else:
            done = self._file.execute(
                "UPDATE claims SET owner = ?, until = ? WHERE key = ? AND owner = ?", (self._me, now + seconds, key, row[0])
            )
        return done.rowcount == 1

    def release(self, key: str) -> None:
        """Give a question up."""
        self._file.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self._me))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _use_write_ahead_log(file: sqlite3.Connection) -> None:
    """Switch a database over; of two processes that find a new one at once, SQLite refuses the second instead of waiting."""
    end = time.monotonic() + WAIT
    while True:
        try:
            file.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def _is_alive(owner: str) -> bool:
    """Whether a claim's process may still be there: of another machine nothing is known."""
    host, process, _ = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
