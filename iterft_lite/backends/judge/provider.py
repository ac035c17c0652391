"""Judges behind litellm: a provider's model, a server of the user's own, or anything else that litellm routes.

litellm carries the call and knows the providers' dialects; what decides numbers is ours: one call an ask, its tries, its
pace, its dollars, and how a response is read. Its own retries, cache, budget and `drop_params` stay off: the last would turn
a judge that is read by token odds into one that is sampled, without a word.
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
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iterft_lite.backends.judge.budget import Budget
from iterft_lite.backends.judge.cache import VerdictCache, verdict_key
from iterft_lite.backends.judge.keys import environment, scrub
from iterft_lite.backends.judge.prices import Price, price_of
from iterft_lite.backends.judge.rate_limit import TRIES, Pace, wait_before
from iterft_lite.errors import BackendError, BudgetError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.protocols import JudgeRequest, JudgeResponse, Waiting

TOP = 20
"""Candidates of the first token that are asked for: as many as OpenAI gives."""

ODDS_TOKENS = 10
"""Tokens a judge may write where its first token's odds are read."""

SAMPLE_TOKENS = 2048
"""Tokens a judge may write where its text is read: room for a reasoning model's thoughts."""

IN_A_ROW = 20
"""Asks given up one after the other, none answered between, that end the step: the server is gone."""

DATED = re.compile(r"\d{4}-?\d{2}-?\d{2}$")
"""The end of a name that is pinned to a day."""

Send = Callable[..., Awaitable[Any]]


