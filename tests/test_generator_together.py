"""Engines that write side by side, without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from iterft_lite.backends.llamacpp.engine import Engine, Finished, Request
from iterft_lite.backends.llamacpp.scheduling import Expected
from iterft_lite.backends.llamacpp.together import Together, engines_that_pay
from iterft_lite.errors import BackendError
from iterft_lite.protocols import Sampling

WARM = Sampling(1.0, 8)


class Echo:
    """An engine whose sequences end at once, with their own seed; one of seed -1 fails."""

    context = 64

    def __init__(self) -> None:
        self.asked: list[int] = []

    def complete(
        self, requests: Sequence[Request], _: Sampling, on_token: Callable[[int, int], None] | None
    ) -> Iterator[Finished]:
        for place, request in enumerate(requests):
            if request.seed < 0:
                raise BackendError("no memory")
            self.asked.append(request.seed)
            if on_token:
                on_token(place, request.seed)
            yield Finished(place, [request.seed], "stop")


def together(*engines: Echo, expected: Expected | None = None) -> Together:
    return Together(cast(Any, engines), expected or Expected())


def asked(*seeds: int) -> list[Request]:
    return [Request([1], seed, 8, kind=seed) for seed in seeds]


def test_what_engines_write_belongs_to_the_requests_as_they_were_given() -> None:
    tokens: list[tuple[int, int]] = []
    both = together(Echo(), Echo())
    made = list(both.complete(asked(50, 51, 52, 53, 54), WARM, lambda place, token: tokens.append((place, token))))
    assert sorted((each.index, *each.ids) for each in made) == [(place, 50 + place) for place in range(5)]
    assert sorted(tokens) == [(place, 50 + place) for place in range(5)]


def test_long_sequences_are_dealt_out_evenly_and_the_same_way_every_time() -> None:
    expected = Expected()
    for seed in range(6):
        expected.note(seed, 10 * seed)
    one, other = Echo(), Echo()
    for _ in range(2):
        list(together(one, other, expected=expected).complete(asked(*range(6)), WARM))
    assert (one.asked, other.asked) == ([5, 3, 1] * 2, [4, 2, 0] * 2)


def test_one_request_is_written_though_there_are_two_engines() -> None:
    assert [each.ids for each in together(Echo(), Echo()).complete(asked(7), WARM)] == [[7]]


def test_an_engine_that_fails_is_heard_and_the_other_one_ends() -> None:
    before = threading.active_count()
    with pytest.raises(BackendError, match="no memory"):
        list(together(Echo(), Echo()).complete(asked(3, -1, 4, 5), WARM))
    assert threading.active_count() == before


def test_engines_end_when_nobody_takes_what_they_write() -> None:
    before, one, other = threading.active_count(), Echo(), Echo()
    taking = together(one, other).complete(asked(*range(1000)), WARM)
    next(taking)
    cast(Any, taking).close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("slots", "threads", "engines"), [(32, 2, 2), (32, 1, 1), (32, 16, 2), (16, 2, 1), (5, 4, 1)])
def test_an_engine_has_sequences_enough_to_be_worth_it(slots: int, threads: int, engines: int) -> None:
    assert engines_that_pay(slots, threads) == engines


def test_all_engines_are_told_what_one_would_be() -> None:
    class Told:
        context = 64

        def __init__(self) -> None:
            self.told: list[str] = []

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: self.told.append(name)

    engines = [Told(), Told()]
    both = Together(cast(Sequence[Engine], engines), Expected())
    both.ends_at([1])
    both.adapt(None)
    both.ignore_ends()
    both.forget()
    both.close()
    assert [each.told for each in engines] == [["ends_at", "adapt", "ignore_ends", "forget", "close"]] * 2
