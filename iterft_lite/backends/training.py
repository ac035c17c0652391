"""What the trainers share: rows to tokens, batches, schedule, adapters, and one training from beginning to end.

What a batch means (arXiv 2605.01130, settings as read in the authors' public code; see docs/protocol.md):
`batch_size` rows an optimiser step, each epoch in an order of its own drawn from the seed, the last batch of an epoch kept
when it is smaller. A batch that is split into micro-batches has the loss and the gradient of the whole batch.

Losses, in nats:
    reply, all    mean over the batch's tokens that are in the loss (not a mean of the rows' means)
    preference    mean over the batch's pairs of -log sigmoid(beta * ((chosen - ref chosen) - (rejected - ref rejected))), where
                  each term is the sum of a reply's log-probabilities (Rafailov et al. 2023, equation 7), plus
                  `dpo_nll_weight` times the mean over pairs of the chosen reply's mean negative log-likelihood (RPO)

torch, transformers and peft are imported here, trl and unsloth are not: unsloth has to come before all of them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler

from iterft_lite.backends import OnProgress, Progress, TrainJob, TrainResult
from iterft_lite.errors import BackendError, ModelError, UserError
from iterft_lite.recipe import TrainSettings
from iterft_lite.regimes import Loss

IGNORED = -100
"""Label of a token that is not in the loss (PyTorch's and Hugging Face's convention)."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a block that the adapter is laid on."""

Example = dict[str, Any]


# -- rows to tokens ---------------------------------------------------------------------------------------------------


def reply_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[int]]:
    """Token ids of a chat's last reply and of all that comes before it.

    The chat is rendered with and without its last message, so that templates without generation markers are served too, and
    the two parts are tokenised apart: before the reply stands exactly what a model is later asked with. The reply ends with the
    template's end-of-turn token; what follows that (a line break, in ChatML) is left away.

    Args:
        tokenizer: With a chat template.
        messages: The last one is the assistant's.
        name: Of the model, for errors.

    Returns:
        (ids of the rendered chat with generation prompt, ids of the reply with its end-of-turn token).

    Raises:
        ModelError: If the template renders the chat differently when the reply is there, or gives the reply no end.
    """
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(asked):
        raise ModelError(
            f"the chat template of `{name}` renders a chat differently once its reply is there: the reply cannot be told apart",
            hint="give the tokenizer a template whose generation prompt is the beginning of the assistant's turn",
        )
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    reply = tokenizer(whole[len(asked) :].rstrip(), add_special_tokens=False)["input_ids"]
    if not reply or reply[-1] not in tokenizer.added_tokens_decoder:
        raise ModelError(
            f"the chat template of `{name}` does not end replies with a special token: a model trained on it would not stop",
            hint="give the tokenizer a template that closes the assistant's turn, as ChatML does with `<|im_end|>`",
        )
    return prompt, reply


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
    rows: Sequence[Mapping[str, Any]], loss: Loss, tokenizer: Any, *, limit: int, name: str
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


# -- batches and schedule ---------------------------------------------------------------------------------------------


class Order(Sampler[int]):
    """Row numbers, each epoch shuffled anew from the seed; the n-th iteration is the n-th epoch.

    Args:
        rows: How many there are.
        seed: Of the training.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        self._epoch += 1
        return iter(self.epoch(self._epoch - 1))

    def epoch(self, number: int) -> list[int]:
        """The order of an epoch, counted from 0."""
        rows = list(range(self._rows))
        random.Random(f"order/{self._seed}/{number}").shuffle(rows)
        return rows


def schedule_factor(step: int, *, steps: int, warmup: float, schedule: Literal["constant", "cosine", "linear"]) -> float:
    """The learning rate of an optimiser step as a share of its peak.

    `int(warmup * steps)` steps warm up: step s of W (from 0) has the share (s + 1) / (W + 1), then comes 1. The authors' code
    has s / W, which spends the first step at a learning rate of 0: a batch that teaches nothing; ours has none such.
    Cosine and linear fall from 1 at the first step after the warmup towards 0, which the step after the last would have.

    Args:
        step: From 0.
        steps: Of the whole training.
        warmup: Share of the steps.
        schedule: After the warmup.
    """
    warm = int(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    passed = (step - warm) / max(1, steps - warm)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))
    return max(0.0, 1 - passed) if schedule == "linear" else 1.0


def micro_batch(batch_size: int, asked: int | Literal["auto"]) -> int:
    """Rows a forward pass: the largest divisor of the batch that is not above what was asked."""
    most = batch_size if asked == "auto" else min(asked, batch_size)
    return next(size for size in range(most, 0, -1) if batch_size % size == 0)


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by the names that they have in a file, in order of name."""
    found = {name.replace(".default.", "."): weight for name, weight in model.named_parameters() if ".lora_" in name}
    return dict(sorted(found.items()))


