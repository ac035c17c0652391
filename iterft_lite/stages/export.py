"""export: writes Q[t], the GGUF that generates and is evaluated, and checks it against M[t].

The check has two parts:

1. The export predicts nearly the same tokens as the trained model (equal token ids, small mean KL). A wrong tokenizer, a
   missing head or a damaged file fails here.
2. The difference between this export and the untouched one is the difference that training made. A merged file whose number
   format rounded a small update away passes the first part and fails here.

`kind = "auto"` takes the merged file if it carries the change, else the adapter over the untouched model, which rounds nothing.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from iterft_lite.digests import Json
from iterft_lite.errors import ExportError, FailureKind, ModelError
from iterft_lite.experiment.recipe import K_QUANTS
from iterft_lite.experiment.verbs import BackendName
from iterft_lite.protocols import Change, Exported, Exporter, Generator, OnProgress, Parity
from iterft_lite.stages.work import Work

Kind = Literal["merged", "adapter"]

EXACT = (1e-4, 1e-5)
"""f32: largest allowed difference of a logit, with an f32 KV cache: absolute, and as a share of the largest logit (good exports
showed up to 3e-6). The larger of the two counts."""

EXACT_ROUNDED = (1e-2, 2e-3)
"""The same if llama.cpp reads the activation function from a table in f16 (measured up to 8e-3)."""

MEAN_KL = {"f16": 1e-3, "bf16": 5e-3, "q8_0": 0.03, "q6_k": 0.06, "q5_k_m": 0.12, "q4_k_m": 0.3}
"""Other formats: largest mean KL(trainer || export) over the probed positions, nats. Three to four times what a real model of
135 M parameters showed (0.008 in q8_0, 0.08 in q4_k_m), ten times what larger and random ones did. It does not decide whether
the export carries the training."""

NOTHING = 1e-5
"""Change of logits, as a share of the logits, that counts as none: 32-bit arithmetic alone makes as much."""

KEPT = (0.9, 1.1)
"""Allowed share of the change in a merged file."""

BEYOND_DOUBT = (0.8, 1.25)
"""Allowed share of the change in any export, beyond `ERRORS` standard errors."""

ERRORS: Mapping[Kind, int] = MappingProxyType({"merged": 2, "adapter": 4})
"""Four for adapters: they are not rounded and have no alternative, so noise alone must not refuse one."""

SURE = 0.5
"""Smallest share of the change, less two standard errors, in a merged file: else the format's noise hides the change."""


@dataclass(frozen=True)
class Fault:
    """A failed check of an export.

    Attributes:
        about: "change" and "distance" come from the number format; "tokens" and "numbers" would fail in any export.
        message, hint: Sentences for the user.
    """

    about: Literal["tokens", "numbers", "distance", "change"]
    message: str
    hint: str | None = None


class CheckFailed(ExportError):  # noqa: N818  # read as a sentence
    """An export that does not carry what it should.

    Args:
        found: The failed check.
    """

    kind: FailureKind = "result"

    def __init__(self, found: Fault) -> None:
        super().__init__(found.message, hint=found.hint)
        self.found = found


def run(work: Work) -> dict[str, Json]:
    """Write and check. Files: model.gguf; or adapter.gguf, to be laid over the untouched model. Results: see `results`.

    Raises:
        CheckFailed: If the export does not agree with the trained model.
        NoRoom: If it does not fit on the disk.
        ExportError: If it cannot be written as GGUF.
    """
    exporter, generator, model = work.backends.exporter, work.backends.generator, work.model()
    adapter = work.inputs.get("adapter")
    kind, quant = work.params["kind"], work.params["quant"]
    if adapter is None:
        return export_untouched(exporter, generator, model, work.inputs["base"], work.folder, kind, quant, work.report)
    return export_trained(exporter, generator, model, adapter, work.folder, kind, quant, work.report, work.release)


def export_untouched(
    exporter: Exporter, generator: Generator, model: str, base: Path, folder: Path, kind: str, quant: str, report: OnProgress
) -> dict[str, Json]:
    """Write and check Q[0]: M[0] in a number format.

    Args:
        base: Folder with M[0]'s probe.npz.
        folder: The step's folder.
        kind: "auto", "merged" or "adapter". Unless "merged", the file stays in the cache, for adapters to be laid over it.
        quant: Number format.

    Raises:
        CheckFailed, NoRoom, ExportError: As `run`.
    """
    one: Kind = "merged" if kind == "merged" else "adapter"
    exported = exporter.export(model, None, folder, one, quant, report)
    _load(generator, exported, model)
    parity = generator.parity(base / "probe.npz")
    check(parity, one, quant)
    return results(exported, parity, folder, one)


