"""Judges behind litellm: a provider's model, a server of the user's own, or anything else that litellm routes.

litellm carries the call and knows the providers' dialects; what decides numbers is ours: one call an ask, its tries, its
pace, its dollars, and how a response is read. Its own retries, cache, budget and `drop_params` stay off: the last would turn
a judge that is read by token probabilities into one that is sampled, without a word.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import math
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iterft_lite.backends.judge.budget import Budget
from iterft_lite.backends.judge.cache import VerdictCache, verdict_key
from iterft_lite.backends.judge.identity import has_ended, way_on
from iterft_lite.backends.judge.keys import environment, scrub
from iterft_lite.backends.judge.kinds import judge_price
from iterft_lite.backends.judge.prices import Price
from iterft_lite.backends.judge.providers import STAND_IN, key_of, key_variables, needs_key, provider_of, proxy_for
from iterft_lite.backends.judge.rate_limit import LONGEST_WAIT, TRIES, Pace, wait_before
from iterft_lite.backends.judge.reply_size import TooLong, bound_replies, valid
from iterft_lite.errors import BackendError, BudgetError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.protocols import JudgeRequest, JudgeResponse, Waiting

TOP = 20
"""Candidates of the first token that are asked for: as many as OpenAI gives."""

NOTHING = -9999.0
"""The log-probability that servers write where they have none."""

ROUNDING = 0.01
"""What a log-probability may lie above 0 in a server's arithmetic."""

MOST_TOKENS = 10_000_000
"""Tokens of a call that a provider is believed."""

ELSEWHERE = 0.2
"""Seconds between two looks for a reply that another process is waiting for."""

LOGPROB_TOKENS = 10
"""Tokens a judge may write where its first token's probabilities are read."""

SAMPLE_TOKENS = 2048
"""Tokens a judge may write where its text is read: room for a reasoning model's thoughts."""

IN_A_ROW = 20
"""Questions given up one after the other, none answered between, that end the step: the server is gone."""

DATED = re.compile(r"\d{4}-?\d{2}-?\d{2}$")
"""The end of a name that is pinned to a day."""

Send = Callable[..., Awaitable[Any]]


class GiveUp(Exception):  # noqa: N818  # how one question ends, not an error of the program
    """This question cannot be answered; the message is the reason."""


class Again(Exception):  # noqa: N818
    """This try failed; another may not.

    Args:
        too_much: The provider said that it is asked too often.
        unseen: The judge may have answered and charged for it, without a word of how much.
        answered: An answer came, and is of no use. If not, the judge was not reached.
        usd: What it cost, where that is known.
    """

    def __init__(
        self,
        reason: str,
        *,
        headers: Mapping[str, str] | None = None,
        too_much: bool = False,
        unseen: bool = False,
        answered: bool = False,
        usd: float = 0.0,
    ) -> None:
        super().__init__(reason)
        self.headers = headers or {}
        self.too_much = too_much
        self.unseen = unseen
        self.answered = answered
        self.usd = usd


