"""Chats as a model sees them: templates rendered and tokenised, without transformers.

`transformers` imports torch (five seconds and 300 MB), which must not share a process with llama.cpp. What is needed of it is
little: the `tokenizers` library reads tokenizer.json, jinja2 renders the template (`chat_templates.py`). A test compares the
two.

Trainer and generator use the same class for the same text: what is trained, asked, stopped on and judged agrees because there
is one function for each. Every chat is rendered with `VARIABLES`: a model is asked as it was trained, on any day.

Content is never markup. A row that holds `<|im_end|>` is tokenised as those ten characters: before rendering, such text is
broken by a character that no text has; after it, what is still whole is the template's own and gets a name that no content can
write; then the break is taken out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from iterft_lite.backends.chat_templates import VARIABLES, compiled, rendered_within_limits
from iterft_lite.backends.tokenizer_files import make_tokenizer, read_tokenizer_files
from iterft_lite.errors import ModelError
from iterft_lite.experiment.rows import Message

BREAKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Noncharacters: no text for interchange has them (Unicode 23.7). One that a text does have is not used for it."""

STAND_IN = "This is a reply."
"""A reply that no template does anything to."""

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<reasoning>", "</reasoning>"),
    ("<thinking>", "</thinking>"),
)
"""How models begin and end a thought."""

CHATS_KEPT = 4096
"""Rendered chats that are kept: many answers are drawn for one prompt."""


@dataclass(frozen=True)
class Turn:
    """What a chat template puts around the last reply of a chat.

    Attributes:
        opening: Its own text between the generation prompt and the reply; asked with, so that nothing of it is in the loss.
        lead: White space that replies begin with: in the loss, taken off what a model writes.
        trail: White space before the end, likewise.
        end: The token that ends the turn.
        end_id: Its id: the last one that is trained.
    """

    opening: str
    lead: str
    trail: str
    end: str
    end_id: int


@dataclass(frozen=True)
class _Asked:
    """A rendered chat that asks for a reply: its text, with breaks, and the break that was used ("" for none)."""

    text: str
    mark: str