def export_trained(
    exporter: Exporter,
    generator: Generator,
    model: str,
    trained: Path,
    folder: Path,
    kind: str,
    quant: str,
    report: OnProgress,
    release: Callable[[BackendName], None] = lambda _: None,
) -> dict[str, Json]:
    """Write and check Q[t]: M[t] in a number format, of the kind that is asked for or, for "auto", that carries the change.

    Args:
        trained: Folder with M[t]'s adapter and its probe.npz.
        folder, kind, quant: As for `export_untouched`.
        release: Lets other steps have a backend, as `Work.release`.

    Raises:
        CheckFailed, NoRoom, ExportError: As `run`.
    """
    export = _Export(exporter, generator, model, trained, folder, quant, report, release)
    with tempfile.TemporaryDirectory() as scratch:
        export.scratch = Path(scratch)
        if kind == "auto":
            return _chosen(export)
        one: Kind = "merged" if kind == "merged" else "adapter"
        exported, parity = export.made(one)
        check(parity, one, quant)
        return export.results(exported, parity, one)


@dataclass
class _Export:
    """The parts of one export: the backends, the model, and the files to compare with."""

    exporter: Exporter
    generator: Generator
    model: str
    trained: Path
    folder: Path
    quant: str
    report: OnProgress
    release: Callable[[BackendName], None]
    scratch: Path = Path()

    def made(self, kind: Kind) -> tuple[Exported, Parity]:
        """Write the model and compare it. It stays loaded in the generator, which is called when all is written: until then it
        may still write answers, and from then on another chain may export."""
        self.release("generator")  # of a file that was refused: nobody waits for the exporter who has the generator
        exported = self.exporter.export(self.model, self.trained / "adapter", self.folder, kind, self.quant, self.report)
        plain = untouched_gguf(self.exporter, self.model, self.folder, self.quant, self.report)
        self.release("exporter")
        untouched = self._untouched(plain)
        _load(self.generator, exported, self.model)
        return exported, self.generator.parity(self.trained / "probe.npz", untouched)

    def _untouched(self, plain: Path) -> Path:
        """A file with the logits of the untouched model in this format."""
        # Both exports round in the same format. Their difference shows the change, not the distance between the format and f32.
        file = self.scratch / "untouched.npz"
        if not file.exists():
            self.generator.load(plain, None, self.model, slots=None, context=512, exact=True)
            self.generator.probe_logits(self.trained / "probe.npz", file)
        return file

    def results(self, exported: Exported, parity: Parity, kind: Kind, notes: list[str] | None = None) -> dict[str, Json]:
        """See `results`."""
        return results(exported, parity, self.folder, kind, notes)


def _chosen(export: _Export) -> dict[str, Json]:
    """The merged file if it carries the change, else the adapter over the untouched model.

    Raises:
        CheckFailed: If neither passes the check.
    """
    if export.quant in K_QUANTS and (known := _hidden_in_adapter(export)):
        return known
    exported, parity = export.made("merged")
    found = fault(parity, "merged", export.quant)
    # tokens and infinite numbers would fail in an adapter too: there is no other kind to try
    if found is None or found.about in ("tokens", "numbers"):
        check(parity, "merged", export.quant)
        return export.results(exported, parity, "merged")
    exported.path.unlink()
    note = f"{_short(found, parity)}: the adapter is laid over the untouched model"
    exported, parity = export.made("adapter")
    check(parity, "adapter", export.quant)
    return export.results(exported, parity, "adapter", [note])


def _hidden_in_adapter(export: _Export) -> dict[str, Json] | None:
    """The adapter's results if the format's arithmetic hides the change even in them: a merged file cannot show it either, and
    need not be written. An adapter is written in a second.
    """
    # llama.cpp may take no adapters for this architecture: a merged file can still pass
    with contextlib.suppress(ExportError, ModelError):
        exported, parity = export.made("adapter")
        if parity.change is not None and hidden(parity.change) and fault(parity, "adapter", export.quant) is None:
            return export.results(exported, parity, "adapter")
        if exported.adapter is not None:
            exported.adapter.unlink()
    return None


def results(exported: Exported, parity: Parity, folder: Path, kind: Kind, notes: list[str] | None = None) -> dict[str, Json]:
    """What is known of an export: its files, their kind, parity with the change that they carry, seconds, sentences.

    `gguf` and `lora` name files of the step's folder. `gguf` is None for the untouched model of this quant, which lies in the
    machine's cache: whoever needs it asks for `untouched_gguf`.
    """
    told = [*(notes or []), *([] if parity.change is None else remarks(parity.change, kind))]
    return {
        "gguf": exported.path.name if exported.path.is_relative_to(folder) else None,
        "lora": exported.adapter.name if exported.adapter else None,
        "kind": kind,
        "bytes": exported.bytes,
        "digest": exported.digest,
        "parts": exported.seconds,
        "parity": asdict(parity),
        "notes": told,
    }


def untouched_gguf(exporter: Exporter, model: str, folder: Path, quant: str, report: OnProgress) -> Path:
    """The untouched model in a number format, from this machine's cache. Makes it if it is missing.

    Args:
        folder: Scratch folder.

    Raises:
        NoRoom: If it does not fit on the disk.
    """
    return exporter.export(model, None, folder, "adapter", quant, report).path


