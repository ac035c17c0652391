"""A session: a locked run folder with its recipe, new or to be continued."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from iterft_lite import hub
from iterft_lite.app.check_judge import begun_hint, require_judge, settled
from iterft_lite.app.tracking import tracked
from iterft_lite.digests import Json
from iterft_lite.engine.backends import open_backends
from iterft_lite.engine.executor import Executor, LocalExecutor
from iterft_lite.engine.manifest import Manifest, Run, finished_in
from iterft_lite.engine.run import (
    FAILURE,
    Event,
    Shared,
    StepFailed,
    StepFinished,
    StepProgress,
    StepStarted,
    context_needed,
    failure_record,
    run,
)
from iterft_lite.engine.study import is_study
from iterft_lite.errors import FolderError, UserError
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.recipe import MACHINE_KEYS, Recipe, make_recipe, read_recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.experiment.versions import versions
from iterft_lite.files import write_json
from iterft_lite.machine.estimate import judging_usd
from iterft_lite.machine.memory import takes_turns, vram_needed
from iterft_lite.machine.resolve import Machine, Resolved, resolve, this_machine
from iterft_lite.machine.timing import Stopwatch, add_to_table, setup_of
from iterft_lite.protocols import Backends

PLACES = frozenset({"model", "trait", "seeds.path", "prompts.path", "mix.path"})
"""Recipe keys that name a place. Its content is in the keys of the steps."""


@dataclass(frozen=True)
class Session:
    """A run folder whose lock is held.

    Attributes:
        run: The folder.
        swap: Trainer and generator take turns on the GPU.
        reuse: Steps that other stores hold (see `run`).
    """

    resolved: Resolved
    plan: Plan
    run: Run
    swap: bool
    reuse: Mapping[str, Path] = field(default_factory=dict)

    def executor(self) -> LocalExecutor:
        """Where the recipe's steps run: this machine."""
        return LocalExecutor(self._backends(), self.resolved.model, context_needed(self.plan), swap=self.swap)

    def _backends(self) -> Backends:
        inputs, recipe = self.resolved.inputs, self.resolved.recipe
        seeds = inputs.seeds if recipe.seeds else ()
        logs, keep_free = self.run.logs, self.keep_free()
        return open_backends(recipe, inputs.trait, inputs.judge, logs, keep_free, seeds=seeds, swap=self.swap)

    def keep_free(self) -> int:
        """Bytes of GPU memory that the generator leaves to the trainer beside it."""
        recipe = self.resolved.recipe
        shared = recipe.vram != "swap" and not self.swap
        need = vram_needed(recipe, self.resolved.model) if shared and this_machine().gpu else None
        return need.training if need else 0

    def stopwatch(self, origin: Literal["run", "doctor"] = "run") -> Stopwatch:
        """A stopwatch for this run's steps."""
        return Stopwatch(self.plan, setup_of(self.resolved, this_machine(), swap=self.swap), origin)

    def events(
        self, executor: Executor | None = None, watch: Stopwatch | None = None, shared: Shared | None = None
    ) -> Generator[Event, None, None]:
        """Run the unfinished steps. Keeps how long they took, for forecasts, and the reason of a failure.

        Args:
            executor: An open executor of an earlier run; its own if None.
            watch: Times the steps; its own if None.
            shared: What it knows together with other runs over one store (see `run`).
        """
        after: Literal["keep", "close"] = "keep" if executor else "close"
        (self.run.root / FAILURE).unlink(missing_ok=True)
        events = run(self.plan, self.run, executor or self.executor(), reuse=self.reuse, after=after, shared=shared)
        noted = _noted(events, watch or self.stopwatch(), self.run.root / FAILURE)
        recipe = self.resolved.recipe
        return tracked(noted, recipe, self.run.root, self._study, self._folder) if recipe.track else noted

    @property
    def _study(self) -> str:
        """The study that the run is a cell of; "" for none."""
        store = self.run.store
        return store.name if store != self.run.root and is_study(store) else ""

    def _folder(self, step: Step) -> Path:
        return self.run.folder(step).path


def _noted(events: Generator[Event, None, None], watch: Stopwatch, failure: Path) -> Generator[Event, None, None]:
    """The same events. Keeps how long the steps took, also of a session that fails, and why it failed.

    Suppresses its own errors: these notes must never hurt a run.
    """
    try:
        for event in events:
            with contextlib.suppress(Exception):
                _note(watch, event, time.monotonic())
                if isinstance(event, StepFailed):
                    write_json(failure, failure_record(event))
            yield event
    finally:
        events.close()
        with contextlib.suppress(Exception):
            add_to_table(watch.samples)


