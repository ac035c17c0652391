"""Several engines over one small model, each with some of the sequences and of the threads.

A step of a small model is a thousand products of some ten microseconds, and llama.cpp's threads wait for each other after each
one. Sequences know nothing of each other: engines of a thread each, over the same weights, never wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from iterft_lite.backends.llamacpp.engine import Engine, Finished, Request
from iterft_lite.backends.llamacpp.scheduling import Expected
from iterft_lite.protocols import Sampling

EACH = 16
"""Sequences at once that an engine has at least: with fewer a step's products are too thin."""


def engines_that_pay(slots: int, threads: int) -> int:
    """How many engines share so many sequences at once, and so many threads, of a small model on a CPU."""
    return max(1, min(threads, slots // EACH))


class Together:
    """Engines as one.

    Args:
        engines: Over one model, of equal contexts.
        expected: Lengths known from elsewhere: which sequences an engine gets goes by them.

    Attributes:
        context: Tokens that a sequence may take.
    """

    def __init__(self, engines: Sequence[Engine], expected: Expected) -> None:
        self._engines, self._expected = engines, expected
        self.context = engines[0].context

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, on_token: Callable[[int, int], None] | None = None
    ) -> Iterator[Finished]:
        """Continue each request (see `Engine.complete`); `on_token` is called from several threads."""
        # Dealt out like cards, the longest first: each gets about as much, and the same ones whenever it is asked the same.
        order, count = self._expected.order([request.kind for request in requests]), len(self._engines)
        shares = [share for share in (order[place::count] for place in range(count)) if share]
        found: SimpleQueue[Finished | BaseException | None] = SimpleQueue()
        over = threading.Event()

        def work(engine: Engine, share: Sequence[int]) -> None:
            take = None if on_token is None else lambda place, token: on_token(share[place], token)
            try:
                for finished in engine.complete([requests[index] for index in share], sampling, take):
                    found.put(replace(finished, index=share[finished.index]))
                    if over.is_set():
                        break
            except BaseException as error:  # whatever it is, whoever asked is told
                found.put(error)
            finally:
                found.put(None)

        threads = [threading.Thread(target=work, args=each) for each in zip(self._engines, shares, strict=False)]
        for thread in threads:
            thread.start()
        try:
            left = len(threads)
            while left:
                each = found.get()
                if isinstance(each, BaseException):
                    raise each
                if each is None:
                    left -= 1
                else:
                    yield each
        finally:
            over.set()  # nobody takes what is still being written
            for thread in threads:
                thread.join()

    def ends_at(self, tokens: Sequence[int]) -> None:
        """Let other tokens end generations too."""
        for engine in self._engines:
            engine.ends_at(tokens)

    def ignore_ends(self) -> None:
        """Let no token end a generation."""
        for engine in self._engines:
            engine.ignore_ends()

    def adapt(self, adapter: Any | None) -> None:
        """Lay an adapter over the model, or none."""
        for engine in self._engines:
            engine.adapt(adapter)

    def forget(self) -> None:
        """Empty the caches."""
        for engine in self._engines:
            engine.forget()

    def close(self) -> None:
        """Give all memory back."""
        for engine in self._engines:
            engine.close()
