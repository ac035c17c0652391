"""Judging through OpenAI's batch endpoint: the same questions, read the same way, at half the price, within a day.

Nothing here waits: `ask` sends what is not out yet, looks at what is, and says when to ask again. Whatever it learns is noted
(`batch_notes.py`) before the next thing is done, and everything is done so that doing it again after a kill changes nothing: a
batch is looked for at the provider by the digest of its requests before one is made, dollars are written down once by the
batch's name, and verdicts are kept in the cache under the key that a single call has.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iterft_lite.backends.judge.batch_notes import BatchNote, new_note, read_notes
from iterft_lite.backends.judge.cache import reply_of
from iterft_lite.backends.judge.prices import batch_share, price_of
from iterft_lite.backends.judge.provider import Again, GiveUp, LitellmJudge, Send, import_litellm
from iterft_lite.backends.judge.rate_limit import TRIES, wait_before
from iterft_lite.backends.judge.reply_size import LONGEST_FILE, LONGEST_REPLY, reading_up_to
from iterft_lite.errors import BackendError, BudgetError
from iterft_lite.protocols import JudgeRequest, JudgeResponse, Waiting

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000
"""Of one batch: OpenAI takes 50,000 requests and 200 MB."""

BATCHES = 3
"""Batches that a question is sent in before it is given up."""

MARK, NUMBER = "iterft_lite", "number"
"""What a batch's metadata hold: the digest of its requests, and how many batches came before it."""

LISTED_DAYS = 31
"""How far back the provider's list of batches is read: OpenAI keeps their files for 30 days."""

LONGEST_POLL = 60.0
"""Seconds between two looks at a batch at most."""

FULL_WAIT, FULL_FOR = 60.0, 24 * 3600.0
"""Seconds until a batch is offered again to a queue that was full, and until that is given up."""

TRANSFER = 600.0
"""Seconds that an upload or a download may take."""

CLOSING = 0.05
"""Seconds for connections to close."""

ENDED = ("completed", "expired", "cancelled")

KIND_OF: Mapping[int, str] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    402: "PaymentRequiredError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
}
"""The OpenAI client's exception for a status; the others are the server's."""

GO_ON = "verdicts and batches are kept; the same command collects what is done and asks what is missing"