def _note(watch: Stopwatch, event: Event, now: float) -> None:
    match event:
        case StepStarted(step):
            watch.began(step, now)
        case StepProgress(step, progress):
            watch.moved(step, progress, now)
        case StepFinished(step, completion, reused):
            watch.done(step, completion, reused, now)


@dataclass(frozen=True)
class Prepared:
    """A recipe, resolved and planned on this machine.

    Attributes:
        asked: As it was given.
    """

    asked: Recipe
    machine: Machine
    resolved: Resolved
    plan: Plan


def prepare(
    asked: Recipe,
    known: Manifest | None = None,
    judge: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    *,
    purpose: Literal["run", "plan"] = "run",
) -> Prepared:
    """Resolve and plan a recipe.

    Args:
        known: The manifest of the folder that it is to go on in: "auto" is decided as it was there.
        judge: How the judge was settled before (`check_judge.settled`); it is tried out if None.
        machine: Where it would run; this one if None.
        purpose: A run needs a model on the hub pinned to a commit, and its judge tried out; a plan needs neither.

    Raises:
        UserError: If the recipe, or something it names, cannot be used.
    """
    machine = machine or this_machine()
    if purpose == "plan":
        resolved = resolve(asked, machine)
        return Prepared(asked, machine, resolved, make_plan(resolved.recipe, resolved.inputs))
    resolved = settled(resolve(_as_before(asked, known), machine, commit=_commit(known)), judge)
    return Prepared(asked, machine, resolved, make_plan(resolved.recipe, resolved.inputs))


@contextlib.contextmanager
def open_run(
    path: Path, overrides: Iterable[str], out: Path, reuse: Iterable[Path] = (), store: Path | None = None
) -> Iterator[Session]:
    """Resolve and plan a recipe, and take its run folder.

    Args:
        reuse: Run folders, or folders of them, whose finished steps are reused where they are the same.
        store: Folder of the steps, which several runs may share; the run's own if None.

    Raises:
        UserError: If the recipe, or something it names, cannot be used; or the folder was made by another recipe.
    """
    asked, known = read_recipe(path, overrides), Run(out).manifest()
    prepared = prepare(asked, known, known.value.get("judge") if known else None)
    finished = finished_in(reuse)
    _refuse_without_gpu(prepared, Run(out, store if known is None else None), finished)
    with take(prepared, out, store if known is None else None, finished) as session:
        yield session


def needs_gpu(prepared: Prepared) -> bool:
    """Whether a recipe's trainings need a GPU and there is none."""
    return prepared.resolved.recipe.trainer == "unsloth" and not prepared.machine.gpu


def _refuse_without_gpu(prepared: Prepared, run: Run, finished: Mapping[str, Path]) -> None:
    """Refuse a recipe whose trainings need a GPU where there is none, unless they are all there.

    Raises:
        UserError: With the trainer that works.
    """
    trained = (step for step in prepared.plan if step.verb == "train")
    if needs_gpu(prepared) and any(step.key not in finished and not run.folder(step).finished for step in trained):
        raise UserError(
            "the recipe is trained with Unsloth, which needs an NVIDIA GPU, and this machine has none",
            hint="`--set trainer=auto` takes the trainer that works here",
        )


@contextlib.contextmanager
def take(
    prepared: Prepared, out: Path, store: Path | None = None, finished: Mapping[str, Path] | None = None
) -> Iterator[Session]:
    """Take the run folder of a recipe, a new one or one to go on in.

    Args:
        store: As of `open_run`.
        finished: Folders of steps that other stores hold, by key.

    Raises:
        FolderError: If the folder was made by another recipe, or cannot be used.
    """
    resolved, plan = prepared.resolved, prepared.plan
    if is_study(out):  # a manifest there would hide the study
        raise FolderError(
            f"`{out}` is the folder of a study, not of a run",
            hint=f"choose another folder with `--out`; `--reuse {out}` takes over what is finished there",
        )
    with Run(out, store) as folder:
        known = folder.manifest()
        if known is not None:
            _refuse_other(known, plan, out)
        if any(step.verb == "judge" and not folder.folder(step).finished for step in plan) and known is not None:
            hint = begun_hint(folder.store, "study") if is_study(folder.store) else begun_hint(out, "run")
            require_judge(resolved.inputs.judge, resolved.recipe, hint)
        folder.write_manifest(_manifest(prepared, known), _with_extras(plan, known))
        yield Session(resolved, plan, folder, takes_turns(resolved.recipe, resolved.model, prepared.machine), finished or {})


