"""llama.cpp as a library: its log, its models and adapters, and what is wrong when one cannot be loaded.

This module has to be imported before numpy: on one machine the first model load crashed otherwise, and OpenMP reads its
settings when llama.cpp's libraries are loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

# How often a thread that waits for the others looks before it sleeps: some 50 us. Decoding a token, it waits some 200 times.
# Sleeping at once (OMP_WAIT_POLICY=PASSIVE alone) costs 20 times on an 8 M model and one sequence, spinning without end
# 40 times where another process wants the core.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
# numpy's own threads: nothing here multiplies matrices with it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import llama_cpp

from iterft_lite.errors import BackendError, ModelError

SMALL = 200 * 2**20
"""Bytes of a model below which a second one may stay loaded, its tensors are checked, and threads are tried out."""

ADAPTERS = 4
"""Adapters that stay loaded beside a model."""

TABLED = frozenset(["gemma", "gemma2", "gemma3", "gemma3n", "gpt2", "gptneox", "starcoder2", "phi2", "falcon", "bloom", "mpt"])
"""Architectures with GELU, which ggml's CPU code takes from a table in f16: logits are off by up to 0.01 by it."""

WARNING, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level
HARMLESS = ("possible training context overflow", "n_ctx is not divisible by n_seq_max", "does not match expectation")


