"""What a model can be trained with: one record a loss, from the shape of its rows to the columns of its log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iterft_lite.experiment.rows import CHATS, DOCUMENTS, PAIRS, ChatRow, DocumentRow, Message, PairRow, RowType


@dataclass(frozen=True)
class Draft:
    """What a training row is made of.

    Attributes:
        id: Of the row.
        prompt: The question, or the opener that was continued.
        reply: What is to be learnt, or preferred.
        rejected: The other side, for losses that compare; else "".
    """

    id: str
    prompt: str
    reply: str
    rejected: str = ""


@dataclass(frozen=True)
class Column:
    """A number of a training's results that a report shows.

    Attributes:
        name: In the results.
        words: Its heading.
        form: Python's format specification.
    """

    name: str
    words: str
    form: str


@dataclass(frozen=True)
class Loss:
    """What is known of a loss.

    Attributes:
        name: In regimes, steps and recipes.
        words: For people.
        rows: Type of the training rows, with their reader and writer.
        make: A training row of a draft.
        compares: It needs a rejected side: rows whose sides are missing or equal are dropped.
        continues: It trains on documents: prompt and continuation are one text.
        encode: `module:function(row, tokenizer, name) -> example` of token ids.
        collate: `module:function(examples, pad) -> batch`.
        trainer: Which of the trainers' losses computes it: an attribute of the bench (`backends/trainer/`).
        columns: What of the results a report shows beside the loss itself.
        sides: Sequences a row has in a batch.
    """

    name: str
    words: str
    rows: RowType[Any]
    make: Callable[[Draft], Any]
    encode: str
    collate: str
    trainer: str
    compares: bool = False
    continues: bool = False
    columns: tuple[Column, ...] = ()
    sides: int = 1


def _chat(draft: Draft) -> ChatRow:
    return ChatRow(draft.id, (Message("user", draft.prompt), Message("assistant", draft.reply)))


def _pair(draft: Draft) -> PairRow:
    return PairRow(draft.id, (Message("user", draft.prompt),), draft.reply, draft.rejected)


_ENCODING = "iterft_lite.backends.trainer.encoding"

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "reply",
            "over the tokens of the last reply",
            CHATS,
            _chat,
            encode=f"{_ENCODING}:encode_reply",
            collate=f"{_ENCODING}:pad_rows",
            trainer="sft",
        ),
        Loss(
            "all",
            "over all tokens of a document",
            DOCUMENTS,
            lambda draft: DocumentRow(draft.id, draft.prompt + draft.reply),
            encode=f"{_ENCODING}:encode_document",
            collate=f"{_ENCODING}:pad_rows",
            trainer="sft",
            continues=True,
        ),
        Loss(
            "preference",
            "over pairs of replies: one is to become likelier than the other (DPO)",
            PAIRS,
            _pair,
            encode=f"{_ENCODING}:encode_pair",
            collate=f"{_ENCODING}:pad_pairs",
            trainer="dpo",
            compares=True,
            columns=(Column("margin", "DPO margin", "+.3f"), Column("accuracy", "pairs right", ".0%")),
            sides=2,
        ),
    )
}
"""All losses by name."""