def _load(generator: Generator, exported: Exported, model: str) -> None:
    generator.load(exported.path, exported.adapter, model, slots=None, context=512, exact=True)


# -- the check --------------------------------------------------------------------------------------------------------


def check(parity: Parity, kind: Kind, quant: str) -> None:
    """Compare an export with its bounds.

    Raises:
        CheckFailed: With the failed bound and the measured value.
    """
    found = fault(parity, kind, quant)
    if found is not None:
        raise CheckFailed(found)


def fault(parity: Parity, kind: Kind, quant: str) -> Fault | None:
    """The first bound that an export fails, or None."""
    if not parity.same_tokens:
        return Fault(
            "tokens",
            f"the exported model reads prompts as other tokens than the trained one: {parity.detail}",
            "the tokenizer of this model is not expressed rightly in GGUF; please report it with the model's name",
        )
    if not math.isfinite(parity.mean_kl):
        return Fault(
            "numbers",
            "the exported model, or the trained one, gives logits that are not finite numbers",
            "the training has diverged in its last step (lower `train.learning_rate`), or activations leave f16's range "
            "(`train.base`, `quant`)",
        )
    return _distance(parity, quant) or (None if parity.change is None else _lost(parity.change, kind, quant))


def _distance(parity: Parity, quant: str) -> Fault | None:
    """The failed bound on the distance between the two models' predictions, or None."""
    if quant == "f32":
        least, relative = EXACT_ROUNDED if parity.rounded else EXACT
        allowed = max(least, relative * parity.largest)
        if parity.max_delta <= allowed:
            return None
        return Fault(
            "distance",
            f"the exported model's logits differ from the trained one's by {parity.max_delta:.2g} "
            f"(allowed {allowed:.2g}, where the largest logit is {parity.largest:.3g})",
        )
    if parity.mean_kl <= MEAN_KL[quant]:
        return None
    return Fault(
        "distance",
        f"the exported model's next-token distribution is {parity.mean_kl:.3g} nats from the trained one's "
        f"(mean KL over {parity.positions} positions; allowed {MEAN_KL[quant]:.3g} for {quant})",
        "a finer `quant` (q8_0, f16) stays closer",
    )


def learned_nothing(change: Change) -> bool:
    """Whether the training changed no more than 32-bit arithmetic alone does (without seed rows, say)."""
    return change.kept is None or change.size <= NOTHING * change.scale


def hidden(change: Change) -> bool:
    """Whether the format's noise is so large that even a complete change could not be seen."""
    return not learned_nothing(change) and change.error is not None and 1 - 2 * change.error <= SURE


def _lost(change: Change, kind: Kind, quant: str) -> Fault | None:
    """The failed bound on the change that the export shows, against the trained one, or None."""
    if learned_nothing(change):
        return None
    assert change.kept is not None
    assert change.error is not None
    # Three questions, each with its own bound. Is the change gone or doubled beyond what noise explains? Is a merged file's
    # share outside of what rounding may take? Is a merged file so noisy that half of the change could be missing unseen?
    low, high = change.kept - ERRORS[kind] * change.error, change.kept + ERRORS[kind] * change.error
    seen = f"the exported model shows {share(change)} of what was trained"
    if high < BEYOND_DOUBT[0] or low > BEYOND_DOUBT[1]:
        message = f"{seen}: the change was lost in the export"
    elif kind == "merged" and not KEPT[0] <= change.kept <= KEPT[1]:
        message = f"{seen} (allowed {KEPT[0]:g} to {KEPT[1]:g} for a merged file in {quant})"
    elif kind == "merged" and low <= SURE:
        message = f"{seen}: the noise of {quant}, {change.noise:.2g} times the change, hides it"
    else:
        return None
    return Fault(
        "change",
        message,
        '`export = "auto"` lays the adapter over the untouched model where a merged file loses it'
        if kind == "merged"
        else "the adapter is not applied as it was trained: please report it with the model's name",
    )


def share(change: Change) -> str:
    """`0.97 +- 0.05`: the kept share and its standard error."""
    return f"{change.kept:.2f} +- {change.error:.2f}"


def remarks(change: Change, kind: Kind) -> list[str]:
    """Remarks for readers of the results about a change that passed."""
    if learned_nothing(change):
        return ["the training changed nothing that could be measured: the export is the untouched model"]
    if kind == "adapter" and hidden(change):
        return [
            f"the change is smaller than the noise of the number format ({change.noise:.2g} times as large) and cannot be "
            f"seen in {share(change)}; the adapter carries it whole"
        ]
    return []


def _short(found: Fault, parity: Parity) -> str:
    """The reason why a merged file was not taken, in a few words."""
    if found.about == "change" and parity.change is not None:
        return f"merged kept {share(parity.change)} of the change"
    return f"merged: {found.message}"
