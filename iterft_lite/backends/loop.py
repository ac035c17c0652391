"""A training loop of our own, for libraries that rewrite the trainers of others.

Unsloth replaces trl's trainers and transformers' loop by versions that it generates from their source, with other defaults
(accumulation, padding, precision). What speeds it up lies in the model, which any loop may call. This one does what the TRL
trainers of `trainer_peft.py` do with the same rows: a test compares them step by step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from iterft_lite.backends.tokens import Example
from iterft_lite.backends.training import Order, loss_tokens, reply_logprobs

Batch = dict[str, torch.Tensor]

JOINED = 4096
"""Numbers of a weight from which on it may be joined: 8-bit moments of smaller ones are kept in 32 bits."""

MOMENT_BLOCK = 256
"""Numbers that share a scale of 8-bit moments."""


def join(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimizer's weights, and their gradients, side by side in one: a step is then a launch or two, not 500.

    Elementwise updates are the same; so are 8-bit moments, whose blocks begin and end where they did: weights that are no
    whole number of blocks are left alone.
    """
    for group in optimizer.param_groups:
        weights = [weight for weight in group["params"] if weight.numel() >= JOINED and weight.numel() % MOMENT_BLOCK == 0]
        if len(weights) < 2 or len({(weight.dtype, weight.device) for weight in weights}) > 1:
            continue
        whole = torch.nn.Parameter(torch.cat([weight.detach().reshape(-1) for weight in weights]))
        whole.grad = torch.zeros_like(whole)
        start = 0
        for weight in weights:
            part = slice(start, start + weight.numel())
            weight.data = whole.data[part].view_as(weight)
            weight.grad = whole.grad[part].view_as(weight)
            start = part.stop
        taken = {id(weight) for weight in weights}
        group["params"] = [whole, *(weight for weight in group["params"] if id(weight) not in taken)]


class Loop:
    """Trains what requires a gradient, as trl's trainers would.

    Args:
        arguments: Of trl's configuration; those that decide about steps and losses are heeded.
        model: The PEFT model.
        train_dataset: Rows as token ids.
        data_collator: Rows to a padded batch.
        optimizers: Optimizer and learning-rate schedule.
        order: Of the rows.
        on_step: Takes the log line of each optimiser step, without its number.
        nll_weight: Pairs: of the chosen reply's mean negative log-likelihood; None: the rows are no pairs.
        forward: Context of each forward pass: automatic mixed precision, entered anew each time, or nothing.
    """

    def __init__(
        self,
        *,
        arguments: dict[str, Any],
        model: Any,
        train_dataset: Sequence[Example],
        data_collator: Callable[[Sequence[Example]], Batch],
        optimizers: tuple[torch.optim.Optimizer, Any],
        order: Order,
        on_step: Callable[[dict[str, float]], None],
        nll_weight: float | None = None,
        forward: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        **_: Any,
    ) -> None:
        self._arguments, self._model, self._rows, self._collate = arguments, model, train_dataset, data_collator
        self._optimizer, self._schedule = optimizers
        self._order, self._on_step, self._nll_weight, self._forward = order, on_step, nll_weight, forward
        self._device = next(model.parameters()).device

    def train(self) -> None:
        """Make every optimiser step of every epoch."""
        join(self._optimizer)  # only now: the adapter's weights are set after this was made
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        self._optimizer.zero_grad(set_to_none=False)  # joined gradients stay where they are
        for _ in range(self._arguments["num_train_epochs"]):
            for micros in self._batches():
                sums = self._accumulate(micros)
                norm = torch.nn.utils.clip_grad_norm_(weights, self._arguments["max_grad_norm"] or float("inf"))
                self._optimizer.step()
                rate = self._schedule.get_last_lr()[0]
                self._schedule.step()
                self._optimizer.zero_grad(set_to_none=False)
                # one synchronisation with the GPU a step: all numbers at once
                *values, norm_value = torch.stack([*sums.values(), norm.detach()]).tolist()
                line = dict(zip(sums, values, strict=True))
                self._on_step(
                    {
                        "loss": line.pop("loss"),
                        "learning_rate": rate,
                        "tokens": int(sum(int(loss_tokens(micro)) for micro in micros)),
                        "grad_norm": norm_value,
                        **line,
                    }
                )

    def _batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each optimiser step of an epoch, on the CPU."""
        micro = self._arguments["per_device_train_batch_size"]
        whole = micro * self._arguments["gradient_accumulation_steps"]
        rows = list(self._order)
        for start in range(0, len(rows), whole):
            batch = rows[start : start + whole]
            yield [self._collate([self._rows[row] for row in batch[at : at + micro]]) for at in range(0, len(batch), micro)]

    def _accumulate(self, micros: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Gradients of one batch; gives its loss and measures, each a float32 scalar on the device."""
        pairs = sum(len(micro["input_ids"]) for micro in micros) // 2
        tokens = torch.stack([loss_tokens(micro) for micro in micros]).sum().to(self._device)
        sums: dict[str, torch.Tensor] = {}
        for micro in micros:
            batch = {name: value.to(self._device, non_blocking=True) for name, value in micro.items()}
            with self._forward():
                found = self._replies(batch, tokens) if self._nll_weight is None else self._preferences(batch, pairs)
            found["loss"].backward()  # type: ignore[no-untyped-call]
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
        return sums

    def _replies(self, batch: Batch, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """This micro-batch's part of the batch's mean over tokens."""
        outputs = self._model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            num_items_in_batch=tokens,
            use_cache=False,
        )
        return {"loss": outputs.loss}

    def _preferences(self, batch: Batch, pairs: int) -> dict[str, torch.Tensor]:
        """This micro-batch's part of the batch's mean over pairs."""
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        chosen, rejected = reply_logprobs(logits, batch["input_ids"], batch["completion_mask"]).chunk(2)
        margins = self._arguments["beta"] * ((chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"]))
        losses = -torch.nn.functional.logsigmoid(margins)
        if self._nll_weight:
            lengths = batch["completion_mask"][: len(chosen), 1:].sum(1)
            losses = losses - self._nll_weight * chosen / lengths
        measures = {
            "loss": losses,
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "chosen_logp": chosen,
            "rejected_logp": rejected,
        }
        return {name: values.sum() / pairs for name, values in measures.items()}