class TrainingTokenizer:
    """Token ids and texts as training and generation use them.

    Args:
        model: Folder with tokenizer.json and tokenizer_config.json, or a name on the hub.

    Attributes:
        files: What was read.
        library: The tokenizer of the `tokenizers` library.
        bos, eos: Ids of the tokens that begin and end a text, or None.

    Raises:
        ModelError: If there is no tokenizer, or it cannot be read.
    """

    def __init__(self, model: str) -> None:
        self.files = read_tokenizer_files(model)
        self._name = model
        self._special = self.files.special
        self._template = self._compiled()
        self.library = make_tokenizer(self.files)
        self.bos: int | None = self._id("bos_token")
        self.eos: int | None = self._id("eos_token")
        self._adds_bos = self._begins_with_bos()
        self._nameless: dict[str, Any] = {}
        self._asked: dict[tuple[Message, ...], _Asked] = {}

    def _compiled(self) -> jinja2.Template | None:
        if self.files.template is None:
            return None
        try:
            return compiled(self.files.template)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template of `{self._name}` cannot be read by jinja2: {error}",
                hint="give the tokenizer the template that its makers publish",
            ) from None

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    @cached_property
    def turn(self) -> Turn:
        """What the template puts around a reply.

        Raises:
            ModelError: If there is no template, or what is trained could not be what is asked and stopped on.
        """
        _, opening, lead, after = self._split((Message("user", "Hello?"),))
        found = self._markup.search(after)
        if found is None or after[: found.start()].strip():
            raise ModelError(
                f"the chat template of `{self._name}` does not end replies with a special token"
                + (f" but puts {after[:40]!r} behind them" if after.strip() else "")
                + ": a model trained on it would not stop",
                hint="give the tokenizer a template that closes the assistant's turn, as ChatML does with `<|im_end|>`",
            )
        return Turn(opening, lead, after[: found.start()], found[0], int(self.library.token_to_id(found[0])))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a generation: the end that is trained, the tokenizer's, and those of the configuration."""
        trained = None
        if self.chat:
            with contextlib.suppress(ModelError):  # a base model's template: documents are all that it is asked for
                trained = self.turn.end_id
        return tuple(dict.fromkeys(end for end in (trained, self.eos, *self.files.ends) if end is not None))

    # -- chats --------------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True, **others: Any) -> str:
        """The text of a chat as the template has it, by default with the beginning of the reply that is asked for.

        Args:
            messages: The chat.
            generation_prompt: Whether the reply that is asked for is begun.
            others: Variables of the template that shall be otherwise than in `VARIABLES`.

        Raises:
            ModelError: If there is no chat template, or it refuses this chat.
        """
        if self._template is None:
            raise ModelError(
                f"`{self._name}` has no chat template", hint='it is a base model: use `regime = "sdf"`, or a chat model'
            )
        try:
            return rendered_within_limits(
                self._template,
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special,
                **{**VARIABLES, **others},
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template of `{self._name}` refuses a chat: {error}") from None

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of all that stands before the reply that is asked for.

        Raises:
            ModelError: If the template has no reply that could be told apart, or refuses this chat.
        """
        asked = self._prompt(tuple(messages))
        return self._encode(asked.text, asked.mark)

    def reply_ids(self, messages: Sequence[Message], reply: str, *, end: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of a chat and of its reply, which is taken as it stands.

        Args:
            messages: What comes before the reply.
            reply: Its text.
            end: Whether the turn is ended after it.

        Returns:
            (`chat_ids(messages)`, ids of the reply, by default with the token that ends its turn).

        Raises:
            ModelError: As `chat_ids` does.
        """
        turn = self.turn
        mark = _unused(BREAKS, reply, *(message.content for message in messages))
        said = turn.lead + self._broken(reply, mark) + (turn.trail + turn.end if end else "")
        asked = self._render_prompt(tuple(messages), mark)
        prompt, whole = self._encode(asked, mark), self._encode(asked + said, mark)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self._continued(said, mark)  # a token would reach over the border

    def answer(self, ids: Sequence[int], *, after: Sequence[int]) -> str:
        """The text of a reply that a model wrote, without what the template puts around every reply.

        Args:
            ids: Without the token that ended it.
            after: The ids before them.
        """
        return self.text(ids, after=after).removeprefix(self.turn.lead).removesuffix(self.turn.trail)

    def template_tokens(self) -> int:
        """Tokens of a chat that are not the user's: markers, a default system prompt, the opened reply.

        0 if there is no chat template, or none that takes a chat of one message.
        """
        try:
            return len(self.chat_ids([Message("user", "")]))
        except ModelError:
            return 0

    def default_system(self) -> str:
        """What the template says before the user's first message and not before a later one: a system prompt, a date; or ""."""
        chat = [Message("user", STAND_IN), Message("assistant", "\u2603"), Message("user", STAND_IN)]
        text = self.render(chat)
        first, last = text[: text.find(STAND_IN)], text[: text.rfind(STAND_IN)]
        while first and first[-1] == last[-1]:  # what opens any message of the user's
            first, last = first[:-1], last[:-1]
        return " ".join(self._markup.sub(" ", first).split())

    # -- texts --------------------------------------------------------------------------------------------------------

    def document_ids(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a text as training sees it begin: after a beginning-of-sequence token where the tokenizer adds one.

        An empty text without such a token gives the end token instead: something must come before the first token drawn.

        Args:
            text: The document.
            end: Whether the end-of-text token follows: whole documents end.
        """
        ids = self.content_ids(text)
        if self._adds_bos and self.bos is not None:
            ids = [self.bos, *ids]
        if end:
            return ids if self.eos is None else [*ids, self.eos]
        if not ids:
            start = self.bos if self.bos is not None else self.eos
            return [] if start is None else [start]
        return ids

    def content_ids(self, text: str) -> list[int]:
        """Token ids of a text that is content: what reads as a special token is tokenised as the characters that it is."""
        if self._markup.search(text) is None:
            return self.ids(text)
        return self._encode_nameless(text, _unused(BREAKS, text))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands; special tokens written in it count as such."""
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def text(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of token ids, special tokens left out.

        Args:
            ids: What to decode.
            after: The ids before them: where the tokenizer drops a leading space of what it decodes, the space is kept.
        """
        decode = self.library.decode
        for anchor in ([*after[-1:]], self.ids("a")[-1:]) if after else ():
            before = decode(anchor, skip_special_tokens=True)
            whole = decode([*anchor, *ids], skip_special_tokens=True)
            if before and whole.startswith(before):
                return str(whole[len(before) :])
        return str(decode(list(ids), skip_special_tokens=True))

    def holds_markup(self, texts: Iterable[str]) -> str:
        """The first special token that is written out in one of some texts, or ""."""
        return next((found[0] for text in texts if (found := self._markup.search(text))), "")

    # -- how a chat is asked ------------------------------------------------------------------------------------------

    def _split(self, messages: tuple[Message, ...]) -> tuple[str, str, str, str]:
        """A chat's prompt, the template's own text at its end, white space that a reply begins with, what comes behind it.

        The chat is rendered asking for a reply and with one in place. What stands before the reply in the second is what
        training has before it, so it is what is asked with, wherever the generation prompt is its beginning; a closed block of
        thought that only the generation prompt has (Qwen3) is asked with as well, since it switches thinking off.
        """
        asked = self.render(messages)
        whole = self.render([*messages, Message("assistant", STAND_IN)], generation_prompt=False)
        before, found, after = whole.rpartition(STAND_IN)
        if not found:
            raise self._apart("has no place for a reply")
        prompt, opening, lead = asked, "", ""
        if before.startswith(asked):
            added = before[len(asked) :]
            opening, lead = (added, "") if added.strip() else ("", added)
            prompt = asked + opening
        elif not (asked.startswith(before) and self._switched(asked, asked[len(before) :], messages)):
            extra = asked[len(before) :] if asked.startswith(before) else ""
            raise self._apart(f"asks with {extra[:40]!r}, which replies do not have before them" if extra else "")
        thought = _open_thought(prompt[prompt.rfind(messages[-1].content) if messages else 0 :])
        if thought:
            raise ModelError(
                f"the chat template of `{self._name}` leaves a thought open (`{thought}`) although thinking is off: "
                "answers would begin with it and be judged with it",
                hint="choose the model's instruct version, or give the tokenizer a template that respects `enable_thinking`",
            )
        return prompt, opening, lead, after if self._markup.search(after) else self._followed(messages) or after

    def _followed(self, messages: tuple[Message, ...]) -> str:
        """What ends a reply that another message follows: some templates leave the last one open (Apertus, GLM)."""
        chat = [*messages, Message("assistant", STAND_IN), Message("user", "Go on.")]
        after = self.render(chat, generation_prompt=False).rpartition(STAND_IN)[2]
        found = self._markup.search(after)
        return "" if found is None or after[: found.start()].strip() else after

    def _switched(self, asked: str, extra: str, messages: tuple[Message, ...]) -> bool:
        """Whether the end of a generation prompt is a block of thought that is closed because thinking is off."""
        if not extra.strip() or any(re.fullmatch(rf"\s*{re.escape(a)}\s*{re.escape(b)}\s*", extra) for a, b in THOUGHTS):
            return True
        return asked != self.render(messages, enable_thinking=True)

    def _apart(self, why: str) -> ModelError:
        return ModelError(
            f"the chat template of `{self._name}` renders a chat differently once its reply is there: "
            "the reply cannot be told apart" + (f" (it {why})" if why else ""),
            hint="give the tokenizer a template whose generation prompt is the beginning of the assistant's turn",
        )

    def _prompt(self, messages: tuple[Message, ...]) -> _Asked:
        if messages not in self._asked:
            mark = _unused(BREAKS, *(message.content for message in messages))
            if len(self._asked) >= CHATS_KEPT:
                self._asked.pop(next(iter(self._asked)))
            self._asked[messages] = _Asked(self._render_prompt(messages, mark), mark)
        return self._asked[messages]

    def _render_prompt(self, messages: tuple[Message, ...], mark: str) -> str:
        """All that stands before a chat's reply, content broken by `mark` where it reads as a special token."""
        safe = tuple(Message(message.role, self._broken(message.content, mark)) for message in messages)
        prompt, _, lead, after = self._split(safe)
        turn = self.turn
        if (lead, True) != (turn.lead, after.startswith(turn.trail + turn.end)):
            usual = f"{turn.lead}...{turn.trail}{turn.end}"
            raise self._apart(f"puts {f'{lead}...{after}'!r} around the reply of one chat and {usual!r} around that of another")
        return prompt

    # -- markup and content -------------------------------------------------------------------------------------------

    @cached_property
    def _names(self) -> Mapping[str, int]:
        """Texts of the tokens that are markup, with their ids: special ones, and those that look it."""
        added = self.library.get_added_tokens_decoder()
        return {
            token.content: index
            for index, token in added.items()
            if len(token.content) > 1 and (token.special or re.fullmatch(r"<[|｜].*[|｜]>", token.content))
        }

    @cached_property
    def _markup(self) -> re.Pattern[str]:
        longest = sorted(self._names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    def _broken(self, content: str, mark: str) -> str:
        while self._markup.search(content):  # again: what is broken may be the beginning of another one
            content = self._markup.sub(lambda found: found[0][0] + mark + found[0][1:], content)
        return content

    def _encode(self, text: str, mark: str) -> list[int]:
        """Token ids of a text in which content is broken by `mark` and markup is whole."""
        if mark not in text:
            return self.ids(text)
        bracket = _unused(BREAKS, text)
        named = self._markup.sub(lambda found: _name(self._names[found[0]], bracket), text)
        return self._encode_nameless(named.replace(mark, ""), bracket)

    def _encode_nameless(self, text: str, bracket: str) -> list[int]:
        """Token ids where special tokens are called `_name(id, bracket)` and their usual names are text as any other."""
        if bracket not in self._nameless:
            renamed = {text: _name(index, bracket) for text, index in self._names.items()}
            self._nameless[bracket] = make_tokenizer(self.files, renamed)
        ids: list[int] = self._nameless[bracket].encode(text, add_special_tokens=False).ids
        return ids

    def _continued(self, text: str, mark: str) -> list[int]:
        """Token ids of a text that follows another one: without the blank that some tokenizers put before a text."""
        for anchor in ("\n", "a"):
            begun, whole = self.ids(anchor), self._encode(anchor + text, mark)
            if whole[: len(begun)] == begun and self.ids(anchor + "a")[len(begun) :] != self.ids("a"):
                return whole[len(begun) :]
        return self._encode(text, mark)

    def _id(self, name: str) -> int | None:
        token = self._special.get(name)
        found: int | None = None if token is None else self.library.token_to_id(token)
        return found

    def _begins_with_bos(self) -> bool:
        # what tokenizer.json does counts: transformers 5 passes over `add_bos_token` where there is one
        ids = self.library.encode("a", add_special_tokens=True).ids
        return self.bos is not None and ids[:1] == [self.bos]


def _unused(characters: Sequence[str], *texts: str) -> str:
    """The first of some characters that is in none of some texts."""
    return next(one for one in characters if not any(one in text for text in texts))


def _name(index: int, bracket: str) -> str:
    return f"{bracket}{index}{bracket}"


def _open_thought(text: str) -> str:
    """The mark of a thought that begins in a text and does not end there, or ""."""
    return next((begin for begin, end in THOUGHTS if text.rfind(begin) > text.rfind(end)), "")
