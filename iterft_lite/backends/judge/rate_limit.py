"""How fast a provider is asked: as many calls at once as it takes, and how long to wait before asking again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

FIRST, LEAST, MOST = 16, 2, 128
"""Calls at once: to begin with, at least, at most."""

TRIES = 7
"""Times that one question is sent: with waits of 0.5 s doubling, half a minute at most before it is given up."""

LONGEST_WAIT = 60.0
"""Seconds, also where the provider asks for more: the next try shows whether it meant it."""


class Pace:
    """Calls at once, as in TCP: doubling a round until the provider first says "too many", then one more a round; halved at
    each "too many", once for all the calls that were in flight together.

    Args:
        first, most: Calls at once to begin with, and ever.
    """

    def __init__(self, first: int = FIRST, most: int = MOST) -> None:
        self.limit = float(first)
        self._most = float(most)
        self.flying = 0
        self.most = 0
        self._starting = True
        self._cut_at = 0.0
        self._freed = asyncio.Condition()

    async def take(self) -> None:
        """Wait until one more call may be made."""
        async with self._freed:
            await self._freed.wait_for(lambda: self.flying < int(self.limit))
            self.flying += 1
            self.most = max(self.most, self.flying)

    async def give_back(self) -> None:
        """A call has ended."""
        async with self._freed:
            self.flying -= 1
            self._freed.notify_all()

    def went_well(self) -> None:
        """A call was answered."""
        # One more for every answer doubles the limit in a round of `limit` calls; 1 / limit for every answer adds one in a
        # round.
        self.limit = min(self._most, self.limit + (1.0 if self._starting else 1.0 / self.limit))

    def was_too_much(self, sent_at: float) -> None:
        """A call was turned away.

        Args:
            sent_at: When it was sent (monotonic seconds).
        """
        self._starting = False
        # Calls that were sent before the last cut were sent under the old limit: their refusals are the same message again.
        if sent_at > self._cut_at:
            self.limit = max(float(LEAST), self.limit / 2)
            self._cut_at = time.monotonic()


def wait_before(retry: int, headers: Mapping[str, str], *, first_wait: float, random_: random.Random) -> float:
    """Seconds before a question is sent again.

    What the provider asks for in Retry-After, and a little more so that not all come back at once; else full jitter, a draw
    from 0 to `first_wait` doubled with each try (M. Brooker, "Exponential backoff and jitter", 2015).

    Args:
        retry: 0 for the second sending.
        headers: Of the provider's answer, names in lower case.
    """
    asked = retry_after(headers)
    if asked is not None:
        return min(LONGEST_WAIT, asked) + random_.uniform(0, first_wait)
    return random_.uniform(0, min(LONGEST_WAIT, first_wait * 2**retry))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in `retry-after-ms` or `retry-after` (a number, or a date); None if there is neither."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name)
        if text:
            try:
                return max(0.0, float(text) / scale)
            except ValueError:
                pass
            try:
                return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
            except (TypeError, ValueError):
                continue
    return None
