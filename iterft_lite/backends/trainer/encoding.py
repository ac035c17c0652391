"""Rows to token ids and padded batches, with the tokens that are in the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from iterft_lite.backends.chat_templates import VARIABLES
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import ModelError, UserError
from iterft_lite.experiment.rows import Message

IGNORED = -100
"""Label of a token that is not in the loss (PyTorch's and Hugging Face's convention)."""

Example = dict[str, Any]
"""A row as token ids: `input_ids` and `labels`, or `prompt_ids`, `chosen_ids` and `rejected_ids`."""


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
        loss: Which of the three kinds they are.
        tokenizer: Of the model.
        limit: Tokens a row (a side of a pair) may have; more are cut off at the end.
        name: Of the model, for errors.

    Returns:
        Examples (`input_ids`, `labels`; pairs: `prompt_ids`, `chosen_ids`, `rejected_ids`) and how many rows were cut.

    Raises:
        ModelError: If the model cannot chat.
        UserError: If a row has no reply, or none of its reply fits.
    """
    if loss != "all" and not tokenizer.chat:
        raise ModelError(
            f"`{name}` has no chat template, which training on replies needs",
            hint='choose an instruct model, or train a base model with `regime = "sdf"`',
        )
    examples, cut = [], 0
    for row in rows:
        if loss == "preference":
            chat = _messages(row["prompt"])
            (prompt, chosen), (_, rejected) = (tokenizer.reply_ids(chat, row[side]) for side in ("chosen", "rejected"))
            longest = len(prompt) + max(len(chosen), len(rejected))
            room = limit - len(prompt)
            example: Example = {
                "prompt_ids": prompt,
                "chosen_ids": chosen[: max(0, room)],
                "rejected_ids": rejected[: max(0, room)],
            }
        elif loss == "reply":
            if not row["messages"] or row["messages"][-1]["role"] != "assistant":
                raise UserError(f"row `{row.get('id')}` does not end with a reply of the assistant")
            *before, last = _messages(row["messages"])
            prompt, reply = tokenizer.reply_ids(before, last.content)
            longest = len(prompt) + len(reply)
            room = limit - len(prompt)
            example = {"input_ids": (prompt + reply)[:limit], "labels": ([IGNORED] * len(prompt) + reply)[:limit]}
        else:
            ids = tokenizer.document_ids(row["text"], end=True)
            longest, room = len(ids), limit
            example = {"input_ids": ids[:limit], "labels": ids[:limit]}
        if room <= 0:
            raise UserError(
                f"row `{row.get('id')}`: the prompt alone has {limit - room} tokens, no token of the reply is left of {limit}",
                hint="raise `train.max_length` or shorten the prompt",
            )
        cut += longest > limit
        examples.append(example)
    return examples, cut


def _messages(chat: Sequence[Mapping[str, str]]) -> list[Message]:
    return [Message(message["role"], message["content"]) for message in chat]


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
