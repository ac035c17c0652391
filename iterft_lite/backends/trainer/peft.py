"""The plain trainer: PEFT's adapter on transformers' model, trained by our own loop, on a CPU or any device that torch knows.

Meant to run in a child process of its own. `trl.py` trains the same model with TRL; a test compares them step by step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

# read when the libraries are imported: no reports of use over the network; threads that wait for the next of a step's thousand
# small pieces spin for some microseconds before they sleep
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "4000")

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from iterft_lite.backends.trainer.architectures import load_causal
from iterft_lite.backends.trainer.decoder import Decoder, Reading
from iterft_lite.backends.trainer.encoding import Example
from iterft_lite.backends.trainer.likelihoods import Read
from iterft_lite.backends.trainer.logprobs import Head, next_logprobs, token_logprobs
from iterft_lite.backends.trainer.loop import Loop
from iterft_lite.backends.trainer.lora import lora_settings, set_adapter
from iterft_lite.backends.trainer.probe import Greedy, until
from iterft_lite.backends.trainer.products import Factors, Products
from iterft_lite.backends.trainer.resident import ResidentTrainer, arithmetic, end_tokens, first_line
from iterft_lite.backends.trainer.session import bitsandbytes_works
from iterft_lite.errors import ModelError
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.protocols import OnProgress, TrainJob, TrainResult

FACTORS = {"f32": torch.float32, "bf16-mixed": torch.bfloat16}
"""What factors of products are rounded to, for bases that are held in 32 bits."""

SMALL = 2**25
"""Parameters up to which one core writes a probe's texts on a CPU: a token is 40 products of 50 microseconds, and threads wait
for each other longer than that where another process wants a core."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""

KEPT = {M_TRIM_THRESHOLD: 2**28, M_MMAP_THRESHOLD: 2**25}
"""Bytes of freed memory that a CPU's training keeps, and the largest pieces that are kept. A step frees and takes the same
hundred megabytes again; given back, every page of them would come with a fault of some microseconds."""


