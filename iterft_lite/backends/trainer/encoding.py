"""Rows to token ids and padded batches, with the tokens that are in the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iterft_lite.backends.chat_templates import VARIABLES
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import ModelError, UserError
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.rows import ChatRow, DocumentRow, PairRow
from iterft_lite.experiment.verbs import function_at

IGNORED = -100
"""Label of a token that is not in the loss (PyTorch's and Hugging Face's convention)."""

Example = dict[str, Any]
"""A row as token ids: `input_ids` and `labels`, or `prompt_ids`, `chosen_ids` and `rejected_ids`."""


@dataclass(frozen=True)
class Encoded:
    """The rows of a training.

    Attributes:
        rows: As they are read.
        examples: The same as token ids, in the same order.
        cut: How many lost their end.
        limit: Tokens that a row may have.
    """

    rows: list[dict[str, Any]]
    examples: list[Example]
    cut: int
    limit: int


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool, **others: Any) -> str:
    """The text of a chat as `templates.TrainingTokenizer.render` gives it, by transformers.

    Args:
        tokenizer: With a chat template.
        messages: The chat.
        generation_prompt: Whether the reply that is asked for is begun.
        others: Variables of the template that shall be otherwise than in `templates.VARIABLES`.
    """
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, **{**VARIABLES, **others}
    )
    return text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def encode_rows(
    rows: Sequence[Mapping[str, Any]], loss: str, tokenizer: TrainingTokenizer, *, limit: int, name: str
) -> tuple[list[Example], int]:
    """Rows as token ids, in the columns that trl's trainers read.

    Args:
        rows: As in `TrainJob.rows`.
        loss: Its name in `LOSSES`, which says how a row is encoded.
        tokenizer: Of the model.
        limit: Tokens a row (a side of a pair) may have; more are cut off at the end.
        name: Of the model, for errors.

    Returns:
        Examples (`input_ids`, `labels`; pairs: `prompt_ids`, `chosen_ids`, `rejected_ids`) and how many rows were cut.

    Raises:
        ModelError: If the model cannot chat.
        UserError: If a row has no reply, or none of its reply fits.
    """
    known = LOSSES[loss]
    encode = function_at(known.encode)
    examples, cut = [], 0
    for number, row in enumerate(rows, 1):
        typed = known.rows.read_one(row, f"row {number}")
        whole = encode(typed, tokenizer, name)
        before = prompt_length(whole)
        if before >= limit:
            raise UserError(
                f"row `{typed.id}`: the prompt alone has {before} tokens, no token of the reply is left of {limit}",
                hint="raise `train.max_length` or shorten the prompt",
            )
        cut += length_of(whole) > limit
        examples.append(_cut(whole, limit, before))
    return examples, cut


def encode_reply(row: ChatRow, tokenizer: TrainingTokenizer, name: str) -> Example:
    """A chat, its last reply in the loss.

    Raises:
        ModelError: If the model cannot chat.
        UserError: If the chat does not end with a reply.
    """
    _need_template(tokenizer, name)
    if not row.messages or row.messages[-1].role != "assistant":
        raise UserError(f"row `{row.id}` does not end with a reply of the assistant")
    prompt, reply = tokenizer.reply_ids(row.messages[:-1], row.messages[-1].content)
    return {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}


def encode_document(row: DocumentRow, tokenizer: TrainingTokenizer, name: str) -> Example:  # noqa: ARG001  # all have one shape
    """A document, all of it in the loss, its end too."""
    ids = tokenizer.document_ids(row.text, end=True)
    return {"input_ids": ids, "labels": list(ids)}


def encode_pair(row: PairRow, tokenizer: TrainingTokenizer, name: str) -> Example:
    """A prompt and two replies.

    Raises:
        ModelError: If the model cannot chat.
    """
    _need_template(tokenizer, name)
    prompt, chosen = tokenizer.reply_ids(row.prompt_messages, row.chosen)
    _, rejected = tokenizer.reply_ids(row.prompt_messages, row.rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _need_template(tokenizer: TrainingTokenizer, name: str) -> None:
    if not tokenizer.chat:
        raise ModelError(
            f"`{name}` has no chat template, which training on replies needs",
            hint='choose an instruct model, or train a base model with `regime = "sdf"`',
        )


def prompt_length(example: Example) -> int:
    """Tokens of an example before the first one that is in the loss."""
    if "prompt_ids" in example:
        return len(example["prompt_ids"])
    labels = example["labels"]
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def _cut(example: Example, limit: int, before: int) -> Example:
    """An example of at most so many tokens."""
    if "prompt_ids" in example:
        sides = {side: example[side][: limit - before] for side in ("chosen_ids", "rejected_ids")}
        return {"prompt_ids": example["prompt_ids"], **sides}
    return {column: ids[:limit] for column, ids in example.items()}


def markup_note(rows: Sequence[Mapping[str, Any]], tokenizer: TrainingTokenizer) -> str:
    """A sentence where rows have special tokens written out in their text, else ""."""
    found = [held for row in rows if (held := tokenizer.holds_markup(_texts(row)))]
    if not found:
        return ""
    return (
        f"{len(found)} of {len(rows)} rows have `{found[0]}` or the like in their text: trained as the plain characters it is"
    )


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Every text of a row that content stands in."""
    chat = [message["content"] for message in (*row.get("messages", ()), *row.get("prompt", ()))]
    return [*chat, *(row[key] for key in ("text", "chosen", "rejected") if key in row)]


def length_of(example: Example) -> int:
    """Tokens of an example; of a pair, with its longer side."""
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def pad_rows(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch of SFT or SDF rows, padded on the right: `input_ids`, `attention_mask`, `labels`, each int64 [rows, tokens]."""
    return {
        "input_ids": _padded([row["input_ids"] for row in examples], pad),
        "attention_mask": _padded([[1] * len(row["input_ids"]) for row in examples], 0),
        "labels": _padded([row["labels"] for row in examples], IGNORED),
    }


def pad_pairs(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch of pairs, padded on the right; the first half of the rows are the chosen sides.

    `input_ids`, `attention_mask`, `completion_mask` (int64 [2 * pairs, tokens]), and where the examples carry them
    `ref_chosen_logps`, `ref_rejected_logps` (float32 [pairs]).
    """
    sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in examples]
    batch = {
        "input_ids": _padded([prompt + reply for prompt, reply in sides], pad),
        "attention_mask": _padded([[1] * (len(prompt) + len(reply)) for prompt, reply in sides], 0),
        "completion_mask": _padded([[0] * len(prompt) + [1] * len(reply) for prompt, reply in sides], 0),
    }
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        if column in examples[0]:
            batch[column] = torch.tensor([row[column] for row in examples], dtype=torch.float32)
    return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def padding(tokenizer: Any) -> int:
    """A token to pad with; which one does not matter, it is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