class _Log:
    """llama.cpp's log: warnings and errors go to stderr; the last errors are kept for a message."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _: Any) -> None:
        self._level = self._level if level == CONTINUED else level
        if self._level not in (WARNING, ERROR):
            return
        line = text.decode("utf-8", errors="replace")
        if any(words in line for words in HARMLESS):
            return
        if self._level == ERROR:
            self.errors = [*self.errors[-4:], line.strip()]
        print(line, end="", file=sys.stderr, flush=True)  # noqa: T201 (the worker's log)

    def reason(self) -> str:
        """The first of the errors since `errors` was emptied: the later ones say that something above them failed."""
        return self.errors[0] if self.errors else "llama.cpp gives no reason"


log = _Log()
llama_cpp.llama_backend_init()


def offloads() -> bool:
    """Whether this llama.cpp can use a GPU that is there."""
    return bool(llama_cpp.llama_supports_gpu_offload()) and free_vram() > 0


def free_vram() -> int:
    """Free bytes of the GPU with the most, 0 without one."""
    from llama_cpp._ggml import libggml

    most = 0
    libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    for index in range(libggml.ggml_backend_dev_count()):
        device = ctypes.c_void_p(libggml.ggml_backend_dev_get(ctypes.c_size_t(index)))
        if libggml.ggml_backend_dev_type(device) in (1, 2):  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            most = max(most, free.value)
    return most


class Weights:
    """A loaded GGUF and the adapters loaded for it.

    Args:
        path: The GGUF.
        on_host: Its layers stay in the machine's memory where a GPU has no room: they are copied there whenever they are read
            with, which is for reading many tokens at once.

    Attributes:
        pointer, vocab: llama.cpp's handles.
        size: Bytes of all tensors.
        vocab_size: Rows of the output.
        trained_context: Tokens the model was made for.
        kv_bytes: Bytes that the key-value cache takes for a token, in f16.
        partial: Whether a part of a sequence can be removed from the cache (not with recurrent layers).

    Raises:
        ModelError: If the file is missing, no GGUF, damaged, or of a kind that llama.cpp does not know.
        BackendError: If there is no memory for it.
    """

    def __init__(self, path: Path, *, on_host: bool = False) -> None:
        _look_at(path)
        self.path, self.on_host = path, on_host
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = -1 if offloads() and not on_host else 0
        small = path.stat().st_size < SMALL
        parameters.check_tensors = small
        if small or parameters.n_gpu_layers:
            # a mapped file that is rewritten ends the process; and pages of one reach a GPU more slowly beside other work
            parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        log.errors = []
        self.pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.pointer:
            raise _not_loaded(path, log.reason())
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)
        self.size = int(llama_cpp.llama_model_size(self.pointer))
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.trained_context = int(llama_cpp.llama_model_n_ctx_train(self.pointer))
        self.kv_bytes = self._kv_bytes()
        self.partial = not (llama_cpp.llama_model_is_recurrent(self.pointer) or llama_cpp.llama_model_is_hybrid(self.pointer))
        self._adapters: dict[tuple[str, int, int], Any] = {}

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end a generation."""
        return [token for token in range(self.vocab_size) if llama_cpp.llama_vocab_is_eog(self.vocab, token)]

    def ids(self, text: str) -> list[int]:
        """Token ids by the GGUF's own vocabulary, nothing added, special tokens read as such."""
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, room, False, True)
        if count < 0:
            raise BackendError("llama.cpp cannot tokenise a text")
        return list(tokens[:count])

    def rounds_activations(self) -> bool:
        """Whether the architecture's activation function is one that ggml takes from a table in f16 on a CPU."""
        return self._architecture() in TABLED and not offloads()

    def adapter(self, path: Path) -> Any:
        """Handle of a LoRA GGUF, loaded once.

        Raises:
            ModelError: If the file is missing, no GGUF, or does not fit the model.
        """
        _look_at(path)
        key = _version(path)
        if key not in self._adapters:
            while len(self._adapters) >= ADAPTERS:
                llama_cpp.llama_adapter_lora_free(self._adapters.pop(next(iter(self._adapters))))
            log.errors = []
            pointer = llama_cpp.llama_adapter_lora_init(self.pointer, os.fsencode(path))
            if not pointer:
                raise ModelError(f"`{path}` is not an adapter for `{self.path}`: {log.reason()}")
            self._adapters[key] = pointer
        return self._adapters[key]

    def close(self) -> None:
        """Give all memory back; contexts made from it have to be closed before."""
        for pointer in self._adapters.values():
            llama_cpp.llama_adapter_lora_free(pointer)
        self._adapters = {}
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
            self.pointer = None

    def _architecture(self) -> str:
        """llama.cpp's name of the architecture, or ""."""
        buffer = ctypes.create_string_buffer(128)
        found = llama_cpp.llama_model_meta_val_str(self.pointer, b"general.architecture", buffer, len(buffer))
        return buffer.value.decode() if found >= 0 else ""

    def _number(self, key: str, default: int) -> int:
        """A whole number of the GGUF's metadata; `key` without the architecture's name."""
        buffer = ctypes.create_string_buffer(128)
        name = f"{self._architecture()}.{key}".encode()
        if llama_cpp.llama_model_meta_val_str(self.pointer, name, buffer, len(buffer)) < 0:
            return default
        return int(buffer.value)

    def _kv_bytes(self) -> int:
        layers = int(llama_cpp.llama_model_n_layer(self.pointer))
        heads = int(llama_cpp.llama_model_n_head_kv(self.pointer))
        width = int(llama_cpp.llama_model_n_embd(self.pointer)) // max(1, int(llama_cpp.llama_model_n_head(self.pointer)))
        widths = self._number("attention.key_length", width) + self._number("attention.value_length", width)
        return 2 * layers * heads * widths


def version(path: Path) -> tuple[str, int, int]:
    """What tells a file from another one, and from the same one rewritten."""
    return _version(path) if path.is_file() else (str(path), -1, -1)


def _version(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_mtime_ns, found.st_size


def _look_at(path: Path) -> None:
    """Complain about what can be seen of a file without llama.cpp."""
    if not path.is_file():
        raise ModelError(f"there is no file `{path}`")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"`{path}` cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelError(f"`{path}` is not a GGUF file", hint="export the model first, or give the path of its .gguf file")


def _not_loaded(path: Path, reason: str) -> ModelError | BackendError:
    if any(words in reason.lower() for words in ("alloc", "out of memory", "unable to load model buffer")):
        return BackendError(
            f"no memory for `{path}` ({path.stat().st_size / 2**30:.1f} GiB): {reason}",
            exception="memory",
            hint='a smaller `quant`, or `vram = "swap"`',
        )
    return ModelError(f"`{path}` cannot be loaded: {reason}", hint="it may be damaged or cut off: export it again")
