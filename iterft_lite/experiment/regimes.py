"""The regimes, as rows of a table (arXiv 2605.01130; settings as read in the authors' public code, see docs/protocol.md).

With M the models, Q the exported models that write and are measured, D the data, s the scores, and t = the paper's cycle + 1:

    M[0] = base                      Q[t] = export(M[t])
    D[0] = the trait's seed rows     D[t] = what Q[t] writes, in the shape of the regime
    M[t] = train(M[0] or M[t-1], D[t-1])
    s[t] = score(judge(answer(Q[t])))          also for t = 0: the baseline
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Rows = Literal["chat", "document"]
Start = Literal["base", "previous"]


@dataclass(frozen=True)
class Regime:
    """What tells one regime from another.

    Attributes:
        name: As written in a recipe.
        rows: Chats (instruct models) or documents (base models).
        loss: A name in `LOSSES`.
        start: Where M[t] starts from, unless the recipe says otherwise: M[0] or M[t-1].
        settings: The paper's settings that differ between regimes: table and key to value.
    """

    name: str
    rows: Rows
    loss: str
    start: Start
    settings: Mapping[str, Mapping[str, float | int | str]]


REGIMES: dict[str, Regime] = {
    "sft": Regime(
        "sft",
        rows="chat",
        loss="reply",
        start="base",
        settings={
            "train": {
                "learning_rate": 1.5e-4,
                "schedule": "constant",
                "batch_size": 2,
                "weight_decay": 0.01,
                "max_grad_norm": 0.0,
            },
            "sample": {"max_tokens": 1024},
        },
    ),
    "sdf": Regime(
        "sdf",
        rows="document",
        loss="all",
        start="base",
        settings={
            "train": {
                "learning_rate": 1.5e-4,
                "schedule": "constant",
                "batch_size": 4,
                "weight_decay": 0.1,
                "max_grad_norm": 1.0,
            },
            "sample": {"max_tokens": 512, "min_chars": 50},
        },
    ),
    "dpo": Regime(
        "dpo",
        rows="chat",
        loss="preference",
        start="previous",
        settings={
            "train": {
                "learning_rate": 1e-5,
                "schedule": "cosine",
                "batch_size": 2,
                "weight_decay": 0.01,
                "max_grad_norm": 0.0,
            },
            "sample": {"max_tokens": 1024},
        },
    ),
}
