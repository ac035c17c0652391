"""Dollars: what a run has spent on judging, over all its sessions, and whether one more call fits."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from iterft_lite.backends.judge.prices import Price, tokens_of
from iterft_lite.files import disk_errors, open_append, read_bytes


class Budget:
    """Spent and reserved dollars against a limit.

    Args:
        limit: Dollars; 0 means none.
        price: Of the judge; None if it is not known.
        ledger: File with a line of dollars for each paid call or batch, so that a run that is continued knows what it has
            spent; a batch's line ends with its name.
    """

    def __init__(self, limit: float, price: Price | None, ledger: Path | None) -> None:
        self.limit = limit
        self.price = price
        self.spent = 0.0
        self.reserved = 0.0
        self._ledger = ledger
        self._ratio = 1.0
        self._named: set[str] = set()
        self._torn = False
        if ledger is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._read(read_bytes(ledger, links=False).decode(errors="replace"))

    def _read(self, text: str) -> None:
        """Take in what earlier sessions wrote. A line that is not an amount was torn by a kill or a full disk, and counts
        nothing."""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            usd, _, name = line.partition(" ")
            if (spent := amount(usd)) is not None:
                self.spent += spent
                self._named.add(name)

    def expected(self, prompt: str, max_tokens: int) -> float:
        """Dollars that a call may cost at most, corrected upwards by what calls have cost so far."""
        return self._ratio * self.price.usd(tokens_of(prompt), max_tokens) if self.price else 0.0

    def reserve(self, usd: float) -> bool:
        """Set dollars aside for a call; False if that would pass the limit."""
        if self.limit and self.spent + self.reserved + usd > self.limit:
            return False
        self.reserved += usd
        return True

    def settle(self, reserved: float, usd: float, name: str = "") -> None:
        """A call has ended: what was set aside is free again, what it cost is written down.

        Args:
            name: Of a batch: it is written down once, however often its end is met.
        """
        self.reserved = max(0.0, self.reserved - reserved)
        if name and name in self._named:
            return
        if usd > 0:
            self.spent += usd
            if reserved:
                self._ratio = max(self._ratio, self._ratio * usd / reserved)
            self._write(f"{usd:.9f} {name}".rstrip())
            self._named.add(name)

    def _write(self, line: str) -> None:
        """Add a line in one write, so that no other process's stands in the middle of it."""
        if self._ledger is None:
            return
        with disk_errors(self._ledger):
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            file = open_append(self._ledger)
        whole = ("\n" if self._torn else "") + line + "\n"
        self._torn = False
        try:
            os.write(file, whole.encode())
        finally:
            os.close(file)

    def keep(self, usd: float) -> None:
        """A call was broken off: the provider may charge for it and will not say, so its dollars stay set aside."""
        self.reserved += usd


def amount(text: str) -> float | None:
    """Dollars in a ledger's line; None if it is not a finite amount."""
    try:
        usd = float(text)
    except ValueError:
        return None
    return usd if math.isfinite(usd) and usd >= 0 else None
