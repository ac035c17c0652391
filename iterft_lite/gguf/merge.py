"""The merged GGUF: W + scale * B A, tensor by tensor, quantised and written in one pass, without a 16-bit copy on the disk.

1. A plan says the number format of each tensor (`planned`, or `layout` for K-quants).
2. Threads make parts of tensors and put them into the file: read W's rows, add B A, bring them into the format (`merge_parts`).

K-quants mix formats, and only llama.cpp knows which tensor gets which. So llama.cpp quantises the untouched base once; the
formats in that file are the layout of every later file, and llama.cpp's own functions quantise its rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, LlamaFileType
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from iterft_lite.cache import cache_folder
from iterft_lite.digests import digest
from iterft_lite.errors import ExportError
from iterft_lite.files import writing
from iterft_lite.gguf.adapter import Adapter, LowRank
from iterft_lite.gguf.arithmetic import PLAIN, Arithmetic, Update, choose_arithmetic
from iterft_lite.gguf.base import OnTensor, no_op
from iterft_lite.gguf.file import Array, Checksum, GgufFile, GgufWriter, Tensor, ensure_room
from iterft_lite.gguf.kquants import quantise_rows
from iterft_lite.programs import run_module

DIRECT: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = MappingProxyType(
    {
        "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
        "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    }
)
"""Quants that need no llama.cpp: the format of matrices, and the file type in the metadata."""

K_QUANTS: Mapping[str, tuple[LlamaFileType, float]] = MappingProxyType(
    {
        "q6_k": (LlamaFileType.MOSTLY_Q6_K, 6.6),
        "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, 5.9),
        "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, 5.1),
    }
)
"""Quants that llama.cpp makes: the file type, and bits a weight at most (a large vocabulary takes more)."""

KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")
"""Endings of the names of matrices that llama.cpp's converter keeps in f32."""

PART_NUMBERS = 4 << 20
"""Numbers in a part: 16 MB in f32. Memory then depends on threads, not on the largest tensor."""

AHEAD = 2
"""Parts for each thread that are being made or wait for it."""

Put = Callable[[str, int, Array], int]
"""Writes rows of a tensor, from a row on; gives where they end in the file. Called by several threads at once."""


def write_merged(
    base: GgufFile,
    adapter: Adapter | None,
    path: Path,
    quant: str,
    *,
    threads: int = 2,
    arithmetic: Arithmetic | None = None,
    on_tensor: OnTensor = no_op,
    checksum: Checksum | None = None,
) -> dict[str, float]:
    """Write a base GGUF, an adapter merged into it, in a number format; gives the seconds of each part.

    Args:
        base: In f32, f16 or bf16.
        adapter: None: the base alone.
        path: Of the new file; it appears when it is whole.
        quant: A name of `DIRECT` or `K_QUANTS`.
        threads: CPU threads for K-quants.
        arithmetic: numpy or torch; None: by size.
        on_tensor: Told of the progress.
        checksum: To follow the writing; an untouched base in a K-quant, which llama.cpp writes, it is told nothing of.

    Raises:
        NoRoom: If the disk has no room for it (checked first).
        ResultError: If a weight does not fit the format.
        ExportError: If the quantiser fails.
    """
    started = time.perf_counter()
    if quant in DIRECT:
        plan, file_type, threads = planned(base, quant), DIRECT[quant][1], 1
    elif quant not in K_QUANTS:
        raise ExportError(f"`{quant}` is not a number format: {', '.join([*DIRECT, *K_QUANTS])}")
    elif adapter is None:
        _quantise_base(base, path, quant, threads)
        return {"quantise": time.perf_counter() - started}
    else:
        kinds, file_type = layout(base, quant, threads, path.parent), K_QUANTS[quant][0]
        plan = [Tensor(tensor.name, tensor.shape, kinds[tensor.name]) for tensor in base.tensors.values()]
    ensure_room(path.parent, _size(plan), f"`{path.name}` in {quant}")
    _write(base, adapter, path, plan, file_type, threads, arithmetic, on_tensor, checksum)
    return {"merge": time.perf_counter() - started}


def planned(base: GgufFile, quant: str) -> list[Tensor]:
    """The tensors of a file in one of the `DIRECT` quants: names and shapes of the base, formats of the quant."""
    kind = DIRECT[quant][0]
    return [Tensor(tensor.name, tensor.shape, _format(base, tensor, kind)) for tensor in base.tensors.values()]


