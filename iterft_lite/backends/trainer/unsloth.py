"""Unsloth's trainer: 4- or 16-bit LoRA on one NVIDIA GPU. Meant to run in a child process of its own.

Unsloth's model is trained by our own loop (`loop.py`): its kernels are in the model, its rewritten trainers are not needed.
Its fast generation is not used either: it keeps copies of the adapter's weights on the adapter's modules, which a re-drawn
adapter would be answered with.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from iterft_lite.errors import BackendError, ModelError
from iterft_lite.experiment.losses import LOSSES

# read while unsloth is imported: no reports of use over the network, no generated code in the working directory
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault(
    "UNSLOTH_COMPILE_LOCATION",
    str(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "iterft_lite"
        / "unsloth_compiled_cache"
        # trainers on several GPUs start at one moment: none may import what another is still writing
        / re.sub(r"[^\w-]+", "-", os.environ.get("CUDA_VISIBLE_DEVICES", "")).removeprefix("0")
    ),
)

try:
    import unsloth  # before torch's other friends: it patches trl, transformers and peft as they are imported
except (ImportError, NotImplementedError) as error:
    raise ModelError(
        f'`trainer = "unsloth"` does not work on this machine: {error}',
        hint="it needs an NVIDIA GPU and pip install 'iterft_lite[gpu]'; `trainer = \"peft\"` works everywhere",
    ) from None

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from iterft_lite.backends.trainer.cuda_graphs import Batch, Graphs
from iterft_lite.backends.trainer.encoding import Example, length_of, padding
from iterft_lite.backends.trainer.logprobs import Head, next_logprobs
from iterft_lite.backends.trainer.loop import Loop
from iterft_lite.backends.trainer.lora import lora_settings
from iterft_lite.backends.trainer.probe import Greedy, greedy_without_cache
from iterft_lite.backends.trainer.resident import ResidentTrainer, arithmetic, end_tokens, first_line, half, with_precision
from iterft_lite.backends.trainer.session import micro_batch
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.protocols import ModelFacts, OnProgress, TrainJob, TrainResult

LEAST_LENGTH = 1024
"""Tokens a row that Unsloth is prepared for at least: the probe's texts are longer than some recipes' rows."""

STATES_ONLY = "UNSLOTH_RETURN_HIDDEN_STATES"
"""Environment variable with which Unsloth's models leave their output matrix away and give the last hidden states as logits."""

FREE_SHARE = 0.3
"""Of the free GPU memory that activations may take before they are recomputed instead of kept; the generator wants its part."""

LAYERS_SHARE = 0.7
"""Of the free GPU memory that the layers' inputs may take before they wait on the CPU for the backward pass."""

ACTIVATIONS = "ITERFT_ACTIVATIONS"
"""Environment variable: "keep", "recompute" or "offload" decides what is chosen by free memory otherwise."""

Activations = Literal["keep", "recompute", "offload"]
"""What is kept of a forward pass for the backward pass: all; each layer's input; that on the CPU (Unsloth's way)."""

RECOMPUTED: dict[Activations, str] = {
    "recompute": "activations are recomputed",
    "offload": "activations are recomputed from inputs that wait on the CPU",
}
WHY: dict[Activations, str] = {
    "recompute": "they would take much of the GPU's free memory",
    "offload": "they would not fit beside the model",
}


