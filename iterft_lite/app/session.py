"""Open a run folder for a recipe: a new one, or one to go on in."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from iterft_lite import hub
from iterft_lite.backends.local import Backends, open_backends
from iterft_lite.digests import Json
from iterft_lite.engine.run import Event, StepFinished, StepProgress, StepStarted, run
from iterft_lite.engine.store import Store, finished_steps
from iterft_lite.errors import FolderError
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.recipe import MACHINE_KEYS, Recipe, make_recipe, read_recipe
from iterft_lite.experiment.versions import versions
from iterft_lite.machine.estimate import judging_usd, takes_turns, vram_needed
from iterft_lite.machine.resolve import Machine, Resolved, resolve, this_machine
from iterft_lite.machine.timing import Stopwatch, add_to_table, setup_of

PLACES = frozenset({"model", "trait", "seeds.path", "prompts.path", "mix.path"})
"""Recipe keys that say where something is; what it holds is in the keys of the steps."""


@dataclass(frozen=True)
class Opened:
    """A run folder whose lock is held.

    Attributes:
        reuse: Steps that other runs finished (see `run`).
    """

    resolved: Resolved
    plan: Plan
    store: Store
    swap: bool
    reuse: Mapping[str, Path] = field(default_factory=dict)

    def backends(self) -> Backends:
        """The backends that the recipe asks for."""
        inputs = self.resolved.inputs
        shared = self.resolved.recipe.vram != "swap" and not self.swap
        need = vram_needed(self.resolved.recipe, self.resolved.model) if shared and this_machine().gpu else None
        keep_free = need.training if need else 0
        seeds = inputs.seeds if self.resolved.recipe.seeds else ()
        return open_backends(self.resolved.recipe, inputs.trait, inputs.judge, self.store.logs, keep_free, seeds=seeds)

    def stopwatch(self, origin: Literal["run", "doctor"] = "run") -> Stopwatch:
        """What times this run's steps."""
        return Stopwatch(self.plan, setup_of(self.resolved, this_machine(), swap=self.swap), origin)

    def events(self, backends: Backends | None = None, watch: Stopwatch | None = None) -> Iterator[Event]:
        """Do what is left to do, and note how long it took for plans to come.

        Args:
            backends: Those of an earlier run, which stay open; its own if None.
            watch: Times the steps; one of its own if None.
        """
        after: Literal["keep", "close"] = "keep" if backends else "close"
        model, found = self.resolved.model, backends or self.backends()
        events = run(self.plan, self.store, found, model, swap=self.swap, reuse=self.reuse, after=after)
        return _timed(events, watch or self.stopwatch())


def _timed(events: Iterator[Event], watch: Stopwatch) -> Iterator[Event]:
    """The same events; how long the steps took is kept, also of a sitting that fails.

    Whatever goes wrong in that: it is a note on the side and must never hurt a run.
    """
    try:
        for event in events:
            with contextlib.suppress(Exception):
                _note(watch, event, time.monotonic())
            yield event
    finally:
        with contextlib.suppress(Exception):
            add_to_table(watch.samples)


def _note(watch: Stopwatch, event: Event, now: float) -> None:
    match event:
        case StepStarted(step):
            watch.began(step, now)
        case StepProgress(step, progress):
            watch.moved(step, progress, now)
        case StepFinished(step, seal, reused):
            watch.done(step, seal, reused, now)


@contextlib.contextmanager
def open_run(path: Path, overrides: Iterable[str], out: Path, reuse: Iterable[Path] = ()) -> Iterator[Opened]:
    """Resolve and plan a recipe, and take its run folder.

    Args:
        reuse: Run folders, or folders of run folders, whose finished steps are taken over where they are the same.

    Raises:
        UserError: If the recipe, or something it names, cannot be used; or the folder was made by another recipe.
    """
    asked = read_recipe(path, overrides)
    machine = this_machine()
    resolved = resolve(_as_before(asked, Store(out)), machine, commit=_commit(Store(out).manifest()))
    plan = make_plan(resolved.recipe, resolved.inputs)
    finished = {key: folder for root in reuse for key, folder in finished_steps(root).items()}
    with Store(out) as store:
        known = store.manifest()
        if known is not None:
            _refuse_other(known, plan, out)
        store.write_manifest(_manifest(asked, resolved, plan, machine, known))
        yield Opened(resolved, plan, store, takes_turns(resolved.recipe, resolved.model, machine), finished)


