"""What generation learns while it runs: how long rows of a kind become, and how many threads pay off."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

TRIAL = 5
"""Steps for which a number of threads is tried."""

HOLD = 150
"""Steps after which it is tried again."""


@dataclass
class Expected:
    """Lengths seen so far, by kind of request: the longest are started first, so that no straggler is left alone at the end."""

    _sums: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: Hashable, length: int) -> None:
        """A request of this kind took this many tokens. May be called from several threads."""
        with self._lock:
            total, count = self._sums.get(kind, (0, 0))
            self._sums[kind] = (total + length, count + 1)

    def order(self, kinds: Sequence[Hashable]) -> list[int]:
        """Indices of requests, longest expected first; those of unknown kind stand for the longest known."""
        means = {kind: total / count for kind, (total, count) in self._sums.items()}
        unknown = max((means[kind] for kind in kinds if kind in means), default=0.0)
        return sorted(range(len(kinds)), key=lambda index: -means.get(kinds[index], unknown))


class Pace:
    """How many threads decode: all, or one where a small model's threads wait for each other longer than they work.

    Tried out during decoding, again and again, because it depends on what else runs on the machine; for few sequences and for
    many apart: the few stragglers at the end of a call are faster alone, the many of the next call are not.

    Args:
        choices: Numbers of threads, the usual one first.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = list(dict.fromkeys(choices))
        self._trials: dict[int, _Trial] = {}
        self._last: _Trial | None = None

    @property
    def best(self) -> int:
        """What was faster the last time for most sequences at once: prompts are many tokens too."""
        return self._trials[max(self._trials)].best if self._trials else self._choices[0]

    def threads(self, sequences: int) -> int:
        """For the next step, of so many sequences."""
        self._last = self._trials.setdefault(sequences.bit_length(), _Trial(self._choices))
        return self._last.threads()

    def took(self, seconds: float) -> None:
        """The step that `threads` was asked for last took this long."""
        if self._last is not None:
            self._last.took(seconds)


class _Trial:
    """Which of some numbers of threads is faster, for about so many sequences."""

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = choices
        self._winner = 0
        self._step = 0
        self._seconds = [0.0] * len(choices)

    @property
    def best(self) -> int:
        return self._choices[self._winner]

    def threads(self) -> int:
        trial = self._step // TRIAL
        return self._choices[trial if trial < len(self._choices) else self._winner]

    def took(self, seconds: float) -> None:
        if len(self._choices) == 1:
            return
        trial, place = divmod(self._step, TRIAL)
        if trial < len(self._choices):
            # the first step of a trial makes or ends threads
            self._seconds[trial] = 0.0 if place == 0 else self._seconds[trial] + seconds
        self._step += 1
        if self._step == TRIAL * len(self._choices):
            self._winner = self._seconds.index(min(self._seconds))
        elif self._step == HOLD:
            self._step = 0
