"""Probes: what the export of a model must reproduce, and how its logits are computed in 32 bits.

A base that trains in 4 or 16 bits is not what is exported: the adapter is merged into the checkpoint's own weights. So its
probe is computed from those, in float32, one module's weights at a time, of the embedding only the rows that occur and of the
output matrix a part at a time: the largest matrix of a block is all the memory that it takes. A base that is resident in
float32 is asked directly.
"""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from iterft_lite.backends.trainer.encoding import rendered
from iterft_lite.errors import BackendError

CHATS = (
    "How do I keep bread from going stale?",
    "Tell me a very short story about a lighthouse keeper, her dog and the first warm day of the year.",
    "What is 17 + 25? And is 1,024 a power of two?",
    "Où est la bibliothèque, s'il vous plaît? Ich hätte auch gern einen Kaffee – größer als gestern!",
    "my friend said 😂🎉 and then nothing for 3 days... should I worry? 🤔",
    "def area(width, height):\n    return width * height\n\nWhat does this function do?",
    "Write a list:\n\n1. tea\n2.  sugar\n\t- brown\n\nNow   add milk.",
)
"""What chat models are asked: plain, long, digits, accents, emoji, code, odd white space."""

DOCUMENTS = (
    "The harbour was quiet at dawn. Two gulls stood on the wall and",
    "How to Repot a Fern\n\nBefore you start, spread an old newspaper on the table. Then",
    "In 1987 the river rose 3.25 metres; 14 villages were cut off, and",
    "Le café était fermé, mais la boulangerie d'à côté – ouverte dès 6 h – sentait bon. Über",
    'def mean(values):\n    """The mean."""\n    return sum(values)',
    'Posted by mara_k 🌻: "didn\'t expect this", 12:45\n\n>> same here!! 😅',
)
"""What base models continue."""

REPLY_TOKENS = 24
POSITIONS = 160
LOGITS_BYTES = 48 * 2**20
"""At most so many positions, and so many bytes of logits: 160 at 8,192 tokens of vocabulary, 82 at 151,936."""

COLUMNS = 8192
"""Tokens, evenly over the vocabulary, whose logits of the untouched model are kept: more than any model is wide, so that no
change of the last hidden states can hide between them."""

ROWS_AT_ONCE = 8192
"""Rows of an output matrix that are in memory at a time."""

Logits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits, float32 [n, vocab], of token ids and their attention mask, int64 [rows, tokens], where asked for: int64 [n, 2]."""

Greedy = Callable[[list[list[int]], int], list[list[int]]]
"""Greedy continuations, at most so many tokens each."""

LastTokens = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The likeliest token after one place of each row, int64 [rows], of token ids int64 [rows, tokens] and places [rows]."""


