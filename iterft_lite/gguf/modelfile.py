"""An Ollama Modelfile for an exported model.

Format: https://docs.ollama.com/modelfile. Ollama renders chats with a Go template of its own, not with the GGUF's Jinja.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from iterft_lite.files import writing
from iterft_lite.gguf.file import GgufFile

CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""Each turn between markers, then the opening of the assistant's turn."""

RAW = "{{ .Prompt }}"
"""The prompt unchanged."""


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile that was written.

    Attributes:
        path: The file.
        template: "chatml", or "raw": the model continues the text as typed.
        note: A sentence for the user if the chat template could not be translated, else "".
    """

    path: Path
    template: str
    note: str


def write_modelfile(
    gguf: Path, folder: Path, *, temperature: float, adapter: Path | None = None, name: str = "Modelfile"
) -> Modelfile:
    """Write `folder`/`name`, for `ollama create NAME -f Modelfile`.

    Args:
        gguf: The model.
        folder: Made if missing.
        temperature: That the model was sampled with.
        adapter: A LoRA GGUF beside the model.
        name: Of the file.

    Raises:
        ExportError: If the model is no GGUF file.
    """
    jinja = GgufFile(gguf).value("tokenizer.chat_template")
    chatml = jinja is not None and all(marker in jinja for marker in ("<|im_start|>", "<|im_end|>"))
    note = ""
    if jinja is not None and not chatml:
        note = "the chat template is not ChatML: prompts are passed to the model as they stand"
    opening = reply_opening(jinja) if chatml else ""
    if opening is None:
        note = "the chat template does more than ChatML (a default system prompt, thinking): Ollama gets plain ChatML"
    lines = [f"FROM {_path(gguf, folder)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter, folder)}")
    lines.append(f'TEMPLATE """{CHATML + (opening or "") if chatml else RAW}"""')
    if chatml:
        lines += ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|im_start|>"']
    # Ollama's own defaults truncate (top_k 40, top_p 0.9); the experiment samples untruncated
    lines += [f"PARAMETER temperature {temperature:g}", "PARAMETER top_k 0", "PARAMETER top_p 1", "PARAMETER min_p 0"]
    path = folder / name
    with writing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Modelfile(path, "chatml" if chatml else "raw", note)


def reply_opening(jinja: str) -> str | None:
    """What a chat template that renders as ChatML, with and without a system prompt, begins a reply with.

    Templates of hybrid models begin it with an empty block of thought, thinking being off wherever this program renders a chat.

    Returns:
        "" for plain ChatML; None if the template renders otherwise, or begins replies with what is no text in Ollama's format.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    talk = [{"role": role, "content": f"{role} text"} for role in ("system", "user", "assistant", "user")]
    openings: set[str | None] = set()
    try:
        # the markers of what is trained on are transformers' own tags
        template = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", jinja))
        for part in (talk, talk[1:]):
            text = template.render(messages=part, add_generation_prompt=True, tools=None, enable_thinking=False)
            turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in part]
            plain = "".join([*turns, "<|im_start|>assistant\n"])
            openings.add(text.removeprefix(plain) if text.startswith(plain) else None)
    except TemplateError:
        return None
    opening = openings.pop() if len(openings) == 1 else None
    return None if opening is None or any(mark in opening for mark in ("{{", '"""')) else opening


def _path(file: Path, folder: Path) -> str:
    """A path as the Modelfile names it: by name beside the Modelfile, elsewhere in full."""
    return f"./{file.name}" if file.resolve().parent == folder.resolve() else str(file.resolve())