class LitellmJudge:
    """Meets the `Judge` protocol.

    Args:
        identity: Fields of the `JudgeIdentity`; its address is the only one that is asked.
        max_usd: See `Budget`.
        ledger: See `Budget`; a path.
        timeout: Seconds a try may take, from sending to the last byte.
        first_wait: Seconds; see `wait_before`.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        *,
        max_usd: float = 0.0,
        ledger: str | None = None,
        timeout: float = 60.0,
        first_wait: float = 0.5,
    ) -> None:
        self._identity = JudgeIdentity(**identity)
        self._address = self._identity.address
        self._timeout = timeout
        self._first_wait = first_wait
        self._variables = environment(Path.cwd())
        self._key = key_of(self._identity.name, self._address, self._variables)
        self.pace = Pace()
        self.budget = Budget(max_usd, judge_price(self._identity.name), Path(ledger) if ledger else None)
        if has_ended(self._identity.name, self._address):
            raise BackendError(f"`{self._identity.name}` was switched off by its provider", hint=way_on(self._identity.name))
        if max_usd and self.budget.price is None:
            raise BackendError(
                f"the price of `{self._identity.name}` is not known, so `max_usd` cannot be enforced",
                hint="set `max_usd = 0`, or choose a judge of the price table (docs/judging.md)",
            )
        self._cache = VerdictCache()
        self._send = self._open()
        self._gave_probabilities = False
        self._random = random.Random()  # waits only: no result depends on it
        self._loop = asyncio.new_event_loop()  # one for all calls: litellm keeps connections by loop
        self.close = weakref.finalize(self, _close, self._loop)

    def identity(self) -> JudgeIdentity:
        """Who this is."""
        return self._identity

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> Waiting | None:
        """Answer every ask, many at once; each as soon as it is in."""
        self._loop.run_until_complete(_Round(self, on_reply).run(asks))
        return None

    def _open(self) -> Send:
        """litellm's asynchronous call, its model's abilities checked.

        Raises:
            BackendError: If the provider is unknown, or gives no probabilities where they are to be read.
        """
        litellm = import_litellm()
        bound_replies()
        provider = provider_of(self._identity.name)
        if provider.signed:  # with what the provider's own library reads from the environment
            os.environ.update({name: value for name, value in self._variables.items() if name in provider.keys})
        self._prepare(litellm)
        name, known = self._model(), self._supported(litellm)
        if known is None:
            raise BackendError(
                f"`{name}` names no known provider",
                hint='write `provider/model`, such as "openai/gpt-4o-mini-2024-07-18"; for a server of your own '
                '"openai/MODEL" with `api_base`',
            )
        if self._wants_key() and not self._key:
            where = " or ".join(key_variables(self._identity.name, self._address))
            raise BackendError(
                f"there is no key for `{name}` at {self._address}", hint=f"set {where} in the environment or .env"
            )
        if self._identity.method == "logprobs" and not self._identity.effort and not {"logprobs", "top_logprobs"} <= set(known):
            raise self._no_probabilities()
        return litellm.acompletion  # type: ignore[no-any-return]

    def _supported(self, litellm: Any, /) -> list[str] | None:
        """The parameters that litellm passes on to the judge; None if it knows no such provider."""
        try:
            return list(litellm.get_supported_openai_params(model=self._model()))
        except Exception:  # litellm's own way of saying "never heard of it"
            return None

    def _prepare(self, litellm: Any) -> None:
        """Room for judges that are litellm providers of our own."""

    def _model(self) -> str:
        """The judge's name as litellm knows it."""
        return self._identity.name

    def _wants_key(self) -> bool:
        """Whether nothing can be asked without a key."""
        return needs_key(self._identity.name, self._address)

    def _no_probabilities(self, seen: str = "") -> BackendError:
        return BackendError(
            f"`{self._identity.name}` gives no token probabilities{seen}",
            exception="NoProbabilities",
            hint='set `judge_method = "samples"` to read its texts instead',
        )

    # -- one question

    def key(self, ask: JudgeRequest) -> str:
        """Where the question's verdict is kept."""
        who = self._identity
        settings = " ".join(filter(None, (who.effort, str(who.tops or ""))))
        return verdict_key(who.name, who.revision, who.method, ask.prompt, ask.sample, settings)

    def claim(self, key: str) -> bool:
        """Take a question, for as long as all its tries may last; False while another process has it."""
        return self._cache.claim(key, TRIES * (self._timeout + LONGEST_WAIT))

    def expected(self, ask: JudgeRequest) -> float:
        """Dollars that one try may cost."""
        return self.budget.expected(ask.prompt, self._max_tokens())

    def _max_tokens(self) -> int:
        return LOGPROB_TOKENS if self._identity.method == "logprobs" else SAMPLE_TOKENS

    async def answer(self, ask: JudgeRequest, stopping: Callable[[], bool]) -> tuple[JudgeResponse, bool]:
        """The reply to one question after as many tries as it takes, and whether the judge was reached.

        It was not if the last try met no connection, a timeout, a rate limit or a server error.

        Raises:
            BackendError: If no question can be answered.
        """
        reason, reached, lost = "", False, 0.0
        for number in range(TRIES):
            sent_at = time.monotonic()
            try:
                reply = self._read(ask, await self._call(ask), time.monotonic() - sent_at)
                self.pace.went_well()
                return replace(reply, usd=reply.usd + lost), True
            except GiveUp as error:
                return JudgeResponse(ask.id, "", method=self._reads(), failure=self.clean(str(error)), usd=lost), True
            except Again as error:
                reason, reached = self.clean(str(error)), error.answered
                lost += error.usd
                if error.too_much:
                    self.pace.was_too_much(sent_at)
                if error.unseen:
                    self.budget.keep(self.expected(ask))
                if stopping():
                    break
                if number + 1 < TRIES:
                    wait = wait_before(number, error.headers, first_wait=self._first_wait, random_=self._random)
                    await asyncio.sleep(wait)
        return JudgeResponse(ask.id, "", method=self._reads(), failure=f"{reason}, after {TRIES} tries", usd=lost), reached

    def clean(self, text: str) -> str:
        """A provider's words in one line, without keys."""
        return valid(scrub(" ".join(text.split())[:300], self._variables))

    def _kept(self, text: object) -> str:
        """A provider's text as it is stored: valid, bounded, and without keys, should a server send ours back."""
        return scrub(valid(text), self._variables)

    def _reads(self) -> Any:
        return "logprobs" if self._identity.method == "logprobs" else "text"

    async def _call(self, ask: JudgeRequest) -> Any:
        """One try."""
        try:
            return await asyncio.wait_for(
                self._send(
                    model=self._model(),
                    messages=[{"role": "user", "content": ask.prompt}],
                    api_base=self._address or None,
                    api_key=self._key_sent(),
                    num_retries=0,
                    max_retries=0,
                    timeout=self._timeout,
                    **self._settings(),
                ),
                self._timeout,
            )
        except TimeoutError:
            raise Again("timeout", unseen=True) from None
        except Exception as error:  # litellm raises its own, the providers' and the network's
            raise self._sorted(error) from None

    def _settings(self) -> dict[str, Any]:
        """What a call asks for beside its question."""
        who, provider = self._identity, provider_of(self._identity.name)
        if who.method == "samples":
            return {"max_tokens": SAMPLE_TOKENS, "temperature": 1.0}
        tops = who.tops or min(TOP, provider.tops or TOP)
        asked: dict[str, Any] = {"max_tokens": LOGPROB_TOKENS, "logprobs": True, "top_logprobs": tops, "temperature": 0.0}
        if who.effort:
            allowed = ["logprobs", "top_logprobs", "reasoning_effort", "temperature"]
            asked |= {"reasoning_effort": who.effort, "allowed_openai_params": allowed}
        if provider.name == "openrouter":  # else it passes the question on to a server that leaves the probabilities out
            asked["extra_body"] = {"provider": {"require_parameters": True}}
        return asked

    def _key_sent(self) -> str | None:
        """The key of a call; a placeholder at servers that have none, or litellm would send them another provider's.

        None leaves it to litellm: for what is signed, and for providers that only it knows.
        """
        provider = provider_of(self._identity.name)
        if provider.signed or (not provider.known and not self._address):
            return None
        return self._key or STAND_IN

    def _sorted(self, error: Exception) -> Exception:
        """What an exception of a call means: for all questions, for this one, or for this try."""
        if cause := next((one for one in _causes(error) if isinstance(one, TooLong)), None):
            return GiveUp(str(cause))
        kind, said = type(error).__name__, str(error).split("Exception - ", 1)[-1]
        if kind == "APIConnectionError" or "connection error" in said.lower():
            return Again(self._no_connection(error))
        headers = {str(k).lower(): str(v) for k, v in dict(getattr(error, "litellm_response_headers", None) or {}).items()}
        cut = "char " in said or isinstance(error.__context__, json.JSONDecodeError)
        return self._meaning(kind, said, headers, cut=cut)

    def _no_connection(self, error: BaseException) -> str:
        """Why a server cannot be reached: the innermost cause, and the proxy that is in between."""
        *_, innermost = _causes(error)
        cause = str(innermost).removeprefix("litellm.").removeprefix("APIConnectionError: ").strip()
        cause = "" if cause.rstrip(".").lower().endswith("connection error") else cause
        proxy = proxy_for(self._address)
        through = f"through the proxy {proxy}" if proxy else ""
        return ": ".join(filter(None, ("no connection", ", ".join(filter(None, (cause, through))))))

    def _meaning(self, kind: str, said: str, headers: Mapping[str, str], *, cut: bool = False) -> Exception:
        """What an error of the provider's means.

        Args:
            kind: Name of the OpenAI client's exception.
            said: The provider's words.
            cut: An answer came, and was cut off.
        """
        name = self._identity.name
        if kind in ("AuthenticationError", "PermissionDeniedError"):
            where = " or ".join(key_variables(name, self._address)) or "the key"
            at = f" at {self._address}" if self._address else ""
            return BackendError(
                f"`{name}`{at} refuses the key: {self.clean(said)}", hint=f"set {where} in the environment or .env"
            )
        if kind == "NotFoundError":
            at = f" at {self._address}" if self._address else ""
            return BackendError(
                f"`{name}` was not found{at}: {self.clean(said)}", exception=kind, hint="check `judge` and `api_base`"
            )
        if kind == "PaymentRequiredError" or re.search(r"insufficient_quota|exceeded your current quota", said):
            return BackendError(
                f"`{name}` has no credit left: {self.clean(said)}",
                hint="verdicts so far are kept; top up and repeat the command",
            )
        if kind == "UnsupportedParamsError" or (kind == "BadRequestError" and "logprobs" in said):
            return self._no_probabilities()
        if kind in ("BadRequestError", "ContextWindowExceededError", "ContentPolicyViolationError", "UnprocessableEntityError"):
            return GiveUp(f"the provider refused the question: {said}")
        if kind == "RateLimitError":
            return Again("rate limit", headers=headers, too_much=True)
        if kind in ("Timeout", "APITimeoutError"):
            return Again("timeout", unseen=True)
        if kind == "APIConnectionError" or "connection error" in said.lower():
            said = said.removeprefix("litellm.APIConnectionError: ")  # the name that litellm gives what it has no name for
            return Again("no connection" if "connect" in said.lower() else f"no connection: {said}", headers=headers)
        return Again("reply cut off" if cut else f"server error: {said}", headers=headers, unseen=cut, answered=cut)

    def _read(self, ask: JudgeRequest, response: Any, seconds: float, price: Price | None = None) -> JudgeResponse:
        """A response as a reply.

        Args:
            price: The judge's own if None.
        """
        try:
            choice = response.choices[0]
            message = choice.message
        except (AttributeError, IndexError, TypeError):
            raise Again("reply without content", unseen=True, answered=True) from None
        refusal = getattr(message, "refusal", None) or (getattr(message, "provider_specific_fields", None) or {}).get("refusal")
        used = self._used(ask, response, price)
        answered_by = self._kept(getattr(response, "model", ""))
        asked_for = self._identity.name.rsplit("/", 1)[-1]
        if DATED.search(asked_for) and DATED.search(answered_by) and answered_by.rsplit("/", 1)[-1] != asked_for:
            raise Again(f"answered by another model, `{answered_by}`", answered=True, usd=used.usd)
        reply = JudgeResponse(
            ask.id,
            self._kept(f"REFUSAL: {refusal}" if refusal else message.content),
            method=self._reads(),
            failure=self._failure(choice, refusal=bool(refusal)),
            tokens_in=used.sent,
            tokens_out=used.written,
            usd=used.usd,
            seconds=round(seconds, 4),
            model=" ".join(filter(None, (answered_by, self._kept(getattr(response, "system_fingerprint", None))))),
        )
        if self._identity.method == "samples" or refusal or reply.failure:
            return reply
        candidates = self._candidates(choice)
        if candidates is None:
            return replace(reply, failure="faulty probabilities")
        if not candidates and not self._gave_probabilities:
            raise self._no_probabilities()
        self._gave_probabilities = True
        return replace(reply, probabilities=candidates) if candidates else replace(reply, failure="no token probabilities")

    def _used(self, ask: JudgeRequest, response: Any, price: Price | None) -> Used:
        """What a response was charged for; what was expected, where its counts cannot be."""
        used = used_by(response, price or self.budget.price)
        return used if used is not None else Used(0, 0, self.expected(ask))

    def _failure(self, choice: Any, *, refusal: bool) -> str:
        """Why a reply's content holds no verdict, as far as the provider says; else ""."""
        if choice.finish_reason == "content_filter" and not refusal:
            return "content filter"
        return "cut off" if choice.finish_reason == "length" and self._identity.method == "samples" else ""

    def _candidates(self, choice: Any) -> tuple[tuple[str, float], ...] | None:
        """Probability of each candidate of the first token that is not blank; () without any, None if they cannot be.

        Raises:
            BackendError: If the judge's tokenizer writes numbers digit by digit: the first one's probabilities are not
            the score's.
        """
        written = list(getattr(getattr(choice, "logprobs", None), "content", None) or [])
        while len(written) > 1 and not str(written[0].token).strip():
            del written[0]
        if not written:
            return ()
        if len(written) > 1 and str(written[0].token).strip().isdigit() and str(written[1].token)[:1].isdigit():
            raise BackendError(
                f"`{self._identity.name}` writes numbers digit by digit: its first token says nothing of scores",
                exception="NoProbabilities",
                hint='set `judge_method = "samples"`, or use its GGUF file as `judge = "local:PATH"`, which is read exactly',
            )
        return candidates_of([(str(one.token), one.logprob) for one in written[0].top_logprobs or ()])


