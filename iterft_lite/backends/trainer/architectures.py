"""What is different about some architectures when they are loaded and trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from iterft_lite.errors import ModelError


def load_causal(model: str, **given: Any) -> Any:
    """A causal language model with PyTorch's own attention; with plain attention where its code has no other.

    Args:
        model: Folder or hub name.
        given: Keywords of `from_pretrained`.

    Raises:
        OSError, ValueError: As transformers does.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa", **given)
    except ValueError as error:
        if "attention implementation" not in str(error) and "scaled_dot_product_attention" not in str(error):
            raise
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", **given)


def without_router_loss(config: Any) -> None:
    """Take the balancing of experts out of the loss: what is trained is the reply, in every architecture alike.

    trl and transformers add it with the configuration's coefficient, 0.001 mostly.
    """
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for name, off in (("router_aux_loss_coef", 0.0), ("output_router_logits", False)):
            if hasattr(part, name):
                setattr(part, name, off)


def adapted_layers(base: Any, targets: Sequence[str]) -> tuple[int, dict[str, int]]:
    """How many matrices an adapter is laid on, and how many weights of which kinds of parameters get none.

    Args:
        base: The model without an adapter.
        targets: As in peft's `target_modules`.

    Returns:
        (matrices with an adapter, numbers by the last parts of the names of matrices in blocks that have none). Embedding,
        output, norms and biases are left out: no adapter of this program is meant for them.
    """
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    head = {id(base.get_output_embeddings()), id(base.get_input_embeddings())}
    ends = {name for name, module in base.named_modules() if id(module) in head}
    chosen = {name for name in linear - ends if name.rsplit(".", 1)[-1] in targets}
    bare: dict[str, int] = {}
    for name, weight in _matrices(base):
        module = name.removesuffix(".weight")
        if module not in chosen and module not in ends:
            kind = ".".join(part for part in module.split(".")[-2:] if not part.isdigit())
            bare[kind] = bare.get(kind, 0) + weight.numel()
    return len(chosen), bare


def _matrices(base: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, weight) for name, weight in base.named_parameters() if weight.dim() > 1)


def adapter_note(matrices: int, bare: Mapping[str, int], parameters: int) -> str:
    """A sentence where part of a model gets no adapter, else "".

    Raises:
        ModelError: If nothing of it gets one.
    """
    if not matrices:
        raise ModelError("LoRA finds no matrix to adapt in this architecture")
    if not bare:
        return ""
    share = sum(bare.values()) / parameters
    kinds = ", ".join(f"`{kind}`" for kind in sorted(bare, key=lambda kind: -bare[kind])[:4])
    return f"the adapter is laid on {matrices} matrices; {kinds} ({share:.0%} of all weights) get none and are not trained"
