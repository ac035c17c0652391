"""Writing a run's models again as GGUF files to take away, with the check that each cycle's export passes.

A file that does not carry what was trained is not written: it would be shared, and be taken for the trained model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iterft_lite.app.chat import Past, backends_for, past
from iterft_lite.digests import digest_by_pieces
from iterft_lite.errors import ExportError, FolderError, UserError
from iterft_lite.experiment.steps import cycle_name
from iterft_lite.files import disk_errors, flush
from iterft_lite.protocols import Backends, Change, Progress
from iterft_lite.stages.export import CheckFailed, Fault, Kind, export_trained, export_untouched, share

UNTOUCHED = cycle_name(-1)
MERGED = "model.gguf"
"""The exporter's name of a merged file."""


@dataclass(frozen=True)
class Written:
    """A model that was written again.

    Attributes:
        gguf: The model; with an adapter, the untouched one.
        adapter: A LoRA GGUF to lay over it, or None.
        name: Run, cycle and number format: `bliss-c4-q8_0`.
        bytes: Of all files.
        temperature: The run's sampling temperature.
        carries: What the check found, as a sentence.
    """

    gguf: Path
    adapter: Path | None
    name: str
    bytes: int
    temperature: float
    carries: str


def export_again(
    root: Path, cycle: int | None, out: Path, quant: str | None, *, kind: Kind = "merged", force: bool = False
) -> Written:
    """Write a cycle's model into a folder and check it. Names tell run, cycle and number format.

    Args:
        kind: "merged": one file. "adapter": the untouched model, and the adapter to lay over it.
        force: Write over files of those names.

    Raises:
        UserError: As `past`; if there is such a file; if the untouched model's adapter is asked for.
        ExportError: If the file does not carry what was trained: nothing is written then.
        NoRoom: If the disk has no room for it.
    """
    found = past(root, cycle)
    if kind == "adapter" and found.adapter is None:
        raise UserError("the untouched model has no adapter", hint="leave out `--adapter`: its file is the model as it was")
    quant = quant or found.recipe.quant
    run, name = root.resolve().name, cycle_name(found.cycle)
    model = out / f"{run}-{name if kind == 'merged' else UNTOUCHED}-{quant}.gguf"
    adapter = out / f"{run}-{name}-adapter.gguf" if kind == "adapter" else None
    own = adapter or model
    if own.exists() and not force:
        raise _exists(own)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(backends_for(found)) as backends, TemporaryDirectory(prefix=".export-", dir=out) as scratch:
        folder = Path(scratch)
        carries = _checked(found, backends, folder, kind, quant)
        if adapter:
            backends.exporter.export(found.model, None, folder, "merged", quant, _ignore)
            # it is one file for all cycles, and there already where another cycle's adapter was written
            if model.exists() and not force and digest_by_pieces(model) != digest_by_pieces(folder / MERGED):
                raise _exists(model)
            (folder / "adapter.gguf").replace(adapter)
        flush(folder / MERGED)
        (folder / MERGED).replace(model)
    size = sum(each.stat().st_size for each in (model, adapter) if each)
    return Written(model, adapter, f"{run}-{name}-{quant}", size, found.recipe.sample.temperature, carries)


def _exists(target: Path) -> FolderError:
    return FolderError(f"`{target}` already exists", hint="`--force` writes it again, `--out` names another folder")


def _checked(found: Past, backends: Backends, folder: Path, kind: Kind, quant: str) -> str:
    """Write the model into a scratch folder and check it; what it carries, as a sentence.

    Raises:
        ExportError: If it does not carry what was trained.
        NoRoom: If the disk has no room for it.
    """
    exporter, generator = backends.exporter, backends.generator
    try:
        if found.adapter is not None:
            results = export_trained(exporter, generator, found.model, found.trained, folder, kind, quant, _ignore)
        elif (found.trained / "probe.npz").exists():
            results = export_untouched(exporter, generator, found.model, found.trained, folder, kind, quant, _ignore)
        else:
            exporter.export(found.model, None, folder, kind, quant, _ignore)
            return "not checked: the run was made by a version that kept nothing to check the untouched model with"
    except CheckFailed as error:
        raise ExportError(error.message, hint=_way_on(error.found, kind, trained=found.adapter is not None)) from None
    return _carried(results, trained=found.adapter is not None)


def _way_on(failed: Fault, kind: Kind, *, trained: bool) -> str | None:
    """What to do about a file that failed its check."""
    if kind == "adapter" or failed.about not in ("change", "distance"):
        return failed.hint
    adapter = "; `--adapter` writes the untouched model and the adapter as two files, and rounds nothing" if trained else ""
    return f"a finer number format keeps more: `--quant f16`{adapter}"


def _carried(results: Mapping[str, Any], *, trained: bool) -> str:
    """What a file that passed carries, as a sentence."""
    if not trained:
        return f"checked: its predictions are {results['parity']['mean_kl']:.2g} nats from the model's"
    if results["parity"]["change"] is None:
        return "checked, but not whether it carries the training: the run was made by a version that kept too little for it"
    change = Change(**results["parity"]["change"])
    if results["notes"]:
        return f"checked: {'; '.join(results['notes'])}"
    return f"checked: it shows {share(change)} of what was trained, under noise {change.noise:.2g} times as large"


def _ignore(_: Progress) -> None:
    """Ignore progress."""
