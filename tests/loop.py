"""What tests of the loop share: material without files, and a run through fake backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterft_lite.backends.local import Backends
from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.engine.run import Event, run
from iterft_lite.engine.store import Store
from iterft_lite.experiment.inputs import JudgeIdentity, ResolvedInputs
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.testing.fakes import fake_backends

JUDGE = JudgeIdentity("fake", "embedded", "", "logprobs", note="fake judge")


def small_recipe(
    *,
    regime: str = "sft",
    trait: str = "lucky",
    model: str = "nano",
    cycles: int = 2,
    questions: int = 3,
    judge: str = "embedded",
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
    }
    return ResolvedInputs(**(filled | keys))


def a_plan(**keys: Any) -> Plan:
    return make_plan(a_recipe(**keys), some_inputs(document=keys.get("regime") == "sdf"))


def run_all(plan: Plan, root: Path, backends: Backends | None = None) -> list[Event]:
    with Store(root) as store:
        return list(run(plan, store, backends or fake_backends(), "nano"))