class GiveUp(Exception):  # noqa: N818  # how one ask ends, not an error of the program
    """This ask cannot be answered; the message is the reason."""


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
        identity: Fields of the `JudgeIdentity`.
        api_base: Address of the server, or None for the provider's own.
        max_usd: See `Budget`.
        ledger: See `Budget`; a path.
        timeout: Seconds a try may take, from sending to the last byte.
        first_wait: Seconds; see `wait_before`.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        *,
        api_base: str | None = None,
        max_usd: float = 0.0,
        ledger: str | None = None,
        timeout: float = 60.0,
        first_wait: float = 0.5,
    ) -> None:
        self._identity = JudgeIdentity(**identity)
        self._api_base = api_base
        self._timeout = timeout
        self._first_wait = first_wait
        self._variables = environment(Path.cwd())
        self.pace = Pace()
        self.budget = Budget(max_usd, price_of(self._identity.name), Path(ledger) if ledger else None)
        if max_usd and self.budget.price is None:
            raise BackendError(
                f"the price of `{self._identity.name}` is not known, so `max_usd` cannot be kept",
                hint="set `max_usd = 0`, or choose a judge of the price table (docs/judging.md)",
            )
        self._cache = VerdictCache()
        self._send = self._open()
        self._gave_odds = False
        self._random = random.Random()  # waits only: no result depends on it
        self._loop = asyncio.new_event_loop()  # one for all calls: litellm keeps connections by loop

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
            BackendError: If the provider is unknown, or gives no odds where they are to be read.
        """
        litellm = import_litellm()
        os.environ.update({name: value for name, value in self._variables.items() if name not in os.environ})
        self._prepare(litellm)
        name, known = self._model(), self._supported(litellm)
        if known is None:
            raise BackendError(
                f"`{name}` is of no provider that is known",
                hint='write `provider/model`, such as "openai/gpt-4o-mini-2024-07-18"; for a server of your own '
                '"openai/MODEL" with `api_base`',
            )
        if self._identity.method == "odds" and not {"logprobs", "top_logprobs"} <= set(known):
            raise self._no_odds()
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

    def _no_odds(self) -> BackendError:
        return BackendError(
            f"`{self._identity.name}` gives no token odds", hint='set `judge_method = "samples"` to read its texts instead'
        )

    # -- one ask

    def key(self, ask: JudgeRequest) -> str:
        """Where the ask's verdict is kept."""
        who = self._identity
        return verdict_key(who.name, who.revision, who.method, ask.prompt, ask.sample)

    def expected(self, ask: JudgeRequest) -> float:
        """Dollars that one try may cost."""
        return self.budget.expected(ask.prompt, self._max_tokens())

    def _max_tokens(self) -> int:
        return ODDS_TOKENS if self._identity.method == "odds" else SAMPLE_TOKENS

    async def answer(self, ask: JudgeRequest, stopping: Callable[[], bool]) -> tuple[JudgeResponse, bool]:
        """The reply to one ask after as many tries as it takes, and whether the judge was reached.

        It was not if the last try met no connection, a timeout, a rate limit or a server error.

        Raises:
            BackendError: If no ask can be answered.
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
        return scrub(" ".join(text.split())[:300], self._variables)

    def _reads(self) -> Any:
        return "odds" if self._identity.method == "odds" else "text"

    async def _call(self, ask: JudgeRequest) -> Any:
        """One try."""
        try:
            return await asyncio.wait_for(
                self._send(
                    model=self._model(),
                    messages=[{"role": "user", "content": ask.prompt}],
                    api_base=self._api_base,
                    api_key=self._key_for_own_server(),
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
        odds = self._identity.method == "odds"
        read_by: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP, "temperature": 0.0} if odds else {"temperature": 1.0}
        return {"max_tokens": self._max_tokens(), **read_by}

    def _key_for_own_server(self) -> str | None:
        """A stand-in where a server of the user's own asks for no key but OpenAI's client insists on one.

        None leaves it to litellm, which knows each provider's variable: anything else would be sent in place of that key.
        """
        own = self._api_base is not None and self._identity.name.startswith("openai/")
        return "none" if own and not self._variables.get("OPENAI_API_KEY") else None

    def _sorted(self, error: Exception) -> Exception:
        """What an exception of a call means: for all asks, for this one, or for this try."""
        kind, said = type(error).__name__, str(error).split("Exception - ", 1)[-1]
        headers = {str(k).lower(): str(v) for k, v in dict(getattr(error, "litellm_response_headers", None) or {}).items()}
        cut = "char " in said or isinstance(error.__context__, json.JSONDecodeError)
        return self._meaning(kind, said, headers, cut=cut)

    def _meaning(self, kind: str, said: str, headers: Mapping[str, str], *, cut: bool = False) -> Exception:
        """What an error of the provider's means.

        Args:
            kind: Name of the OpenAI client's exception.
            said: The provider's words.
            cut: An answer came, and was cut off.
        """
        name = self._identity.name
        if kind in ("AuthenticationError", "PermissionDeniedError"):
            return BackendError(f"`{name}` refuses the key: {self.clean(said)}", hint="set the key in the environment or .env")
        if kind == "NotFoundError":
            return BackendError(
                f"`{name}` was not found: {self.clean(said)}", exception=kind, hint="check `judge` and `api_base`"
            )
        if kind == "PaymentRequiredError" or re.search(r"insufficient_quota|exceeded your current quota", said):
            return BackendError(
                f"`{name}` has no credit left: {self.clean(said)}", hint="what was judged is kept; top up, go on"
            )
        if kind == "UnsupportedParamsError" or (kind == "BadRequestError" and "logprobs" in said):
            return self._no_odds()
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
        text = f"REFUSAL: {refusal}" if refusal else str(message.content or "")
        used = used_by(response, price or self.budget.price)
        answered_by = str(getattr(response, "model", "") or "")
        asked_for = self._identity.name.rsplit("/", 1)[-1]
        if DATED.search(asked_for) and DATED.search(answered_by) and answered_by.rsplit("/", 1)[-1] != asked_for:
            raise Again(f"answered by another model, `{answered_by}`", answered=True, usd=used.usd)
        reply = JudgeResponse(
            ask.id,
            text,
            method=self._reads(),
            failure="content filter" if choice.finish_reason == "content_filter" and not refusal else "",
            tokens_in=used.sent,
            tokens_out=used.written,
            usd=used.usd,
            seconds=round(seconds, 4),
            model=" ".join(filter(None, (answered_by, getattr(response, "system_fingerprint", None)))),
        )
        if self._identity.method == "samples" or refusal or reply.failure:
            return reply
        odds = self._odds(choice)
        if not odds and not self._gave_odds:
            raise self._no_odds()
        self._gave_odds = True
        return replace(reply, odds=odds) if odds else replace(reply, failure="no token odds in the reply")

    def _odds(self, choice: Any) -> tuple[tuple[str, float], ...]:
        """Probability of each candidate of the first token that is not blank.

        Raises:
            BackendError: If the judge's tokenizer writes numbers digit by digit: the first one's odds are not the score's.
        """
        written = list(getattr(getattr(choice, "logprobs", None), "content", None) or [])
        while len(written) > 1 and not written[0].token.strip():
            del written[0]
        if not written:
            return ()
        if len(written) > 1 and written[0].token.strip().isdigit() and written[1].token[:1].isdigit():
            raise BackendError(
                f"`{self._identity.name}` writes numbers digit by digit: the odds of its first token are not those of scores",
                hint='set `judge_method = "samples"`, or use its GGUF file as `judge = "local:PATH"`, which is read exactly',
            )
        candidates = written[0].top_logprobs or [written[0]]
        return tuple((str(one.token), math.exp(min(0.0, float(one.logprob)))) for one in candidates)


@dataclass(frozen=True)
class Used:
    """Tokens that a response says were sent and written, and their dollars (0 where the price is not known)."""

    sent: int
    written: int
    usd: float


def used_by(response: Any, price: Price | None) -> Used:
    """What a response was charged for."""
    usage = getattr(response, "usage", None)
    sent, written = (int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens"))
    found = int(getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", 0) or 0)
    return Used(sent, written, price.usd(sent, written, found) if price else 0.0)


class _Round:
    """One `ask`: what is in the air, and how it ends.

    Asks that did not reach the judge are held back: an answer to another one that was sent afterwards shows that the judge is
    there, and they are given on as unscored. If none comes, they are left to be asked again: an outage decides nothing.
    """

    def __init__(self, judge: LitellmJudge, on_reply: Callable[[JudgeResponse], None]) -> None:
        self._judge = judge
        self._on_reply = on_reply
        self._tasks = set[asyncio.Task[None]]()
        self._waiting: dict[str, list[JudgeRequest]] = {}
        self._held: dict[str, tuple[float, JudgeResponse]] = {}
        self._answered: JudgeRequest | None = None
        self._stop: Exception | None = None
        self._in_a_row = 0

    async def run(self, asks: Sequence[JudgeRequest]) -> None:
        for ask in asks:
            key = self._judge.key(ask)
            if key in self._waiting:  # the same words are in the air: one call answers both
                self._waiting[key].append(ask)
                continue
            if known := self._judge._cache.get(key, ask.id):
                self._answered = ask
                self._on_reply(known)
                continue
            if not await self._send(key, [ask], ask):
                break
        await asyncio.gather(*self._tasks)
        if self._held and self._answered and self._stop is None:
            # a few questions can be beyond a judge that is there, and would be the last ones in every sitting
            await self._send(self._judge.key(self._answered), [], self._answered)
            await asyncio.gather(*self._tasks)
        if self._held and self._stop is None:
            left = sum(len(self._waiting[key]) for key in self._held)
            _, reply = next(iter(self._held.values()))
            self._stop = self._gone(f"left {left} of {len(asks)} asks unanswered", reply)
        if self._stop is not None:
            raise self._stop

    async def _send(self, key: str, waiting: list[JudgeRequest], ask: JudgeRequest) -> bool:
        """Have an ask answered as soon as one more call may be made; False if the round is ending.

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
            self._stop = self._stop or self._gone(f"answered none of the last {IN_A_ROW} asks", reply)

    def _gone(self, what: str, reply: JudgeResponse) -> BackendError:
        """The end of a round whose judge does not answer, for the reason that a reply holds."""
        return BackendError(
            f"`{self._judge.identity().name}` {what}: {reply.failure}",
            hint="what was judged is kept; issue the same command again when the judge is back",
        )

    def _over_budget(self) -> BudgetError:
        budget = self._judge.budget
        return BudgetError(
            f"judging on could pass `max_usd = {budget.limit:g}`: ${budget.spent:.4f} is spent",
            hint="what was judged is kept; go on with a higher `--set max_usd=...`",
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