class UnslothTrainer(ResidentTrainer):
    """Trains with Unsloth's kernels (a `Trainer`).

    Args:
        device: "auto" or "cuda:0": Unsloth takes the first GPU that it sees.
        threads: Of the CPU; None leaves torch's choice.
    """

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        super().__init__(device, threads)
        if self._device.type != "cuda":
            raise ModelError('`trainer = "unsloth"` needs an NVIDIA GPU', hint='`trainer = "peft"` works everywhere')
        self._settings: TrainSettings | None = None
        self._length = 0
        self._activations: Activations = "keep"
        self._least: Activations = "keep"
        self._chosen: Activations = "keep"
        self._graphs: Graphs | None = None

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        """Load M[0] (see `Trainer.load`)."""
        self._settings = settings
        return super().load(model, settings)

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        """Train one adapter (see `Trainer.train`)."""
        result = super().train(job, on_progress)
        notes = [*result.notes]
        chosen = self._chosen
        if chosen in RECOMPUTED and self._activations == chosen:
            notes.append(f"{RECOMPUTED[chosen]}: {WHY[chosen]}")
        if self._recorder is not None and self._recorder.failure:
            notes.append(f"kernels are launched one by one: {self._recorder.failure}")
        return TrainResult(**{**vars(result), "notes": tuple(notes)})

    # -- what differs between libraries -----------------------------------------------------------------------------------

    def _load_base(self, model: str, precision: str, settings: TrainSettings) -> Any:
        if precision in ("f32", "bf16-mixed"):
            raise ModelError(
                f'Unsloth trains on a base of 4 or 16 bits, not `train.base = "{precision}"`',
                hint='choose "nf4", "bf16" or "f16", or `trainer = "peft"`',
            )
        if precision == "bf16" and half(self._device) != "bf16":
            raise ModelError("this GPU does not compute in bf16", hint='choose `train.base = "f16"` or "nf4"')
        # above the model's own context Unsloth would stretch its positions
        self._length = min(max(settings.max_length, LEAST_LENGTH), super()._context)
        try:
            base, _ = unsloth.FastLanguageModel.from_pretrained(
                model_name=model,
                max_seq_length=self._length,
                dtype=arithmetic(precision, self._device),
                load_in_4bit=precision == "nf4",
                load_in_16bit=precision != "nf4",
                use_exact_model_name=True,  # M[0] itself, not a quantised copy of it from another account
                use_gradient_checkpointing=False,  # decided for each training (see `_ready`)
                fix_tokenizer=False,  # ours is the one that counts
                offload_embedding=False,
                local_files_only=Path(model).is_dir(),
            )
        except torch.OutOfMemoryError:
            raise BackendError(
                f"`{model}` does not fit into the GPU's free memory",
                exception="OutOfMemoryError",
                hint='choose `vram = "swap"`' + ("" if precision == "nf4" else ' or `train.base = "nf4"`'),
            ) from None
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"`{model}` cannot be loaded by Unsloth: {first_line(error)}", hint='try `trainer = "peft"`'
            ) from None
        return base

    def _inject(self, base: Any, rank: int, alpha: float) -> Any:
        return unsloth.FastLanguageModel.get_peft_model(
            base,
            use_gradient_checkpointing=False,
            max_seq_length=self._length,
            random_state=0,
            **lora_settings(base, rank, alpha),
        )

    def _adapt(self, rank: int, alpha: float) -> None:
        if self._shape not in (None, (rank, alpha)):
            self._reload()  # Unsloth has rewritten the layers for the adapter that they have
        super()._adapt(rank, alpha)
        if self._graphs is None:
            self._graphs = Graphs(self._device, self._context)

    def _unload(self) -> None:
        self._graphs, self._least = None, "keep"
        super()._unload()

    def _sft(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any:
        given |= {"logprobs": self._logprobs, "graphs": self._recorder}
        return Loop(arguments=arguments, train_dataset=train_dataset, **given)

    _dpo = _sft

    @property
    def _recorder(self) -> Graphs | None:
        """Unsloth's offloading waits for the CPU, which cannot be recorded."""
        return None if self._activations == "offload" else self._graphs

    def _logprobs(self, ids: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # recorded passes take all
        """Log-probability of each token after a row's first (see `Loop`)."""
        return next_logprobs(self._states(self._adapted, ids), ids, Head.of(self._adapted))

    def _states(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [rows, tokens, width]; logits of models that do not give them."""
        with torch.autocast("cuda", self._dtype), _states_only():
            made: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return made

    def _reply_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        given = self._recorder.even(batch) if self._recorder is not None else batch
        ids, inside = (given[name].to(self._device) for name in ("input_ids", "completion_mask"))
        return (self._logprobs(ids, inside[:, 1:].bool()) * inside[:, 1:]).sum(1)

    def _ready(self, model: Any, use: Literal["train", "infer"]) -> None:  # noqa: ARG002
        # one mode for all: without dropout the two differ in kernels only, and inference's remember adapters
        model.for_training(use_gradient_checkpointing="unsloth" if self._activations == "offload" else False)
        if self._activations == "recompute":
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.gradient_checkpointing = True
                    # there is no dropout, and the state of random numbers cannot be asked for while a graph is recorded
                    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    def _relieve(self, last: bool) -> str:
        if self._graphs is not None:
            self._graphs.clear()
        ways: tuple[Activations, ...] = get_args(Activations)
        if not last or self._activations == ways[-1] or os.environ.get(ACTIVATIONS):
            return ""
        # for the trainings to come as well
        self._activations = self._least = ways[ways.index(self._activations) + 1]
        return RECOMPUTED[self._activations]

    def _greedy(self, model: Any) -> Greedy:
        ends = end_tokens(self._tokenizer, model.generation_config)
        head = Head.of(model)
        # transformers' models have a method of this name
        disabled = [getattr(module, "disable_adapters", None) for module in model.modules()]
        adapted = False in disabled

        def passes(batch: Batch) -> dict[str, torch.Tensor]:
            states = self._states(model, batch["input_ids"])
            last = states[torch.arange(len(states), device=self._device), batch["last"]]
            logits = last if states.shape[-1] == len(head.weight) else head.logits(last)
            return {"tokens": logits.argmax(-1)}

        def last_tokens(ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            batch = {"input_ids": ids.to(self._device), "last": last.to(self._device)}
            if adapted and self._recorder is not None:
                return self._recorder.run("greedy", passes, self._recorder.even(batch))["tokens"]
            return passes(batch)["tokens"]

        return greedy_without_cache(last_tokens, padding(self._tokenizer), ends)

    # -- own --------------------------------------------------------------------------------------------------------------

    @property
    def _context(self) -> int:
        return min(super()._context, self._length)

    def _reload(self) -> None:
        """Load the base again, without an adapter."""
        name, settings = self._name, self._settings
        assert settings is not None
        self._unload()
        self.load(name, settings)

    def _plan(self, job: TrainJob, examples: Sequence[Example]) -> None:
        self._chosen = self._choose(job, examples)
        if self._chosen != self._activations and self._graphs is not None:
            self._graphs.clear()
        self._activations = self._chosen

    def _choose(self, job: TrainJob, examples: Sequence[Example]) -> Activations:
        """What is kept for the backward pass, by the GPU's free memory; what was too much before is not tried again.

        By the tokens of the longest row and a guess at the activations that Unsloth keeps of a token: in each layer about 4
        times the width and twice the inner width, of 2 bytes; the layer's input is one width.
        """
        asked = os.environ.get(ACTIVATIONS, "")
        if asked in get_args(Activations):
            return cast(Activations, asked)
        settings = with_precision(job.settings, self._device)
        rows = micro_batch(settings.batch_size, settings.micro_batch) * LOSSES[job.loss].sides
        tokens = rows * max(map(length_of, examples), default=0)
        text = self._config.get_text_config()
        layers = tokens * text.num_hidden_layers * 2
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if layers * (4 * text.hidden_size + 2 * text.intermediate_size) <= FREE_SHARE * free:
            fits: Activations = "keep"
        else:
            fits = "recompute" if layers * text.hidden_size <= LAYERS_SHARE * free else "offload"
        return max(fits, self._least, key=get_args(Activations).index)


@contextlib.contextmanager
def _states_only() -> Iterator[None]:
    """Have Unsloth's models give hidden states for logits; those that do not know the switch go on giving logits."""
    before = os.environ.get(STATES_ONLY)
    os.environ[STATES_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[STATES_ONLY]
        else:
            os.environ[STATES_ONLY] = before
