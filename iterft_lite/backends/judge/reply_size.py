"""A judge's reply has an end: what comes from a server is read up to a limit, as it is once unpacked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

LONGEST_REPLY = 4 << 20
"""Bytes of a reply: 20 candidates of ten tokens are 30 KB, and a reasoning model's thoughts some more."""

LONGEST_FILE = 1 << 30
"""Bytes of a batch's answers: 50,000 of 20 KB."""

LONGEST_TEXT = 32_000
"""Characters of what a judge writes that are kept."""

_limit: ContextVar[int] = ContextVar("limit", default=LONGEST_REPLY)


class TooLong(Exception):  # noqa: N818  # said of a reply; it never leaves the judge
    """A reply that goes on past the limit."""


@contextlib.contextmanager
def reading_up_to(limit: int) -> Iterator[None]:
    """Replies inside of the block may have so many bytes."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def bound_replies() -> None:
    """Have httpx, which all of litellm's calls end in, stop reading at the limit.

    Its clients are made in many places and take no such setting. Counted is what leaves the decoder: a few kilobytes
    of gzip can stand for gigabytes, and are unpacked 16 KB at a time.
    """
    import httpx

    response: Any = httpx.Response
    if hasattr(response.aiter_bytes, "__wrapped__"):
        return
    unbounded = response.aiter_bytes

    @functools.wraps(unbounded)
    async def aiter_bytes(self: Any, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        read, limit = 0, _limit.get()
        async for chunk in unbounded(self, chunk_size):
            read += len(chunk)
            if read > limit:
                raise TooLong(f"the reply is longer than {limit >> 20} MB")
            yield chunk

    response.aiter_bytes = aiter_bytes


def valid(text: object) -> str:
    """A server's text as valid Unicode of bounded length: a lone surrogate becomes "?"."""
    return str(text or "")[:LONGEST_TEXT].encode("utf-8", "replace").decode("utf-8")