@contextlib.contextmanager
def open_again(out: Path) -> Iterator[Session]:
    """Open a run folder to do more steps of its recipe.

    Raises:
        FolderError: If it is not a run folder, or something that its recipe rests on has changed since.
    """
    folder, machine = Run(out), this_machine()
    known = folder.known()
    resolved = resolve(make_recipe(known.recipe, source=str(out)), machine, commit=_commit(known))
    resolved = settled(resolved, known.value.get("judge"))
    plan = make_plan(resolved.recipe, resolved.inputs)
    _refuse_other(known, plan, out)
    with folder:
        yield Session(resolved, plan, folder, takes_turns(resolved.recipe, resolved.model, machine))


def _with_extras(plan: Plan, known: Manifest | None) -> list[Step]:
    """The plan's steps, and further ones of the manifest (held-out questions) that still apply."""
    names = {step.name: step.key for step in plan}
    extras = [step for step in known.steps if step.name not in names and step.part] if known else []
    return [*plan, *(step for step in extras if step.cycle <= plan.recipe.cycles)]


def _as_before(asked: Recipe, known: Manifest | None) -> Recipe:
    """The recipe with each "auto" decided as it was when the folder was made: an API key that came or went since must not
    change the judge in the middle of a curve."""
    if known is None or "asked" not in known.value:
        return asked
    before, settled = known.value["asked"], known.recipe
    update: dict[str, Any] = {
        key: settled[key] for key in ("trainer", "judge") if getattr(asked, key) == before.get(key) == "auto"
    }
    train = {
        key: settled["train"][key]
        for key in ("base", "optimizer")
        if getattr(asked.train, key) == before["train"].get(key) == "auto"
    }
    return asked.model_copy(update=update | {"train": asked.train.model_copy(update=train)})


def _commit(known: Manifest | None) -> Literal["needed", "as it was"]:
    """Whether to pin a model on the hub to a commit. A folder whose recipe names no commit continues without one."""
    model = str(known.recipe["model"]) if known else ""
    return "as it was" if hub.is_name(model) and not hub.is_pinned(model) else "needed"


def _manifest(prepared: Prepared, known: Manifest | None) -> dict[str, Json]:
    asked, resolved, plan, machine = prepared.asked, prepared.resolved, prepared.plan, prepared.machine
    trait = resolved.inputs.trait
    created = known.value["created"] if known else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "asked": asked.model_dump(mode="json"),
        "recipe": resolved.recipe.model_dump(mode="json"),
        "trait": trait.name,
        "colour": trait.colour,
        "summary": trait.summary,
        "model_identity": resolved.inputs.model,
        "judge": asdict(resolved.inputs.judge),
        "planned_usd": judging_usd(plan),
        "choices": list(resolved.choices),
        "machine": {"gpu": machine.gpu, "vram": machine.vram_total, "system": platform.platform()},
        "versions": versions(),
        "created": created,
    }


def _refuse_other(known: Manifest, plan: Plan, out: Path) -> None:
    """Refuse a folder whose finished steps are not this plan's. Steps that are derived from others may be done again.

    Raises:
        FolderError: With the difference.
    """
    if known.format == 1:
        raise FolderError(
            f"`{out}` was made by version 0.1, whose steps have other keys: it cannot be continued",
            hint="report, chat and export still read it; choose another folder with `--out` to go on from its recipe",
        )
    before = {step.name: step.key for step in known.steps}
    others = [step for step in plan if before.get(step.name, step.key) != step.key]
    changed = next((step for step in others if not VERBS[step.verb].derived), None)
    # files may have moved: the keys show whether their content changed
    free = MACHINE_KEYS if changed else MACHINE_KEYS | PLACES
    found = list(differences(known.recipe, plan.recipe.model_dump(mode="json"), free))
    if changed and not found:
        found.append(
            f"step {changed.name}: the trait, prompts, model or judge it rests on has changed, or how this version does it"
        )
    if found:
        raise FolderError(
            f"`{out}` was made by another recipe:\n" + "\n".join(f"  - {difference}" for difference in found),
            hint="choose another folder with `--out`, or set these back: `--set KEY=VALUE`",
        )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str] = frozenset(), prefix: str = ""
) -> Iterator[str]:
    """Differences of two recipes, without keys that may change between sessions and keys that the folder's version did not
    have: if one of those changes a step, the step's key shows it."""
    for key in sorted({*before} & {*now}):
        old, new = before[key], now[key]
        if old == new or prefix + key in free:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, free, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}` is {old!r} in the folder and {new!r} here"