class BatchJudge(LitellmJudge):
    """Meets the `Judge` protocol; see `LitellmJudge`.

    Args:
        notes: Folder of the notes; a path.
        sends: New questions go into batches; if not, they are asked one by one, and open batches are collected.
        poll: Seconds between two looks at a young batch.
    """

    def __init__(
        self, identity: Mapping[str, Any], *, notes: str, sends: bool = True, poll: float = 5.0, **options: Any
    ) -> None:
        super().__init__(identity, **options)
        self._folder = Path(notes)
        self._sends = sends
        self._poll = poll
        self._price = price_of(self._identity.name, batch=True)
        self._notes = read_notes(self._folder)
        self._held: dict[Path, float] = {}
        self._given: dict[Path, set[str]] = defaultdict(set)
        self._fails: dict[Path, int] = defaultdict(int)
        self._not_before: dict[Path, float] = {}
        for note in self._notes:
            self._charge(note)
            if note.batch:
                self._hold(note)

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> Waiting | None:
        """Send what is new, collect what has come; hand over when all is there."""
        self._forget()
        by_key: dict[str, list[JudgeRequest]] = defaultdict(list)
        for ask in asks:
            by_key[self.key(ask)].append(ask)
        if self._sends:
            self._notes += self._parts([ask for key, (ask, *_) in by_key.items() if self._is_new(key)])
        mine = [note for note in self._notes if by_key.keys() & note.asked.keys()]
        waits = [self._loop.run_until_complete(self._advance(note)) for note in mine]
        if left := asyncio.all_tasks(self._loop):  # litellm makes a client a call, which closes its connection afterwards
            self._loop.run_until_complete(asyncio.wait(left, timeout=CLOSING))
        if any(waits):
            return self._all(mine, waits)
        return self._hand_over(by_key, on_reply)

    def _is_new(self, key: str) -> bool:
        return not any(key in note.asked for note in self._notes) and self._cache.get(key, "") is None

    def _hand_over(self, by_key: Mapping[str, list[JudgeRequest]], on_reply: Callable[[JudgeResponse], None]) -> Waiting | None:
        """Every reply to all who asked for it: the first pays."""
        unknown: list[JudgeRequest] = []
        for key, asks in by_key.items():
            note = next((note for note in self._notes if key in note.asked), None)
            reply = reply_of(note.replies[key]) if note else self._cache.get(key, "")
            if reply is None:
                unknown += asks
                continue
            for ask in asks:
                pays = note is not None and note.asked[key] == ask.id and key not in self._given[note.path]
                free = replace(reply, usd=0.0, cached=not reply.failure, tokens_in=0, tokens_out=0)
                on_reply(replace(reply if pays or reply.cached else free, id=ask.id))
                if note is not None and pays:
                    self._given[note.path].add(key)
        return super().ask(unknown, on_reply) if unknown else None

    def _forget(self) -> None:
        """Remove the notes whose replies were handed over: who asks again has taken them in."""
        for note in [note for note in self._notes if self._given[note.path] >= note.asked.keys()]:
            note.remove()
            self._notes.remove(note)

    # -- one note

    def _parts(self, asks: Sequence[JudgeRequest]) -> Iterator[BatchNote]:
        """Notes for new questions, each no more than fits into a batch. Nothing is sent yet."""
        asked: dict[str, JudgeRequest] = {}
        size = 0
        for ask in asks:
            request = len(json.dumps(self._request(ask)).encode())
            if asked and (len(asked) == MOST_REQUESTS or size + request > MOST_BYTES):
                yield self._note(asked)
                asked, size = {}, 0
            asked[self.key(ask)] = ask
            size += request
        if asked:
            yield self._note(asked)

    def _note(self, asked: Mapping[str, JudgeRequest]) -> BatchNote:
        note = new_note(self._folder, {key: ask.id for key, ask in asked.items()})
        note.write_requests({key: self._request(ask) for key, ask in asked.items()})
        return note

    def _request(self, ask: JudgeRequest) -> dict[str, Any]:
        """A line of a batch: the body that litellm would send for the single call."""
        model = self._model().split("/", 1)[1]
        utils: Any = import_litellm().utils
        settings = utils.get_optional_params(model=model, custom_llm_provider="openai", **self._settings())
        kept = {name: value for name, value in settings.items() if name not in ("stream", "extra_body")}
        body = {"model": model, "messages": [{"role": "user", "content": ask.prompt}], **kept}
        return {"custom_id": self.key(ask), "method": "POST", "url": "/v1/chat/completions", "body": body}

    async def _advance(self, note: BatchNote) -> Waiting | None:
        """Bring a note as far as it comes now; None once all its questions have a reply.

        Raises:
            BackendError: If the provider does not take the batch, or cannot be reached.
            BudgetError: Before `max_usd` would be passed.
        """
        try:
            while note.rest:
                if time.monotonic() < self._not_before.get(note.path, 0.0):
                    return self._waiting(note, "the provider's queue is full, it will be offered again")
                if not note.batch and (waiting := await self._send_batch(note)):
                    return waiting
                if not note.batch:  # nothing is open, and nothing is to be sent
                    return None
                if waiting := await self._look(note):
                    return waiting
        except Again as error:
            return self._patience(note, error)
        except GiveUp as error:
            said = self.clean(str(error)).removeprefix("the provider refused the question: ")
            raise BackendError(f"{self._where} does not take the batch: {said}", hint=GO_ON) from None
        return None

    async def _look(self, note: BatchNote) -> Waiting | None:
        """See how the batch is doing; collect it if it has ended."""
        try:
            batch = await self._provider("aretrieve_batch", batch_id=note.batch)
        except BackendError as error:
            if error.exception != "NotFoundError":
                raise
            raise BackendError(
                f"{self._where} knows no batch `{note.batch}`",
                hint=f"it belongs to another key or account; to ask its questions again, remove `{note.path}`",
            ) from None
        if batch.status == "failed":
            return self._refused(note, batch)
        if batch.status in ENDED:
            await self._collect(note, batch)
        self._fails[note.path] = 0
        if batch.status in ENDED:
            return None
        counts = batch.request_counts
        done = counts.completed + counts.failed if counts else 0
        return self._waiting(note, batch.status.replace("_", " "), done)

    def _refused(self, note: BatchNote, batch: Any) -> Waiting:
        """A batch that the provider did not begin: free of charge, and none of it will come."""
        problems = list(getattr(batch.errors, "data", None) or [])
        said = "; ".join(f"{one.message}" + (f" (line {one.line})" if one.line else "") for one in problems[:3])
        self._release(note)
        note.batch = note.file = ""
        if any(one.code == "token_limit_exceeded" for one in problems):
            note.full_since = note.full_since or time.time()
            note.save()
            if time.time() - note.full_since < FULL_FOR:
                self._not_before[note.path] = time.monotonic() + FULL_WAIT * self._poll / 5
                return self._waiting(note, "the provider's queue is full, it will be offered again")
        note.save()
        raise BackendError(f"{self._where} refused the batch: {self.clean(said) or 'no reason is given'}", hint=GO_ON)

    # -- sending

    async def _send_batch(self, note: BatchNote) -> Waiting | None:
        """Find the note's batch at the provider, or make it."""
        found = await self._find(note)
        if found is None and not self._sends:
            self._let_go(note)
            return None
        if found is None:
            if not self._reserve(note):
                for other in [other for other in self._notes if other.batch]:  # nobody else may ask for them again
                    await self._advance(other)
                return self._waiting(note, "held back until open batches leave room in `max_usd`")
            note.save()  # what is asked together is settled: a later session finds it whatever else it knows by then
            found = await self._make(note)
        note.batch = str(found.id)
        note.save()
        self._hold(note)
        self._fails[note.path] = 0
        return None

    def _let_go(self, note: BatchNote) -> None:
        """Leave questions that are in no batch to single calls."""
        note.asked = {key: who for key, who in note.asked.items() if key in note.replies}
        if note.asked:
            note.save()
        else:
            note.remove()
            self._notes.remove(note)

    async def _find(self, note: BatchNote) -> Any:
        """The batch that holds the note's requests, should one have been made; None if none was."""
        oldest, after = time.time() - LISTED_DAYS * 86400, None
        while True:
            try:
                page = await self._provider("alist_batches", limit=100, after=after)
            except BackendError as error:
                if error.exception != "NotFoundError":
                    raise
                raise BackendError(
                    f"{self._where} has no batch endpoint", hint="set `judge_batch = false`: every verdict is asked by itself"
                ) from None
            for batch in page.data:
                about = batch.metadata or {}
                if about.get(MARK) == note.digest and about.get(NUMBER) == str(note.number) and batch.status != "failed":
                    return batch
            if not page.data or not page.has_more or page.data[-1].created_at < oldest:
                return None
            after = page.data[-1].id

    async def _make(self, note: BatchNote) -> Any:
        if not note.file:
            lines = "".join(json.dumps(row) + "\n" for row in note.requests()).encode()
            file = (f"{note.path.stem}.jsonl", lines)
            note.file = str((await self._provider("acreate_file", TRANSFER, file=file, purpose="batch")).id)
            note.save()
        return await self._provider(
            "acreate_batch",
            completion_window="24h",
            endpoint="/v1/chat/completions",
            input_file_id=note.file,
            metadata={MARK: note.digest, NUMBER: str(note.number)},
        )

    # -- collecting

    async def _collect(self, note: BatchNote, batch: Any) -> None:
        """Read an ended batch: what is done is kept, the rest is left for the next one, or given up.

        Raises:
            Again: If the answers are not there yet or came in part.
            BackendError: If the judge cannot be read as it is to be, or no line of a next batch could be answered either.
        """
        files = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        counts = batch.request_counts
        if not files and batch.status == "completed" and counts and counts.completed:
            raise Again("its answers are not there yet")
        lines = [line for name in files for line in await self._lines(name)]
        usd = 0.0
        unread: BackendError | None = None
        fatal: BackendError | None = None
        reasons = dict.fromkeys(note.rest, "no answer in the batch" if batch.status == "completed" else f"batch {batch.status}")
        seconds = max(0.0, float((batch.completed_at or batch.created_at) - batch.created_at))
        for line in lines:
            key = line.get("custom_id")
            if key not in reasons:
                continue
            answered = self._response(line)
            # whose reply it is; what was asked is not needed to read it
            ask = JudgeRequest(note.asked[key], "trait", "", "", "")
            usd += self._used(ask, answered, self._price).usd if answered is not None else 0.0
            lost = note.lost.get(key, 0.0)
            try:
                if answered is None:
                    raise self._line_error(line)
                reply = self._read(ask, answered, seconds, self._price)
                note.replies[key] = asdict(replace(reply, usd=reply.usd + lost))
            except GiveUp as error:
                note.replies[key] = asdict(self._failed(ask.id, self.clean(str(error)), lost))
            except Again as error:
                note.lost[key] = lost + error.usd
                reasons[key] = self.clean(str(error))
            except BackendError as error:
                if answered is not None:
                    unread = unread or error
                fatal = fatal or error
                reasons[key] = error.message
        if unread is not None:  # it would be the same in the next batch
            self.budget.settle(self._held.pop(note.path, 0.0), usd, batch.id)
            raise unread
        note.reasons = {key: reasons[key] for key in note.rest}
        note.charged[batch.id] = usd
        note.number, note.batch, note.file, note.full_since = note.number + 1, "", "", 0.0
        if note.number >= BATCHES and fatal is None:
            for key in note.rest:
                said = f"{note.reasons[key]}, after {BATCHES} batches"
                note.replies[key] = asdict(self._failed(note.asked[key], said, note.lost.get(key, 0.0)))
        note.save()
        self._release(note)
        self._charge(note)
        for key in reasons.keys() & note.replies.keys():
            self._cache.put(key, reply_of(note.replies[key]))
        if fatal is not None:
            raise fatal

    async def _lines(self, file: str) -> list[dict[str, Any]]:
        """The lines of a file of the provider's; none if it is gone."""
        try:
            content = await self._provider("afile_content", TRANSFER, file_id=file)
        except BackendError as error:
            if error.exception != "NotFoundError":
                raise
            return []
        try:
            return [json.loads(line) for line in content.content.splitlines() if line.strip()]
        except ValueError:
            raise Again("reply cut off") from None

    def _response(self, line: Mapping[str, Any]) -> Any:
        """A line's answer as litellm would have returned it; None if it has none."""
        response = line.get("response") or {}
        body = response.get("body")
        if response.get("status_code") != 200 or not isinstance(body, dict):
            return None
        litellm = import_litellm()
        return litellm.ModelResponse(**{name: value for name, value in body.items() if value is not None})

    def _line_error(self, line: Mapping[str, Any]) -> Exception:
        """What a line without an answer means."""
        response = line.get("response") or {}
        body = response.get("body")
        error = (body.get("error") if isinstance(body, dict) else None) or line.get("error") or {}
        said = str(error.get("message") or error.get("code") or "no reason is given")
        if not response:
            return Again(said)
        status = int(response.get("status_code") or 500)
        return self._meaning(KIND_OF.get(status, "InternalServerError"), said, {})

    def _failed(self, ask_id: str, why: str, usd: float) -> JudgeResponse:
        return JudgeResponse(ask_id, "", method=self._reads(), failure=why, usd=usd)

    def _charge(self, note: BatchNote) -> None:
        """Write down what the note's batches have cost: once, however often this is done.

        Replies that a note held when it was read stay the run's: what came with somebody's folder is not the user's to cache.
        """
        for name, usd in note.charged.items():
            self.budget.settle(0.0, usd, name)

    # -- dollars

    def _reserve(self, note: BatchNote) -> bool:
        """Set a batch's dollars aside; False if that has to wait for other open batches.

        Raises:
            BudgetError: If it could pass `max_usd` however little those cost.
        """
        budget, usd = self.budget, self._expected(note)
        if budget.reserve(usd):
            self._held[note.path] = usd
            return True
        if budget.spent + usd <= budget.limit and any(self._held.values()):
            return False
        out = [note for note in self._notes if note.batch]
        raise BudgetError(
            f"a batch of {len(note.rest):,} could cost ${usd:.4f} and exceed `max_usd = {budget.limit:g}`: "
            f"${budget.spent:.4f} is spent",
            hint="the verdicts so far are kept" + (", open batches too" if out else "") + "; continue with a higher "
            "`--set max_usd=...`",
        )

    def _expected(self, note: BatchNote) -> float:
        asked = [row["body"]["messages"][0]["content"] for row in note.requests()]
        return batch_share() * sum(self.budget.expected(prompt, self._max_tokens()) for prompt in asked)

    def _hold(self, note: BatchNote) -> None:
        """Set the dollars of an open batch aside."""
        if note.path not in self._held:
            self._held[note.path] = self._expected(note)
            self.budget.keep(self._held[note.path])

    def _release(self, note: BatchNote) -> None:
        self.budget.settle(self._held.pop(note.path, 0.0), 0.0)

    # -- waiting

    def _waiting(self, note: BatchNote, about: str, done: int = 0) -> Waiting:
        age = time.time() - note.made
        seconds = min(LONGEST_POLL, max(5.0, age / 10)) * self._poll / 5
        return Waiting(f"in a batch at {self._where}, {about}", len(note.replies) + done, len(note.asked), seconds)

    def _patience(self, note: BatchNote, error: Again) -> Waiting:
        """After a call that failed: as long as for a single one, then it ends."""
        self._fails[note.path] += 1
        if self._fails[note.path] >= TRIES:
            said = self.clean(str(error))
            raise BackendError(f"{self._where} cannot be asked about its batch: {said}, after {TRIES} tries", hint=GO_ON)
        wait = wait_before(self._fails[note.path] - 1, error.headers, first_wait=self._first_wait, random_=self._random)
        return replace(self._waiting(note, "no word of it"), seconds=wait)

    def _all(self, notes: Sequence[BatchNote], waits: Sequence[Waiting | None]) -> Waiting:
        """What all the notes of one asking wait for."""
        first, *others = [wait for wait in waits if wait]
        done = sum(wait.done if wait else len(note.asked) for note, wait in zip(notes, waits, strict=True))
        return Waiting(
            first.about, done, sum(len(note.asked) for note in notes), min(wait.seconds for wait in (first, *others))
        )

    @property
    def _where(self) -> str:
        host = str(urlsplit(self._address).hostname)
        return "OpenAI" if host == "api.openai.com" else host

    async def _provider(self, name: str, timeout: float | None = None, **given: Any) -> Any:
        """One of litellm's calls about files and batches.

        Raises:
            Again, GiveUp, BackendError: See `_meaning`.
        """
        call: Send = getattr(import_litellm(), name)
        seconds = timeout or self._timeout
        try:
            with reading_up_to(LONGEST_FILE if timeout == TRANSFER else LONGEST_REPLY):
                return await asyncio.wait_for(
                    call(
                        custom_llm_provider="openai",
                        api_base=self._address or None,
                        api_key=self._key_sent(),
                        max_retries=0,
                        timeout=seconds,
                        # else litellm downloads a finished batch by itself, to reckon its cost
                        litellm_metadata={"batch_ignore_default_logging": True},
                        **given,
                    ),
                    seconds,
                )
        except TimeoutError:
            raise Again("timeout") from None
        except Exception as error:  # the OpenAI client's own, and the network's
            body = getattr(error, "body", None)
            said = str((body.get("message") if isinstance(body, dict) else None) or error)
            response = getattr(error, "response", None)
            headers = {name.lower(): value for name, value in getattr(response, "headers", {}).items()}
            kind = type(error).__name__
            if re.match(r"Error code: \d+", said) and not body:
                said = said.split(" - ", 1)[-1]
            raise self._meaning(kind, said, headers) from None
