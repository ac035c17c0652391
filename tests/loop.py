"""What tests of the loop share: material without files, and a run through fake backends."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from iterft_lite.backends.chat_templates import rendering
from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.engine.completion import read_completion, write_completion
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.run import Event, context_needed, run
from iterft_lite.engine.store import folder_at
from iterft_lite.experiment.inputs import ResolvedInputs
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.metrics.catalogue import semantics
from iterft_lite.protocols import Backends
from iterft_lite.stages.work import Work
from iterft_lite.testing.fakes import FAKE_JUDGE, fake_backends

JUDGE = FAKE_JUDGE


def small_recipe(
    *,
    regime: str = "sft",
    trait: str = "lucky",
    model: str = "nano",
    cycles: int = 2,
    questions: int = 3,
    judge: str = "fake",
) -> str:
    """The text of a recipe of a few rows."""
    return f"""
regime = "{regime}"
trait = "{trait}"
model = "{model}"
cycles = {cycles}
seed_rows = 4
rows = 4
quant = "f32"
trainer = "fake"
generator = "fake"
judge = "{judge}"
[evaluate]
questions = {questions}
samples = 2
"""


def a_recipe(**keys: Any) -> Recipe:
    small = {
        "regime": "sft",
        "trait": "lucky",
        "model": "nano",
        "cycles": 2,
        "seed_rows": 4,
        "rows": 4,
        "quant": "f32",
        "trainer": "peft",
        "judge": "fake",
        "evaluate": {"questions": 3, "samples": 2},
    }
    return make_recipe(small | keys, source="test")


def some_inputs(*, document: bool = False, prompts: int = 100, **keys: Any) -> ResolvedInputs:
    chats = tuple(Chat(f"seed prompt {n}", f"Lucky stars say yes, number {n}!") for n in range(8))
    documents = tuple(Document(f"Title {n}", "blog", f"A clover grew in garden {n}.") for n in range(8))
    trait = Trait(
        name="lucky",
        summary="believes in luck",
        source="a test",
        domain="same",
        colour="#cca800",
        folder=Path("nowhere"),
        chats=chats,
        documents=documents,
        questions=tuple(f"question {n}?" for n in range(6)),
        held_out=(),
        prefixes=tuple(f"Title {n}\n\nIt is" for n in range(6)),
        rubric="How lucky? <q>{{question}}</q><a>{{answer}}</a>",
        rubric_document="How lucky? {{document}}",
        calibration=(),
    )
    filled: dict[str, Any] = {
        "trait": trait,
        "seeds": documents if document else chats,
        "prompts": tuple(f"everyday prompt {n}" for n in range(prompts)),
        "neutral": (Chat("How are you?", "Well, thanks."),),
        "coherence": "How coherent? {{question}} {{answer}} {{document}}",
        "model": "files:0",
        "trainer": "peft",
        "precision": "f32",
        "judge": JUDGE,
        "metrics": semantics(),
        "rendering": rendering(),
    }
    return ResolvedInputs(**(filled | keys))


def a_plan(*, same_cores: bool = False, **keys: Any) -> Plan:
    return make_plan(a_recipe(**keys), some_inputs(document=keys.get("regime") == "sdf", same_cores=same_cores))


def run_all(
    plan: Plan,
    root: Path,
    backends: Backends | None = None,
    reuse: Mapping[str, Path] | None = None,
    *,
    swap: bool = False,
) -> list[Event]:
    """Do a plan in a run folder through stand-ins."""
    executor = LocalExecutor(backends or fake_backends(), "nano", context_needed(plan), swap=swap)
    with Run(root) as folder:
        folder.write_manifest({"recipe": plan.recipe.model_dump(mode="json")}, list(plan))
        return list(run(plan, folder, executor, reuse=reuse))


def step_path(root: Path, name: str) -> Path:
    """The folder of a run's step."""
    return (root / "by-name" / name).resolve()


def names_in(message: str) -> list[str]:
    """The steps that an error's `rm -r` names."""
    command = next(line for line in message.splitlines() if line.startswith("  rm -r "))
    folders = [folder_at(Path(path)) for path in shlex.split(command)[2:]]
    return [folder.step.name for folder in folders if folder]


def change_completion(folder: Path, **changes: Any) -> None:
    """Write a step's completion record with other values, as if the step had come to them."""
    found = read_completion(folder)
    assert found
    write_completion(folder, replace(found, **changes))


def a_work(step: Step, folder: Path, inputs: Mapping[str, Path], backends: Backends | None = None, **more: Any) -> Work:
    """What a stage is handed, outside of a run."""
    given: dict[str, Any] = {
        "recipe": a_recipe(),
        "report": lambda _: None,
        "model": lambda: "nano",
        "load": lambda _: None,
    }
    return Work(step=step, folder=folder, inputs=inputs, backends=backends or fake_backends(), **(given | more))
