"""What judges cost: the price table pinned in this repository (`prices.toml`), and arithmetic on it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("prices.toml")

ASCII_PER_TOKEN = 3.5
"""Characters a token of English rubric and answer has at least; other characters count as a token a byte (emoji come near
that). A little low, so that estimates are a little high."""


@dataclass(frozen=True)
class Price:
    """US dollars a million tokens.

    Attributes:
        sent, cached, written: For tokens sent, sent and found in the provider's prompt cache, and written by the judge.
        ends: The day the provider has announced to switch the model off, or "".
    """

    sent: float
    cached: float
    written: float
    ends: str = ""

    def batched(self, *, discount: bool) -> Price:
        """Through OpenAI's batch endpoint.

        Args:
            discount: The model's tokens found in the prompt cache are cheaper in batches too.
        """
        share = batch_share()
        return Price(self.sent * share, (self.cached if discount else self.sent) * share, self.written * share, self.ends)

    def usd(self, sent: int, written: int, cached: int = 0) -> float:
        """Dollars for a call.

        Args:
            sent: All tokens sent, those in the provider's cache included.
        """
        return ((sent - cached) * self.sent + cached * self.cached + written * self.written) / 1e6


FREE = Price(0.0, 0.0, 0.0)


@lru_cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def prices_date() -> str:
    """The day that the table was read."""
    return str(_table()["date"])


def batch_share() -> float:
    """What a token costs in a batch, as a share of its price."""
    return float(_table()["batch"]["share"])


def price_of(judge: str, *, batch: bool = False) -> Price | None:
    """The price of a judge by its name; None where the table does not know it, which is not the same as free.

    Args:
        batch: Asked in batches.
    """
    provider, _, model = judge.partition("/")
    if judge == "embedded" or judge.startswith("local:") or (model and provider in _table()["free"]):
        return FREE
    models = _table()["models"]
    known = models.get(judge) or {name.split("/", 1)[1]: row for name, row in models.items()}.get(judge.rsplit("/", 1)[-1])
    if not known:
        return None
    price = Price(known["in"], known["cached"], known["out"], known.get("ends", ""))
    return price.batched(discount=judge.rsplit("/", 1)[-1] in _table()["batch"]["cached"]) if batch else price


def tokens_of(text: str) -> int:
    """About how many tokens a text has; rather too many than too few."""
    plain = len(text.encode("ascii", "ignore"))
    return int(plain / ASCII_PER_TOKEN) + len(text.encode("utf-8", "replace")) - plain + 8
