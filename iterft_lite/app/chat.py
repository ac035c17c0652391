"""Use the models of a run: talk to any cycle's, or write its GGUF again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from iterft_lite.data.traits import read_trait
from iterft_lite.engine.backends import open_backends
from iterft_lite.engine.executor import exported_files
from iterft_lite.engine.manifest import Run
from iterft_lite.errors import UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.rows import Message
from iterft_lite.experiment.steps import Step, cycle_name, cycle_title
from iterft_lite.hub import folder_of
from iterft_lite.hub import title as hub_title
from iterft_lite.machine.resolve import model_place
from iterft_lite.protocols import Backends, Completion, Exported, Generator, Progress, Prompt, Sampling

TURN_TOKENS = 2048
"""Context of a conversation; its oldest turns are forgotten beyond that."""


@dataclass
class Talk:
    """A conversation with a model.

    Attributes:
        title: Which model it is.
        name: What its turns are headed with.
    """

    title: str
    name: str
    generator: Generator
    document: bool
    turns: list[Message] = field(default_factory=list)

    def reply(self, said: str, *, temperature: float, max_tokens: int) -> str:
        """What the model answers; a base model continues the text. Draws anew each time."""
        self.turns.append(Message("user", said))
        while sum(len(turn.content) for turn in self.turns) > 2 * (TURN_TOKENS - max_tokens) and len(self.turns) > 1:
            del self.turns[:2]
        seed = random.SystemRandom().randrange(2**31)
        prompt = Prompt("turn", seed, text=said) if self.document else Prompt("turn", seed, tuple(self.turns))
        found: list[Completion] = []
        self.generator.complete([prompt], Sampling(temperature, max_tokens), found.append)
        self.turns.append(Message("assistant", found[0].text))
        return found[0].text.strip()


@dataclass(frozen=True)
class Past:
    """A finished run whose models are to be used.

    Attributes:
        recipe: As resolved.
        model: Folder of M[0].
        cycle: The one that was asked for.
        adapter: Its adapter folder; None for the untouched model.
        export: Its export step.
    """

    run: Run
    recipe: Recipe
    model: str
    cycle: int
    adapter: Path | None
    export: Step


def past(root: Path, cycle: int | None) -> Past:
    """A cycle's model in a run folder; the last finished one if no cycle is named.

    Raises:
        FolderError: If it is no run folder.
        UserError: If the run has no such cycle, or not yet.
        StoreError: If its adapter was changed, or anything that it rests on was made anew and came out differently.
    """
    run = Run(root)
    manifest = run.known()
    steps = manifest.steps
    exports = {step.cycle: step for step in steps if step.verb == "export" and run.folder(step).finished}
    wanted = max(exports, default=-1) if cycle is None else cycle
    if wanted not in exports:
        there = ", ".join(map(str, sorted(exports))) or "none"
        raise UserError(f"`{root}` has no finished model of cycle {wanted}", hint=f"finished: {there}")
    for step in _ancestry(steps, exports[wanted]):
        folder = run.folder(step)
        folder.verify() if step.verb == "train" else folder.check_inputs()
    recipe = make_recipe(manifest.recipe, source=str(root))
    train = next((step for step in steps if step.verb == "train" and step.cycle == wanted), None)
    adapter = run.folder(train).path / "adapter" if train else None
    return Past(run, recipe, folder_of(model_place(recipe.model)), wanted, adapter, exports[wanted])


def _ancestry(steps: Sequence[Step], step: Step) -> list[Step]:
    """A step and all that it rests on, in the run's order."""
    wanted = {step.name}
    for each in reversed(steps):  # a step comes after those that it reads
        if each.name in wanted:
            wanted.update(name for _, name in each.inputs)
    return [each for each in steps if each.name in wanted]


def _backends(found: Past) -> Backends:
    judge = JudgeIdentity("embedded", "embedded", "", "logprobs")
    return open_backends(found.recipe, read_trait(found.recipe.trait), judge, found.run.logs)


@contextlib.contextmanager
def open_chat(root: Path, cycle: int | None) -> Iterator[Talk]:
    """A conversation with a cycle's model; a merged file that `keep` removed is written again for its duration.

    Raises:
        UserError: As `past`.
    """
    found = past(root, cycle)
    backends = _backends(found)
    title = f"{hub_title(found.recipe.model)}, {found.recipe.trait}, {cycle_title(found.cycle)}"
    try:
        with TemporaryDirectory(prefix="iterft-") as scratch:
            gguf, lora = exported_files(found.run.folder(found.export))
            if not gguf.exists():
                exported = _export(found, backends, Path(scratch), found.recipe.quant)
                gguf, lora = exported.path, exported.adapter
            backends.generator.load(gguf, lora, found.model, slots=1, context=TURN_TOKENS, exact=False)
            yield Talk(title, cycle_name(found.cycle), backends.generator, found.recipe.row.rows == "document")
    finally:
        backends.close()


def export_again(root: Path, cycle: int | None, out: Path, quant: str | None) -> tuple[Exported, Past]:
    """Write the merged GGUF of a cycle's model into a folder.

    Raises:
        UserError: As `past`.
        ExportError: If there is no room for it.
    """
    found = past(root, cycle)
    backends = _backends(found)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _export(found, backends, out, quant or found.recipe.quant), found
    finally:
        backends.close()


def _export(found: Past, backends: Backends, out: Path, quant: str) -> Exported:
    def ignore(_: Progress) -> None:
        return None

    return backends.exporter.export(found.model, found.adapter, out, "merged", quant, ignore)