def candidates_of(given: Sequence[tuple[str, Any]]) -> tuple[tuple[str, float], ...] | None:
    """Candidates with their probabilities, out of a server's log-probabilities; () if those say nothing, None if they
    cannot be.

    They say nothing where a server has none and writes 0, or 0 for what it wrote and -9999 for all else.
    """
    try:
        logprobs = [float(logprob) for _, logprob in given]
    except (TypeError, ValueError):
        return None
    if any(math.isnan(logprob) or logprob > ROUNDING for logprob in logprobs):
        return None
    certain = sum(logprob >= 0.0 for logprob in logprobs)
    if len(logprobs) > 1 and (certain > 1 or sum(logprob > NOTHING for logprob in logprobs) <= 1):
        return ()
    return tuple((valid(token), math.exp(min(0.0, logprob))) for (token, _), logprob in zip(given, logprobs, strict=True))


@dataclass(frozen=True)
class Used:
    """Tokens that a response says were sent and written, and their dollars (0 where the price is not known)."""

    sent: int
    written: int
    usd: float


def used_by(response: Any, price: Price | None) -> Used | None:
    """What a response was charged for; None if its counts are negative, not finite or beyond all measure."""
    usage = getattr(response, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None)
    given = [getattr(usage, "prompt_tokens", 0), getattr(usage, "completion_tokens", 0), getattr(details, "cached_tokens", 0)]
    counts = [0 if count is None else count for count in given]
    if not all(isinstance(count, int | float) and 0 <= count <= MOST_TOKENS for count in counts):
        return None
    sent, written, found = map(int, counts)
    return Used(sent, written, price.usd(sent, written, min(sent, found)) if price else 0.0)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from, outermost first."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or now.__context__


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """End a judge's event loop, and what is left in it."""
    if loop.is_closed() or loop.is_running():
        return

    def end() -> None:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    # on a thread of its own: a judge may be collected while another one's loop runs on this one
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()


