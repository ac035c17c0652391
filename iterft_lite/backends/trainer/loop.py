"""The training loop of the plain trainer and of Unsloth's.

It does what the TRL trainers of `trl.py` do with the same rows: a test compares them step by step. What makes a step fast lies
in how log-probabilities are computed, which each trainer gives. (Unsloth replaces trl's trainers and transformers' loop by
versions that it generates from their source, with other defaults: accumulation, padding, precision.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from iterft_lite.backends.trainer.cuda_graphs import Batch, Graphs, Passes
from iterft_lite.backends.trainer.encoding import IGNORED, Example
from iterft_lite.backends.trainer.session import Order, loss_tokens

JOINED = 4096
"""Numbers of a weight from which on it may be joined: 8-bit moments of smaller ones are kept in 32 bits."""

MOMENT_BLOCK = 256
"""Numbers that share a scale of 8-bit moments."""


def join(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimizer's weights, and their gradients, side by side in one: a step is then a launch or two, not 500.

    Elementwise updates are the same; so are 8-bit moments, whose blocks begin and end where they did: weights that are no
    whole number of blocks are left alone. Weights that lie side by side already stay where they are.
    """
    for group in optimizer.param_groups:
        weights = [weight for weight in group["params"] if weight.numel() >= JOINED and weight.numel() % MOMENT_BLOCK == 0]
        if len(weights) < 2 or len({(weight.dtype, weight.device) for weight in weights}) > 1:
            continue
        whole = _side_by_side(weights)
        if whole is None:
            whole = torch.nn.Parameter(torch.cat([weight.detach().reshape(-1) for weight in weights]))
            whole.grad = torch.zeros_like(whole)
            start = 0
            for weight in weights:
                part = slice(start, start + weight.numel())
                # The model keeps its own parameter objects. They become views of the whole, so forward and backward passes read
                # and write the same memory as the optimizer, which only knows the whole.
                weight.data = whole.data[part].view_as(weight)
                weight.grad = whole.grad[part].view_as(weight)
                start = part.stop
        taken = {id(weight) for weight in weights}
        group["params"] = [whole, *(weight for weight in group["params"] if id(weight) not in taken)]


