"""TRL's trainers on the same model, rows and batches: what our own loop is held against, and a choice of its own.

Meant to run in a child process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

from iterft_lite.backends.trainer.encoding import Example
from iterft_lite.backends.trainer.peft import PeftTrainer
from iterft_lite.backends.trainer.session import Order, loss_tokens

# isort: split
# after `peft.py`, which turns reports of use over the network off
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import selective_log_softmax


class ExactBatches:
    """Laid over a trl trainer: our order of rows, our log instead of its prints.

    Args:
        order: Of the rows.
        on_step: Takes the log line of each optimiser step, without its number.
        scale: Gradients are so much larger on their way through the model.
    """

    def __init__(
        self, *args: Any, order: Order, on_step: Callable[[dict[str, float]], None], scale: float, **kwargs: Any
    ) -> None:
        self._order, self._on_step, self._scale = order, on_step, scale
        self._sizes: list[int] = []
        self._loss_tokens = 0
        super().__init__(*args, **kwargs)
        for callback in list(self.callback_handler.callbacks):  # type: ignore[attr-defined]
            if type(callback).__name__ in {"PrinterCallback", "ProgressCallback"}:
                self.remove_callback(callback)  # type: ignore[attr-defined]

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:  # noqa: ARG002  # trl's signature
        return self._order

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one optimiser step; their sizes are noted."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self._sizes = [len(sample["input_ids"]) for sample in samples]
        self._loss_tokens = int(sum(loss_tokens(sample) for sample in samples))
        return samples, items

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the adapter's weights get their gradients as they are."""
        with contextlib.ExitStack() as hooks:
            for weight in self.model.parameters() if self._scale != 1 else ():  # type: ignore[attr-defined]
                if weight.requires_grad:
                    hooks.callback(weight.register_hook(lambda slope: slope / self._scale).remove)
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch as its part of the whole batch's."""
        loss, outputs = self._loss(model, inputs, num_items_in_batch)
        if self._scale != 1:
            loss.register_hook(lambda slope: slope * self._scale)  # type: ignore[no-untyped-call]
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: Any, inputs: dict[str, Any], items: Any) -> tuple[torch.Tensor, Any]:
        made: tuple[torch.Tensor, Any] = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=items
        )
        return made

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Hand over a step's line; the summary at the end has no loss of a step and is left away."""
        if "loss" in logs:
            line = {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "tokens": self._loss_tokens,
                "grad_norm": float(logs.get("grad_norm", 0.0)),
            }
            self._on_step({**line, **self._more()})
        for metrics in self._metrics.values():  # type: ignore[attr-defined]
            metrics.clear()

    def _more(self) -> dict[str, float]:
        return {}


class ExactPairs(ExactBatches):
    """Laid over trl's DPOTrainer: an explicit reference, pairs of a batch weighed alike, log-probabilities in 32 bits.

    trl's default reference has changed between its versions; here the reference's log-probabilities come with the rows.

    Args:
        nll_weight: Of the chosen reply's mean negative log-likelihood.
    """

    def __init__(self, *args: Any, nll_weight: float, **kwargs: Any) -> None:
        # a placeholder keeps trl from copying the adapter as its own reference
        super().__init__(*args, ref_model=torch.nn.Identity(), **kwargs)
        self._nll_weight = nll_weight
        self.ref_model = None
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # it is tokenised already

    def _loss(self, model: Any, inputs: dict[str, Any], items: Any) -> tuple[torch.Tensor, Any]:
        def in_32_bits(**given: Any) -> Any:
            outputs = model(**given)
            outputs["logits"] = outputs["logits"].float()
            return outputs

        loss, outputs = super()._loss(in_32_bits, inputs, items)
        if self._nll_weight:
            pairs = len(inputs["input_ids"]) // 2
            mask = inputs["completion_mask"][:pairs]
            sums = reply_logprobs(outputs["logits"][:pairs], inputs["input_ids"][:pairs], mask)
            loss = loss - self._nll_weight * (sums / mask[:, 1:].sum(1)).mean()
        # transformers divides by the number of micro-batches, of which the last may be smaller
        return loss * (len(inputs["input_ids"]) * len(self._sizes) / sum(self._sizes)), outputs

    def _more(self) -> dict[str, float]:
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        names = {
            "margin": "rewards/margins",
            "accuracy": "rewards/accuracies",
            "chosen_logp": "logps/chosen",
            "rejected_logp": "logps/rejected",
        }
        return {
            ours: sum(size * value for size, value in zip(self._sizes, metrics[trls], strict=True)) / sum(self._sizes)
            for ours, trls in names.items()
        }


def reply_logprobs(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the log-probabilities of each row's reply, float32 [rows].

    Args:
        logits: [rows, tokens, vocab], of any precision.
        ids: int64 [rows, tokens].
        mask: 1 where a token belongs to the reply, int64 [rows, tokens].
    """
    # row by row and only where the reply is: a copy of all logits in 32 bits would be the largest thing in memory
    sums = []
    for row, target, inside in zip(logits[:, :-1], ids[:, 1:], mask[:, 1:].bool(), strict=True):
        sums.append(-torch.nn.functional.cross_entropy(row[inside].float(), target[inside], reduction="sum"))
    return torch.stack(sums)


class _Sft(ExactBatches, SFTTrainer):  # type: ignore[misc]  # trl has no types
    pass


class _Dpo(ExactPairs, DPOTrainer):  # type: ignore[misc]  # trl has no types
    pass


class TrlTrainer(PeftTrainer):
    """Trains a PEFT model with TRL's trainers (a `Trainer`)."""

    _packs = False

    def _sft(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any:
        rows = Dataset.from_list(list(train_dataset))
        return _Sft(args=one_device(SFTConfig(**arguments)), train_dataset=rows, **given)

    def _dpo(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any:
        rows = Dataset.from_list(list(train_dataset))
        return _Dpo(args=one_device(DPOConfig(**arguments)), train_dataset=rows, **given)

    def _reply_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, attention, mask = (batch[name].to(self._device) for name in ("input_ids", "attention_mask", "completion_mask"))
        logits = self._adapted(input_ids=ids, attention_mask=attention, use_cache=False).logits
        made: torch.Tensor = selective_log_softmax(logits[:, :-1].float(), ids[:, 1:], row_mask=mask[:, 1:]).sum(1)
        return made


def one_device(arguments: Any) -> Any:
    """The same configuration of transformers' trainer, kept from spreading over every GPU that it sees."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
