"""A base that stays loaded, and one adapter on it: what the plain trainer and Unsloth's have in common."""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig

from iterft_lite.backends.passages import likelihood_of, text_of
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.backends.tokenizer_files import as_transformers
from iterft_lite.backends.trainer.architectures import adapted_layers, adapter_note, without_router_loss
from iterft_lite.backends.trainer.encoding import Encoded, Example, encode_rows, padding, read_rows
from iterft_lite.backends.trainer.likelihoods import Read, sum_logprobs, tokens_at_once
from iterft_lite.backends.trainer.lora import projections, read_adapter, read_shape, set_adapter
from iterft_lite.backends.trainer.probe import Greedy, Logits, greedy_by, write_probe
from iterft_lite.backends.trainer.session import Bench, bitsandbytes_works, train_adapter
from iterft_lite.backends.trainer.streaming import Checkpoint, Streamed
from iterft_lite.errors import ModelError
from iterft_lite.experiment.recipe import HELD_IN_32_BITS, TrainSettings
from iterft_lite.files import user_path
from iterft_lite.gguf.families import refuse_problems
from iterft_lite.hardware import cpu_precision
from iterft_lite.hub import name_of
from iterft_lite.protocols import Likelihood, ModelFacts, OnProgress, Passage, TrainJob, TrainResult

UNBOUNDED = 1_000_000
"""Tokens of a model that does not say what it was made for."""


