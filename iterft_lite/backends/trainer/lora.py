"""LoRA weights: drawn, read, laid on a resident model, written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from iterft_lite.errors import ModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a block that the adapter is laid on."""


def adapter_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by the names that they have in a file, in order of name."""
    found = {name.replace(".default.", "."): weight for name, weight in model.named_parameters() if ".lora_" in name}
    return dict(sorted(found.items()))


def draw_adapter(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a fresh adapter: A uniform in +-1/sqrt(width) (what peft's default comes to), B zero: it changes nothing.

    Drawn on the CPU in order of name, so that a seed gives the same adapter on every device and from every trainer.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn = {}
    for name, weight in adapter_weights(model).items():
        drawn[name] = torch.zeros(weight.shape, dtype=torch.float32)
        if ".lora_A." in name:
            drawn[name].uniform_(-1, 1, generator=generator).mul_(weight.shape[1] ** -0.5)
    return drawn


def read_adapter(folder: Path, model: Any, *, rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """Weights of an adapter folder, checked to fit this model and this recipe.

    Raises:
        ModelError: If the folder holds no adapter, or one of another shape or scale.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        read = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"`{folder}` holds no adapter that can be read: {error}") from None
    if (config["r"], config["lora_alpha"]) != (rank, alpha):
        raise ModelError(
            f"the adapter in `{folder}` has rank {config['r']} and alpha {config['lora_alpha']:g}, "
            f"the recipe {rank} and {alpha:g}",
            hint="a continual run keeps the adapter's rank and alpha",
        )
    expected = {name: tuple(weight.shape) for name, weight in adapter_weights(model).items()}
    if {name: tuple(weight.shape) for name, weight in read.items()} != expected:
        raise ModelError(f"the adapter in `{folder}` was made for another model")
    return {name: weight.float() for name, weight in read.items()}


def read_shape(folder: Path) -> tuple[int, float]:
    """Rank and alpha of an adapter folder.

    Raises:
        ModelError: If it holds no adapter.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"`{folder}` holds no adapter that can be read: {error}") from None


def set_adapter(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the resident adapter these weights, in 32 bits: in 16 a learning rate of 1e-5 would be rounded away.

    Weights and gradients in 32 bits stay where they are in memory: recorded passes (`graphs.py`) read and write them there.
    """
    for name, parameter in adapter_weights(model).items():
        if parameter.dtype == torch.float32:
            parameter.data.copy_(weights[name])
        else:
            parameter.data = weights[name].to(device=parameter.device, dtype=torch.float32, copy=True)
            parameter.grad = None
        if parameter.grad is not None:
            parameter.grad.zero_()
        parameter.requires_grad_(True)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the resident adapter as PEFT does: `adapter_model.safetensors` (float32) and `adapter_config.json`.

    Args:
        model: The PEFT model.
        folder: Made if missing.
        base: Name of the base: a hub name, or of a local folder its last part, so that the file means the same on any machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().cpu().contiguous().clone() for name, weight in adapter_weights(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=base, inference_mode=True)
    # sets have no order, files that are compared by their bytes need one
    plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in sorted(config.items())}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")


EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"})
"""Names that peft takes for a mixture's fused experts and its router."""


def projections(base: Any) -> list[str]:
    """What the adapter is laid on, by the last parts of names: the seven projections, or, where an architecture has others,
    every linear layer but the output. Of a mixture of experts the attention: fused experts are no matrices, and no GGUF could
    carry an adapter of theirs.

    Layers are named one by one: for "all-linear" peft makes adapters for fused experts too.
    """
    head = base.get_output_embeddings()
    linear = [(name, module) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    named = {name.rsplit(".", 1)[-1] for name, module in linear if module is not head}
    if any(".experts." in name and weight.dim() == 3 for name, weight in base.named_parameters()):
        return sorted(named - EXPERTS)
    return list(PROJECTIONS) if set(PROJECTIONS) <= named else sorted(named)


def lora_settings(base: Any, rank: int, alpha: float) -> dict[str, Any]:
    """Arguments of a LoRA configuration: dropout and biases none."""
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": projections(base),
    }
