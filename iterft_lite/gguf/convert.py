"""Runs one of llama.cpp's conversion scripts, in a process of its own.

Run as `python -m iterft_lite.gguf.convert SOURCE SCRIPT MODEL [--end ID] ARGUMENT...`. SOURCE is the folder of llama.cpp, whose
`gguf-py` is imported in place of an installed gguf, which is older. ID is the token that ends a turn. This module makes up for
what the scripts cannot read, wherever the model's files leave no doubt:

- tokenizer.json is read as it stands, not by the class that tokenizer_config.json names: it is what training reads;
- the scripts know byte-level BPE tokenizers by a hash and refuse others; one whose tokenizer.json says that it cuts text
  exactly as Qwen2 does is named so (`tokenizer.ggml.pre = "qwen2"`);
- Llama 3's cut without a beginning token has a name of its own there (`smaug-bpe`), under which llama.cpp forgets that words
  which are tokens need no merges: where tokenizer.json says so the name is Llama 3's;
- a SentencePiece vocabulary that is only in tokenizer.json has no scores there; the order of its merges says the same;
- transformers' configurations leave out old keys, or rename them (`rotary_pct`); config.json's own are laid under them;
- heads that predict several tokens are no part of the model that is trained: they are left away;
- the token that ends a turn goes into the file, so that whoever runs it stops there; so does the number format, always.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def run_script(source: Path, script: str, model: Path, end: int | None, arguments: list[str]) -> None:
    """Run `source`/`script` as a program with `arguments`; `model` is the Hugging Face folder that it reads."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    base: Any = importlib.import_module("conversion.base")
    _read_tokenizer_json(model)
    _lay_config_under(base.ModelBase, model)
    _name_known_cut(base.TextModel, model)
    _read_pieces(base, model)
    _complete_metadata(base.gguf, end, arguments)
    base.ModelBase.no_mtp = True
    sys.argv = [script, *arguments]
    runpy.run_path(str(source / script), run_name="__main__")


def _read_tokenizer_json(model: Path) -> None:
    """Let transformers' AutoTokenizer give what tokenizer.json says."""
    import transformers

    # only now: it imports gguf, and the scripts need the newer one beside them
    from iterft_lite.backends.tokenizer_files import as_transformers, read_tokenizer_files

    if (model / "tokenizer.json").is_file():
        files = read_tokenizer_files(str(model))
        transformers.AutoTokenizer.from_pretrained = lambda *_, **__: as_transformers(files)


def _lay_config_under(model_base: Any, model: Path) -> None:
    usual = model_base.load_hparams

    def load(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        found: dict[str, Any] = usual(folder, is_mistral_format)
        if folder != model or is_mistral_format:
            return found
        whole = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **found}
        if "partial_rotary_factor" in (whole.get("rope_parameters") or {}):
            whole.setdefault("rotary_pct", whole["rope_parameters"]["partial_rotary_factor"])
        if whole.get("multi_query") and not whole.get("new_decoder_architecture"):
            whole["num_kv_heads"] = 1  # of Falcon's: its configuration gives the number of the other kind
        return whole

    model_base.load_hparams = staticmethod(load)


def _name_known_cut(text_model: Any, model: Path) -> None:
    from iterft_lite.gguf.tokenizer import cuts_like_qwen2, ignores_merges

    known = text_model.get_vocab_base_pre

    def name_of_cut(self: Any, tokenizer: Any) -> str:
        try:
            name = str(known(self, tokenizer))
        except NotImplementedError:
            if not cuts_like_qwen2(model):
                raise
            return "qwen2"
        return "llama-bpe" if name == "smaug-bpe" and ignores_merges(model) else name

    text_model.get_vocab_base_pre = name_of_cut


def _read_pieces(base: Any, model: Path) -> None:
    """Have a SentencePiece vocabulary without `tokenizer.model` read from tokenizer.json; any other one as byte-level BPE."""
    from iterft_lite.gguf.tokenizer import Pieces, sentence_pieces

    if (model / "tokenizer.model").is_file():
        return
    text_model = base.TextModel
    usual = text_model.__init__

    def not_there(self: Any, *_: Any, **__: Any) -> None:
        # the scripts import sentencepiece before they look whether the model has a file for it
        raise FileNotFoundError(self.dir_model / "tokenizer.model")

    def begin(self: Any, *given: Any, **named: Any) -> None:
        usual(self, *given, **named)
        pieces = sentence_pieces(model, int(self.hparams["vocab_size"]))
        if pieces is not None:
            self.set_vocab = lambda: _write_pieces(base.gguf, self, pieces)

    def _write_pieces(gguf: Any, made: Any, pieces: Pieces) -> None:
        writer = made.gguf_writer
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces.tokens)
        writer.add_token_scores(pieces.scores)
        writer.add_token_types(pieces.types)
        writer.add_add_space_prefix(pieces.blank_first)
        gguf.SpecialVocab(model, n_vocab=len(pieces.tokens)).add_to_gguf(writer)

    text_model.__init__ = begin
    text_model._create_vocab_sentencepiece = not_there
    text_model._set_vocab_llama_hf = not_there


def _complete_metadata(gguf: Any, end: int | None, arguments: list[str]) -> None:
    """Name the token that ends a turn in the file's metadata, and the number format where a script does not."""
    usual = gguf.GGUFWriter.write_header_to_file
    formats = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    kind = next((formats[one] for one in arguments if one in formats), None)

    def write(self: Any, *given: Any, **named: Any) -> None:
        def number(value: int) -> Any:
            return gguf.gguf_writer.GGUFValue(value=int(value), type=gguf.GGUFValueType.UINT32)

        for fields in self.kv_data[:1]:
            if end is not None:
                fields[gguf.Keys.Tokenizer.EOT_ID] = number(end)
            if kind is not None:
                fields.setdefault(gguf.Keys.General.FILE_TYPE, number(kind))
            if gguf.Keys.Tokenizer.LIST in fields:  # of some vocabularies llama.cpp thinks otherwise where nothing is said
                no = gguf.gguf_writer.GGUFValue(value=False, type=gguf.GGUFValueType.BOOL)
                fields.setdefault(gguf.Keys.Tokenizer.ADD_BOS, no)
        usual(self, *given, **named)

    gguf.GGUFWriter.write_header_to_file = write


def main(source: str, script: str, model: str, *arguments: str) -> None:
    """Run a script; see the module."""
    end, rest = (int(arguments[1]), arguments[2:]) if arguments[:1] == ("--end",) else (None, arguments)
    run_script(Path(source), script, Path(model), end, list(rest))


if __name__ == "__main__":
    main(*sys.argv[1:])
