"""What M[0]'s configuration says: whether it may judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iterft_lite.hub import cached_file


def instruct_parameters(model: str) -> float | None:
    """Parameters of a model that has a chat template, about; None where it has none, or is not on this machine.

    Args:
        model: Folder or hub name.
    """
    config, tokenizer = _json(model, "config.json"), _json(model, "tokenizer_config.json")
    if config is None or not ((tokenizer or {}).get("chat_template") or _file(model, "chat_template.jinja")):
        return None
    config = config.get("text_config") or config
    try:
        width, layers, heads = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        head = int(config.get("head_dim") or width // heads)
        kv = head * int(config.get("num_key_value_heads") or heads)
        inner = int(config["intermediate_size"])
        embeddings = int(config["vocab_size"]) * width * (1 if config.get("tie_word_embeddings") else 2)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return float(layers * (2 * width * (heads * head + kv) + 3 * width * inner) + embeddings)


def _file(model: str, name: str) -> Path | None:
    path = Path(model) / name
    return path if model and path.is_file() else cached_file(model, name)


def _json(model: str, name: str) -> dict[str, Any] | None:
    path = _file(model, name)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