def _format(base: GgufFile, tensor: Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The format of one tensor, as llama.cpp's converter chooses it.

    Vectors, norms, and matrices that a 16-bit base keeps in f32 are f32. q8_0 needs rows of whole blocks of 32: others are f16.
    """
    half = base.value("general.file_type") != LlamaFileType.ALL_F32
    if tensor.kind not in PLAIN:
        return tensor.kind
    if (
        len(tensor.shape) < 2
        or not tensor.name.endswith(".weight")
        or tensor.name.endswith(KEPT)
        or (half and tensor.kind == GGMLQuantizationType.F32)
    ):
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return kind


def _size(plan: list[Tensor]) -> int:
    return sum(tensor.bytes for tensor in plan) + (32 << 20)  # a vocabulary takes up to some 20 MB


def _write(
    base: GgufFile,
    adapter: Adapter | None,
    path: Path,
    plan: list[Tensor],
    file_type: LlamaFileType,
    threads: int,
    arithmetic: Arithmetic | None,
    on_tensor: OnTensor,
    checksum: Checksum | None,
) -> None:
    arithmetic = arithmetic or choose_arithmetic(sum(tensor.bytes for tensor in plan))
    updates = adapter.updates if adapter else {}
    absent = sorted(set(updates) - set(base.tensors))
    if absent:
        raise ExportError(f"the base has no `{absent[0]}` to merge into")
    metadata = base.metadata({"general.file_type": int(file_type)})
    alignment = int(base.value("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    # a merged model can be made again from its adapter, and is removed with the next: it need not wait for the disk
    with writing(path, flushed=adapter is None) as temporary:
        with (
            contextlib.closing(GgufWriter(temporary, metadata, plan, alignment)) as file,
            contextlib.closing(merge_parts(base, plan, updates, file.put, arithmetic, threads, on_tensor)) as ends,
        ):
            if checksum is not None:
                checksum.begin(temporary)
            for end in ends:
                if checksum is not None:
                    checksum.written(end)
        if checksum is not None:
            checksum.written(file.size)


def merge_parts(
    base: GgufFile,
    plan: list[Tensor],
    updates: Mapping[str, LowRank],
    put: Put,
    arithmetic: Arithmetic,
    threads: int,
    on_tensor: OnTensor,
) -> Generator[int]:
    """Make every tensor of a plan, in parts, and put them into their places, several at once.

    Yields:
        What `put` gave for each part, in the order of the plan: the end of what is in the file.
    """
    # A queue of futures in the order of the file: the pool works in any order, `finished` hands out results in this one. Its
    # length is bounded, so that the yielded places are not far behind what is written.
    done = 0
    waiting: deque[tuple[Future[int], bool]] = deque()
    # Quantising rows to K-quants takes all CPU threads; merging gains from few (a GPU waits for copies, numpy for memory).
    gate = threading.Semaphore(arithmetic.threads)
    threads = max(threads, arithmetic.threads)

    def make(stored: Array, kind: GGMLQuantizationType, target: Tensor, start: int, update: Update | None) -> int:
        direct = target.kind in PLAIN or target.kind == GGMLQuantizationType.Q8_0
        with gate:
            merged = arithmetic.merged(stored, kind, target.kind if direct else GGMLQuantizationType.F32, update)
        return put(target.name, start, merged if direct else quantised(merged.view(np.float32), target))

    def finished() -> int:
        nonlocal done
        part, last = waiting.popleft()
        end = part.result()
        if last:
            done += 1
            on_tensor(done, len(plan))
        return end

    # One BLAS thread: spread over cores that other threads use, a product of rank 16 waits for them (8 s in place of 1 s).
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for target in plan:
            tensor, low_rank = base.tensors[target.name], updates.get(target.name)
            update = None if low_rank is None else whole_update(target.name, low_rank)
            step = max(1, PART_NUMBERS // tensor.shape[-1])
            for start in range(0, tensor.rows, step):
                stored = base.rows(tensor, start, start + step)
                part = None if update is None else _rows_of(update, start, step, tensor.shape[-1])
                waiting.append((pool.submit(make, stored, tensor.kind, target, start, part), start + step >= tensor.rows))
                if len(waiting) > AHEAD * threads:
                    yield finished()
        while waiting:
            yield finished()


def whole_update(name: str, low_rank: LowRank) -> Update:
    """The update of a whole matrix, with the seed of its rounding: a digest of the tensor's name and the update's numbers.

    So one training always gets the same rounding noise, and two trainings get independent noise.
    """
    seen = hashlib.sha256(name.encode())
    for numbers in (low_rank.a, low_rank.b):
        seen.update(np.ascontiguousarray(numbers).tobytes())
    return Update(low_rank.b * np.float32(low_rank.scale), low_rank.a, int.from_bytes(seen.digest()[:4], "little"))


def _rows_of(update: Update, start: int, rows: int, columns: int) -> Update:
    return replace(update, b=update.b[start : start + rows], first=start * columns)


def quantised(weights: Array, target: Tensor) -> Array:
    """Rows of a tensor in its format, by llama.cpp.

    Args:
        weights: Contiguous float32 [rows, columns].

    Returns:
        uint8 [rows, bytes a row].

    Raises:
        ExportError: If llama.cpp's library is not there, or it does not know the format.
    """
    made = np.empty((len(weights), target.row_bytes), dtype=np.uint8)
    try:
        size = quantise_rows(int(target.kind), weights.ctypes.data, made.ctypes.data, *weights.shape)
    except OSError as error:
        raise ExportError(f"llama.cpp's number formats cannot be loaded: {error}") from error
    if size != made.nbytes:
        raise ExportError(f"llama.cpp quantised `{target.name}` to {size} bytes in place of {made.nbytes}")
    return made


# -- which tensor gets which format ------------------------------------------------------------------------------------


def layout(base: GgufFile, quant: str, threads: int, folder: Path) -> dict[str, GGMLQuantizationType]:
    """The format of each tensor in a K-quant of a base. Quantises the base once if the cache does not know it.

    Args:
        folder: Room for that file, which is removed again.
    """
    try:
        known = json.loads(_layout_path(base, quant).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{quant}-", dir=folder) as scratch:
            known = _quantise_base(base, Path(scratch) / "base.gguf", quant, threads)
    return {name: GGMLQuantizationType(kind) for name, kind in known.items()}


def _layout_path(base: GgufFile, quant: str) -> Path:
    """The cached layout's file. Its name is a digest of all that llama.cpp's choice can depend on: its version, the metadata
    without the vocabulary, and the tensors.
    """
    values = [[key, base.value(key)] for key in base.keys if not key.startswith("tokenizer.")]
    tensors = [[tensor.name, list(tensor.shape), int(tensor.kind)] for tensor in base.tensors.values()]
    key = digest([quant, importlib.metadata.version("llama-cpp-python"), values, tensors])
    return cache_folder() / "layouts" / f"{key[:24]}.json"


def _quantise_base(base: GgufFile, path: Path, quant: str, threads: int) -> dict[str, int]:
    """Have llama.cpp quantise a base. Notes and returns the format that it chose for each tensor, as ggml's number."""
    file_type, bits = K_QUANTS[quant]
    numbers = sum(tensor.rows * tensor.shape[-1] for tensor in base.tensors.values())
    ensure_room(path.parent, int(numbers * bits / 8) + (32 << 20), f"`{path.name}` in {quant}")
    with writing(path) as temporary:
        run_quantiser(base.path, temporary, file_type, threads)
    kinds = {tensor.name: int(tensor.kind) for tensor in GgufFile(path).tensors.values()}
    with writing(_layout_path(base, quant)) as temporary:
        temporary.write_text(json.dumps(kinds, indent=0), encoding="utf-8")
    return kinds


def run_quantiser(source: Path, target: Path, file_type: LlamaFileType, threads: int) -> None:
    """Run llama.cpp's quantiser in a child process: importing llama_cpp after numpy or torch crashes on some machines.

    Raises:
        ExportError: With the end of what it said.
    """
    arguments = [str(source), str(target), str(int(file_type)), str(threads)]
    done = run_module("iterft_lite.gguf.kquants", arguments)
    if done.returncode:
        end = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-8:])
        raise ExportError(f"llama.cpp could not quantise `{source.name}` (exit code {done.returncode}):\n{end}")
