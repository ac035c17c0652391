"""What fuzz targets share: how many inputs, and ways in which files are damaged.

`ITERFT_FUZZ=1000000 pytest tests/attacks/test_fuzz.py` spreads so many inputs over the targets; without it each takes a few.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TARGETS = 32
"""How many there are: the inputs are spread over them."""

FEW = 40
"""Inputs of a target in CI."""

GIVEN = int(os.environ.get("ITERFT_FUZZ", "0"))

fuzz = settings(
    max_examples=GIVEN // TARGETS if GIVEN else FEW,
    deadline=None,
    database=None,
    derandomize=not GIVEN,
    suppress_health_check=list(HealthCheck),
)
"""Decorates a target."""

SPLINTERS = (
    b"\xff",
    b"\xfe\xff", b"\xef\xbb\xbf", b"\0", b"\n", b"\r\n", b'"', b"\\ud83d", b"{", b"}", b"[" * 2000, b"null", b"NaN",
    b"-1", b"1e999", b"9" * 5000, b"../../x", b"\x1b]0;x\x07", b"[/b]", b"$\\frac{$", b"{{question}}", "\u202e".encode(),
    b"e\xcc\x81",
)  # fmt: skip
"""What is put into files."""

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with a few damages: bytes changed, cut off, cut out, doubled, or splinters put in."""
    return st.integers(0, 2**32).map(lambda seed: damage(whole, random.Random(seed)))


def damage(whole: bytes, draw: random.Random) -> bytes:
    """See `damaged`."""
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice([1, 1, 4, 64]))
        ways = {
            "change": lambda found: bytes(draw.randrange(256) for _ in found),
            "cut out": lambda _: b"",
            "double": lambda found: found * 2,
            "zero": lambda found: bytes(len(found)),
            "put in": lambda found: draw.choice(SPLINTERS) + found,
        }
        way = draw.choice(["cut off", *ways])
        data[at : len(data) if way == "cut off" else end] = ways.get(way, lambda _: b"")(bytes(data[at:end]))
    return bytes(data)


def damaged_json(whole: bytes) -> st.SearchStrategy[bytes]:
    """Likewise of JSON, or with another value at some place."""
    return damaged(whole) | st.integers(0, 2**32).map(lambda seed: other_values(whole, random.Random(seed)))


DEEP = [json.loads("[" * many + "]" * many) for many in (100, 400, 800)]
"""Values that can be read, and that whoever walks through them may fall over."""


def other_values(data: bytes, draw: random.Random) -> bytes:
    """JSON in which a value at a place by chance is another one."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    at = draw.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:
        return damage(data, draw)
    places = list(_places(value))
    if places:
        holder, key = draw.choice(places)
        holder[key] = draw.choice(
            [None, -1, 1e308, float("nan"), "../../../x", "\ud800", [], {}, [[]], {"a": 1}, True, "x" * 9999, *DEEP]
        )
    lines[at] = json.dumps(value).encode()
    return b"\n".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value that could hold another one."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])
