"""Dollars: what a run has spent on judging, over all its sittings, and whether one more call fits."""

from __future__ import annotations

from pathlib import Path

from iterft_lite.backends.judge.prices import Price, tokens_of


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
        if ledger is not None and ledger.exists():
            for line in ledger.read_text().split("\n")[:-1]:
                usd, _, name = line.partition(" ")
                self.spent += float(usd)
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
        if usd:
            self.spent += usd
            if reserved:
                self._ratio = max(self._ratio, self._ratio * usd / reserved)
            if self._ledger is not None:
                self._ledger.parent.mkdir(parents=True, exist_ok=True)
                with self._ledger.open("a") as file:
                    file.write(f"{usd:.9f} {name}".rstrip() + "\n")
            self._named.add(name)

    def keep(self, usd: float) -> None:
        """A call was broken off: the provider may charge for it and will not say, so its dollars stay set aside."""
        self.reserved += usd
