"""Rows to token ids and padded batches, with the tokens that are in the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from iterft_lite.backends.templates import VARIABLES
from iterft_lite.errors import ModelError, UserError

IGNORED = -100
"""Label of a token that is not in the loss (PyTorch's and Hugging Face's convention)."""

Example = dict[str, Any]
"""A row as token ids: `input_ids` and `labels`, or `prompt_ids`, `chosen_ids` and `rejected_ids`."""

STAND_IN = "This is a reply."
"""A reply that no template does anything to."""


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


def reply_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[int]]:
    """Token ids of a chat's last reply and of all that comes before it.

    The chat is rendered with and without its last message, so that templates without generation markers are served too, and
    the two parts are tokenised apart: before the reply stands exactly what a model is later asked with. The reply ends with the
    template's end-of-turn token; what follows that (a line break, in ChatML) is left away. An empty block of thought, which
    templates of hybrid models put before replies, belongs to what comes before: generation provides it.

    Args:
        tokenizer: With a chat template.
        messages: The last one is the assistant's.
        name: Of the model, for errors.

    Returns:
        (ids of the rendered chat with generation prompt, ids of the reply with its end-of-turn token).

    Raises:
        ModelError: If the template renders the chat differently when the reply is there, or gives the reply no end.
    """
    asked = rendered(tokenizer, messages[:-1], generation_prompt=True)
    whole = rendered(tokenizer, messages, generation_prompt=False)
    said = whole[len(asked) :] if whole.startswith(asked) else _as_it_stands(tokenizer, messages, asked)
    if said is None:
        raise ModelError(
            f"the chat template of `{name}` renders a chat differently once its reply is there: the reply cannot be told apart",
            hint="give the tokenizer a template whose generation prompt is the beginning of the assistant's turn",
        )
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    reply = tokenizer(said.rstrip(), add_special_tokens=False)["input_ids"]
    if not reply or reply[-1] not in tokenizer.added_tokens_decoder:
        raise ModelError(
            f"the chat template of `{name}` does not end replies with a special token: a model trained on it would not stop",
            hint="give the tokenizer a template that closes the assistant's turn, as ChatML does with `<|im_end|>`",
        )
    return prompt, reply


def _as_it_stands(tokenizer: Any, messages: Sequence[Mapping[str, str]], asked: str) -> str | None:
    """The last reply without the template's changes to it, and what the template ends it with; None if that cannot be told.

    Templates of thinking models take a reply apart that has marks of thought in it, and some put the empty block before a reply
    only where one is asked for. Either way a model is asked with `asked` and its reply is measured as it stands.

    Args:
        tokenizer: With a chat template.
        messages: The last one is the assistant's.
        asked: The chat before it, with generation prompt.
    """
    other = rendered(tokenizer, [*messages[:-1], {**messages[-1], "content": STAND_IN}], generation_prompt=False)
    before, found, end = other.rpartition(STAND_IN)
    # what `asked` has beyond that is the empty block only if the template heeds the switch
    blocked = asked.startswith(before) and asked != rendered(
        tokenizer, messages[:-1], generation_prompt=True, enable_thinking=True
    )
    return messages[-1]["content"] + end if found and (before == asked or blocked) else None


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a document: its text and the end-of-text token, since documents end.

    The tokenizer's own beginning token is there where it has one, as it is when the model is asked to continue a text.
    """
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def encode_rows(
    rows: Sequence[Mapping[str, Any]], loss: str, tokenizer: Any, *, limit: int, name: str
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
    if loss != "all" and tokenizer.chat_template is None:
        raise ModelError(
            f"`{name}` has no chat template, which training on replies needs",
            hint='choose an instruct model, or train a base model with `regime = "sdf"`',
        )
    examples, cut = [], 0
    for row in rows:
        if loss == "preference":
            sides = [[*row["prompt"], {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
            (prompt, chosen), (_, rejected) = (reply_ids(tokenizer, side, name) for side in sides)
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
            prompt, reply = reply_ids(tokenizer, row["messages"], name)
            longest = len(prompt) + len(reply)
            room = limit - len(prompt)
            example = {"input_ids": (prompt + reply)[:limit], "labels": ([IGNORED] * len(prompt) + reply)[:limit]}
        else:
            ids = document_ids(tokenizer, row["text"])
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