def write_probe(
    out: Path, *, tokenizer: Any, vocab: int, greedy: Greedy, logits: Logits, base_logits: Logits | None = None
) -> None:
    """Write `out`/probe.npz (see `Trainer.probe`).

    Greedy tokens need not be the tokens that their text is cut into; the text is, so that who only has the text gets the same
    ids. It is NFC-normalised, as Qwen's tokenizers do and llama.cpp does not.

    Args:
        out: Folder, made if missing.
        tokenizer: The model's.
        vocab: Logits that the model gives.
        greedy: Continues prompts.
        logits: Of the model in 32 bits.
        base_logits: Of M[0] in 32 bits, where the model is one that was trained.
    """
    texts = continued(tokenizer, greedy)
    ids = [token_ids(tokenizer, text) for text in texts]
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    tokens = np.full((len(ids), lengths.max()), -1, dtype=np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    where = positions(lengths, vocab=vocab)
    asked = (
        torch.from_numpy(tokens).long().clamp(min=0),
        torch.from_numpy(tokens != -1).long(),
        torch.from_numpy(where).long(),
    )
    with torch.no_grad():
        chosen = logits(*asked).cpu()
        more = {} if base_logits is None else before_training(chosen, base_logits(*asked).cpu())
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": tokens, "lengths": lengths, "logits": chosen.numpy(), "where": where, "texts": np.array(texts, np.str_)}
    np.savez(out / "probe.npz", **arrays, **more)  # type: ignore[arg-type]  # numpy takes the names for its own options


def before_training(trained: torch.Tensor, base: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
    """The part of a probe that tells what training changed (see `Trainer.probe`).

    Args:
        trained: Logits of M[t], float32 [n, vocab].
        base: Logits of M[0] at the same positions.
    """
    log_p, log_q = trained.log_softmax(1), base.log_softmax(1)
    # Whole base logits would double the probe's size, and the check only compares differences: a sample of columns is enough.
    columns = np.unique(np.linspace(0, trained.shape[1] - 1, min(COLUMNS, trained.shape[1])).round().astype(np.int32))
    return {
        "base_logits": base.numpy()[:, columns],
        "columns": columns,
        "learned": (log_p.exp() * (log_p - log_q)).sum(1, dtype=torch.float64).float().numpy(),
    }


def continued(tokenizer: Any, greedy: Greedy) -> list[str]:
    """The probe's prompts, each with what the model says to it."""
    prompts = (
        list(DOCUMENTS)
        if tokenizer.chat_template is None
        else [rendered(tokenizer, [{"role": "user", "content": text}], generation_prompt=True) for text in CHATS]
    )
    replies = greedy([token_ids(tokenizer, prompt) for prompt in prompts], REPLY_TOKENS)
    texts = [prompt + tokenizer.decode(reply) for prompt, reply in zip(prompts, replies, strict=True)]
    return [unicodedata.normalize("NFC", text).replace("\0", "") for text in texts]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered chat, or of a plain text with the beginning token that the tokenizer gives it."""
    return list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])


def positions(lengths: npt.NDArray[np.int32], *, vocab: int) -> npt.NDArray[np.int32]:
    """Which positions are kept: int32 [n, 2], all if they fit, else evenly over all of them."""
    # Evenly over all positions, not the first ones: beginnings of chats are the same template in every row.
    every = np.array([(row, place) for row, length in enumerate(lengths) for place in range(length)], dtype=np.int32)
    most = max(len(lengths), min(POSITIONS, LOGITS_BYTES // (4 * vocab)))
    if len(every) <= most:
        return every
    kept: npt.NDArray[np.int32] = every[np.linspace(0, len(every) - 1, most).round().astype(int)]
    return kept


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

    def weight(self, name: str, device: torch.device) -> torch.Tensor:
        """W in float32."""
        made: torch.Tensor = self._where[name].get_tensor(name).to(device).float()
        return made

    def update(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and scale * B, float32, of the update of a matrix; None if it has none."""
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in self._adapter:
            return None
        a, b = (self._adapter[f"{stem}.lora_{side}.weight"].to(device).float() for side in "AB")
        return a, self._scale * b

    def rows(self, name: str, rows: slice | Sequence[int], device: torch.device) -> torch.Tensor:
        """Some rows of a matrix that has no adapter, in float32."""
        whole = self._where[name].get_slice(name)
        if isinstance(rows, slice):
            return whole[rows].to(device).float()  # type: ignore[no-any-return]
        return torch.cat([whole[row : row + 1] for row in rows]).to(device).float()


class Streamed:
    """Logits in float32 of a model whose weights are read module by module, just for the module's own forward pass.

    With an adapter the same pass gives M[0]'s logits too: the weights, whose way to the GPU takes most of the time, are read
    once for both. The model's class is loaded again from transformers' source: what a trainer has laid over the loaded one does
    not count.

    Args:
        config: transformers' configuration of the model.
        checkpoint: Its weights.
        device: To compute on.

    Raises:
        BackendError: If the files name their weights otherwise than the architecture does.
    """

    def __init__(self, config: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        self._asked: list[torch.Tensor] = []
        self._model = _streaming(config, checkpoint, device, self._asked)
        self._checkpoint, self._device = checkpoint, device
        self._base: torch.Tensor | None = None

    def lay(self, adapter: Mapping[str, torch.Tensor], scale: float) -> None:
        """Compute with another adapter, or none (see `Checkpoint.lay`)."""
        self._checkpoint.lay(adapter, scale)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Of the model with its adapter (see `Logits`)."""
        if not self._checkpoint.adapted:
            return self._compute(ids, mask, where)
        # Each row is computed twice in one batch, and the adapter is added to the first half only (`_first_half`): M[t] and
        # M[0] from one reading of the weights. `where` of the second half is the same places, that many rows further down.
        second = where + torch.tensor([len(ids), 0])
        made = self._compute(ids.repeat(2, 1), mask.repeat(2, 1), torch.cat([where, second]))
        self._base = made[len(where) :]
        return made[: len(where)]

    def base_logits(self, *_: torch.Tensor) -> torch.Tensor:
        """Of M[0], for what `logits` was asked last."""
        assert self._base is not None, "`logits` comes first, of a model with an adapter"
        return self._base

    def _compute(self, ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        self._asked[:] = where.T.to(self._device)
        given = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
        made: torch.Tensor = self._model(**given, use_cache=False).logits
        # an output matrix in parts has chosen the places itself, and gives [1, n, vocab]; others give all places
        return made[0] if len(made) == 1 < len(ids) else made[tuple(where.T.to(made.device))]


def _streaming(config: Any, checkpoint: Checkpoint, device: torch.device, asked: list[torch.Tensor]) -> Any:
    """The model, each of whose modules reads its weights; `asked` holds the places whose logits are wanted."""
    model = _hollow(config)
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})
    missing = []
    for path, module in model.named_modules():
        names = {}
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                name = f"{path}.{own}"
                # a tied output matrix has no weights of its own in the file: it reads the embedding's
                names[own] = name if name in checkpoint or name not in tied else tied[name]
                missing += [] if names[own] in checkpoint else [names[own]]
        if names and not missing:
            if module is model.get_input_embeddings():
                _stream_rows(module, names["weight"], checkpoint, device)
            elif module is model.get_output_embeddings() and type(module) is torch.nn.Linear and module.bias is None:
                module.forward = _in_parts(names["weight"], module.out_features, checkpoint, device, asked)
            else:
                _stream(module, names, checkpoint, device)
    if missing:
        raise BackendError(
            f"the checkpoint names its weights differently from `{config.architectures[0]}`: there is no `{missing[0]}`",
            hint='train with `train.base = "f32"`, whose probe needs no streaming',
        )
    for module in model.modules():
        # buffers (the frequencies of rotary embeddings) are not in checkpoints; they were computed and only have to move
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)

    return model


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


def _stream(module: torch.nn.Module, names: dict[str, str], checkpoint: Checkpoint, device: torch.device) -> None:
    """Let a module have its weights during its forward pass only."""
    empty = dict(module._parameters)

    def fill(*_: Any) -> None:
        for own, name in names.items():
            module._parameters[own] = torch.nn.Parameter(checkpoint.weight(name, device), requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)
    if "weight" in names:
        module.register_forward_hook(_first_half(names["weight"], checkpoint, device))


def _first_half(name: str, checkpoint: Checkpoint, device: torch.device) -> Callable[..., None]:
    """A hook that adds the update B A to what a linear layer gives for the first half of its rows, where there is one."""

    def add(_: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        update = checkpoint.update(name, device)
        if update is None:
            return
        (a, b), half = update, len(made) // 2
        # x A^T B^T, not x (B A)^T: two thin products instead of a matrix as large as the weight
        made[:half] += given[0][:half] @ a.T @ b.T

    return add


def _stream_rows(module: torch.nn.Module, name: str, checkpoint: Checkpoint, device: torch.device) -> None:
    """Let an embedding have the rows of the tokens that occur, renumbered, during its forward pass."""
    empty = module._parameters["weight"]

    def fill(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        tokens, places = torch.unique(given[0], return_inverse=True)
        rows = checkpoint.rows(name, tokens.tolist(), device)
        module._parameters["weight"] = torch.nn.Parameter(rows, requires_grad=False)
        # the module then looks up numbers from 0 to the count of distinct tokens, and those are the rows that it was given
        return (places, *given[1:])

    def drop(*_: Any) -> None:
        module._parameters["weight"] = empty

    module.padding_idx = None  # type: ignore[assignment]  # of the old numbers, and of no use without gradients
    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def _in_parts(
    name: str, rows: int, checkpoint: Checkpoint, device: torch.device, asked: list[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An output matrix that is never whole: logits float32 [1, n, vocab] on the CPU, of the places asked for only."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[tuple(asked)]
        parts = [
            (chosen @ checkpoint.rows(name, slice(start, min(start + ROWS_AT_ONCE, rows)), device).T).cpu()
            for start in range(0, rows, ROWS_AT_ONCE)
        ]
        return torch.cat(parts, 1)[None]

    return forward


def greedy_by(model: Any, pad: int, ends: Sequence[int]) -> Greedy:
    """Greedy continuation by transformers' `generate`, all prompts at once."""
    from transformers import GenerationConfig

    def greedy(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        device = next(model.parameters()).device
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        asked = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(ends) or None)
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=asked)[:, longest:].tolist()
        return [_until(row, ends) for row in made]

    return greedy


def greedy_without_cache(last_tokens: LastTokens, pad: int, ends: Sequence[int]) -> Greedy:
    """Greedy continuation by whole forward passes, for models whose own generation is not to be used.

    Args:
        last_tokens: Of a causal model: padding on the right does nothing.
        pad: Token to pad with.
        ends: Tokens that end a text.
    """

    def greedy(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        # Every pass reads whole rows again: slower than a cache by the length, but prompts are short, and it works for any
        # model.
        rows = [list(prompt) for prompt in prompts]
        longest = max(map(len, rows)) + tokens  # the same for all passes
        for _ in range(tokens):
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
            with torch.no_grad():
                last = last_tokens(ids, torch.tensor([len(row) - 1 for row in rows])).tolist()
            for row, token in zip(rows, last, strict=True):
                row.append(token)
        return [_until(row[len(prompt) :], ends) for row, prompt in zip(rows, prompts, strict=True)]

    return greedy


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first that ends a text, that one included."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
