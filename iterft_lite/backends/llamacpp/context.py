"""A context of llama.cpp: its settings, its memory, and decoding a batch."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from iterft_lite.backends.llamacpp.library import Weights, free_vram, log, offloads

# isort: split
import llama_cpp
import numpy as np

from iterft_lite.errors import BackendError

F32, F16 = 0, 1  # ggml_type

WIDE = 24 * 2**30
"""Free GPU memory from which prompts are read in larger pieces, whose activations take a gigabyte more at 4 B parameters."""


class Batch:
    """A `llama_batch` over numpy arrays: what is written to them is what llama.cpp reads.

    Args:
        size: Tokens at most.
    """

    def __init__(self, size: int) -> None:
        self.tokens = np.zeros(size, dtype=np.int32)
        self.positions = np.zeros(size, dtype=np.int32)
        self.slots = np.zeros(size, dtype=np.int32)
        self.wanted = np.zeros(size, dtype=np.int8)
        self._ones = np.ones(size, dtype=np.int32)
        # `seq_id` is an array of pointers to lists of sequences, one a token. Each list has one entry, so the pointers lead
        # into `slots`, and writing a slot's number there is all that is ever needed.
        self._pointers = self.slots.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self.struct = llama_cpp.llama_batch()
        for name, array in (
            ("token", self.tokens),
            ("pos", self.positions),
            ("n_seq_id", self._ones),
            ("seq_id", self._pointers),
            ("logits", self.wanted),
        ):
            kind = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, kind))


class Context:
    """A context on a model.

    Args:
        weights: The model.
        settings: llama.cpp's (see `parameters`).

    Attributes:
        pointer: llama.cpp's handle.

    Raises:
        BackendError: If there is no memory for it.
    """

    def __init__(self, weights: Weights, settings: Any) -> None:
        log.errors = []
        self._threads = int(settings.n_threads)
        self.pointer = llama_cpp.llama_init_from_model(weights.pointer, settings)
        if not self.pointer:
            slots = int(settings.n_seq_max)
            raise BackendError(
                f"no memory for {slots} sequences of {settings.n_ctx // slots} tokens: {log.reason()}",
                exception="memory",
                hint="fewer `slots`, or a shorter context",
            )
        self.memory = llama_cpp.llama_get_memory(self.pointer)

    @staticmethod
    def parameters(*, slots: int, length: int, exact: bool, threads: int) -> Any:
        """llama.cpp's settings.

        Args:
            slots: Sequences.
            length: Tokens a sequence may take.
            exact: f32 cache, no flash attention.
            threads: CPU threads.
        """
        made = llama_cpp.llama_context_default_params()
        made.n_ctx = slots * -(-length // 256) * 256  # llama.cpp rounds up to it
        made.n_batch = 2048 if offloads() else 512
        made.n_ubatch = 512
        if offloads() and not exact and free_vram() > WIDE:
            made.n_batch, made.n_ubatch = 4096, 2048
        made.n_seq_max = slots
        made.n_threads = made.n_threads_batch = threads
        made.kv_unified = False
        made.swa_full = True  # a part of a sequence could not be removed otherwise
        made.type_k = made.type_v = F32 if exact else F16
        made.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        made.no_perf = True
        return made

    def adapt(self, adapter: Any | None) -> None:
        """Lay an adapter over the model, or none."""
        self.forget()
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter) if adapter else None
        scales = (ctypes.c_float * 1)(1.0) if adapter else None
        if llama_cpp.llama_set_adapters_lora(self.pointer, adapters, 1 if adapter else 0, scales):
            raise BackendError(f"llama.cpp does not take the adapter: {log.reason()}")

    def forget(self) -> None:
        """Empty the cache."""
        # False: only what is known about the cells is cleared, not their gigabytes
        llama_cpp.llama_memory_clear(self.memory, False)

    def decode(self, batch: Batch, count: int, threads: int = 0) -> float:
        """Decode the first `count` tokens of a batch, and wait for it; gives the seconds.

        Args:
            threads: CPU threads; 0: those of the settings.

        Raises:
            BackendError: If it fails.
        """
        batch.struct.n_tokens = count
        threads = threads or self._threads
        llama_cpp.llama_set_n_threads(self.pointer, threads, threads)
        log.errors = []
        began = time.perf_counter()
        code = llama_cpp.llama_decode(self.pointer, batch.struct)
        if code:
            raise BackendError(
                f"llama.cpp cannot decode a batch of {count} tokens (code {code}): {log.reason()}",
                exception="memory" if code in (1, -2) else "decode",
                hint="fewer `slots` need less memory" if code in (1, -2) else None,
            )
        llama_cpp.llama_synchronize(self.pointer)
        return time.perf_counter() - began

    def close(self) -> None:
        """Give all memory back."""
        if self.pointer:
            llama_cpp.llama_free(self.pointer)
            self.pointer = None
