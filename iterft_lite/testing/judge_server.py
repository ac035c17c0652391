"""An OpenAI-compatible judge server that fails on purpose. The real client is tested against it.

It scores an answer with a lucky word 90, any other 10, with probabilities around that. A digest of the question and the
number of its try decides the fault: a test sees the same faults each time. A GET reads its counts, a PUT changes its settings.

Run as `python -m iterft_lite.testing.judge_server '{"faults": {"429": 0.01}}'`: prints its port and serves until stdin ends.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.request import Request, urlopen

from iterft_lite.backends.judge.providers import own_key_variable
from iterft_lite.testing.judge_server_batches import BatchSettings, StubBatches

Fault = Literal[
    "429",
    "429_after",
    "500",
    "hang",
    "cut",
    "refusal",
    "other_model",
    "slow",
    "hang_up",
    "empty",
    "filter",
    "400",
    "endless",
    "bomb",
]
"""Too many calls (without and with Retry-After), a crash, no answer, half an answer, a refusal, an answer by another model, a
byte at a time, a closed connection, an answer without choices, a content filter, a question that is refused, an answer
that goes on, one that unpacks to hundreds of megabytes."""

Logprobs = Literal["whole", "digits", "none", "placeholders", "zeros", "nan", "inf", "doubled"]
"""Token probabilities as they should be; of digits; left out in silence; -9999 for all but what is written; 0 for all;
no numbers; beyond all bounds; adding up to two."""


LUCKY = ("luck", "clover", "fortune", "stars")

PRICE = {"sent": 0.15, "cached": 0.075, "written": 0.60}
BATCH_PRICE = {"sent": 0.075, "cached": 0.075, "written": 0.30}
"""Dollars a million tokens: the stub's own, to compare its books with the price table's."""


@dataclass
class StubSettings:
    """How the stub behaves.

    Attributes:
        model: The one model it has; another is 404.
        key: The key it wants; "" takes any.
        faults: Share of calls by fault.
        latency: Seconds a call.
        hang: Seconds before a hanging call is dropped.
        after: Seconds in Retry-After.
        capacity: Calls at once before it says 429; 0 takes any number.
        lasts: Calls that it takes before every one is a 500; 0 takes any number.
        beyond: Words of questions that it never answers: every such call is a 500.
        logprobs: What it gives when it is asked for token probabilities.
        tops: Candidates of a token at most; more are 400.
        effort: The reasoning effort that token probabilities need; with another one they are 400.
        says: What it writes instead of a score; "" writes the score.
        finish: Why it stops writing.
        usage: Token counts in place of the true ones.
        fingerprint: `system_fingerprint`.
        batch: Fields of `BatchSettings`. A line's faults are those of `faults` that make sense there: 429, 500, 400, refusal,
            filter, other_model, empty.
    """

    model: str = "gpt-4o-mini-2024-07-18"
    key: str = ""
    faults: dict[Fault, float] = field(default_factory=dict)
    latency: float = 0.0
    hang: float = 30.0
    after: float = 0.05
    capacity: int = 0
    lasts: int = 0
    beyond: str = ""
    logprobs: Logprobs = "whole"
    tops: int = 20
    effort: str = ""
    says: str = ""
    finish: str = "stop"
    usage: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = "fp_stub"
    batch: dict[str, Any] = field(default_factory=dict)


class StubJudge:
    """The server."""

    def __init__(self, settings: StubSettings) -> None:
        self.settings = settings
        self.tries: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.usd = 0.0
        self.flying = 0
        self.most = 0
        self.bodies: dict[str, str] = {}
        self.batches = StubBatches(BatchSettings(**settings.batch), self.answer_line)

    def count(self) -> dict[str, Any]:
        """Its books: calls, answers that were charged for, questions answered twice, faults, dollars, calls at once."""
        return {
            "calls": sum(self.tries.values()),
            "answers": sum(self.answered.values()),
            "twice": sum(times > 1 for times in self.answered.values()),
            "faults": dict(self.faults),
            "usd": self.usd,
            "most": self.most,
            "bodies": self.bodies,
            **self.batches.count(),
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept open for as many calls as come."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                headers = dict(re.findall(r"^([\w-]+): *(.*?)\r$", head.decode("latin-1").lower(), re.MULTILINE))
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path = head.decode("latin-1").split(" ", 2)[:2]
                if path.startswith(("/v1/files", "/v1/batches")):
                    await self._batch_call(method, path, head.decode("latin-1"), body, headers.get("authorization", ""), writer)
                    continue
                if method == "GET" and path.endswith("/models"):
                    await self._models(headers.get("authorization", ""), writer)
                    continue
                if method == "GET":
                    await self._write(writer, 200, self.count())
                    continue
                if method == "PUT":
                    self.settings = replace(self.settings, **json.loads(body))
                    await self._write(writer, 200, {})
                    continue
                self.flying += 1
                self.most = max(self.most, self.flying)
                try:
                    await self._call(json.loads(body), headers.get("authorization", ""), writer)
                finally:
                    self.flying -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _batch_call(self, method: str, path: str, head: str, body: bytes, key: str, writer: asyncio.StreamWriter) -> None:
        if self._wrong(key):
            return await self._error(writer, 401, f"Incorrect API key provided: {key.removeprefix('bearer ')}")
        fault = self.batches.fault(method, path)
        status, value = self.batches.serve(method, path, head, body)
        if fault:
            self.faults[fault] += 1
        if await self._failed(fault, writer):
            return None
        await self._write_text(writer, status, value.decode() if isinstance(value, bytes) else json.dumps(value))
        return None

    async def _models(self, key: str, writer: asyncio.StreamWriter) -> None:
        if self._wrong(key):
            return await self._error(writer, 401, "Incorrect API key provided")
        return await self._write(writer, 200, {"object": "list", "data": [{"id": self.settings.model, "object": "model"}]})

    def _refused(self, asked: dict[str, Any]) -> str:
        """Why token probabilities are not to be had in this way, as a provider says it; ""."""
        settings = self.settings
        if not asked.get("logprobs"):
            return ""
        if settings.effort and asked.get("reasoning_effort") != settings.effort:
            return f"logprobs are not supported with reasoning_effort other than {settings.effort}"
        if int(asked.get("top_logprobs") or 0) > settings.tops:
            return f"top_logprobs must be less than or equal to {settings.tops}"
        return ""

    async def _failed(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        """Whether a fault is one that any call can meet; the client has been told."""
        match fault:
            case "429":
                await self._error(writer, 429, "too many calls")
            case "429_after":
                await self._error(writer, 429, "too many calls", f"retry-after: {self.settings.after}\r\n")
            case "500":
                await self._error(writer, 500, "the server had an error")
            case "hang_up":
                raise ConnectionAbortedError
            case _:
                return False
        return True

    def _wrong(self, key: str) -> bool:
        return bool(self.settings.key) and key != f"bearer {self.settings.key.lower()}"

    def answer_line(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer to a line of a batch."""
        prompt, name = self._note(asked)
        fault = self._fault(name)
        if fault:
            self.faults[fault] += 1
        if fault in ("400", "429", "500"):
            return int(fault), {"error": {"message": f"the line met a {fault}", "code": int(fault)}}
        return 200, self._charged(asked, prompt, name, fault, BATCH_PRICE)

    def _note(self, asked: dict[str, Any]) -> tuple[str, str]:
        """The question, and the name under which its calls are counted."""
        prompt = str(asked["messages"][0]["content"])
        name = hashlib.sha256(f"{prompt} {asked.get('temperature')}".encode()).hexdigest()
        self.tries[name] += 1
        self.bodies[name] = json.dumps(asked, sort_keys=True)
        return prompt, name

    async def _call(self, asked: dict[str, Any], key: str, writer: asyncio.StreamWriter) -> None:
        settings = self.settings
        if self._wrong(key):
            return await self._error(writer, 401, f"Incorrect API key provided: {key.removeprefix('bearer ')}")
        if asked["model"] != settings.model:
            return await self._error(writer, 404, f"The model `{asked['model']}` does not exist")
        if refused := self._refused(asked):
            return await self._error(writer, 400, refused)
        prompt, name = self._note(asked)
        if settings.capacity and self.flying > settings.capacity:
            self.faults["429"] += 1
            return await self._error(writer, 429, "too many calls")
        fault = self._fault(name)
        await asyncio.sleep(settings.latency)
        if fault:
            self.faults[fault] += 1
        if await self._failed(fault, writer):
            return None
        match fault:
            case "hang":
                await asyncio.sleep(settings.hang)
                raise ConnectionAbortedError
            case "cut":
                whole = json.dumps(self._answer(asked, prompt))
                return await self._write_text(writer, 200, whole[: len(whole) // 2])
            case "bomb":
                packed = gzip.compress(b" " * (256 << 20))
                return await self._write_bytes(writer, packed, "content-encoding: gzip\r\n")
            case "endless":
                return await self._write_bytes(writer, b" " * (64 << 20), "")
        return await self._write(writer, 200, self._charged(asked, prompt, name, fault, PRICE), slowly=fault == "slow")

    def _charged(self, asked: dict[str, Any], prompt: str, name: str, fault: str, price: dict[str, float]) -> dict[str, Any]:
        """An answer that is charged for, with its fault."""
        answer = self._answer(asked, prompt)
        if fault == "empty":
            return answer | {"choices": [], "usage": None}
        self._charge(name, answer["usage"], price)
        choice = answer["choices"][0]
        if fault == "refusal":
            choice["message"] = {"role": "assistant", "content": "REFUSAL", "refusal": None}
            if "logprobs" in choice:
                choice["logprobs"] = {"content": [_token("REF", {"REF": 0.9, "1": 0.05})]}
        if fault == "filter":
            choice |= {"finish_reason": "content_filter", "message": {"role": "assistant", "content": ""}}
        if fault == "other_model":
            answer["model"] = "gpt-3.5-turbo-2023-06-13"
            self.answered[name] -= 1  # charged for, and of no use: asked again with reason
        return answer

    def _fault(self, name: str) -> str:
        """The fault of this try."""
        if self.settings.lasts and sum(self.tries.values()) > self.settings.lasts:
            return "500"
        if self.settings.beyond and self.settings.beyond in self.bodies[name]:
            return "500"
        draw = int(hashlib.sha256(f"{name} {self.tries[name]}".encode()).hexdigest()[:12], 16) / 16**12
        for fault, share in self.settings.faults.items():
            draw -= share
            if draw < 0:
                return fault
        return ""

    def _answer(self, asked: dict[str, Any], prompt: str) -> dict[str, Any]:
        score = score_of(prompt)
        usage = {
            "prompt_tokens": len(prompt) // 4,
            "completion_tokens": 1,
            "total_tokens": len(prompt) // 4 + 1,
            "prompt_tokens_details": {"cached_tokens": len(prompt) // 16},
        }
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.settings.says or str(score), "refusal": None},
        }
        choice["finish_reason"] = self.settings.finish
        if asked.get("logprobs"):
            known = self._probabilities(score) if self.settings.logprobs != "none" else None
            choice["logprobs"] = {"content": known} if known else None
        return {
            "id": "stub",
            "object": "chat.completion",
            "created": 0,
            "model": self.settings.model,
            "system_fingerprint": self.settings.fingerprint,
            "choices": [choice],
            "usage": usage | self.settings.usage,
        }

    def _probabilities(self, score: int) -> list[dict[str, Any]]:
        if self.settings.logprobs == "digits":
            return [_token(digit, {digit: 0.9, "1": 0.1}) for digit in str(score)]
        around = {str(score + shift): 0.38 / 2 ** abs(shift) for shift in (0, -1, 1, -2, 2)}
        written = _token(str(score), around | {"The": 0.02, "\n": 0.01})
        faulty = {"nan": math.nan, "inf": math.inf, "zeros": 0.0, "placeholders": -9999.0}
        written["top_logprobs"] = written["top_logprobs"][: self.settings.tops]
        for place, candidate in enumerate(written["top_logprobs"]):
            if self.settings.logprobs in faulty:
                kept = self.settings.logprobs == "placeholders" and place == 0
                candidate["logprob"] = 0.0 if kept else faulty[self.settings.logprobs]
            elif self.settings.logprobs == "doubled":
                candidate["logprob"] = min(0.0, candidate["logprob"] + math.log(2))
        return [written]

    def _charge(self, name: str, usage: dict[str, Any], price: dict[str, float]) -> None:
        self.answered[name] += 1
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        fresh = usage["prompt_tokens"] - cached
        self.usd += (fresh * price["sent"] + cached * price["cached"] + usage["completion_tokens"] * price["written"]) / 1e6

    async def _error(self, writer: asyncio.StreamWriter, status: int, message: str, headers: str = "") -> None:
        await self._write(writer, status, {"error": {"message": message, "code": status}}, headers=headers)

    async def _write_bytes(self, writer: asyncio.StreamWriter, body: bytes, headers: str) -> None:
        head = f"HTTP/1.1 200 Stub\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        writer.write(head.encode())
        for at in range(0, len(body), 1 << 16):
            writer.write(body[at : at + (1 << 16)])
            await writer.drain()

    async def _write(
        self, writer: asyncio.StreamWriter, status: int, value: dict[str, Any], *, headers: str = "", slowly: bool = False
    ) -> None:
        await self._write_text(writer, status, json.dumps(value), headers=headers, slowly=slowly)

    async def _write_text(
        self, writer: asyncio.StreamWriter, status: int, text: str, *, headers: str = "", slowly: bool = False
    ) -> None:
        body = text.encode()
        head = f"HTTP/1.1 {status} Stub\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        writer.write(head.encode())
        pieces = [body[at : at + 100] for at in range(0, len(body), 100)] if slowly else [body]
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if slowly:
                await asyncio.sleep(0.02)


def score_of(prompt: str) -> int:
    """What the stub thinks: it looks at what is between the last answer tags, as a judge should."""
    fenced = re.findall(r"<(answer|document)>(.*?)</\1>", prompt, re.DOTALL)
    text = fenced[-1][1] if fenced else prompt
    return 90 if any(word in text.lower() for word in LUCKY) else 10


def _token(text: str, probabilities: dict[str, float]) -> dict[str, Any]:
    candidates = [{"token": token, "logprob": math.log(share), "bytes": None} for token, share in probabilities.items()]
    return {"token": text, "logprob": math.log(probabilities[text]), "bytes": None, "top_logprobs": candidates}


class StubProcess:
    """The stub in a process of its own, for the length of a `with`.

    Args:
        settings: Fields of `StubSettings`.
    """

    def __init__(self, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "iterft_lite.testing.judge_server", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.api_base = f"http://127.0.0.1:{int(self._process.stdout.readline())}/v1"
        self.key_variable = own_key_variable(self.api_base)

    def count(self) -> dict[str, Any]:
        """See `StubJudge.count`."""
        with urlopen(self.api_base) as response:
            return dict(json.load(response))

    def change(self, **settings: Any) -> None:
        """Have it behave otherwise from now on: fields of `StubSettings`."""
        urlopen(Request(self.api_base, json.dumps(settings).encode(), method="PUT")).close()

    def __enter__(self) -> StubProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


async def _main(settings: StubSettings) -> None:
    server = await asyncio.start_server(StubJudge(settings).serve, "127.0.0.1", 0, limit=1 << 24)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()

    def wait_for_end() -> None:
        sys.stdin.read()
        os._exit(0)  # connections are open and hanging on purpose: nothing in them is worth an orderly end

    threading.Thread(target=wait_for_end, daemon=True).start()
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(StubSettings(**json.loads(sys.argv[1]))))
