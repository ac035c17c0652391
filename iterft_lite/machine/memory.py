"""GPU memory that a recipe needs, from the model's shape; and whether trainer and generator take turns on the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterft_lite.errors import FileError, ModelError
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.files import read_object
from iterft_lite.hardware import MERGING
from iterft_lite.hub import cached_file
from iterft_lite.machine.known_models import known_config
from iterft_lite.machine.resolve import Machine

BITS: Mapping[str, float] = {
    "f32": 32, "bf16-mixed": 48, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.9, "q4_k_m": 5.1, "nf4": 4.2,
}  # fmt: skip
"""Bits a weight in each number format, scales included."""

RUNTIME = 600 << 20
"""GPU memory of a process that holds nothing yet: CUDA's context and kernels."""

LOGITS = 768 << 20
"""GPU memory of a training for parts of logits, weights dequantised one by one, and workspace."""

JUDGE = ("q8_0", 4, 2048)
"""The untouched model as judge: its number format, and the sequences and tokens of each that it has room for at least
(`backends/judge/base.py`); more slots take what is free."""

LEAST_SLOTS = 16
"""Sequences at once that the generator has at least, beside a trainer."""


@dataclass(frozen=True)
class Vram:
    """GPU memory that a recipe needs, bytes; from the model's shape.

    A 4B run on rows of 290 tokens took 5.4 to 6.9 GiB for training; the arithmetic says 8.6 GiB for rows of 1,024.

    Attributes:
        base: The trainer's resident base.
        training: What the trainer takes beside it: adapter, its moments, activations, and some logits.
        tight: The same where activations are recomputed, as the trainer does when they would not fit.
        generator: With `LEAST_SLOTS` sequences.
        exporter: Parts of matrices that are being merged, with CUDA's own.
        judge: The untouched model as judge, which stays beside whatever else is there; 0 for other judges.
    """

    base: int
    training: int
    tight: int
    generator: int
    exporter: int = MERGING
    judge: int = 0

    @property
    def trainer(self) -> int:
        """The trainer's process."""
        return self.base + self.training

    @property
    def together(self) -> int:
        """Everything at once."""
        return self.trainer + self.generator + self.exporter + self.judge

    @property
    def in_turns(self) -> int:
        """The trainer, activations recomputed, and then the generator; the exporter merges on the CPU."""
        return max(self.base + self.tight, self.generator) + self.judge


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its configuration.

    Attributes:
        matrices: Rows and columns of a layer's seven projections.
        kv: Width of a token's keys, and of its values.
        embedding: Numbers of the embedding, and of the output matrix where that is another.
    """

    layers: int
    width: int
    inner: int
    vocab: int
    kv: int
    matrices: tuple[tuple[int, int], ...]
    embedding: int

    @property
    def parameters(self) -> int:
        """All numbers but those of norms and biases."""
        return self.linear + self.embedding

    def stored(self, quant: str) -> int:
        """Bytes of all numbers in a number format."""
        return int(self.parameters * BITS[quant] / 8)

    @property
    def linear(self) -> int:
        """Numbers of all layers' projections."""
        return self.layers * sum(a * b for a, b in self.matrices)


def shape_of(place: str) -> Shape | None:
    """The shape of a model; None where its configuration is not on this machine.

    Args:
        place: Folder or hub name.
    """
    config = _config(place)
    if config is None:
        return None
    layers, width, inner = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads, vocab = int(config["num_attention_heads"]), int(config["vocab_size"])
    head = int(config.get("head_dim") or width // heads)
    kv = head * int(config.get("num_key_value_heads") or heads)
    attention = ((width, heads * head), (width, kv), (width, kv), (heads * head, width))
    matrices = (*attention, (width, inner), (width, inner), (inner, width))
    embedding = vocab * width * (1 if config.get("tie_word_embeddings") else 2)
    return Shape(layers, width, inner, vocab, kv, matrices, embedding)


def vram_needed(recipe: Recipe, place: str) -> Vram | None:
    """The GPU memory that a recipe needs; None where the model's configuration is not on this machine.

    Args:
        place: Folder or hub name of M[0].
    """
    shape = shape_of(place)
    if shape is None:
        return None
    layers, width = shape.layers, shape.width
    base = BITS["nf4" if recipe.train.base == "auto" else recipe.train.base]
    # numbers in A [rank, in] and B [out, rank] of each of the seven projections
    adapter = layers * recipe.train.lora_rank * sum(a + b for a, b in shape.matrices)
    length = min(recipe.train.max_length, recipe.sample.max_tokens + 256)
    asked = recipe.train.micro_batch
    rows = recipe.train.batch_size if asked == "auto" else min(asked, recipe.train.batch_size)
    # both sides of a pair pass through the model in one batch
    tokens = rows * length * recipe.loss_record.sides
    # 16-bit activations that a layer keeps for its backward pass: about four as wide as the model, two as wide as the MLP
    of_a_layer = tokens * 2 * (4 * width + 2 * shape.inner)
    numbers = 4 if recipe.train.base in ("f32", "bf16-mixed") else 2
    logits, kept = LOGITS, layers * of_a_layer
    # recomputed activations: each layer's input is kept, and one layer at a time is computed again
    least = layers * tokens * 2 * width + of_a_layer
    if recipe.trainer in ("peft", "trl"):  # recomputes nothing; holds whole logits of pairs and their gradients
        least = kept = kept * numbers // 2
        logits = max(logits, 3 * 4 * tokens * shape.vocab) if recipe.loss_record.compares else logits
    # keys and values in 16 bits: 4 bytes a token, layer and number of kv width
    cache = LEAST_SLOTS * (recipe.sample.max_tokens + 256) * 4 * layers * shape.kv
    return Vram(
        base=int(shape.linear * base / 8 + numbers * shape.embedding) + RUNTIME,
        training=int(adapter * 12 + logits + kept),
        tight=int(adapter * 12 + logits + least),
        generator=shape.stored(recipe.quant) + cache + RUNTIME + (512 << 20),
        judge=_judge_needs(shape) if recipe.judge == "base" else 0,
    )


def _judge_needs(shape: Shape) -> int:
    """GPU memory of the untouched model as judge, bytes."""
    quant, slots, tokens = JUDGE
    return shape.stored(quant) + slots * tokens * 4 * shape.layers * shape.kv + RUNTIME + (512 << 20)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
"""Keys of config.json that tell a model's shape."""


def _config(place: str) -> dict[str, Any] | None:
    """A model's configuration: from its folder, or from what the hub's cache holds."""
    path = Path(place) / "config.json"
    if not path.is_file():
        cached = cached_file(place, "config.json")
        if cached is None:
            known = known_config(place)
            return None if known is None else dict(known)
        path = cached
    try:
        config = read_object(path)
    except FileError as error:
        raise ModelError(error.message, hint=error.hint) from None
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    optional = [key for key in ("head_dim", "num_key_value_heads") if config.get(key)]
    return (
        config if all(isinstance(config.get(key), int) and 0 < config[key] < 1 << 32 for key in (*SIZES, *optional)) else None
    )


def takes_turns(recipe: Recipe, place: str, machine: Machine) -> bool:
    """Whether trainer and generator take turns on the GPU."""
    if not machine.gpu or recipe.vram == "resident":
        return False
    if recipe.vram == "swap":
        return True
    need = vram_needed(recipe, place)
    return need is None or machine.vram_free < need.together