@contextlib.contextmanager
def open_again(out: Path) -> Iterator[Opened]:
    """Take a run folder for more of what it was made for.

    Raises:
        FolderError: If it is none, or what its recipe rests on has changed since.
    """
    store, machine = Store(out), this_machine()
    known = store.run_manifest()
    resolved = resolve(make_recipe(known["recipe"], source=str(out)), machine, commit=_commit(known))
    plan = make_plan(resolved.recipe, resolved.inputs)
    _refuse_other(known, plan, out)
    with store:
        yield Opened(resolved, plan, store, takes_turns(resolved.recipe, resolved.model, machine))


def _as_before(asked: Recipe, store: Store) -> Recipe:
    """The recipe with the "auto"s decided as they were when the folder was made: a key that has come or gone since then
    must not change who judges half of a curve."""
    known = store.manifest()
    if known is None or "asked" not in known:
        return asked
    before, settled = known["asked"], known["recipe"]
    update: dict[str, Any] = {
        key: settled[key] for key in ("trainer", "judge") if getattr(asked, key) == before.get(key) == "auto"
    }
    train = {
        key: settled["train"][key]
        for key in ("base", "optimizer")
        if getattr(asked.train, key) == before["train"].get(key) == "auto"
    }
    return asked.model_copy(update=update | {"train": asked.train.model_copy(update=train)})


def _commit(known: Mapping[str, Any] | None) -> Literal["needed", "as it was"]:
    """Whether a model on the hub is pinned to a commit: not in a folder of an earlier version, which goes on as it was."""
    model = str(known["recipe"]["model"]) if known and "recipe" in known else ""
    return "as it was" if hub.is_name(model) and not hub.is_pinned(model) else "needed"


def _manifest(
    asked: Recipe, resolved: Resolved, plan: Plan, machine: Machine, known: Mapping[str, Any] | None
) -> dict[str, Json]:
    trait = resolved.inputs.trait
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
        "steps": [
            {"verb": step.verb, "cycle": step.cycle, "part": step.part, "inputs": step.inputs, "key": step.key} for step in plan
        ],
        "machine": {"gpu": machine.gpu, "vram": machine.vram_total, "system": platform.platform()},
        "versions": versions(),
        "created": known["created"] if known else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _refuse_other(known: Mapping[str, Any], plan: Plan, out: Path) -> None:
    """Refuse a folder whose finished steps are not this plan's.

    Raises:
        FolderError: With the difference.
    """
    before = {(row["verb"], row["cycle"], row["part"]): row["key"] for row in known["steps"]}
    changed = next((step for step in plan if before.get((step.verb, step.cycle, step.part), step.key) != step.key), None)
    # files may have been moved: whether they hold something else is told by the keys
    free = MACHINE_KEYS if changed else MACHINE_KEYS | PLACES
    differences = list(_differences(known["recipe"], plan.recipe.model_dump(mode="json"), free))
    if changed and not differences:
        differences.append(
            f"step {changed.name}: the trait, prompts, model or judge it rests on has changed, or how this version does it"
        )
    if differences:
        raise FolderError(
            f"`{out}` was made by another recipe:\n" + "\n".join(f"  - {difference}" for difference in differences),
            hint="choose another folder with `--out`, or set these back: `--set KEY=VALUE`",
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str], prefix: str = "") -> Iterator[str]:
    """What two recipes differ in, but for what is free to change between sittings and for keys that the folder's version did
    not have: whether those change a step is told by its key."""
    for key in sorted({*before} & {*now}):
        old, new = before[key], now[key]
        if old == new or prefix + key in free:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, free, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}` is {old!r} in the folder and {new!r} here"
