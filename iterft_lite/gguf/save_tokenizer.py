"""Writes a tokenizer as transformers reads it, with its tokenizer.json, in a process of its own.

Run as `python -m iterft_lite.gguf.save_tokenizer MODEL FOLDER`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False).save_pretrained(sys.argv[2])