class ResidentTrainer(ABC):
    """A trainer that keeps one base and lays one adapter on it, whose weights are drawn or loaded again for each training.

    What differs between libraries is in the methods that begin with an underscore.

    Args:
        device: "auto" is the first GPU where there is one.
        threads: Of the CPU; None leaves torch's choice.
    """

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._device = torch.device(("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self._name = ""
        self._precision = ""
        self._parameters = 0
        self._base: Any = None
        self._tokenizer: Any = None
        self._texts: Any = None
        self._config: Any = None
        self._adapted: Any = None
        self._streamed: Streamed | None = None
        self._shape: tuple[int, float] | None = None
        self._usual = (0, 0.0)
        self._bare = ""

    # -- the protocol -----------------------------------------------------------------------------------------------------

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        """Load M[0] (see `Trainer.load`)."""
        precision = with_precision(settings, self._device).base
        self._usual = (settings.lora_rank, settings.lora_alpha)
        if (model, precision) != (self._name, self._precision):
            self._unload()
            self._config, self._texts = read_model_files(model)
            self._tokenizer = as_transformers(self._texts.files)
            self._base = self._load_base(model, precision, settings)
            self._name, self._precision = model, precision
            self._parameters = int(self._base.num_parameters())
            without_dropout(self._base)
            without_router_loss(self._base.config)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what quantising took on its way
        return ModelFacts(
            architecture=(self._config.architectures or [type(self._base).__name__])[0],
            parameters=self._parameters,
            vocab=self._config.get_text_config().vocab_size,
            context=self._context,
            chat=self._tokenizer.chat_template is not None,
            precision=precision,
            device=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
        )

    def probe(self, out: Path, adapter: Path | None = None) -> None:
        """Write `out`/probe.npz (see `Trainer.probe`); `load` comes first."""
        self._need_base()
        if adapter is None:
            if self._adapted is None:
                self._write_probe(out, self._base, {}, 1.0)
            else:
                with self._adapted.disable_adapter():
                    self._write_probe(out, self._adapted, {}, 1.0)
            return
        weights, scale = self._read_adapter(adapter)
        set_adapter(self._adapted, weights)
        self._write_probe(out, self._adapted, weights, scale)

    def likelihood(
        self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None], adapter: Path | None = None
    ) -> None:
        """Log-probability of each passage's text (see `Trainer.likelihood`); `load` comes first.

        Raises:
            ModelError: If what comes before a passage leaves no room in the context.
            BackendError: If a probability is not a finite number.
            OutOfMemoryError: torch's, if there is no GPU memory for a single text.
        """
        self._need_base()
        texts = [text_of(self._texts, passage, self._trained_context) for passage in passages]
        asked = [place for place, text in enumerate(texts) if text.count]
        for passage, text in zip(passages, texts, strict=True):
            if not text.count:
                on_likelihood(Likelihood(passage.id, 0.0, 0))

        def take(number: int, total: float) -> None:
            place = asked[number]
            on_likelihood(likelihood_of(passages[place], total, texts[place].count))

        if asked:
            config = self._config.get_text_config()
            width = config.hidden_size
            room = tokens_at_once(width, getattr(config, "intermediate_size", 4 * width), self._device)
            with self._read_with(adapter) as model:
                sum_logprobs(model, [texts[place] for place in asked], room, take)

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        """Train one adapter (see `Trainer.train`); `load` comes first."""
        self._need_base()
        settings = with_precision(job.settings, self._device)
        rows = read_rows(job.rows)
        limit = min(settings.max_length, self._context)
        examples, cut = encode_rows(rows, job.loss, self._texts, limit=limit, name=self._name)
        self._plan(job, examples)
        self._adapt(settings.lora_rank, settings.lora_alpha)
        bench = Bench(
            model=self._adapted,
            tokenizer=self._tokenizer,
            texts=self._texts,
            title=base_name(self._name),
            precision=self._precision,
            small_range=self._dtype == torch.float16,
            optimizer="adamw_8bit" if settings.optimizer == "adamw_8bit" else "adamw",
            sft=self._sft,
            dpo=self._dpo,
            ready=self._ready,
            relieve=self._relieve,
            reply_logprobs=self._reply_logprobs,
        )
        result = train_adapter(bench, job, Encoded(rows, examples, cut, limit), on_progress)
        self.probe(job.out, job.out / "adapter")
        return replace(result, notes=(*filter(None, [self._bare]), *result.notes))

    # -- what differs between libraries -----------------------------------------------------------------------------------

    @abstractmethod
    def _load_base(self, model: str, precision: str, settings: TrainSettings) -> Any: ...

    @abstractmethod
    def _inject(self, base: Any, rank: int, alpha: float) -> Any: ...

    @abstractmethod
    def _sft(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any: ...

    @abstractmethod
    def _dpo(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any: ...

    @abstractmethod
    def _reply_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor: ...

    @contextlib.contextmanager
    def _read_with(self, adapter: Path | None) -> Iterator[Read]:
        """What reads under M[0], with an adapter or without."""
        streamed = self._checkpoint()
        streamed.lay(*(({}, 1.0) if adapter is None else self._read_adapter(adapter)))
        yield streamed

    def _plan(self, job: TrainJob, examples: Sequence[Example]) -> None:  # noqa: B027  # most decide nothing
        """Decide what depends on the rows of a training."""

    def _greedy(self, model: Any) -> Greedy:
        ends = end_tokens(self._tokenizer, model.generation_config)
        return greedy_by(model, padding(self._tokenizer), ends)

    def _ready(self, model: Any, use: Literal["train", "infer"]) -> None:
        model.train(use == "train")

    def _relieve(self, last: bool) -> str:  # noqa: ARG002  # nothing is held that could be given back
        return ""

    # -- shared -----------------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        """Of activations."""
        return arithmetic(self._precision, self._device)

    @property
    def _context(self) -> int:
        """Tokens that a row may have."""
        return self._trained_context

    @property
    def _trained_context(self) -> int:
        """Tokens that the model was made for."""
        return int(getattr(self._config.get_text_config(), "max_position_embeddings", 0) or UNBOUNDED)

    def _need_base(self) -> None:
        if self._base is None:
            raise AssertionError("load comes before train and probe")

    def _unload(self) -> None:
        self._base = self._adapted = self._shape = self._streamed = None
        self._name = self._precision = ""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _adapt(self, rank: int, alpha: float) -> None:
        """Have an adapter of this shape on the base."""
        if self._shape != (rank, alpha):
            if self._adapted is not None:
                self._base = self._adapted.unload()
            self._bare = adapter_note(*adapted_layers(self._base, projections(self._base)), self._parameters)
            self._adapted = self._inject(self._base, rank, alpha)
            self._shape = (rank, alpha)

    def _read_adapter(self, folder: Path) -> tuple[dict[str, torch.Tensor], float]:
        """Weights of an adapter folder, and alpha / rank; an adapter of this shape is on the base then.

        Raises:
            ModelError: As `lora.read_adapter`.
        """
        rank, alpha = read_shape(folder)
        self._adapt(rank, alpha)
        return read_adapter(folder, self._adapted, rank=rank, alpha=alpha), alpha / rank

    def _write_probe(self, out: Path, model: Any, adapter: dict[str, torch.Tensor], scale: float) -> None:
        self._ready(model, "infer")
        resident = self._precision in HELD_IN_32_BITS
        logits, base_logits = self._exact_logits(model) if resident else self._streamed_logits(adapter, scale)
        write_probe(
            out,
            tokenizer=self._tokenizer,
            vocab=model.get_output_embeddings().weight.shape[0],
            greedy=self._greedy(model),
            logits=logits,
            base_logits=base_logits if adapter else None,
        )

    def _exact_logits(self, model: Any) -> tuple[Logits, Logits]:
        """Logits of a resident base in 32 bits, with its adapter and without."""
        adapted = self._resident_logits(model)

        def logits(*asked: torch.Tensor) -> torch.Tensor:
            with model.disable_adapter():
                return adapted(*asked)

        return adapted, logits

    def _resident_logits(self, model: Any) -> Logits:
        def logits(ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = model(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
            ).logits
            return made[tuple(where.T)].float()

        return logits

    def _streamed_logits(self, adapter: dict[str, torch.Tensor], scale: float) -> tuple[Logits, Logits]:
        """The same in 32 bits where the resident base has fewer."""
        streamed = self._checkpoint()
        streamed.lay(adapter, scale)
        return streamed.logits, streamed.base_logits

    def _checkpoint(self) -> Streamed:
        """M[0] as it is stored."""
        if self._streamed is None:
            self._streamed = Streamed(self._config, Checkpoint(model_folder(self._name)), self._device)
        return self._streamed


DTYPES = {"f32": torch.float32, "bf16-mixed": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""torch's types of what is not quantised."""


def half(device: torch.device) -> Literal["bf16", "f16"]:
    """The 16 bits to compute in: f16 on a GPU that has no bf16 (NVIDIA before Ampere; torch would imitate it)."""
    old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "f16" if old else "bf16"


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """The type that activations have beside a base of this precision."""
    if precision == "nf4":
        precision = "f32" if device.type == "cpu" else half(device)
    return DTYPES[precision]


def with_precision(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """The settings with "auto" decided: nf4 and 8-bit moments on a GPU where bitsandbytes works, else 32-bit moments.

    Without bitsandbytes a GPU holds the base in the 16 bits that it computes in. A CPU holds it in 32, and multiplies in bf16
    where it has instructions for that.
    """
    cuda = device.type == "cuda"
    eight = cuda and "auto" in (settings.base, settings.optimizer) and bitsandbytes_works()
    base = settings.base if settings.base != "auto" else "nf4" if eight else half(device) if cuda else cpu_precision()
    optimizer = settings.optimizer if settings.optimizer != "auto" else "adamw_8bit" if eight else "adamw"
    return settings.model_copy(update={"base": base, "optimizer": optimizer})


def read_model_files(model: str) -> tuple[Any, TrainingTokenizer]:
    """Configuration and tokenizer of a local folder or a hub name.

    Raises:
        ModelError: If there is no such model, or it is quantised already.
    """
    folder = user_path(model)
    local = folder.is_dir()
    if not local and (model.startswith(("/", ".", "~")) or model.count("/") > 1 or folder.exists()):
        raise ModelError(
            f"there is no model folder `{model}`",
            hint="give a Hugging Face folder (config.json, tokenizer, safetensors) or a hub name",
        )
    if local and not (folder / "config.json").is_file():
        raise ModelError(f"`{model}` holds no Hugging Face model: there is no config.json in it")
    if local:
        refuse_problems(folder)
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False)
        tokenizer = TrainingTokenizer(model)
    except (OSError, ValueError) as error:
        hint = (
            "the folder needs config.json and tokenizer.json"
            if local
            else "check the name and the network; gated models need HF_TOKEN; HF_HUB_OFFLINE=1 finds only downloaded models"
        )
        raise ModelError(f"`{model}` cannot be loaded: {first_line(error)}", hint=hint) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"`{model}` is quantised already: its adapters could not be merged into full-precision weights",
            hint='give the 16-bit model; `train.base = "nf4"` quantises it for training',
        )
    return config, tokenizer


def model_folder(model: str) -> Path:
    """The folder that holds a model's files: its own, or the hub cache's."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))


def without_dropout(base: Any) -> None:
    """Turn dropout off for good: a training is then a function of its job alone."""
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def end_tokens(tokenizer: Any, generation: Any) -> list[int]:
    """Tokens that end a text."""
    ends = generation.eos_token_id if generation is not None else None
    found = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or [])}
    return sorted(token for token in found if token is not None)


def first_line(error: Exception) -> str:
    """An error's own words, without the pages that some libraries add."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def base_name(model: str) -> str:
    """A model's name for files: a hub name as it is, also of its folder in the hub's cache; another folder by its last part."""
    return name_of(Path(model).resolve()) if Path(model).is_dir() else model


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
