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
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.backends.trainer.divergence import check_step, check_weights
from iterft_lite.backends.trainer.encoding import (
    IGNORED,
    Encoded,
    Example,
    markup_note,
    pad_pairs,
    padding,
)
from iterft_lite.backends.trainer.lora import adapter_weights, draw_adapter, read_adapter, save_adapter, set_adapter
from iterft_lite.errors import BackendError, ModelError
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.verbs import function_at
from iterft_lite.hardware import Gpu
from iterft_lite.protocols import OnProgress, Progress, TrainJob, TrainResult

GRADIENT_SCALE = 2.0**12
"""What gradients are multiplied by where they pass through f16: most would be less than its smallest numbers otherwise.

A power of two: in 32 bits nothing changes by it. (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2)
"""

SCALED_LESS = 16.0
"""By so much, each time that a scaled gradient leaves f16's range."""

# -- batches and schedule ---------------------------------------------------------------------------------------------


class Order(Sampler[int]):
    """Row numbers, each epoch shuffled by itself from the seed; the n-th iteration is the n-th epoch.

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


# -- losses -----------------------------------------------------------------------------------------------------------


def loss_tokens(sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a micro-batch that are predicted in the loss; the first of a row is predicted from nothing."""
    if "labels" in sample:
        return (sample["labels"][:, 1:] != IGNORED).sum()
    return sample["completion_mask"][:, 1:].sum()


@torch.no_grad()
def reference_logprobs(bench: Bench, examples: list[Example], batches: Sequence[Sequence[int]], pad: int) -> None:
    """Write the sums of log-probabilities of both replies under the model as it stands into the examples.

    Args:
        bench: With the reference as its model.
        examples: Pairs; `ref_chosen_logps` and `ref_rejected_logps` are added.
        batches: Row numbers to take together: the training's own micro-batches, so that padding and with it rounding agree.
        pad: Token that rows are padded with.
    """
    for rows in batches:
        sums = bench.reply_logprobs(pad_pairs([examples[row] for row in rows], pad)).tolist()
        for row, chosen, rejected in zip(rows, sums[: len(rows)], sums[len(rows) :], strict=True):
            examples[row].update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)


