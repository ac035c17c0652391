"""The stub judge's files and batches: OpenAI's endpoints with their failures.

The stub answers and charges the lines when the batch is made. Time then changes only the reported state. So its counts are
right for a batch that nobody collects, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
"""Status and body of the answer to a call's body."""

PAGE = 3
"""Batches on a page of the list at most: few, so that readers have to turn pages."""


@dataclass(frozen=True)
class BatchSettings:
    """How batches go.

    Attributes:
        seconds: From a batch's making to its end.
        looks: How often a batch is shown before it has ended, whatever the time.
        fails: Code with which every batch fails validation.
        full: So many batches, the first ones, fail because the queue is full.
        ends: The state in which the first `ending` batches end, not all of their lines done.
        ending: How many do.
        done: Share of their lines that is done then.
        late: So many times a finished batch is shown without its files.
        cut: So many times a file is sent without its end.
        faults: Share of GETs by fault: 429, 429_after, 500, hang_up.
    """

    seconds: float = 0.0
    looks: int = 0
    fails: str = ""
    full: int = 0
    ends: str = "expired"
    ending: int = 0
    done: float = 0.5
    late: int = 0
    cut: int = 0
    faults: dict[str, float] = field(default_factory=dict)


class StubBatches:
    """Files and batches of the stub.

    Args:
        settings: How they go.
        answer: Answers one line's body.
    """

    def __init__(self, settings: BatchSettings, answer: Answer) -> None:
        self.settings = settings
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.calls: Counter[str] = Counter()
        self._answer = answer
        self._late = settings.late
        self._cut = settings.cut

    def count(self) -> dict[str, Any]:
        """Batches that were taken, their lines, what they were told to note, and calls by kind."""
        taken = [batch for batch in self.batches.values() if not batch["errors"]]
        return {
            "batches": len(taken),
            "lines": [batch["request_counts"]["total"] for batch in taken],
            "metadata": [batch["metadata"] for batch in taken],
            "batch_calls": dict(self.calls),
        }

    def fault(self, method: str, path: str) -> str:
        """The fault of this call; drawn from how many there were."""
        if method != "GET":
            return ""
        number = sum(self.calls.values())
        draw = int(hashlib.sha256(f"{path.split('?')[0].count('/')} {number}".encode()).hexdigest()[:12], 16) / 16**12
        for fault, share in self.settings.faults.items():
            draw -= share
            if draw < 0:
                return fault
        return ""

    def serve(self, method: str, path: str, head: str, body: bytes) -> tuple[int, dict[str, Any] | bytes]:
        """Status and body for a call under /v1/files or /v1/batches."""
        place, _, query = path.removeprefix("/v1/").partition("?")
        kind, name, what = ([*place.split("/"), "", ""])[:3]
        self.calls[f"{method} {kind}{'/ID' if name else ''}{'/' + what if what else ''}"] += 1
        if (method, kind) == ("POST", "files"):
            return 200, self._upload(head, body)
        if (method, kind) == ("POST", "batches"):
            return self._make(json.loads(body))
        if kind == "files" and name in self.files:
            whole, self._cut = self.files[name], self._cut - 1
            return 200, whole if self._cut < 0 else whole[: len(whole) * 2 // 3]
        if kind == "batches" and not name:
            return 200, self._page(query)
        if kind == "batches" and name in self.batches:
            return 200, self._shown(self.batches[name])
        return 404, _error(404, f"No such object: {name}")

    def _upload(self, head: str, body: bytes) -> dict[str, Any]:
        found = re.search(r"boundary=([^\s;]+)", head)
        assert found is not None, "an upload has parts"
        for part in body.split(b"--" + found[1].encode()):
            head_, _, content = part.partition(b"\r\n\r\n")
            if b'name="file"' in head_:
                name = f"file-{len(self.files)}"
                self.files[name] = content.removesuffix(b"\r\n")
        about = {"object": "file", "created_at": 0, "filename": "asked.jsonl", "purpose": "batch", "status": "processed"}
        return {"id": name, "bytes": len(self.files[name]), **about}

    def _make(self, asked: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Take a batch; its lines are answered at once."""
        settings, number = self.settings, len(self.batches)
        if asked["input_file_id"] not in self.files:
            return 400, _error(400, f"No such File object: {asked['input_file_id']}")
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        failed = settings.fails or ("token_limit_exceeded" if number < settings.full else "")
        ends = "failed" if failed else settings.ends if number < settings.full + settings.ending else "completed"
        names = [line["custom_id"] for line in lines]
        if len(set(names)) < len(names):
            failed, ends = "duplicate_custom_id", "failed"
        said = f"the stub says {failed}"
        counts = {"total": len(lines), "completed": 0, "failed": 0}
        batch: dict[str, Any] = {
            "id": f"batch_{number}",
            "object": "batch",
            "endpoint": asked["endpoint"],
            "completion_window": asked["completion_window"],
            "input_file_id": asked["input_file_id"],
            "metadata": asked.get("metadata"),
            "created_at": int(time.time()),
            "request_counts": counts,
            "errors": {"object": "list", "data": [{"code": failed, "line": 1, "message": said}]} if failed else None,
            "output_file_id": None,
            "error_file_id": None,
            "_made": time.monotonic(),
            "_looks": 0,
            "_ends": ends,
        }
        if not failed:
            share = settings.done if ends != "completed" else 1.0
            good: list[dict[str, Any]] = []
            bad: list[dict[str, Any]] = []
            for place, line in enumerate(lines):
                if place >= share * len(lines):
                    why = {"code": f"batch_{ends}", "message": f"This request could not be executed: the batch has {ends}."}
                    bad.append({"id": f"r{place}", "custom_id": line["custom_id"], "response": None, "error": why})
                    continue
                status, answer = self._answer(line["body"])
                response = {"status_code": status, "request_id": f"q{place}", "body": answer}
                one: dict[str, Any] = {"id": f"r{place}", "custom_id": line["custom_id"], "response": response, "error": None}
                (good if status == 200 else bad).append(one)
            counts |= {"completed": len(good), "failed": len(bad)}
            for field_, rows in (("output_file_id", good), ("error_file_id", bad)):
                if rows:
                    batch[field_] = f"file-{len(self.files)}"
                    # the order of the answers is not that of the questions
                    self.files[batch[field_]] = b"".join(json.dumps(row).encode() + b"\n" for row in rows[::-1])
        self.batches[batch["id"]] = batch
        return 200, self._shown(batch)

    def _shown(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as it looks by now."""
        shown = {key: value for key, value in batch.items() if not key.startswith("_")}
        passed = (time.monotonic() - batch["_made"]) / (self.settings.seconds or 1e-9)
        if self.settings.looks:
            passed = batch["_looks"] / self.settings.looks
            self.batches[batch["id"]]["_looks"] += 1
        if passed < 1:
            state = "validating" if passed < 0.1 else "in_progress" if passed < 0.9 else "finalizing"
            done = int(min(1.0, passed) * batch["request_counts"]["completed"])
            counts = {"total": batch["request_counts"]["total"], "completed": done, "failed": 0}
            hidden = {"output_file_id": None, "error_file_id": None, "errors": None}
            return shown | {"status": state, "request_counts": counts} | hidden
        if batch["_ends"] == "completed" and self._late > 0:
            self._late -= 1
            shown |= {"output_file_id": None, "error_file_id": None}
        return shown | {"status": batch["_ends"], "completed_at": int(time.time())}

    def _page(self, query: str) -> dict[str, Any]:
        """Batches, the newest first."""
        newest = list(self.batches.values())[::-1]
        after = re.search(r"after=([^&]+)", query)
        names = [batch["id"] for batch in newest]
        start = names.index(after[1]) + 1 if after else 0
        page = [self._shown(batch) for batch in newest[start : start + PAGE]]
        return {"object": "list", "data": page, "has_more": start + PAGE < len(newest)}


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "code": status}}
