"""Shapes of common models: so their needs are known before anything is downloaded.

From the models' config.json on the hub (Qwen3 Technical Report, arXiv 2505.09388, tables 1 and 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Config = Mapping[str, int | bool]


@dataclass(frozen=True)
class KnownModel:
    """A model whose shape is known here.

    Attributes:
        name: Of the instruct model on the hub.
        base: Of the base model of the same shape.
        config: The parts of its config.json that decide memory.
    """

    name: str
    base: str
    config: Config


def _qwen3(layers: int, width: int, inner: int, heads: int, *, tied: bool) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }


LADDER = (
    KnownModel("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", _qwen3(28, 1024, 3072, 16, tied=True)),
    KnownModel("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base", _qwen3(28, 2048, 6144, 16, tied=True)),
    KnownModel("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Base", _qwen3(36, 2560, 9728, 32, tied=True)),
    KnownModel("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", _qwen3(36, 4096, 12288, 32, tied=False)),
)
"""The smallest first."""


def known_config(name: str) -> Config | None:
    """The shape of a model on the hub, whichever its commit; None if it is not known here."""
    plain = name.partition("@")[0]
    return next((model.config for model in LADDER if plain in (model.name, model.base)), None)