def draw_adapter(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a fresh adapter: A uniform in +-1/sqrt(width) (what peft's default comes to), B zero: it changes nothing.

    Drawn on the CPU in order of name, so that a seed gives the same adapter on every device and from every trainer.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn = {}
    for name, weight in adapter_weights(model).items():
        drawn[name] = torch.zeros(weight.shape, dtype=torch.float32)
        if ".lora_A." in name:
            drawn[name].uniform_(-1, 1, generator=generator).mul_(weight.shape[1] ** -0.5)
    return drawn


def read_adapter(folder: Path, model: Any, *, rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """Weights of an adapter folder, checked to fit this model and this recipe.

    Raises:
        ModelError: If the folder holds no adapter, or one of another shape or scale.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        read = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"`{folder}` holds no adapter that can be read: {error}") from None
    if (config["r"], config["lora_alpha"]) != (rank, alpha):
        raise ModelError(
            f"the adapter in `{folder}` has rank {config['r']} and alpha {config['lora_alpha']:g}, "
            f"the recipe {rank} and {alpha:g}",
            hint="a continual run keeps the adapter's rank and alpha",
        )
    expected = {name: tuple(weight.shape) for name, weight in adapter_weights(model).items()}
    if {name: tuple(weight.shape) for name, weight in read.items()} != expected:
        raise ModelError(f"the adapter in `{folder}` was made for another model")
    return {name: weight.float() for name, weight in read.items()}


def read_shape(folder: Path) -> tuple[int, float]:
    """Rank and alpha of an adapter folder.

    Raises:
        ModelError: If it holds no adapter.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"`{folder}` holds no adapter that can be read: {error}") from None


def set_adapter(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the resident adapter these weights, in 32 bits: in 16 a learning rate of 1e-5 would be rounded away."""
    for name, parameter in adapter_weights(model).items():
        parameter.data = weights[name].to(device=parameter.device, dtype=torch.float32, copy=True)
        parameter.grad = None
        parameter.requires_grad_(True)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the resident adapter as PEFT does: `adapter_model.safetensors` (float32) and `adapter_config.json`.

    Args:
        model: The PEFT model.
        folder: Made if missing.
        base: Name of the base: a hub name, or of a local folder its last part, so that the file means the same on any machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().cpu().contiguous().clone() for name, weight in adapter_weights(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=base, inference_mode=True)
    # sets have no order, files that are compared by their bytes need one
    plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in sorted(config.items())}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")


def projections(base: Any) -> list[str] | str:
    """What the adapter is laid on: the seven projections, or peft's "all-linear" in architectures that name them otherwise."""
    named = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return list(PROJECTIONS) if set(PROJECTIONS) <= named else "all-linear"


def lora_settings(base: Any, rank: int, alpha: float) -> dict[str, Any]:
    """Arguments of a LoRA configuration: dropout and biases none."""
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": projections(base),
    }


def make_optimizer(weights: Sequence[torch.nn.Parameter], settings: TrainSettings, kind: str) -> torch.optim.Optimizer:
    """AdamW on the adapter, with moments in 32 bits ("adamw") or 8 ("adamw_8bit", bitsandbytes)."""
    values: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if kind == "adamw":
        return torch.optim.AdamW(weights, fused=True, **values)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ModelError(
            '`train.optimizer = "adamw_8bit"` needs bitsandbytes', hint="pip install 'iterft_lite[gpu]', or choose \"adamw\""
        ) from None
    return AdamW8bit(weights, **values)  # type: ignore[no-any-return]


def bitsandbytes_works() -> bool:
    """Whether bitsandbytes is there with its native library for this device."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # it raises what it likes on machines that it does not know
        return False
    return True


# -- trl's trainers, made exact ---------------------------------------------------------------------------------------


class ExactBatches:
    """Laid over a trl trainer: our order of rows, our log instead of its prints.

    Args:
        order: Of the rows.
        on_step: Takes the log line of each optimiser step, without its number.
    """

    def __init__(self, *args: Any, order: Order, on_step: Callable[[dict[str, float]], None], **kwargs: Any) -> None:
        self._order, self._on_step = order, on_step
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
        self._loss_tokens = int(sum(_in_loss(sample) for sample in samples))
        return samples, items

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


def _in_loss(sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a micro-batch that are predicted in the loss; the first of a row is predicted from nothing."""
    if "labels" in sample:
        return (sample["labels"][:, 1:] != IGNORED).sum()
    return sample["completion_mask"][:, 1:].sum()


class ExactPairs(ExactBatches):
    """Laid over trl's DPOTrainer: an explicit reference, pairs of a batch weighed alike, log-probabilities in 32 bits.

    trl's default reference has changed between its versions; here the reference's log-probabilities come with the rows.

    Args:
        nll_weight: Of the chosen reply's mean negative log-likelihood.
    """

    def __init__(self, *args: Any, nll_weight: float, **kwargs: Any) -> None:
        # a stand-in keeps trl from copying the adapter as its own reference
        super().__init__(*args, ref_model=torch.nn.Identity(), **kwargs)
        self._nll_weight = nll_weight
        self.ref_model = None
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # it is tokenised already

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch as its part of the whole batch's mean over pairs."""

        def in_32_bits(**given: Any) -> Any:
            outputs = model(**given)
            outputs["logits"] = outputs["logits"].float()
            return outputs

        loss, outputs = super().compute_loss(  # type: ignore[misc]
            in_32_bits, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self._nll_weight:
            pairs = len(inputs["input_ids"]) // 2
            mask = inputs["completion_mask"][:pairs, 1:]
            logprobs = token_logprobs(outputs["logits"][:pairs], inputs["input_ids"][:pairs])
            loss = loss - self._nll_weight * ((logprobs * mask).sum(1) / mask.sum(1)).mean()
        # transformers divides by the number of micro-batches, of which the last may be smaller
        loss = loss * (len(inputs["input_ids"]) * len(self._sizes) / sum(self._sizes))
        return (loss, outputs) if return_outputs else loss

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


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token after the first: float32 [rows, tokens - 1] from logits [rows, tokens, vocab]."""
    # row by row: a copy of all logits in 32 bits is the largest thing in memory
    rows = [
        -torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="none")
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.stack(rows)


@torch.no_grad()
def reference_logprobs(model: Any, examples: list[Example], batches: Sequence[Sequence[int]], pad: int) -> None:
    """Write the sums of log-probabilities of both replies under the model as it stands into the examples.

    Args:
        model: The reference.
        examples: Pairs; `ref_chosen_logps` and `ref_rejected_logps` are added.
        batches: Row numbers to take together: the training's own micro-batches, so that padding and with it rounding agree.
        pad: Token that rows are padded with.
    """
    # trl's own function: policy and reference that are the same differ by nothing, not even by rounding
    from trl.trainer.utils import selective_log_softmax

    device = next(model.parameters()).device
    for rows in batches:
        batch = {name: value.to(device) for name, value in pad_pairs([examples[row] for row in rows], pad).items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        replies = batch["completion_mask"][:, 1:]
        logprobs = selective_log_softmax(logits[:, :-1].float(), batch["input_ids"][:, 1:], row_mask=replies)
        sums = logprobs.sum(1).tolist()
        for row, chosen, rejected in zip(rows, sums[: len(rows)], sums[len(rows) :], strict=True):
            examples[row].update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)


# -- one training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A resident model with all that a training needs beside its job.

    Attributes:
        model: The PEFT model.
        tokenizer: Its tokenizer.
        name: Of M[0], as given to `load`.
        precision: In which its base is held.
        optimizer: "adamw" or "adamw_8bit".
        context: Tokens that the model was made for.
        sft, dpo: Make a trl trainer from `arguments` (of trl's configuration) and the trainer's own keywords.
        ready: Sets the model to "train" or "infer".
    """

    model: Any
    tokenizer: Any
    name: str
    precision: str
    optimizer: Literal["adamw", "adamw_8bit"]
    context: int
    sft: Callable[..., Any]
    dpo: Callable[..., Any]
    ready: Callable[[Any, Literal["train", "infer"]], None]


def train_adapter(bench: Bench, job: TrainJob, on_progress: OnProgress) -> TrainResult:
    """Train one adapter on a resident model and write it with its log. The probe is the caller's.

    Out of memory: the micro-batch is halved and the training begins again, so that its result is that of the whole batch.

    Raises:
        BackendError: If it is out of memory with one row a pass, or the loss is not a number any more.
    """
    settings = job.settings
    job.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(job.rows)
    limit = min(settings.max_length, bench.context)
    examples, cut = encode_rows(rows, job.loss, bench.tokenizer, limit=limit, name=bench.name)
    if job.start is None:
        weights = draw_adapter(bench.model, job.seed)
    else:
        weights = read_adapter(job.start, bench.model, rank=settings.lora_rank, alpha=settings.lora_alpha)
    size = micro_batch(settings.batch_size, settings.micro_batch)
    notes: list[str] = []
    if not rows:
        set_adapter(bench.model, weights)
        notes.append("no rows to train on: the model is the one that it started from")
    log: list[dict[str, float]] = []
    with Vram() as vram:
        while rows:
            attempt = _Attempt(bench, job, on_progress, vram, micro=size)
            try:
                log = attempt.run(examples, weights)
                break
            except torch.OutOfMemoryError:
                pass  # outside of the handler nothing holds the failed step's tensors any more
            gc.collect()
            torch.cuda.empty_cache()
            if size == 1:
                raise BackendError(
                    "out of memory with one row a forward pass",
                    kind="OutOfMemoryError",
                    hint='choose `train.base = "nf4"` or a smaller `train.max_length`',
                )
            smaller = micro_batch(settings.batch_size, size // 2)
            notes.append(f"out of memory: micro-batch {size} -> {smaller}")
            on_progress(Progress(0, _steps(len(rows), settings), "steps", note=notes[-1]))
            size = smaller
    save_adapter(bench.model, job.out / "adapter", base_name(bench.name))
    with (job.out / "log.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in log)
    if cut:
        notes.append(f"{cut} of {len(rows)} rows were longer than {limit} tokens and lost their end")
    last = log[-math.ceil(len(log) / 10) :]
    return TrainResult(
        rows=len(rows) * settings.epochs,
        steps=len(log),
        tokens=int(sum(line["tokens"] for line in log)),
        first_loss=log[0]["loss"] if log else 0.0,
        last_loss=log[-1]["loss"] if log else 0.0,
        partial_batch=len(rows) % settings.batch_size,
        cut_rows=cut,
        margin=_mean(last, "margin") if job.loss == "preference" and log else None,
        accuracy=_mean(last, "accuracy") if job.loss == "preference" and log else None,
        precision=bench.precision,
        peak_vram=vram.peak,
        notes=tuple(notes),
    )


class _Attempt:
    """One try at a training, with one size of micro-batch."""

    def __init__(self, bench: Bench, job: TrainJob, on_progress: OnProgress, vram: Vram, *, micro: int) -> None:
        self._bench, self._job, self._on_progress, self._vram, self._micro = bench, job, on_progress, vram, micro
        self._log: list[dict[str, float]] = []
        self._steps = 0

    def run(self, examples: Sequence[Example], weights: Mapping[str, torch.Tensor]) -> list[dict[str, float]]:
        """Train; gives the log."""
        bench, job, settings = self._bench, self._job, self._job.settings
        self._steps = _steps(len(examples), settings)
        order = Order(len(examples), job.seed)
        pad = padding(bench.tokenizer)
        examples = [dict(example) for example in examples]
        set_adapter(bench.model, weights)
        if job.loss == "preference":
            bench.ready(bench.model, "infer")
            # a fresh adapter has B = 0: the model that it starts from is M[0]
            base = job.reference == "base" and job.start is not None
            with bench.model.disable_adapter() if base else contextlib.nullcontext():
                reference_logprobs(bench.model, examples, list(_chunks(order.epoch(0), settings.batch_size, self._micro)), pad)
        bench.ready(bench.model, "train")
        optimizer = make_optimizer(list(adapter_weights(bench.model).values()), settings, bench.optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: schedule_factor(step, steps=self._steps, warmup=settings.warmup, schedule=settings.schedule),
        )
        with tempfile.TemporaryDirectory() as scratch, own_forward(bench.model):
            make, collate = (bench.dpo, pad_pairs) if job.loss == "preference" else (bench.sft, pad_rows)
            trainer = make(
                arguments=self._arguments(scratch),
                model=bench.model,
                processing_class=bench.tokenizer,
                train_dataset=Dataset.from_list(examples),
                data_collator=lambda batch: collate(batch, pad),
                optimizers=(optimizer, scheduler),
                order=order,
                on_step=self._step,
                **({"nll_weight": settings.dpo_nll_weight} if job.loss == "preference" else {}),
            )
            set_adapter(bench.model, weights)  # trl rounds the adapter to 16 bits where the base is quantised
            trainer.train()
        if len(self._log) != self._steps:
            raise AssertionError(f"{len(self._log)} optimiser steps were made where {self._steps} were due")
        return self._log

    def _step(self, line: dict[str, float]) -> None:
        self._log.append({"step": len(self._log) + 1, **line})
        self._vram.look()
        if not math.isfinite(line["loss"]):
            raise BackendError(
                f"the loss of step {len(self._log)} is {line['loss']}: the training has diverged",
                kind="diverged",
                hint="lower `train.learning_rate`, or clip with `train.max_grad_norm = 1.0`",
            )
        tokens = int(sum(each["tokens"] for each in self._log))
        self._on_progress(Progress(len(self._log), self._steps, "steps", tokens=tokens))

    def _arguments(self, scratch: str) -> dict[str, Any]:
        """Keywords of trl's configuration. What decides how many steps there are is never left to a default."""
        settings = self._job.settings
        cpu = next(self._bench.model.parameters()).device.type == "cpu"
        more: dict[str, Any] = (
            {"beta": settings.dpo_beta, "loss_type": ["sigmoid"], "disable_dropout": False}
            if self._job.loss == "preference"
            # the output matrix is only applied to tokens in the loss
            else {
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "packing": False,
                "padding_free": False,
                "loss_type": "chunked_nll",
            }
        )
        return {
            "output_dir": scratch,
            "per_device_train_batch_size": self._micro,
            "gradient_accumulation_steps": settings.batch_size // self._micro,
            "num_train_epochs": settings.epochs,
            "max_steps": -1,
            "learning_rate": settings.learning_rate,
            "max_grad_norm": settings.max_grad_norm,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": self._job.seed % 2**32,
            "use_cpu": cpu,
            "bf16": False,
            "fp16": False,
            "gradient_checkpointing": False,
            "dataloader_drop_last": False,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": not cpu,
            "remove_unused_columns": False,
            "max_length": None,
            **more,
        }


def one_device(arguments: Any) -> Any:
    """The same configuration of transformers' trainer, kept from spreading over every GPU that it sees."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


@contextlib.contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Undo what trainers lay over the resident model's `forward`: nothing of a training stays for the next."""
    layers = [model, model.get_base_model()]
    before = [{name: vars(layer)[name] for name in ("forward", "_original_forward") if name in vars(layer)} for layer in layers]
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            for name in ("forward", "_original_forward"):
                vars(layer).pop(name, None)
            vars(layer).update(kept)


def padding(tokenizer: Any) -> int:
    """A token to pad with; which one does not matter, it is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def base_name(model: str) -> str:
    """A model's name for files: a hub name as it is, a folder by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _steps(rows: int, settings: TrainSettings) -> int:
    return settings.epochs * math.ceil(rows / settings.batch_size)


def _chunks(rows: Sequence[int], batch: int, micro: int) -> Iterator[Sequence[int]]:
    """The micro-batches of an epoch, as transformers' trainer forms them: as `micro` divides `batch`, only the last is smaller."""
    assert batch % micro == 0
    for start in range(0, len(rows), micro):
        yield rows[start : start + micro]


def _mean(log: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(line[name] for line in log) / len(log)


# -- memory -----------------------------------------------------------------------------------------------------------


class Vram:
    """The most GPU memory this process was seen to hold, by the driver's count (NVML); 0 where there is none.

    `look` is called after each step: torch keeps what it once took, so little is missed in between.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._nvml: Any = None
        self._handle: Any = None

    def __enter__(self) -> Vram:
        if torch.cuda.is_available():
            with contextlib.suppress(Exception):  # without NVML there is no count, and training goes on
                import pynvml

                pynvml.nvmlInit()
                uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
                self._nvml = pynvml
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                self._nvml.nvmlShutdown()

    def look(self) -> None:
        """Note what is held now: by this process, or by the whole GPU where a container hides who holds what."""
        if self._nvml is None:
            return
        with contextlib.suppress(Exception):
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
            used = own[0] if own and own[0] else self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
            self.peak = max(self.peak, int(used))


def with_precision(settings: TrainSettings, cuda: bool) -> TrainSettings:
    """The settings with "auto" decided: nf4 and 8-bit moments on a GPU where bitsandbytes works, else f32 and 32-bit moments.

    A GPU without bitsandbytes holds the base in bf16.
    """
    eight = cuda and "auto" in (settings.base, settings.optimizer) and bitsandbytes_works()
    base = settings.base if settings.base != "auto" else "nf4" if eight else "bf16" if cuda else "f32"
    optimizer = settings.optimizer if settings.optimizer != "auto" else "adamw_8bit" if eight else "adamw"
    return settings.model_copy(update={"base": base, "optimizer": optimizer})
