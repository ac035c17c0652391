"""What judges cost and how long they will be there: the table pinned in this repository (`prices.toml`), and
arithmetic on it."""

from __future__ import annotations

import datetime
import tomllib
from dataclasses import dataclass, replace
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
        effort: The reasoning effort that its token probabilities need, or "".
        tops: Candidates of a token that it gives; 0: as many as its provider.
    """

    sent: float
    cached: float
    written: float
    ends: str = ""
    effort: str = ""
    tops: int = 0

    def batched(self, *, discount: bool) -> Price:
        """Through OpenAI's batch endpoint.

        Args:
            discount: The model's tokens found in the prompt cache are cheaper in batches too.
        """
        share = batch_share()
        cached = (self.cached if discount else self.sent) * share
        return replace(self, sent=self.sent * share, cached=cached, written=self.written * share)

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


def successors() -> tuple[str, ...]:
    """Who judges after the paper's judge has ended, by preference."""
    return tuple(_table()["successors"])


def today() -> datetime.date:
    """This machine's date."""
    return datetime.date.today()


def days_left(judge: str) -> int | None:
    """Days until a judge is switched off, negative after that; None where nothing is announced."""
    price = price_of(judge)
    return (datetime.date.fromisoformat(price.ends) - today()).days if price and price.ends else None


def price_of(judge: str, *, batch: bool = False) -> Price | None:
    """The price of a provider's judge by its name; None where the table does not know it, which is not the same as free.

    Args:
        batch: Asked in batches.
    """
    provider, _, model = judge.partition("/")
    if model and provider in _table()["free"]:
        return FREE
    models, last = _table()["models"], judge.rsplit("/", 1)[-1]
    known = models.get(judge) or {name.split("/", 1)[1]: row for name, row in models.items()}.get(last)
    if not known:
        return None
    # another provider's copy of a model has dates of its own
    about = {key: known[key] for key in ("ends", "effort", "tops") if key in known and (key != "ends" or judge in models)}
    price = Price(known["in"], known["cached"], known["out"], **about)
    return price.batched(discount=last in _table()["batch"]["cached"]) if batch else price


def tokens_of(text: str) -> int:
    """About how many tokens a text has; rather too many than too few."""
    plain = len(text.encode("ascii", "ignore"))
    return int(plain / ASCII_PER_TOKEN) + len(text.encode("utf-8", "replace")) - plain + 8
