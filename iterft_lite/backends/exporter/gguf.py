"""The exporter that writes GGUF files, in a child process that stays warm: bases opened and arithmetic loaded once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from iterft_lite.gguf.adapter import Adapter, read_adapter, write_lora
from iterft_lite.gguf.base import Base, OnTensor, base_gguf
from iterft_lite.gguf.file import Checksum
from iterft_lite.gguf.merge import DIRECT, write_merged
from iterft_lite.protocols import Exported, OnProgress, Progress


class GgufExporter:
    """Writes merged GGUF files, or LoRA GGUF files beside a base.

    Args:
        threads: CPU threads for K-quants; 0: all cores.
    """

    def __init__(self, threads: int = 0) -> None:
        self._threads = threads or os.cpu_count() or 1
        self._bases: dict[Path, Base] = {}

    def export(
        self,
        model: str,
        adapter: Path | None,
        out: Path,
        kind: Literal["merged", "adapter"],
        quant: str,
        on_progress: OnProgress,
    ) -> Exported:
        """See `backends.Exporter`. Merged: `out`/model.gguf. Adapter: `out`/adapter.gguf, and the base in the cache.

        Raises:
            ModelError: If there is no such model.
            ExportError: If there is no room, or the model or adapter cannot be expressed.
        """

        def on_tensor(done: int, total: int) -> None:
            on_progress(Progress(done, total, "tensors"))

        started = time.perf_counter()
        base = self._base(model, on_tensor)
        read = None if adapter is None else read_adapter(adapter, base)
        seconds = {"convert": time.perf_counter() - started}
        if kind == "merged":
            path = out / "model.gguf"
            checksum = Checksum() if quant in DIRECT or read is not None else None
            seconds |= write_merged(base.file, read, path, quant, threads=self._threads, on_tensor=on_tensor, checksum=checksum)
            return Exported(path, None, path.stat().st_size, seconds, checksum.hexdigest() if checksum else "")
        return self._beside(base, read, out, quant, seconds, on_tensor)

    def _beside(
        self, base: Base, adapter: Adapter | None, out: Path, quant: str, seconds: dict[str, float], on_tensor: OnTensor
    ) -> Exported:
        """The base in a quant, made once, and the adapter as a file of its own."""
        quantised, size = base.folder / f"{quant}.gguf", 0
        if not quantised.is_file():
            seconds |= write_merged(base.file, None, quantised, quant, threads=self._threads, on_tensor=on_tensor)
            size = quantised.stat().st_size
        if adapter is None:
            return Exported(quantised, None, size, seconds)
        started, path = time.perf_counter(), out / "adapter.gguf"
        size += write_lora(adapter, base, path)
        return Exported(quantised, path, size, {**seconds, "adapter": time.perf_counter() - started})

    def _base(self, model: str, on_tensor: OnTensor) -> Base:
        """The base of a model, opened once."""
        made = base_gguf(model, on_tensor)
        return self._bases.setdefault(made.folder, made)
