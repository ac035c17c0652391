"""Python code in model folders: never run, unless the command line names the very model.

A model folder is data from a stranger. transformers loads classes from `.py` files in it where its configuration says so
(`auto_map`) and `trust_remote_code` is true, or asks on standard input where it is not given; llama.cpp's conversion scripts
pass true. In every process of this program that may load a model, `refuse_model_code` replaces what loads such classes:

- a model whose classes transformers has itself is loaded with those;
- a model that needs its own code is refused in one sentence, whatever the caller passed;
- a model that `trust` was called for (`--trust-remote-code MODEL`; no recipe, run folder or variable can) is loaded with it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from iterft_lite import hub
from iterft_lite.errors import ModelError
from iterft_lite.files import user_path

LOADER = "transformers.dynamic_module_utils"
"""Everything that transformers loads from model folders goes through this module."""

_trusted: set[str] = set()


def trust(model: str) -> None:
    """Let the code of one model run in this process and those that it starts: a folder, or a name on the hub."""
    _trusted.add(str(user_path(model).resolve()) if user_path(model).is_dir() else model)


def trusted() -> list[str]:
    """The models that may run code of their own."""
    return sorted(_trusted)


def is_trusted(place: str) -> bool:
    """Whether a model, by its folder or its name on the hub, may run code of its own.

    A name stands for its files in the hub's cache too; with a commit, for those of that commit only.
    """
    folder = Path(place).resolve()
    commit = folder.name if folder.parent.name == "snapshots" else ""
    names = {place, str(folder)}
    if commit:
        names |= {hub.name_of(folder), f"{hub.name_of(folder)}@{commit}"}
    return bool(names & _trusted)


def refusal(model: str) -> ModelError:
    """The error for a model that needs code of its own."""
    return ModelError(
        f"`{hub.title(model)}` can only be loaded with Python code that comes with it, and such code is not run",
        hint="use a model that transformers itself knows; only if you have read that code and trust who wrote it: "
        f"`--trust-remote-code {model}`",
    )


def refuse_model_code() -> None:
    """Replace what loads code from model folders, in this process and for good."""
    module = sys.modules.get(LOADER)
    if module is not None:
        _replace(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers' loader as usual, and replaces its functions before anybody can import them from it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != LOADER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Replacing(spec.loader)
        return spec


class _Replacing(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _replace(module)


def _replace(module: ModuleType) -> None:
    """Put refusing functions in the place of the module's own, also where they were imported from it already."""
    if getattr(module, "refuses_model_code", False):
        return
    module.refuses_model_code = True  # type: ignore[attr-defined]
    made: dict[str, Callable[..., Any]] = {"resolve_trust_remote_code": _resolve}
    for name in ("get_class_from_dynamic_module", "get_cached_module_file"):
        made[name] = _checked(getattr(module, name), split=name == "get_class_from_dynamic_module")
    for name, function in made.items():
        before = getattr(module, name)
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith("transformers") and vars(other).get(name) is before:
                setattr(other, name, function)
        setattr(module, name, function)


def _resolve(
    trust_remote_code: Any,  # noqa: ARG001  # what the caller would trust does not count
    model_name: Any,
    has_local_code: bool,
    has_remote_code: bool,
    error_message: str | None = None,  # noqa: ARG001
    upstream_repo: str | None = None,
) -> bool:
    """Whether a model's own classes are taken; stands for transformers' function of this name."""
    if has_local_code or not has_remote_code:
        return False
    for place in filter(None, (str(model_name), upstream_repo)):
        if not is_trusted(place):
            raise refusal(place)
    return True


def _checked(load: Callable[..., Any], *, split: bool) -> Callable[..., Any]:
    """A function that loads code from a model, refusing those that are not trusted.

    Args:
        load: Its arguments begin with the model, or with a class of it, which may name another model before `--`.
        split: The latter.
    """

    def checked(first: Any, *rest: Any, **named: Any) -> Any:
        place = str(first)
        if split:
            repository, _, other = place.partition("--")
            place = repository if other else str(rest[0] if rest else named["pretrained_model_name_or_path"])
        if not is_trusted(place):
            raise refusal(place)
        return load(first, *rest, **named)

    return checked
