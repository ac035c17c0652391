"""export: Q[t], the GGUF that writes and is measured, checked against M[t]."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from iterft_lite.digests import Json
from iterft_lite.errors import ExportError
from iterft_lite.protocols import Parity
from iterft_lite.stages.work import Work

EXACT_DELTA = 1e-4
"""f32: largest difference of a logit, with an f32 KV cache."""

MEAN_KL = {"f16": 1e-3, "bf16": 5e-3, "q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06, "q4_k_m": 0.15}
"""Other formats: largest mean KL(trainer || export) over the probed positions, nats. About ten times what sound exports showed;
each bit less of a K-quant allows for about twice the error."""


def run(work: Work) -> dict[str, Json]:
    """Write and check. Files: model.gguf, or adapter.gguf beside a cached base. Results: the files' place, parity, seconds.

    Raises:
        ExportError: If the export does not fit on the disk or does not agree with the trained model.
    """
    exporter, generator, model = work.backends.exporter, work.backends.generator, work.model()
    adapter = work.inputs.get("adapter")
    kind, quant = work.params["kind"], work.params["quant"]
    exported = exporter.export(model, adapter / "adapter" if adapter else None, work.folder, kind, quant, work.report)
    generator.load(exported.path, exported.adapter, model, slots=None, context=512, exact=True)
    parity = generator.parity((adapter or work.inputs["base"]) / "probe.npz")
    check(parity, quant)
    return {
        "gguf": _place(exported.path, work.folder),
        "lora": _place(exported.adapter, work.folder) if exported.adapter else None,
        "bytes": exported.bytes,
        "sha256": exported.sha256,
        "parts": exported.seconds,
        "parity": asdict(parity),
    }


def _place(path: Path, folder: Path) -> str:
    """A path inside the step's folder as it is there; one outside (the cached base) in full."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def check(parity: Parity, quant: str) -> None:
    """Hold an export against its bounds.

    Raises:
        ExportError: With what is off and by how much.
    """
    if not parity.same_tokens:
        raise ExportError(
            f"the exported model reads prompts as other tokens than the trained one: {parity.detail}",
            hint="the tokenizer of this model is not expressed rightly in GGUF; please report it with the model's name",
        )
    if not math.isfinite(parity.mean_kl):
        raise ExportError(
            "the exported model, or the trained one, gives logits that are not finite numbers",
            hint="the training has diverged in its last step (lower `train.learning_rate`), or activations leave f16's range "
            "(`train.base`, `quant`)",
        )
    if quant == "f32" and parity.max_delta > EXACT_DELTA:
        raise ExportError(
            f"the exported model's logits differ from the trained one's by {parity.max_delta:.2g} (allowed {EXACT_DELTA:.0g})"
        )
    if quant != "f32" and parity.mean_kl > MEAN_KL[quant]:
        raise ExportError(
            f"the exported model's next-token distribution is {parity.mean_kl:.3g} nats from the trained one's "
            f"(mean KL over {parity.positions} positions; allowed {MEAN_KL[quant]:.3g} for {quant})",
            hint="a finer `quant` (q8_0, bf16, f16) stays closer",
        )
