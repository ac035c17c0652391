"""A model's tokenizer as its files have it: found, read, made with the `tokenizers` library.

tokenizer.json is what counts, as it stands: it is what llama.cpp's converter reads too. transformers builds the class that
tokenizer_config.json names instead, which for some models (SmolLM2, StarCoder2, DeepSeek-LLM) cuts text otherwise.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from iterft_lite.errors import FileError, ModelError
from iterft_lite.files import read_json, read_text, user_path
from iterft_lite.programs import run_module

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
)
"""What is fetched of a model on the hub."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that templates see."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model's folder says of its tokenizer.

    Attributes:
        name: Of the model, for errors.
        tokenizer: The text of tokenizer.json.
        config: tokenizer_config.json.
        special: Named special tokens: `bos_token` and so on.
        template: Source of the chat template, or None.
        ends: Token ids that config.json and generation_config.json end a text with.
    """

    name: str
    tokenizer: str
    config: Mapping[str, Any]
    special: Mapping[str, str]
    template: str | None
    ends: tuple[int, ...]


def read_tokenizer_files(model: str) -> TokenizerFiles:
    """Read the tokenizer of a local folder or of a model on the hub, which is fetched.

    Raises:
        ModelError: If there is none, or a file of it is no JSON.
    """
    with tokenizer_folder(model) as folder:
        config = _json(folder / "tokenizer_config.json")
        own = folder if (folder / "config.json").is_file() or not Path(model).is_dir() else Path(model)
        ends = [end for name in ("config.json", "generation_config.json") for end in _ends(_json(own / name))]
        return TokenizerFiles(
            name=model,
            tokenizer=_text(folder / "tokenizer.json"),
            config=config,
            special=_special_tokens(folder, config),
            template=_template(folder, config),
            ends=tuple(dict.fromkeys(ends)),
        )


@contextmanager
def tokenizer_folder(model: str) -> Iterator[Path]:
    """The folder with the tokenizer.json of a local model or of one on the hub, which is fetched.

    Where there is only an older format (`tokenizer.model`), transformers converts it in a process of its own.

    Raises:
        ModelError: If there is none.
    """
    folder = user_path(model)
    if not folder.is_dir():
        if model.startswith((".", "~")) or folder.is_absolute() or model.count("/") > 1:
            raise ModelError(f"there is no folder `{model}`")
        folder = _fetch(model)
    if (folder / "tokenizer.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="iterft-tokenizer-") as converted:
        done = run_module("iterft_lite.gguf.save_tokenizer", [str(folder), converted])
        if done.returncode or not Path(converted, "tokenizer.json").is_file():
            reason = (done.stderr.strip().splitlines() or ["no tokenizer.json came of it"])[-1]
            raise ModelError(f"`{model}` has no tokenizer that can be read: {reason}")
        yield Path(converted)


def make_tokenizer(files: TokenizerFiles, renamed: Mapping[str, str] | None = None) -> Any:
    """The tokenizer of some files, by the `tokenizers` library.

    Args:
        files: As read.
        renamed: Added tokens that get another text: their old one is then read as any text is.

    Raises:
        ModelError: If tokenizer.json cannot be read.
    """
    source = files.tokenizer if not renamed else json.dumps(_with_names(json.loads(files.tokenizer), renamed))
    try:
        made: Any = Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(f"the tokenizer of `{files.name}` cannot be read: {error}") from None
    made.no_truncation()
    made.no_padding()
    _add_missing(made, files, renamed or {})
    return made


def as_transformers(files: TokenizerFiles) -> Any:
    """A tokenizer as transformers' and trl's code takes it: tokenizer.json as it stands, and the template.

    `AutoTokenizer` would build the class that tokenizer_config.json names, which may cut text otherwise. It is one of its own:
    transformers sets lengths and padding on the tokenizer that it is given.
    """
    from transformers import PreTrainedTokenizerFast  # heavy: it imports torch

    made = make_tokenizer(files)
    added = {token.content: token for token in made.get_added_tokens_decoder().values()}
    named = {name: added.get(text, text) for name, text in files.special.items()}
    whole = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **named)
    whole.chat_template = files.template
    return whole


def _with_names(read: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json whose added tokens have other texts, in the vocabulary too."""
    model = read["model"]
    for token in read["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(token, token): index for token, index in model["vocab"].items()}
    else:  # Unigram: pairs of token and score
        model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        # a text that is no token any more cannot be merged into one
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & renamed.keys()]
    return {**read, "post_processor": None}


def _add_missing(made: Any, files: TokenizerFiles, renamed: Mapping[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json names; those that tokenizer.json has keep what it says of them."""
    for _, token in sorted(files.config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        text = renamed.get(token["content"], token["content"])
        if made.token_to_id(text) is None:
            made.add_tokens([AddedToken(text, **{key: value for key, value in token.items() if key != "content"})])
    added = {token.content for token in made.get_added_tokens_decoder().values()}
    named = [renamed.get(token, token) for token in files.special.values()]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named if token not in added])


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:  # offline, unknown, gated, not a name: many classes, all the user's to see
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"no folder and no model on the hub is called `{model}`: {reason}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except FileError as error:
        raise ModelError(error.message, hint=error.hint) from None
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """All of a text file of a model's.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        return read_text(path)
    except (OSError, FileError) as error:
        raise ModelError(f"`{path}` cannot be read: {getattr(error, 'message', error)}") from None


def _ends(config: Mapping[str, Any]) -> list[int]:
    """The ids of a configuration's `eos_token_id`: one, several or none."""
    inner = config.get("text_config")
    given = config.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    return [end for end in (given if isinstance(given, list) else [given]) if isinstance(end, int)]


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens, in the precedence of transformers 5: the older map counts only without `added_tokens_decoder`."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named.update(_json(folder / "special_tokens_map.json"))
    contents = {key: named[key].get("content") if isinstance(named.get(key), dict) else named.get(key) for key in NAMED}
    return {key: str(content) for key, content in contents.items() if content is not None}


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Source of the default chat template: its file before the configuration's entry."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return _text(file)
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
    if isinstance(entry, dict):
        entry = entry.get("default")
    return None if entry is None else str(entry)
