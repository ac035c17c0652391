"""The exporter that writes GGUF files, in a child process that stays warm: bases opened and arithmetic loaded once."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Literal

from iterft_lite.files import digest_path, keep_digest, kept_digest, writing
from iterft_lite.gguf.adapter import read_adapter, write_lora
from iterft_lite.gguf.base import Base, OnTensor, base_gguf, no_op
from iterft_lite.gguf.file import Checksum, ensure_room
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

    def stored(self, model: str) -> Path:
        """See `Exporter`."""
        return self._base(model).path

    def export(
        self,
        model: str,
        adapter: Path | None,
        out: Path,
        kind: Literal["merged", "adapter"],
        quant: str,
        on_progress: OnProgress,
    ) -> Exported:
        """See `Exporter`. Merged: `out`/model.gguf. Adapter: `out`/adapter.gguf, and the untouched model in the cache.

        The untouched model is made once for a number format and kept in the cache; a merged file of it is the same file under
        another name.

        Raises:
            ModelError: If there is no such model.
            NoRoom: If the disk has no room.
            ExportError: If the model or adapter cannot be expressed.
        """

        def on_tensor(done: int, total: int) -> None:
            on_progress(Progress(done, total, "tensors"))

        started = time.perf_counter()
        base = self._base(model, on_tensor)
        read = None if adapter is None else read_adapter(adapter, base)
        seconds = {"convert": time.perf_counter() - started}
        if read is not None and kind == "merged":
            path = out / "model.gguf"
            with contextlib.closing(Checksum()) as checksum:
                seconds |= write_merged(
                    base.file, read, path, quant, threads=self._threads, on_tensor=on_tensor, checksum=checksum
                )
                return Exported(path, None, path.stat().st_size, seconds, digest=checksum.hexdigest())
        untouched, size = base.folder / f"{quant}.gguf", 0
        if not untouched.is_file():
            seconds |= self._write_untouched(base, untouched, quant, on_tensor)
            size = untouched.stat().st_size
        if kind == "merged":
            path = out / "model.gguf"
            link(untouched, path)
            return Exported(path, None, path.stat().st_size, seconds, digest=kept_digest(untouched))
        if read is None:
            return Exported(untouched, None, size, seconds)
        started, path = time.perf_counter(), out / "adapter.gguf"
        size += write_lora(read, base, path)
        return Exported(untouched, path, size, {**seconds, "adapter": time.perf_counter() - started})

    def _write_untouched(self, base: Base, path: Path, quant: str, on_tensor: OnTensor) -> dict[str, float]:
        """Write M[0] in a quant, once for all runs on this machine; gives the seconds of each part."""
        digest_path(path).unlink(missing_ok=True)  # of another file under this name
        with contextlib.closing(Checksum()) as checksum:
            seconds = write_merged(base.file, None, path, quant, threads=self._threads, on_tensor=on_tensor, checksum=checksum)
            if quant in DIRECT:
                keep_digest(path, checksum.hexdigest())
        return seconds

    def _base(self, model: str, on_tensor: OnTensor = no_op) -> Base:
        """The base of a model, opened once."""
        made = base_gguf(model, on_tensor)
        return self._bases.setdefault(made.folder, made)


def link(source: Path, target: Path) -> None:
    """Have the same file under a second name; where the disk is another one, a copy.

    Raises:
        NoRoom: If the disk has no room for the copy.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            ensure_room(target.parent, source.stat().st_size, f"`{target.name}`")
            shutil.copyfile(source, temporary)
