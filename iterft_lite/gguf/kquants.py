"""llama.cpp's quantiser as a program: `python -m iterft_lite.gguf.kquants SOURCE TARGET FILE_TYPE THREADS`.

Imports llama_cpp before anything else: on some machines numpy imported first made it crash.
"""

from __future__ import annotations

import ctypes
import sys


def main(source: str, target: str, file_type: int, threads: int) -> int:
    """Quantise a GGUF file; gives llama.cpp's return value, 0 for success."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = file_type
    settings.nthread = threads
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
