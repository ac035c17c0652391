"""The plain trainer: TRL and PEFT, on a CPU or any device that torch knows. Meant to run in a child process of its own."""

from __future__ import annotations

import os

# trl reports its use over the network otherwise; has to be said before it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import selective_log_softmax

from iterft_lite.backends.trainer.architectures import load_causal
from iterft_lite.backends.trainer.encoding import Example
from iterft_lite.backends.trainer.lora import lora_settings
from iterft_lite.backends.trainer.resident import ResidentTrainer, arithmetic, first_line
from iterft_lite.backends.trainer.session import ExactBatches, ExactPairs, bitsandbytes_works, one_device
from iterft_lite.errors import ModelError
from iterft_lite.experiment.recipe import TrainSettings


class _Sft(ExactBatches, SFTTrainer):  # type: ignore[misc]  # trl has no types
    pass


class _Dpo(ExactPairs, DPOTrainer):  # type: ignore[misc]  # trl has no types
    pass


class PeftTrainer(ResidentTrainer):
    """Trains with TRL's trainers on a PEFT model (a `Trainer`)."""

    def _load_base(self, model: str, precision: str, settings: TrainSettings) -> Any:  # noqa: ARG002  # the other one needs them
        dtype = arithmetic(precision, self._device)
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
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora_settings(base, rank, alpha)))

    def _sft(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any:
        rows = Dataset.from_list(list(train_dataset))
        return _Sft(args=one_device(SFTConfig(**arguments)), train_dataset=rows, **given)

    def _dpo(self, *, arguments: dict[str, Any], train_dataset: Sequence[Example], **given: Any) -> Any:
        rows = Dataset.from_list(list(train_dataset))
        return _Dpo(args=one_device(DPOConfig(**arguments)), train_dataset=rows, **given)

    def _reply_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, attention, mask = (batch[name].to(self._device) for name in ("input_ids", "attention_mask", "completion_mask"))
        logits = self._adapted(input_ids=ids, attention_mask=attention, use_cache=False).logits
        made: torch.Tensor = selective_log_softmax(logits[:, :-1].float(), ids[:, 1:], row_mask=mask[:, 1:]).sum(1)
        return made