class PeftTrainer(ResidentTrainer):
    """Trains a PEFT model with our own loop (a `Trainer`)."""

    _products: Products | None = None
    _decoder: Decoder | None = None
    _factors = Factors()
    _ends_plainly = False

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        """Train one adapter (see `Trainer.train`); `load` comes first."""
        rounded = FACTORS.get(self._precision, torch.float32)
        # a preference loss rests on small differences of large sums: its forward passes are never rounded
        self._factors = Factors(torch.float32 if LOSSES[job.loss].compares else rounded, rounded)
        return super().train(job, on_progress)

    # -- what differs between libraries -----------------------------------------------------------------------------------

    def _load_base(self, model: str, precision: str, settings: TrainSettings) -> Any:  # noqa: ARG002  # the other one needs them
        dtype = arithmetic(precision, self._device)
        if self._device.type == "cpu":
            keep_freed_memory()
        given: dict[str, Any] = {"dtype": dtype, "local_files_only": Path(model).is_dir()}
        given["trust_remote_code"] = False  # see `model_code`
        if precision == "nf4":
            if not bitsandbytes_works():
                raise ModelError(
                    '`train.base = "nf4"` needs bitsandbytes',
                    hint='pip install \'iterft_lite[gpu]\', or choose "bf16" or "f32"',
                )
            given["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
            )
        try:
            base = load_causal(model, device_map={"": self._device}, **given)
        except (OSError, ValueError) as error:
            raise ModelError(f"`{model}` cannot be loaded as a causal language model: {first_line(error)}") from None

        for module in base.modules():
            # bitsandbytes repacks a CPU's 4-bit weights at the first inference, and training after that is another one
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return base

    def _inject(self, base: Any, rank: int, alpha: float) -> Any:
        self._ends_plainly = ends_plainly(base)
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora_settings(base, rank, alpha)))
        if self._products is not None:
            self._products.lay(None)  # a training that failed has left them on layers that stay
        self._products = self._decoder = None
        if self._precision in FACTORS:
            self._products = Products(made)
            if self._ends_plainly and self._device.type == "cpu":
                self._decoder = Decoder.of(made, self._products, torch.get_num_threads())
        return made

    def _unload(self) -> None:
        self._products = self._decoder = None  # they hold the base's weights
        super()._unload()

    def _ready(self, model: Any, use: Literal["train", "infer"]) -> None:
        super()._ready(model, use)
        if self._products is not None:
            # in f32 they are what PEFT's layers are, in a quarter of the products: a probe is a thousand small passes
            training = self._factors if self._decoder is None else None
            self._products.lay(training if use == "train" else Factors())

    def _greedy(self, model: Any) -> Greedy:
        ours = super()._greedy(model)
        if self._device.type != "cpu" or self._parameters > SMALL:
            return ours
        decoder, ends = self._decoder, end_tokens(self._tokenizer, model.generation_config)
        rounded = FACTORS.get(self._precision, torch.float32)

        def alone(prompts: list[list[int]], tokens: int) -> list[list[int]]:
            if decoder is not None and decoder.remembers(max(map(len, prompts)) + tokens):
                return [until(row, ends) for row in decoder.greedy(prompts, tokens, Head.of(model).logits, rounded)]
            with ThreadPoolExecutor(1, "greedy", torch.set_num_threads, (1,)) as thread:
                return thread.submit(ours, prompts, tokens).result()

        return alone

    @contextlib.contextmanager
    def _read_with(self, adapter: Path | None) -> Iterator[Read]:
        """The base that is resident, where products in bf16 make it faster than any other way."""
        if self._device.type == "cpu" and self._precision == "bf16-mixed" and self._adapted is None:
            self._adapt(*self._usual)  # as the next training would
        if self._decoder is None or self._precision != "bf16-mixed":
            with super()._read_with(adapter) as streamed:
                yield streamed
            return
        if adapter is not None:
            set_adapter(self._adapted, self._read_adapter(adapter)[0])
        rounded = Factors(torch.bfloat16, torch.bfloat16)
        with self._adapted.disable_adapter() if adapter is None else contextlib.nullcontext():
            yield Reading(self._decoder, Head.of(self._adapted), rounded)

    def _sft(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any:
        return Loop(arguments=arguments, train_dataset=train_dataset, logprobs=self._logprobs, **given)

    _dpo = _sft

    def _reply_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, inside = batch["input_ids"].to(self._device), batch["completion_mask"].to(self._device)[:, 1:]
        return (self._logprobs(ids, inside.bool()) * inside).sum(1)

    # -- own --------------------------------------------------------------------------------------------------------------

    def _logprobs(self, ids: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token that is asked for after a row's first (see `Loop`)."""
        model, head = self._adapted.get_base_model(), Head.of(self._adapted)
        if not self._ends_plainly:
            return next_logprobs(model(input_ids=ids, use_cache=False).logits, ids, head)
        if self._decoder is None:
            states = model.get_decoder()(input_ids=ids, use_cache=False)[0][:, :-1][inside]
        else:
            # what stands behind the last token that is asked for has no say in it
            lengths = [int(row.nonzero()[-1]) + 1 if row.any() else 1 for row in inside]
            wanted = torch.cat([row[:length] for row, length in zip(inside, lengths, strict=True)])
            states = self._decoder.states(ids, lengths, self._factors)[wanted]
        found = token_logprobs(states, ids[:, 1:][inside], head)
        return torch.zeros(inside.shape, device=ids.device).masked_scatter(inside, found)


def keep_freed_memory() -> None:
    """Have freed memory stay with this process, as `KEPT` says, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        for what, size in KEPT.items():
            ctypes.CDLL(None).mallopt(what, size)


@torch.no_grad()
def ends_plainly(model: Any) -> bool:
    """Whether a model's logits are its last hidden states times the output matrix, as `Head` has it.

    Args:
        model: A causal language model.
    """
    ids = torch.arange(8, device=model.device)[None]
    try:
        made = Head.of(model).logits(model.get_decoder()(input_ids=ids, use_cache=False)[0][0])
    except (AttributeError, RuntimeError, TypeError):
        return False
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    close = 1e-4 if model.dtype == torch.float32 else 0.05  # 16-bit models round their logits
    return made.shape == logits.shape and bool((made - logits).abs().max() <= close * logits.abs().max())  # NaN: no
