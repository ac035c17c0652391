"""Using a run's models: chat with the model of any cycle."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

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
from iterft_lite.machine.memory import takes_turns
from iterft_lite.machine.resolve import model_place, this_machine
from iterft_lite.protocols import Backends, Progress, Prompt, Sampling
from iterft_lite.stages.export import untouched_gguf

TURN_TOKENS = 2048
"""Context of a conversation, tokens. Older turns are dropped."""


@dataclass
class Talk:
    """A conversation with one of a run's models. It can switch to another cycle's model.

    Attributes:
        root: The run folder.
        cycle: The cycle of the model.
        system: The system message; "" for none, as in training.
    """

    root: Path
    cycle: int
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    _past: Past = field(init=False)
    _backends: Backends = field(init=False)
    _scratch: Path = field(init=False)

    @property
    def title(self) -> str:
        """The model in words."""
        recipe = self._past.recipe
        return f"{hub_title(recipe.model)}, {Path(recipe.trait).name}, {cycle_title(self.cycle)}"

    @property
    def name(self) -> str:
        """The heading of the model's turns."""
        return cycle_name(self.cycle)

    @property
    def document(self) -> bool:
        """Whether the model is a base model, which continues a text."""
        return self._past.recipe.row.rows == "document"

    @property
    def cycles(self) -> list[int]:
        """Cycles whose models can be chosen."""
        return finished_cycles(self.root)

    def turn_to(self, cycle: int) -> None:
        """Switch to another cycle's model and start a new conversation.

        Raises:
            UserError: As `past`.
            StoreError: As `past`, or if the exported file was changed.
        """
        found = past(self.root, cycle)
        exported_step = found.run.folder(found.export)
        exported_step.verify(pruned=True)
        gguf, lora = exported_files(exported_step)
        folder = self._scratch / cycle_name(cycle)
        folder.mkdir(exist_ok=True)
        if gguf is None:
            gguf = untouched_gguf(self._backends.exporter, found.model, folder, found.recipe.quant, _ignore)
        if not gguf.exists() or (lora and not lora.exists()):
            kind: Literal["merged", "adapter"] = "adapter" if lora else "merged"
            exported = self._backends.exporter.export(found.model, found.adapter, folder, kind, found.recipe.quant, _ignore)
            gguf, lora = exported.path, exported.adapter
        self._backends.generator.load(gguf, lora, found.model, slots=1, context=TURN_TOKENS, exact=False)
        self._past, self.cycle = found, cycle
        self.turns.clear()

    def tell(self, system: str) -> None:
        """Set the system message and start a new conversation.

        Raises:
            UserError: If it is a base model.
        """
        if self.document:
            raise UserError("a model trained on documents takes no system message: it continues a text")
        self.system = system
        self.turns.clear()

    def reply(self, said: str, *, temperature: float, max_tokens: int, on_text: Callable[[str], None] = lambda _: None) -> str:
        """The model's reply; a base model continues the text. Draws with a new seed each time.

        Args:
            on_text: Callback for the text so far, called repeatedly.
        """
        self.turns.append(Message("user", said))
        while sum(len(turn.content) for turn in self.turns) > 2 * (TURN_TOKENS - max_tokens) and len(self.turns) > 1:
            del self.turns[:2]
        seed = random.SystemRandom().randrange(2**31)
        told = (Message("system", self.system),) if self.system else ()
        prompt = Prompt("turn", seed, text=said) if self.document else Prompt("turn", seed, (*told, *self.turns))
        found = self._backends.generator.stream(prompt, Sampling(temperature, max_tokens), on_text)
        self.turns.append(Message("assistant", found.text))
        return found.text.strip()


@dataclass(frozen=True)
class Past:
    """A cycle's model in a run.

    Attributes:
        recipe: As resolved.
        model: Folder of M[0].
        cycle: The cycle.
        trained: Folder of the step that made it, with its probe; for the untouched model, of the step that loaded it.
        export: Its export step.
    """

    run: Run
    recipe: Recipe
    model: str
    cycle: int
    trained: Path
    export: Step

    @property
    def adapter(self) -> Path | None:
        """Its adapter folder; None for the untouched model."""
        return None if self.cycle < 0 else self.trained / "adapter"


def past(root: Path, cycle: int | None) -> Past:
    """A cycle's model in a run folder; the last finished one if `cycle` is None.

    Raises:
        FolderError: If it is not a run folder.
        UserError: If the run has no such cycle, or not yet; if its adapter was removed.
        StoreError: If its adapter or probe was changed, or a step that it rests on was done again with another result.
    """
    run = Run(root)
    manifest = run.known()
    steps = manifest.steps
    exports = _exports(run, steps)
    wanted = max(exports, default=-1) if cycle is None else cycle
    if wanted not in exports:
        there = ", ".join(map(str, sorted(exports))) or "none"
        raise UserError(f"`{root}` has no finished model of cycle {wanted}", hint=f"finished: {there}")
    recipe = make_recipe(manifest.recipe, source=str(root))
    ancestry = _ancestry(steps, exports[wanted])
    for step in ancestry:
        folder = run.folder(step)
        # `keep` removes adapters of earlier cycles, which later models rest on but are not read from; version 0.1 kept no
        # probe of the untouched model
        removed = step.verb == "load_base" or recipe.keep == "ends"
        folder.verify(pruned=removed) if step.verb in ("train", "load_base") else folder.check_inputs()
    made = next(step for step in reversed(ancestry) if step.verb in ("train", "load_base") and step.cycle == wanted)
    trained = run.folder(made)
    if made.verb == "train" and not trained.whole():
        raise UserError(
            f'the adapter of cycle {wanted} was removed: `keep = "{recipe.keep}"` keeps the first and the last',
            hint=f"another cycle of `{root}`, or another run with `--set keep=adapters`",
        )
    return Past(run, recipe, folder_of(model_place(recipe.model)), wanted, trained.path, exports[wanted])


def finished_cycles(root: Path) -> list[int]:
    """Cycles whose models are finished."""
    run = Run(root)
    return sorted(_exports(run, run.known().steps))


def _exports(run: Run, steps: Sequence[Step]) -> dict[int, Step]:
    """The finished export steps, by cycle."""
    return {step.cycle: step for step in steps if step.verb == "export" and run.folder(step).finished}


def _ancestry(steps: Sequence[Step], step: Step) -> list[Step]:
    """A step and all that it rests on, in the run's order."""
    wanted = {step.name}
    for each in reversed(steps):  # a step stands behind the steps that it reads
        if each.name in wanted:
            wanted.update(name for _, name in each.inputs)
    return [each for each in steps if each.name in wanted]


def backends_for(found: Past) -> Backends:
    """The run's backends, with a judge that needs nothing."""
    judge = JudgeIdentity("embedded", "embedded", "", "logprobs")
    swap = takes_turns(found.recipe, found.model, this_machine())
    return open_backends(found.recipe, read_trait(found.recipe.trait), judge, found.run.logs, swap=swap)


@contextlib.contextmanager
def open_chat(root: Path, cycle: int | None) -> Iterator[Talk]:
    """A conversation with a cycle's model. Writes a merged file that `keep` removed again, and removes it in the end.

    Raises:
        UserError: As `past`.
    """
    found = past(root, cycle)
    talk = Talk(root, found.cycle)
    with TemporaryDirectory(prefix="iterft-") as scratch, contextlib.closing(backends_for(found)) as backends:
        talk._past, talk._backends, talk._scratch = found, backends, Path(scratch)
        talk.turn_to(found.cycle)
        yield talk


def _ignore(_: Progress) -> None:
    """Ignore progress."""
