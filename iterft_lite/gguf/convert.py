"""Runs one of llama.cpp's own conversion scripts, in a process of its own.

Run as `python -m iterft_lite.gguf.convert SOURCE SCRIPT MODEL ARGUMENT...`. SOURCE is the folder of llama.cpp's sources: its
`gguf-py` goes before an installed gguf, which is older. Two things are made up for, both only where nothing is guessed:

- the scripts know byte-level BPE tokenizers by a hash and refuse others; one whose tokenizer.json says that it cuts text
  exactly as Qwen2 does is named so (`tokenizer.ggml.pre = "qwen2"`);
- they import sentencepiece before they look whether the model has a file for it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def run_script(source: Path, script: str, model: Path, arguments: list[str]) -> None:
    """Run `source`/`script` as a program with `arguments`; `model` is the Hugging Face folder that it reads."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    # only now: it imports gguf, and the scripts need the newer one beside them
    from iterft_lite.gguf.tokenizer import cuts_like_qwen2

    text_model: Any = importlib.import_module("conversion.base").TextModel
    known = text_model.get_vocab_base_pre

    def name_of_cut(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not cuts_like_qwen2(model):
                raise
            return "qwen2"

    def no_sentencepiece(self: Any, *_: Any, **__: Any) -> None:
        raise FileNotFoundError(self.dir_model / "tokenizer.model")

    text_model.get_vocab_base_pre = name_of_cut
    if not (model / "tokenizer.model").is_file():
        text_model._create_vocab_sentencepiece = no_sentencepiece
    sys.argv = [script, *arguments]
    runpy.run_path(str(source / script), run_name="__main__")


if __name__ == "__main__":
    run_script(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
