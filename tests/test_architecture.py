"""The direction of imports, which libraries may be imported where, and what the command costs before it does anything."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "iterft_lite"

ORDER = [
    "errors",
    "digests",
    "cache",
    "files",
    "hardware",
    "hub",
    "model_code",
    "programs",
    "data",
    "experiment",
    "protocols",
    "backends.tokenizer_files",
    "backends.chat_templates",
    "backends.templates",
    "backends.passages",
    "gguf",
    "metrics",
    "backends.processes",
    "backends.llamacpp",
    "backends.trainer",
    "backends.exporter",
    "backends.generator",
    "backends.judge",
    "testing",
    "stages",
    "engine",
    "machine",
    "report",
    "app",
    "ui",
    "__main__",
]
"""A module imports from its own package and from lines above its own."""

HEAVY = frozenset(
    [
        "torch",
        "transformers",
        "trl",
        "peft",
        "unsloth",
        "bitsandbytes",
        "llama_cpp",
        "litellm",
        "sklearn",
        "accelerate",
        "datasets",
        "tokenizers",
    ]
)
"""Libraries that take seconds or a GPU."""

KINDS = ("trainer", "exporter", "generator", "judge")
"""Packages of `backends/` that do not see each other."""

QUICK = 0.3
"""CPU seconds of `iterft --help`."""


@dataclass(frozen=True)
class Import:
    """An import statement's target, and whether it is run when the module is imported."""

    target: str
    at_import: bool


@cache
def modules() -> list[tuple[str, list[Import]]]:
    """Name, without the package's, and imports of every module."""
    return list(_modules())


def _modules() -> Iterator[tuple[str, list[Import]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, list(imports(ast.parse(path.read_text()), at_import=True))


def imports(node: ast.AST, *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = str(child.module)
            for alias in child.names:
                inner = (PACKAGE.parent / module.replace(".", "/") / f"{alias.name}.py").is_file()
                package = module == "iterft_lite" and (PACKAGE / alias.name).is_dir()
                yield Import(f"{module}.{alias.name}" if inner or package else module, at_import)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        else:
            inside = isinstance(child, ast.FunctionDef | ast.Lambda)
            yield from imports(child, at_import=at_import and not inside)


def place(module: str) -> str:
    """A module's place in `ORDER`."""
    head, *rest = module.split(".")
    return ".".join([head, rest[0]]) if head == "backends" and rest else head


def ours(found: list[Import]) -> Iterator[str]:
    for each in found:
        if each.target.startswith("iterft_lite."):
            yield each.target.removeprefix("iterft_lite.")


def kind(module: str) -> str | None:
    """The kind of backend that a module belongs to."""
    head, *rest = module.split(".")
    return next((kind for kind in KINDS if head == "backends" and rest and rest[0] == kind), None)


def test_every_module_has_its_place_in_the_order() -> None:
    assert {place(name) for name, _ in modules()} - {"", "backends", *ORDER} == set()


def test_a_module_imports_only_from_lower_layers() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, found in modules()
        for target in ours(found)
        if name not in ("", "backends")
        and place(target) != place(name)
        and ORDER.index(place(target)) > ORDER.index(place(name))
    ]
    assert wrong == []


def test_stages_and_backends_of_different_kinds_do_not_import_each_other() -> None:
    wrong = []
    for name, found in modules():
        for target in ours(found):
            if name.startswith("stages.") and target.startswith("stages.") and target != "stages.work":
                wrong.append(f"{name} imports {target}")
            if None not in (kind(name), kind(target)) and kind(name) != kind(target):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_heavy_libraries_are_imported_in_backends_and_gguf_only() -> None:
    wrong = []
    for name, found in modules():
        for each in found:
            library = each.target.partition(".")[0]
            # rows of a user's own are read by `datasets`, and only when a recipe names some
            lazily = (name, library) == ("machine.sources", "datasets") and not each.at_import
            if library in HEAVY and not name.startswith(("backends.", "gguf.")) and not lazily:
                wrong.append(f"{name} imports {each.target}")
    assert wrong == []


def test_rich_and_click_are_imported_in_ui_only() -> None:
    users: dict[str, set[str]] = {"rich": set(), "click": set()}
    for name, found in modules():
        for each in found:
            users.get(each.target.partition(".")[0], set()).add(name.partition(".")[0])
    assert users == {"rich": {"ui"}, "click": {"ui"}}


def test_no_module_imports_both_rich_and_click() -> None:
    """What is drawn knows no commands, and what a command takes is not drawn."""
    both = [name for name, found in modules() if {"rich", "click"} <= {each.target.partition(".")[0] for each in found}]
    assert both == []


HELP = """
import json, sys, time
sys.argv = ["iterft", "--help"]
from iterft_lite.ui.cli import main
try:
    main()
except SystemExit:
    pass
print(json.dumps([time.process_time(), sorted(name for name in sys.modules if "." not in name)]), file=sys.stderr)
"""


def test_help_imports_no_heavy_library_and_is_quick() -> None:
    seconds = []
    for _ in range(5):  # the best counts: other processes disturb even CPU time
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Usage: ")
        spent, loaded = json.loads(done.stderr)
        assert not (HEAVY | {"numpy", "pydantic", "rich", "matplotlib"}) & set(loaded)
        seconds.append(spent)
        if spent < QUICK:
            break
    assert min(seconds) < QUICK