def _side_by_side(weights: Sequence[torch.Tensor]) -> torch.nn.Parameter | None:
    """The whole whose parts these weights and their gradients are, in order and without gaps; None if there is none."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    made = []
    for parts in (weights, grads):
        first = parts[0].untyped_storage() if len(parts) == len(weights) else None
        start = 0
        for part in parts:
            # the same storage, each part where the one before it ends: nothing was moved since the last training
            if first is None or part.untyped_storage().data_ptr() != first.data_ptr() or part.storage_offset() != start:
                return None
            start += part.numel()
        if first is None or first.nbytes() != start * parts[0].element_size():
            return None
        made.append(torch.empty(0, dtype=parts[0].dtype, device=parts[0].device).set_(first, 0, (start,)))  # type: ignore[call-overload]
    whole = torch.nn.Parameter(made[0])
    whole.grad = made[1]
    return whole


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
        logprobs: Log-probability of each token after a row's first, float32 [rows, tokens - 1], from token ids [rows, tokens]
            that are padded on the right, and where it is wanted, bool [rows, tokens - 1]: elsewhere it may be any number. For
            pairs the sums over replies are the reference's too.
        scale: Gradients are so much larger on their way through the model (see `training.GRADIENT_SCALE`).
        nll_weight: Pairs: of the chosen reply's mean negative log-likelihood; None: the rows are not pairs.
        graphs: Repeats recorded passes; None: every kernel is launched by itself.
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
        logprobs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scale: float = 1.0,
        nll_weight: float | None = None,
        graphs: Graphs | None = None,
        **_: Any,
    ) -> None:
        self._arguments, self._rows, self._collate = arguments, train_dataset, data_collator
        self._optimizer, self._schedule = optimizers
        self._order, self._on_step, self._nll_weight = order, on_step, nll_weight
        self._logprobs, self._graphs, self._scale = logprobs, graphs, scale
        self._device = next(model.parameters()).device

    def train(self) -> None:
        """Make every optimiser step of every epoch."""
        # the model's own weights, before they are joined: these are what recorded graphs hold addresses of
        named = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        join(self._optimizer)  # only now: the adapter's weights are set after this was made
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        for weight in weights:  # gradients stay where they are from here on
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        if self._graphs is not None:
            self._graphs.begin(named)
        before: _Step | None = None
        for _ in range(self._arguments["num_train_epochs"]):
            for micros in self._batches():
                sums = self._accumulate(micros)
                for weight in weights if self._scale != 1 else ():
                    assert weight.grad is not None
                    weight.grad /= self._scale
                # an infinite limit clips nothing, but the norm is wanted for the log all the same
                norm = torch.nn.utils.clip_grad_norm_(weights, self._arguments["max_grad_norm"] or float("inf"))
                self._optimizer.step()
                rate = self._schedule.get_last_lr()[0]
                self._schedule.step()
                # zeroed in place: graphs write to gradients where they were recorded
                self._optimizer.zero_grad(set_to_none=False)
                now = _Step(sums | {"grad_norm": norm.detach()}, rate, int(sum(int(loss_tokens(micro)) for micro in micros)))
                # a step's numbers are read when the next one is launched: the GPU need not wait for their reader
                if before is not None:
                    self._on_step(before.line())
                before = now
        if before is not None:
            self._on_step(before.line())

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
        pairs = self._nll_weight is not None
        # Every micro-batch divides its sum by the number of the whole batch, tokens or pairs. So gradients add up to the mean
        # over the batch even where micro-batches differ in tokens; a mean of means would weigh short replies more.
        whole = sum(len(micro["input_ids"]) // 2 if pairs else int(loss_tokens(micro)) for micro in micros)
        passes = self._preferences if pairs else self._replies
        kind = (pairs, self._nll_weight, self._arguments.get("beta"))
        # as tensors, because a recorded graph repeats what it read as Python numbers
        numbers = {"whole": float(whole), "scale": self._scale}
        sums: dict[str, torch.Tensor] = {}
        for micro in micros:
            given = micro if self._graphs is None else self._graphs.even(micro)
            batch = {name: value.to(self._device) for name, value in given.items() if name != "attention_mask"}
            batch |= {name: torch.tensor(value, device=self._device) for name, value in numbers.items()}
            found = self._run(kind, passes, batch)
            # cloned: a graph's results are overwritten by its next launch
            sums = {name: sums[name] + value if sums else value.clone() for name, value in found.items()}
        return sums

    def _run(self, kind: Hashable, passes: Passes, batch: Batch) -> dict[str, torch.Tensor]:
        if self._graphs is None:
            return passes(batch)
        try:
            return self._graphs.run(kind, passes, batch)
        except torch.OutOfMemoryError:
            self._graphs.clear()  # what is tried next, with fewer rows, needs their memory
            raise

    def _replies(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Forwards and backwards: this micro-batch's part of the batch's mean over tokens."""
        inside = batch["labels"][:, 1:] != IGNORED
        loss = -(self._logprobs(batch["input_ids"], inside) * inside).sum() / batch["whole"]
        loss.backward(batch["scale"])  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def _preferences(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Forwards and backwards: this micro-batch's part of the batch's mean over pairs."""
        inside = batch["completion_mask"][:, 1:]
        chosen, rejected = (self._logprobs(batch["input_ids"], inside.bool()) * inside).sum(1).chunk(2)
        # DPO (Rafailov et al. 2023, equation 7): log-ratios to the reference, chosen minus rejected, times beta
        margins = self._arguments["beta"] * ((chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"]))
        losses = -torch.nn.functional.logsigmoid(margins)
        if self._nll_weight:
            losses = losses - self._nll_weight * chosen / inside.chunk(2)[0].sum(1)
        measures = {
            "loss": losses,
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "chosen_logp": chosen,
            "rejected_logp": rejected,
        }
        parts = {name: values.sum() / batch["whole"] for name, values in measures.items()}
        parts["loss"].backward(batch["scale"])
        return {name: value.detach() for name, value in parts.items()}


class _Step:
    """A launched optimiser step.

    Args:
        values: Its numbers, scalars on the device.
        rate: Learning rate.
        tokens: In its loss.
    """

    def __init__(self, values: dict[str, torch.Tensor], rate: float, tokens: int) -> None:
        self._names, self._rate, self._tokens = list(values), rate, tokens
        self._values = torch.stack([value.float() for value in values.values()])

    def line(self) -> dict[str, float]:
        """The log line; waits for the device, once for all numbers."""
        values = dict(zip(self._names, self._values.tolist(), strict=True))
        first = {"loss": values.pop("loss"), "learning_rate": self._rate, "tokens": self._tokens}
        return {**first, "grad_norm": values.pop("grad_norm"), **values}
