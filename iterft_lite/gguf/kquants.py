"""llama.cpp's quantiser: as a program for a whole file, and for rows of a matrix.

    python -m iterft_lite.gguf.kquants SOURCE TARGET FILE_TYPE THREADS

The program imports llama_cpp before anything else: on some machines numpy imported first made it crash in reading a vocabulary.
For rows only the library with the number formats is loaded, whose functions are plain C.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")


@cache
def _quantise_chunk() -> Any:
    """`ggml_quantize_chunk` of the llama.cpp that is installed.

    Raises:
        OSError: If it is not there.
    """
    found = importlib.util.find_spec("llama_cpp")
    folder = os.environ.get("LLAMA_CPP_LIB_PATH") or (Path(str(found.origin)).parent / "lib" if found else "")
    function = ctypes.CDLL(str(Path(folder) / LIBRARY)).ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    return function


def quantise_rows(kind: int, source: int, target: int, rows: int, columns: int) -> int:
    """Quantise rows of a matrix; returns the number of bytes written. Releases Python's lock, so threads run side by side.

    Args:
        kind: Number format, as GGUF numbers them.
        source: Address of contiguous float32 [rows, columns].
        target: Address of as many bytes as they take in that format.

    Raises:
        OSError: If llama.cpp's library is not there.
    """
    return int(_quantise_chunk()(kind, source, target, 0, rows, columns, None))


def main(source: str, target: str, file_type: int, threads: int) -> int:
    """Quantise a GGUF file; returns llama.cpp's return value, 0 for success."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = file_type
    settings.nthread = threads
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
