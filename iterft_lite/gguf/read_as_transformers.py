"""How transformers reads a text, with the class that a model's tokenizer_config.json names: its name and the ids, as JSON.

Run as `python -m iterft_lite.gguf.read_as_transformers FOLDER TEXT`.
"""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False)
    sys.stdout.write(json.dumps([type(read).__name__, read(sys.argv[2], add_special_tokens=False)["input_ids"]]))
