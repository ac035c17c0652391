"""How llama.cpp reads texts with a GGUF's own vocabulary: `python -m iterft_lite.backends.llamacpp.reading GGUF TEXT...`."""

from __future__ import annotations

import sys
from pathlib import Path

from iterft_lite.backends.llamacpp.library import Weights

# isort: split
import json


def main(path: str, *texts: str) -> None:
    """Write the token ids of each text to stdout, as JSON."""
    weights = Weights(Path(path))
    sys.stdout.write(json.dumps([weights.ids(text) for text in texts]))


if __name__ == "__main__":
    main(*sys.argv[1:])