# -- one training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A resident model with all that a training needs beside its job.

    Attributes:
        model: The PEFT model.
        tokenizer: Its tokenizer, as trl takes it.
        texts: The same, which rows are tokenised with.
        title: Of M[0], for files: without the folders of this machine.
        precision: In which its base is held.
        small_range: It computes in f16, whose range gradients would leave unless they are scaled.
        optimizer: "adamw" or "adamw_8bit".
        sft, dpo: Make a trainer from `arguments` (of trl's configuration) and trl's keywords.
        ready: Sets the model to "train" or "infer".
        relieve: After a failed allocation: what can be spared is given back, and if True is given, more of a pass is computed
            anew instead of kept; says which, "" if nothing is left to be done.
        reply_logprobs: Sums of the replies' log-probabilities, float32 [rows], of a padded batch of pairs on the CPU, computed
            as the trainer's loss does it: policy and reference that are the same shall differ by nothing, not even by rounding.
    """

    model: Any
    tokenizer: Any
    texts: TrainingTokenizer
    title: str
    precision: str
    small_range: bool
    optimizer: Literal["adamw", "adamw_8bit"]
    sft: Callable[..., Any]
    dpo: Callable[..., Any]
    ready: Callable[[Any, Literal["train", "infer"]], None]
    relieve: Callable[[bool], str]
    reply_logprobs: Callable[[dict[str, torch.Tensor]], torch.Tensor]


def train_adapter(bench: Bench, job: TrainJob, encoded: Encoded, on_progress: OnProgress) -> TrainResult:
    """Train one adapter on a resident model and write it with its log. The probe is the caller's.

    Out of memory: the micro-batch is halved and the training begins again, so that its result is that of the whole batch; with
    one row a pass, more is recomputed.
    Gradients beyond f16's range: it begins again with gradients scaled less, so that every step counts.

    Raises:
        BackendError: If it is out of memory with one row a pass.
        Diverged: If its loss, its gradients or the weights that it leaves are beyond all bounds.
    """
    settings = job.settings
    job.out.mkdir(parents=True, exist_ok=True)
    rows, examples, cut = encoded.rows, encoded.examples, encoded.cut
    if job.start is None:
        # The adapter's start is fixed before the first attempt: an attempt that runs out of memory begins again from the same
        # weights.
        weights = draw_adapter(bench.model, job.seed)
    else:
        weights = read_adapter(job.start, bench.model, rank=settings.lora_rank, alpha=settings.lora_alpha)
    size = micro_batch(settings.batch_size, settings.micro_batch)
    scale = GRADIENT_SCALE if bench.small_range else 1.0
    notes = ["computing in f16: the GPU has no bf16"] if bench.small_range and bench.precision == "nf4" else []
    if not rows:
        set_adapter(bench.model, weights)
        notes.append("no rows to train on: the model is the one that it started from")
    log: list[dict[str, float]] = []
    with Vram() as vram:
        while rows:
            attempt = _Attempt(bench, job, on_progress, vram, micro=size, scale=scale)
            short = False
            try:
                log = attempt.run(examples, weights)
                break
            except torch.OutOfMemoryError:
                short = True  # outside of the handler nothing holds the failed step's tensors any more
            except _TooLargeError:
                pass
            if short:
                size, note = _with_less_memory(bench, settings.batch_size, size)
                notes.append(note)
            else:
                notes.append(f"gradients scaled by {scale:.0f} leave f16's range: scaled by {scale / SCALED_LESS:.0f}")
                scale /= SCALED_LESS
            on_progress(Progress(0, _steps(len(rows), settings), "steps", note=notes[-1]))
    check_weights(adapter_weights(bench.model), log, job.loss)
    save_adapter(bench.model, job.out / "adapter", bench.title)
    with (job.out / "log.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in log)
    notes += filter(None, [markup_note(rows, bench.texts)])
    if cut:
        notes.append(f"{cut} of {len(rows)} rows were longer than {encoded.limit} tokens and lost their end")
    # margins are averaged over the last tenth of the steps, since those of single steps jump about
    last = log[-math.ceil(len(log) / 10) :]
    return TrainResult(
        rows=len(rows) * settings.epochs,
        steps=len(log),
        tokens=int(sum(line["tokens"] for line in log)),
        first_loss=log[0]["loss"] if log else 0.0,
        last_loss=log[-1]["loss"] if log else 0.0,
        partial_batch=len(rows) % settings.batch_size,
        cut_rows=cut,
        margin=_mean(last, "margin") if LOSSES[job.loss].compares and log else None,
        accuracy=_mean(last, "accuracy") if LOSSES[job.loss].compares and log else None,
        precision=bench.precision,
        peak_vram=vram.peak,
        notes=tuple(notes),
    )


def _with_less_memory(bench: Bench, batch_size: int, size: int) -> tuple[int, str]:
    """The micro-batch to begin again with after a failed allocation, and what was done, in words.

    Raises:
        BackendError: If nothing is left to be done.
    """
    thriftier = bench.relieve(size == 1)
    gc.collect()
    torch.cuda.empty_cache()
    if size > 1:
        smaller = micro_batch(batch_size, size // 2)
        return smaller, f"out of memory: micro-batch {size} -> {smaller}"
    if thriftier:
        return size, f"out of memory with one row a pass: {thriftier}"
    base = "" if bench.precision == "nf4" else '`train.base = "nf4"`, '
    raise BackendError(
        "out of memory with one row a forward pass",
        exception="OutOfMemoryError",
        hint=f'choose {base}`vram = "swap"` or a smaller `train.max_length`',
    )


class _TooLargeError(Exception):
    """A gradient left the range of the floats that it is made of."""


class _Attempt:
    """One try at a training, with one size of micro-batch and one scale of gradients."""

    def __init__(self, bench: Bench, job: TrainJob, on_progress: OnProgress, vram: Vram, *, micro: int, scale: float) -> None:
        self._bench, self._job, self._on_progress, self._vram = bench, job, on_progress, vram
        self._micro, self._scale = micro, scale
        self._loss = LOSSES[job.loss]
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
        bench.ready(bench.model, "train")  # the reference too: the same kernels, and there is no dropout
        if self._loss.compares:
            # a fresh adapter has B = 0: the model that it starts from is M[0]
            base = job.reference == "base" and job.start is not None
            with bench.model.disable_adapter() if base else contextlib.nullcontext():
                reference_logprobs(bench, examples, list(_chunks(order.epoch(0), settings.batch_size, self._micro)), pad)
        optimizer = make_optimizer(list(adapter_weights(bench.model).values()), settings, bench.optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: schedule_factor(step, steps=self._steps, warmup=settings.warmup, schedule=settings.schedule),
        )
        with tempfile.TemporaryDirectory() as scratch, own_forward(bench.model):
            collate = function_at(self._loss.collate)
            trainer = getattr(bench, self._loss.trainer)(
                arguments=self._arguments(scratch),
                model=bench.model,
                processing_class=bench.tokenizer,
                train_dataset=examples,
                data_collator=lambda batch: collate(batch, pad),
                optimizers=(optimizer, scheduler),
                order=order,
                on_step=self._step,
                scale=self._scale,
                **({"nll_weight": settings.dpo_nll_weight} if self._loss.compares else {}),
            )
            set_adapter(bench.model, weights)  # trl rounds the adapter to 16 bits where the base is quantised
            trainer.train()
        if len(self._log) != self._steps:
            raise AssertionError(f"{len(self._log)} optimiser steps were made where {self._steps} were due")
        return self._log

    def _step(self, line: dict[str, float]) -> None:
        self._log.append({"step": len(self._log) + 1, **line})
        self._vram.look()
        if math.isfinite(line["loss"]) and not math.isfinite(line["grad_norm"]) and self._scale > 1:
            raise _TooLargeError
        more = "; some models' activations leave f16's range, not bf16's" if self._bench.small_range else ""
        check_step(self._log, self._job.loss, self._bench.model.config.get_text_config().vocab_size, more=more)
        tokens = int(sum(each["tokens"] for each in self._log))
        self._on_progress(Progress(len(self._log), self._steps, "steps", tokens=tokens))

    def _arguments(self, scratch: str) -> dict[str, Any]:
        """Keywords of trl's configuration. What decides how many steps there are is never left to a default."""
        settings = self._job.settings
        cpu = next(self._bench.model.parameters()).device.type == "cpu"
        more: dict[str, Any] = (
            {"beta": settings.dpo_beta, "loss_type": ["sigmoid"], "disable_dropout": False}
            if self._loss.compares
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


def _steps(rows: int, settings: TrainSettings) -> int:
    return settings.epochs * math.ceil(rows / settings.batch_size)


def _chunks(rows: Sequence[int], batch: int, micro: int) -> Iterator[Sequence[int]]:
    """The micro-batches of an epoch, as transformers' trainer forms them: `micro` divides `batch`."""
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
        self._gpu: Gpu | None = None

    def __enter__(self) -> Vram:
        if torch.cuda.is_available():
            # by its UUID: CUDA may number GPUs in another order than the driver
            with contextlib.suppress(Exception):  # where it has none there is no count, and training goes on
                uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
                self._gpu = Gpu(f"GPU-{uuid.removeprefix('GPU-')}")
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        self.look()

    def look(self) -> None:
        """Note what is held now: by this process, or by the whole GPU where a container hides who holds what."""
        if self._gpu is not None:
            self.peak = max(self.peak, self._gpu.used([os.getpid()]))