class _Round:
    """One `ask`: what is in flight, and how it ends.

    Asks that did not reach the judge are held back: an answer to another one that was sent afterwards shows that the judge is
    there, and they are given on as unscored. If none comes, they are left to be asked again: an outage decides nothing.
    """

    def __init__(self, judge: LitellmJudge, on_reply: Callable[[JudgeResponse], None]) -> None:
        self._judge = judge
        self._on_reply = on_reply
        self._tasks = set[asyncio.Task[None]]()
        self._waiting: dict[str, list[JudgeRequest]] = {}
        self._held: dict[str, tuple[float, JudgeResponse]] = {}
        self._elsewhere: dict[str, list[JudgeRequest]] = {}
        self._answered: JudgeRequest | None = None
        self._stop: Exception | None = None
        self._in_a_row = 0

    async def run(self, asks: Sequence[JudgeRequest]) -> None:
        try:
            for ask in asks:
                if not await self._take_up(self._judge.key(ask), ask):
                    break
            await asyncio.gather(*self._tasks)
            while self._elsewhere and self._stop is None:
                await self._look_elsewhere()
            await self._see_whether_it_is_there(len(asks))
        finally:
            for key in self._waiting:
                self._judge._cache.release(key)
        if self._stop is not None:
            raise self._stop

    async def _take_up(self, key: str, ask: JudgeRequest) -> bool:
        """Send an ask, unless it is answered or on its way already; False if the round is ending."""
        for going in (self._waiting, self._elsewhere):
            if key in going:  # the same words are in flight: one call answers both
                going[key].append(ask)
                return True
        if known := self._judge._cache.get(key, ask.id):
            self._answered = ask
            self._on_reply(known)
            return True
        if not self._judge.claim(key):
            self._elsewhere[key] = [ask]
            return True
        sent = await self._send(key, [ask], ask)
        if not sent:  # else who asks again, with this process alive, waits until the claim ends by itself
            self._judge._cache.release(key)
        return sent

    async def _look_elsewhere(self) -> None:
        """Take the replies that other processes were waiting for; ask what they gave up."""
        waiting, self._elsewhere = self._elsewhere, {}
        for key, asks in waiting.items():
            for ask in asks:
                await self._take_up(key, ask)
        await asyncio.gather(*self._tasks)
        if self._elsewhere:
            await asyncio.sleep(ELSEWHERE)

    async def _see_whether_it_is_there(self, asked: int) -> None:
        """Settle what was held back: sent again is a question that was answered."""
        if self._held and self._answered and self._stop is None:
            # a few questions can be beyond a judge that is there, and would be the last ones in every session
            await self._send(self._judge.key(self._answered), [], self._answered)
            await asyncio.gather(*self._tasks)
        if self._held and self._stop is None:
            left = sum(len(self._waiting[key]) for key in self._held)
            _, reply = next(iter(self._held.values()))
            self._stop = self._gone(f"left {left} of {asked} questions unanswered", reply)

    async def _send(self, key: str, waiting: list[JudgeRequest], ask: JudgeRequest) -> bool:
        """Have a question answered as soon as one more call may be made; False if the round is ending.

        Args:
            waiting: Who gets the reply.
        """
        judge = self._judge
        await judge.pace.take()
        expected = judge.expected(ask)
        if self._stop is None and not judge.budget.reserve(expected):
            self._stop = self._over_budget()
        if self._stop is not None:
            await judge.pace.give_back()
            return False
        self._waiting[key] = waiting
        task = asyncio.create_task(self._one(key, ask, expected))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _one(self, key: str, ask: JudgeRequest, expected: float) -> None:
        judge, usd = self._judge, 0.0
        try:
            reply, reached = await judge.answer(ask, lambda: self._stop is not None)
            usd = reply.usd
        except Exception as error:
            self._stop = self._stop or error
            self._waiting.pop(key)
            judge._cache.release(key)
            return
        finally:
            judge.budget.settle(expected, usd)
            await judge.pace.give_back()
        try:
            self._take(key, ask, reply, reached=reached)
        except Exception as error:  # a full disk, or a taker that is gone: nothing may be lost in silence
            self._stop = self._stop or error

    def _take(self, key: str, ask: JudgeRequest, reply: JudgeResponse, *, reached: bool) -> None:
        """Keep a reply; hand over what is settled by it."""
        self._judge._cache.put(key, reply)
        answered = not reply.failure or reply.tokens_in > 0
        if not answered and self._stop is not None:
            return  # the step is ending: asked again when it goes on
        self._count(reply, answered=answered)
        if not reached:
            self._held[key] = time.monotonic(), reply
            return
        if reply.failure:
            self._judge._cache.release(key)
        self._hand_over(key, reply)
        if answered:
            self._answered = ask
            sent_at = time.monotonic() - reply.seconds
            for other in [other for other, (given_up_at, _) in self._held.items() if given_up_at < sent_at]:
                self._hand_over(other, self._held.pop(other)[1])

    def _hand_over(self, key: str, reply: JudgeResponse) -> None:
        """Give a reply to all who asked for it: the first pays."""
        for place, ask in enumerate(self._waiting.pop(key)):
            free = replace(reply, usd=0.0, cached=not reply.failure, tokens_in=0, tokens_out=0)
            self._on_reply(replace(free if place else reply, id=ask.id))

    def _count(self, reply: JudgeResponse, *, answered: bool) -> None:
        """Notice a judge that has stopped answering."""
        self._in_a_row = 0 if answered else self._in_a_row + 1
        if self._in_a_row >= IN_A_ROW:
            self._stop = self._stop or self._gone(f"answered none of the last {IN_A_ROW} questions", reply)

    def _gone(self, what: str, reply: JudgeResponse) -> BackendError:
        """The end of a round whose judge does not answer, for the reason that a reply holds."""
        return BackendError(
            f"`{self._judge.identity().name}` {what}: {reply.failure}",
            hint="the verdicts so far are kept; issue the same command again when the judge is back",
        )

    def _over_budget(self) -> BudgetError:
        budget = self._judge.budget
        return BudgetError(
            f"further judging could exceed `max_usd = {budget.limit:g}`: ${budget.spent:.4f} is spent",
            hint="the verdicts so far are kept; continue with a higher `--set max_usd=...`",
        )


def import_litellm() -> Any:
    """litellm, offline and quiet."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ.setdefault("LITELLM_LOG", "CRITICAL")
    litellm: Any = importlib.import_module("litellm")
    litellm.suppress_debug_info = True
    litellm.drop_params = False
    litellm.telemetry = False
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "httpx", "openai"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm
