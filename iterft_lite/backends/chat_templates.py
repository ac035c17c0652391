"""The jinja2 of chat templates: what a template may see, how large it may grow, how long it may take.

The rendering rules are those of `PreTrainedTokenizerBase.apply_chat_template` in transformers 5 (a sandbox; `trim_blocks`,
`lstrip_blocks`, loop controls; `raise_exception`, `strftime_now`, an unescaped `tojson`).

A template comes with a model from a stranger. The sandbox keeps it from the machine; the limits keep it from taking its memory
and its time: whatever makes a long value out of short ones is measured before it is done, and a timer ends what takes seconds
(published templates take a thousandth of one). The timer is a signal: it only works in a process's main thread, which is where
every worker of this program renders.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from iterft_lite.digests import Json

TODAY = datetime(2024, 7, 26)
"""What templates take for today: the day that Llama's fall back to where none is given."""

LARGEST = 8_000_000
"""Characters or items of any value, and of what a template gives."""

LONGEST_SOURCE = 1_000_000
"""Characters of a template."""

SECONDS = 5.0
"""A rendering takes at most."""

WIDE = re.compile(r"[%:][^a-zA-Z%{}]*\d{5}")
"""A width of five digits or more in a text that formats others."""


def strftime_now(form: str) -> str:
    """`TODAY` in the form of `strftime`."""
    return TODAY.strftime(form)


VARIABLES: Mapping[str, Any] = {"enable_thinking": False, "strftime_now": strftime_now}
"""What every rendering gives a template beside the chat; one that does not know a variable passes over it.

With `enable_thinking` false, templates of hybrid models (Qwen3, SmolLM3) put an empty block of thought before the reply that is
asked for, as they do before a reply that is there. As variables, both hide the globals of transformers' own environment.
"""


RULES = 1
"""Raised when the same template, chat and variables come to another text."""


def rendering() -> dict[str, Json]:
    """How chats are rendered: a parameter of the steps that do it. (The template itself is part of the model's identity.)"""
    return {"thinking": VARIABLES["enable_thinking"], "today": TODAY.date().isoformat(), "rules": RULES}


class _LimitError(jinja2.TemplateError):
    """A template that would grow too large or takes too long."""


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template, ready to be rendered by `rendered_within_limits`.

    Raises:
        jinja2.TemplateError: If it is not a template, or is too long.
    """
    if len(source) > LONGEST_SOURCE:
        raise _LimitError(f"it has {len(source)} characters, {LONGEST_SOURCE} are allowed")
    try:
        made = environment().from_string(source)
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise _LimitError(f"it cannot be compiled: {type(error).__name__}") from None
    # `~` is no operator that the sandbox is asked about: what it is compiled to is a name in the template's module
    names = made.root_render_func.__globals__
    names.update({name: _measured(names[name]) for name in ("str_join", "markup_join") if name in names})
    return made


def rendered_within_limits(template: jinja2.Template, **variables: Any) -> str:
    """What a template gives.

    Raises:
        jinja2.TemplateError: If it refuses, fails in whatever way, grows too large or takes too long.
    """
    parts, size = [], 0
    try:
        with _time_limit():
            for part in template.generate(**variables):
                parts.append(part)
                size += len(part)
                _hold(size)
    except jinja2.TemplateError:
        raise
    except Exception as error:  # a template can raise anything that Python can
        raise _LimitError(f"{type(error).__name__}: {error}") from None
    return "".join(parts)


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
        _hold(indent or 0)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = _Limited(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = tojson
    for name in ("center", "indent", "batch", "slice", "replace", "join", "format", "wordwrap"):
        made.filters[name] = _guarded(name, made.filters[name])
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


class _Generation(Extension):
    """`{% generation %}` marks what is trained on; rendering leaves its body as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own signature)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Limited(ImmutableSandboxedEnvironment):
    """A sandbox in which no value grows beyond `LARGEST`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure what an operation would give, and do it."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _hold(left.bit_length() * abs(right))
        elif operator == "*":
            _hold(_size(left) * _size(right))
        elif operator == "+":
            _hold(_size(left) + _size(right) if _is_sized(left) else 0)
        elif operator == "%" and isinstance(left, str):
            _refuse_wide(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as jinja2 has it
        """Measure a call's arguments, and do it."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _hold_text(owner, args)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Look at a text whose `format` is asked for."""
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and getattr(value, "__name__", "") in ("format", "format_map"):
            _refuse_wide(owner)
        return super().wrap_str_format(value)


def _guarded(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments are measured first; what jinja2 notes on it (that it wants the context) is kept."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _refuse_wide(str(args[0]))
        texts = [one for one in args if isinstance(one, str)]
        _hold_text(max(texts, key=len, default=""), (*args, *kwargs.values()))
        return usual(*args, **kwargs)

    vars(guarded).update(vars(usual))
    return guarded


def _hold_text(text: str, args: tuple[Any, ...]) -> None:
    """Measure a method or filter of a text: its width, and a text that may be put in for each character."""
    for given in args:
        if isinstance(given, int):
            _hold(given)
        elif isinstance(given, str):
            _hold((len(text) + 1) * len(given) // 1000)  # a chat's text in a template's: no thousandfold


def _measured(usual: Callable[..., Any]) -> Callable[..., Any]:
    def joined(parts: Any) -> Any:
        given = list(parts)
        _hold(sum(map(_size, given)))
        return usual(given)

    return joined


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple))


def _size(value: Any) -> int:
    """Items of a sequence, the size of a number as it would repeat one; 1 of anything else."""
    if _is_sized(value):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _hold(size: int) -> None:
    if size > LARGEST:
        raise _LimitError(f"a value of it would have {size:.1e} characters or items, {LARGEST:.0e} are allowed")


def _refuse_wide(text: str) -> None:
    found = WIDE.search(text)
    if found:
        raise _LimitError(f"it formats with a width of five digits or more: `{found[0]}`")


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `_LimitError` in this block after `SECONDS`, in a main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> None:
        raise _LimitError(f"it takes longer than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
