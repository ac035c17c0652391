"""The training tokenizer without transformers: chat templates and token ids.

`transformers` imports torch (five seconds and 300 MB), which must not share a process with llama.cpp. What is needed of it is
little: the `tokenizers` library reads tokenizer.json, jinja2 renders the template. The rendering rules are those of
`PreTrainedTokenizerBase.apply_chat_template` in transformers 5 (a sandbox; `trim_blocks`, `lstrip_blocks`, loop controls;
`raise_exception`, `strftime_now`, an unescaped `tojson`; the special tokens as variables); a test compares the two.

Every chat of the program, the trainer's too, is rendered with `VARIABLES`: a model is asked as it was trained, on any day.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from iterft_lite.errors import ModelError
from iterft_lite.experiment.rows import Message

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
)
"""What is fetched of a model on the hub."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that templates see."""

TODAY = datetime(2024, 7, 26)
"""What templates take for today: the day that Llama's fall back to where they are told none."""


def strftime_now(form: str) -> str:
    """`TODAY` in the form of `strftime`."""
    return TODAY.strftime(form)


VARIABLES: Mapping[str, Any] = {"enable_thinking": False, "strftime_now": strftime_now}
"""What every rendering gives a template beside the chat; one that does not know a variable passes over it.

With `enable_thinking` false, templates of hybrid models (Qwen3, SmolLM3) put an empty block of thought before the reply that is
asked for, as they do before a reply that is there. As variables, both hide the globals of transformers' own environment.
"""

SAVE = "import sys; from transformers import AutoTokenizer as A; A.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"


class TrainingTokenizer:
    """Token ids and texts as the trainer's tokenizer gives them.

    Args:
        model: Folder with tokenizer.json and tokenizer_config.json, or a name on the hub. Where there is only an older
            format (`tokenizer.model`), transformers converts it in a process of its own.

    Attributes:
        bos, eos: Their ids, or None.

    Raises:
        ModelError: If there is no tokenizer, or it cannot be read.
    """

    def __init__(self, model: str) -> None:
        self._name = model
        with tokenizer_folder(model) as folder:
            self._config = _json(folder / "tokenizer_config.json")
            try:
                self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exceptions
                raise ModelError(f"the tokenizer of `{model}` cannot be read: {error}") from None
            self._special = _special_tokens(folder, self._config)
            source = _template(folder, self._config)
        self._template = None if source is None else environment().from_string(source)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_missing()
        self.bos: int | None = self._id("bos_token")
        self.eos: int | None = self._id("eos_token")
        self._adds_bos = self._begins_with_bos()

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The text of a chat, by default with the beginning of the reply that is asked for.

        Raises:
            ModelError: If there is no chat template, or it refuses this chat.
        """
        if self._template is None:
            raise ModelError(
                f"`{self._name}` has no chat template", hint='it is a base model: use `regime = "sdf"`, or a chat model'
            )
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special,
                **VARIABLES,
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template of `{self._name}` refuses a chat: {error}") from None

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a rendered chat with generation prompt."""
        return self.ids(self.render(messages))

    def template_tokens(self) -> int:
        """Tokens of a chat that are not the user's: markers, a default system prompt, the opened reply.

        0 if there is no chat template, or none that takes a chat of one message.
        """
        try:
            return len(self.chat_ids([Message("user", "")]))
        except ModelError:
            return 0

    def document_ids(self, text: str) -> list[int]:
        """Token ids of a text as training sees it begin: after a beginning-of-sequence token where the tokenizer adds one.

        An empty text without such a token gives the end token instead: something must come before the first token drawn.
        """
        ids = self.ids(text)
        if self._adds_bos and self.bos is not None:
            return [self.bos, *ids]
        if not ids:
            start = self.bos if self.bos is not None else self.eos
            return [] if start is None else [start]
        return ids

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands; special tokens written in it count as such."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def text(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of token ids, special tokens left out.

        Args:
            ids: What to decode.
            after: The ids before them: where the tokenizer drops a leading space of what it decodes, the space is kept.
        """
        if not after:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        anchor = list(after[-1:])
        before = self._tokenizer.decode(anchor, skip_special_tokens=True)
        whole = self._tokenizer.decode([*anchor, *ids], skip_special_tokens=True)
        if before and whole.startswith(before):
            return str(whole[len(before) :])
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _id(self, name: str) -> int | None:
        token = self._special.get(name)
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    def _add_missing(self) -> None:
        """Add the tokens that only tokenizer_config.json names."""
        for _, token in sorted(self._config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            if self._tokenizer.token_to_id(token["content"]) is None:
                settings = {key: value for key, value in token.items() if key != "content"}
                self._tokenizer.add_tokens([AddedToken(token["content"], **settings)])
        self._tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self._special.values()]
        )

    def _begins_with_bos(self) -> bool:
        # what tokenizer.json does counts: transformers 5 passes over `add_bos_token` where there is one
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        return self.bos is not None and ids[:1] == [self.bos]


@contextmanager
def tokenizer_folder(model: str) -> Iterator[Path]:
    """The folder with the tokenizer.json of a local model or of one on the hub, which is fetched.

    Raises:
        ModelError: If there is none.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "~")) or folder.is_absolute() or model.count("/") > 1:
            raise ModelError(f"there is no folder `{model}`")
        folder = _fetch(model)
    if (folder / "tokenizer.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="iterft-tokenizer-") as converted:
        command = [sys.executable, "-c", SAVE, str(folder), converted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not Path(converted, "tokenizer.json").is_file():
            reason = (done.stderr.strip().splitlines() or ["no tokenizer.json came of it"])[-1]
            raise ModelError(f"`{model}` has no tokenizer that can be read: {reason}")
        yield Path(converted)


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:  # offline, unknown, gated, not a name: many classes, all the user's to see
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"no folder and no model on the hub is called `{model}`: {reason}") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"`{path}` is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens, in the precedence of transformers 5: the older map counts only without `added_tokens_decoder`."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named.update(_json(folder / "special_tokens_map.json"))
    contents = {key: named[key]["content"] if isinstance(named.get(key), dict) else named.get(key) for key in NAMED}
    return {key: str(content) for key, content in contents.items() if content is not None}


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Source of the default chat template: its file before the configuration's entry."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {one["name"]: one["template"] for one in entry}
    if isinstance(entry, dict):
        entry = entry.get("default")
    return None if entry is None else str(entry)


class _Generation(Extension):
    """`{% generation %}` marks what is trained on; rendering leaves its body as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own signature)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """The jinja2 environment of chat templates."""

    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made
