"""A model whose weights are read module by module from its checkpoint, just for the module's own forward pass.

A base that trains in 4 or 16 bits is not what is exported, and not what texts are measured under: the checkpoint's own weights
are. Here they pass through, of the embedding only the rows that occur: the largest matrix of a block is all the memory that it
takes. On a GPU the next matrices are on their way while one computes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from iterft_lite.backends.trainer.logprobs import Head
from iterft_lite.errors import BackendError
from iterft_lite.hardware import available_memory

ROWS_AT_ONCE = 8192
"""Rows of an output matrix that are in memory at a time."""

AHEAD = 8
"""Matrices that are read before they are asked for: a block's, 200 MB of pinned memory at 4 B parameters."""

READERS = 4
"""Threads that read them: one copies from the page cache at a fifth of what the bus takes."""

LARGE = 2**28
"""Bytes from which a matrix is not read ahead: torch keeps pinned memory, and a vocabulary's would take a gigabyte of it."""

KEPT = 0.25
"""Share of the machine's memory that can be had which a model may take to stay pinned: the bus takes it at three times the pace
at which threads copy what the system has read of the files."""

Part = tuple[str, int, int]
"""A matrix's name and its rows from where to where; 0 and 0: all."""


class Checkpoint:
    """The weights of a model's safetensors files, by name, and of an adapter merged into them.

    Args:
        folder: Of the Hugging Face model.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        self._files: list[Any] = [safe_open(folder / file, framework="pt") for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  # not a mapping
        self._adapter: Mapping[str, torch.Tensor] = {}
        self._scale = 1.0
        self._ahead = _Ahead(lambda part: self._stored(part).pin_memory())
        self._keeps = sum((folder / name).stat().st_size for name in files) <= KEPT * available_memory()
        self._kept: dict[Part, torch.Tensor] = {}

    def lay(self, adapter: Mapping[str, torch.Tensor], scale: float) -> None:
        """Merge another adapter, or none.

        Args:
            adapter: Weights by their names in PEFT's file.
            scale: alpha / rank.
        """
        self._adapter, self._scale = adapter, scale

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter."""
        return bool(self._adapter)

    def weight(self, name: str, device: torch.device, rows: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """W as it is stored, or its rows from where to where."""
        part = (name, *rows)
        if part in self._kept:
            return self._kept[part].to(device, non_blocking=True)
        stored = self._stored(part)
        if device.type != "cuda" or stored.nbytes >= LARGE:
            return stored.to(device)
        pinned = self._ahead.get(part)
        if self._keeps:
            self._kept[part] = pinned
        return pinned.to(device, non_blocking=True)

    def whole(self, name: str, device: torch.device) -> torch.Tensor:
        """W as it is stored, in the parts in which an output matrix is read for logits."""
        count = self._stored((name, 0, 0)).shape[0]
        starts = range(0, count, ROWS_AT_ONCE)
        return torch.cat([self.weight(name, device, (start, min(start + ROWS_AT_ONCE, count))) for start in starts])

    def some_rows(self, name: str, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Some rows of a matrix as it is stored; int64 [n] on the CPU."""
        whole: torch.Tensor = self._where[name].get_tensor(name)
        return whole[rows].to(device)

    def update(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and scale * B, float32, of the update of a matrix; None if it has none."""
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in self._adapter:
            return None
        a, b = (self._adapter[f"{stem}.lora_{side}.weight"].to(device).float() for side in "AB")
        return a, self._scale * b

    def _stored(self, part: Part) -> torch.Tensor:
        """The memory of a mapped file, of which nothing is read yet."""
        name, begin, end = part
        whole: torch.Tensor = self._where[name].get_tensor(name)
        return whole[begin:end] if end else whole


class _Ahead:
    """Reads what will be asked for next, while the GPU computes: every pass through a model asks in the same order.

    Args:
        read: Reads a part into pinned memory.
    """

    def __init__(self, read: Callable[[Part], torch.Tensor]) -> None:
        self._read = read
        self._after: dict[Part, Part] = {}
        self._coming: dict[Part, Future[torch.Tensor]] = {}
        self._last: Part | None = None
        self._pool = ThreadPoolExecutor(READERS, "weights")

    def get(self, part: Part) -> torch.Tensor:
        """A part, which was on its way if a pass has asked for it before."""
        if self._last is not None:
            self._after[self._last] = part
        self._last = part
        found = self._coming.pop(part, None)
        following: Part | None = part
        for _ in range(AHEAD):
            following = self._after.get(following) if following else None
            if following and following not in self._coming:
                self._coming[following] = self._pool.submit(self._read, following)
        return found.result() if found else self._read(part)


@dataclass
class _Pass:
    """What the modules of a model compute now.

    Attributes:
        exact: In 32 bits; else linear layers multiply in the bits that their weights are stored in.
        halved: The adapter is added to the first half of the rows only.
        asked: Rows and places whose logits are wanted, int64 [n] each.
    """

    exact: bool = True
    halved: bool = False
    asked: tuple[torch.Tensor, ...] = ()


class Streamed:
    """A model that is not in memory: its logits in 32 bits, and its last hidden states as it is stored.

    With an adapter one pass gives M[0]'s logits too: the weights, whose way to the GPU takes most of the time, are read once
    for both. The model's class is loaded again from transformers' source: what a trainer has laid over the loaded one does not
    count.

    Args:
        config: transformers' configuration of the model.
        checkpoint: Its weights.
        device: To compute on.

    Raises:
        BackendError: If the files name their weights otherwise than the architecture does.
    """

    def __init__(self, config: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        self._pass = _Pass()
        self._model = _hollow(config)
        self._names = _names(self._model, checkpoint)
        self._checkpoint, self._device = checkpoint, device
        self._base: torch.Tensor | None = None
        _stream_all(self._model, self._names, checkpoint, device, self._pass)

    def lay(self, adapter: Mapping[str, torch.Tensor], scale: float) -> None:
        """Compute with another adapter, or none (see `Checkpoint.lay`)."""
        self._checkpoint.lay(adapter, scale)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Of the model with its adapter, in 32 bits (see `probe.Logits`)."""
        if not self._checkpoint.adapted:
            return self._compute(ids, mask, where)
        # Each row is computed twice in one batch, and the adapter is added to the first half only: M[t] and M[0] from one
        # reading of the weights. `where` of the second half is the same places, that many rows further down.
        self._pass.halved = True
        second = where + torch.tensor([len(ids), 0])
        made = self._compute(ids.repeat(2, 1), mask.repeat(2, 1), torch.cat([where, second]))
        self._base = made[len(where) :]
        return made[: len(where)]

    def base_logits(self, *_: torch.Tensor) -> torch.Tensor:
        """Of M[0], for what `logits` was asked last."""
        assert self._base is not None, "`logits` comes first, of a model with an adapter"
        return self._base

    def states(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:  # noqa: ARG002  # all is computed
        """Last hidden states of the model with its adapter, float32 [rows, tokens, width] on the device.

        Texts are padded behind their ends. Products are those of the stored numbers' type with sums in 32 bits, and so is all
        between the products.

        Args:
            ids: int64 [rows, tokens].
            lengths: As of `likelihoods.Read`.
        """
        stored = self._stored_type()
        self._model.set_attn_implementation(_attention(self._model))
        self._pass.exact = self._pass.halved = False
        try:
            with torch.no_grad(), torch.autocast(self._device.type, stored, enabled=stored != torch.float32):
                made: torch.Tensor = self._model.base_model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
        finally:
            self._pass.exact = True
            self._model.set_attn_implementation("eager")
        return made.float()

    def head(self) -> Head:
        """What makes logits of hidden states, as it is stored: the largest matrix, whole."""
        end = self._model.get_output_embeddings()
        names = self._names[end]
        read = {own: self._checkpoint.whole(name, self._device) for own, name in names.items()}
        return replace(Head.of(self._model), weight=read["weight"].to(self._stored_type()), bias=read.get("bias"))

    def _stored_type(self) -> torch.dtype:
        """Of the numbers of the largest matrix; 32 bits where this device has no products of that type."""
        end = self._model.get_output_embeddings()
        stored = self._checkpoint.weight(self._names[end]["weight"], torch.device("cpu")).dtype
        old = self._device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32 if stored == torch.bfloat16 and old else stored

    def _compute(self, ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        self._pass.asked = tuple(where.T.to(self._device))
        given = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
        made: torch.Tensor = self._model(**given, use_cache=False).logits
        # an output matrix in parts has chosen the places itself, and gives [1, n, vocab]; others give all places
        return made[0] if len(made) == 1 < len(ids) else made[tuple(where.T.to(made.device))]


def _attention(model: Any) -> str:
    """PyTorch's own attention, which takes no memory for its scores; it cannot squeeze them (Gemma 2)."""
    squeezed = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not squeezed else "eager"


def _names(model: Any, checkpoint: Checkpoint) -> dict[Any, dict[str, str]]:
    """By module without weights, the names of its weights in the checkpoint."""
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})
    found: dict[Any, dict[str, str]] = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                continue
            name = f"{path}.{own}"
            # a tied output matrix has no weights of its own in the file: it reads the embedding's
            found.setdefault(module, {})[own] = name = name if name in checkpoint or name not in tied else tied[name]
            if name not in checkpoint:
                kind = model.config.architectures[0]
                raise BackendError(
                    f"the checkpoint names its weights differently from `{kind}`: there is no `{name}`",
                    hint='train with `train.base = "f32"`, whose probe needs no streaming',
                )
    return found


def _stream_all(
    model: Any, names: Mapping[Any, dict[str, str]], checkpoint: Checkpoint, device: torch.device, now: _Pass
) -> None:
    """Have each module read its weights."""
    for module, own in names.items():
        if module is model.get_input_embeddings():
            _stream_rows(module, own["weight"], checkpoint, device)
        elif module is model.get_output_embeddings() and type(module) is torch.nn.Linear and module.bias is None:
            module.forward = _in_parts(own["weight"], module.out_features, checkpoint, device, now)
        else:
            _stream(module, own, checkpoint, device, now)
    for module in model.modules():
        # buffers (the frequencies of rotary embeddings) are not in checkpoints; they were computed and only have to move
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _hollow(config: Any) -> Any:
    """A model of this configuration with its buffers and without its weights."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    spec = importlib.util.find_spec(type(config).__module__.replace(".configuration_", ".modeling_"))
    if name is None or spec is None or spec.loader is None:
        raise BackendError(
            f"transformers has no class of its own for `{config.model_type}`, whose logits a probe needs in 32 bits",
            hint='train with `train.base = "f32"`, whose probe needs no streaming',
        )
    # Unsloth patches the classes of the imported module. A second copy of the module, from its source, is untouched.
    pristine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pristine)
    kind = getattr(pristine, name)
    with init_empty_weights(include_buffers=False):
        return kind._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def _stream(
    module: torch.nn.Module, names: Mapping[str, str], checkpoint: Checkpoint, device: torch.device, now: _Pass
) -> None:
    """Let a module have its weights during its forward pass only."""
    empty = dict(module._parameters)

    def fill(*_: Any) -> None:
        for own, name in names.items():
            weight = checkpoint.weight(name, device)
            # only linear layers choose the type of their products: others would mix two
            kept = weight if isinstance(module, torch.nn.Linear) and not now.exact else weight.float()
            module._parameters[own] = torch.nn.Parameter(kept, requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)
    if "weight" in names:
        module.register_forward_hook(_with_update(names["weight"], checkpoint, device, now))


def _with_update(name: str, checkpoint: Checkpoint, device: torch.device, now: _Pass) -> Callable[..., None]:
    """A hook that adds the update B A, where there is one, to what a linear layer gives for all rows or half of them."""

    def add(_: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        update = checkpoint.update(name, device)
        if update is None:
            return
        (a, b), rows = update, slice(len(made) // 2 if now.halved else None)
        # x A^T B^T, not x (B A)^T: two thin products instead of a matrix as large as the weight
        made[rows] += given[0][rows] @ a.T @ b.T

    return add


def _stream_rows(module: torch.nn.Module, name: str, checkpoint: Checkpoint, device: torch.device) -> None:
    """Let an embedding have the rows of the tokens that occur, renumbered, during its forward pass."""
    empty = module._parameters["weight"]

    def fill(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        tokens, places = torch.unique(given[0], return_inverse=True)
        rows = checkpoint.some_rows(name, tokens.cpu(), device)
        module._parameters["weight"] = torch.nn.Parameter(rows.float(), requires_grad=False)
        # the module then looks up numbers from 0 to the count of distinct tokens, and those are the rows that it was given
        return (places, *given[1:])

    def drop(*_: Any) -> None:
        module._parameters["weight"] = empty

    module.padding_idx = None  # type: ignore[assignment]  # of the old numbers, and of no use without gradients
    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def _in_parts(
    name: str, rows: int, checkpoint: Checkpoint, device: torch.device, now: _Pass
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An output matrix that is never whole: logits float32 [1, n, vocab] on the CPU, of the places asked for only."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[now.asked]
        parts = [
            (chosen @ checkpoint.weight(name, device, (start, min(start + ROWS_AT_ONCE, rows))).float().T).cpu()
            for start in range(0, rows, ROWS_AT_ONCE)
        ]
        return torch.cat(parts, 1)[None]

    return forward
