"""Walk a plan: do every step that is not finished, two lanes side by side, and say what happens as events. Prints nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from iterft_lite.backends.local import Backends
from iterft_lite.backends.processes.child import Child
from iterft_lite.digests import Json
from iterft_lite.engine.store import Seal, Store
from iterft_lite.errors import RunError
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.steps import LANES, Lane, Step
from iterft_lite.experiment.versions import libraries, versions
from iterft_lite.hardware import Gpu, Peak
from iterft_lite.hub import folder_of
from iterft_lite.protocols import Progress
from iterft_lite.stages import base, compose, export, generate, judge, measure, score, seed, train
from iterft_lite.stages.work import Work

CONTEXT_STEP = 64
"""Contexts are rounded up to this many tokens."""


@dataclass(frozen=True)
class StepStarted:
    """A step is being done."""

    step: Step


@dataclass(frozen=True)
class StepProgress:
    """A step has come further."""

    step: Step
    progress: Progress


@dataclass(frozen=True)
class StepFinished:
    """A step is finished; `reused` if an earlier sitting, or another run, did it."""

    step: Step
    seal: Seal
    reused: bool


Event = StepStarted | StepProgress | StepFinished


class _StopLane(Exception):  # noqa: N818  # not an error
    """The run is ending: a lane leaves its step as it is."""


def run(
    plan: Plan,
    store: Store,
    backends: Backends,
    model: str,
    *,
    swap: bool = False,
    reuse: Mapping[str, Path] | None = None,
    after: Literal["close", "keep"] = "close",
) -> Iterator[Event]:
    """Do a plan in a store whose lock is held.

    Args:
        model: Folder or hub name of M[0].
        swap: Trainer and generator do not share the GPU's memory: the one ends before the other begins.
        reuse: Folders of steps that other runs finished, by key; what is among them is not done again.
        after: Whether the backends end with the run, or stay for another; they always end when it fails.

    Yields:
        Events, in the order in which they happen.

    Raises:
        RunError: The first failure of either lane; finished steps and rows are kept.
    """
    walk = _Walk(plan, store, backends, model, swap, reuse or {})
    lanes = [threading.Thread(target=walk.lane, args=(lane,), daemon=True) for lane in sorted(set(LANES.values()))]
    for thread in lanes:
        thread.start()
    try:
        ended = 0
        while ended < len(lanes):
            event = walk.events.get()
            if event is None:
                ended += 1
            else:
                yield event
    finally:
        walk.stop()
        for thread in lanes:
            thread.join()
        if after == "close":
            backends.close()
    if walk.failure is not None:
        raise walk.failure


class _Walk:
    """What the lanes of a run share."""

    def __init__(self, plan: Plan, store: Store, backends: Backends, model: str, swap: bool, reuse: Mapping[str, Path]) -> None:
        self.plan = plan
        self.store = store
        self.backends = backends
        self.place = model
        self.swap = swap
        self.reuse = reuse
        self.context = context_needed(plan)
        self.gpu = Gpu()
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.failure: BaseException | None = None
        self._finished: set[str] = set()
        self._written: dict[str, Path] = {}
        """By exported model that was written again, its file."""
        self._resting: dict[str, float] = {}
        """By step whose verdicts are on their way, when to look again (monotonic seconds)."""
        self._since: dict[str, float] = {}
        """By step that is being done, up to when its seconds are counted."""
        self._changed = threading.Condition()
        self._stopping = False

    def lane(self, lane: Lane) -> None:
        """Do the lane's steps, each as soon as what it reads is finished; what rests is taken up again."""
        try:
            todo = [step for step in self.plan if step.lane == lane]
            while todo:
                # a batch takes hours: the judge goes on with whatever is ready, the device keeps its order
                step = self._next(todo if lane == "judge" else todo[:1])
                if self._do(step):
                    todo = [other for other in todo if other is not step]
                    self._prune()
        except _StopLane:
            pass
        except BaseException as error:
            if not self._stopping:
                self.failure = error
        finally:
            if self.failure is not None:
                self.stop()
            self.events.put(None)

    def stop(self) -> None:
        """Have both lanes end soon; a lane inside a backend's call is freed by ending the backend."""
        with self._changed:
            unfinished = len(self._finished) < len(self.plan.steps)
            self._stopping = True
            self._changed.notify_all()
        if unfinished:
            self.backends.close()

    def _next(self, steps: Sequence[Step]) -> Step:
        """The first of some steps whose inputs are finished and that does not rest, once there is one."""
        with self._changed:
            while True:
                self._go_on()
                ready = [step for step in steps if {name for _, name in step.inputs} & self.plan.steps.keys() <= self._finished]
                rests = {step.name: self._resting.get(step.name, 0.0) - time.monotonic() for step in ready}
                for step in ready:
                    if rests[step.name] <= 0:
                        return step
                self._changed.wait(min(rests.values(), default=None))

    def _go_on(self) -> None:
        if self._stopping:
            raise _StopLane

    def _do(self, step: Step) -> bool:
        """Do a step; False if it rests."""
        folder = self.store.folder(step)
        seal = folder.seal_of()
        if seal is None and step.key in self.reuse:
            seal = folder.adopt(self.reuse[step.key])
        if seal is not None:
            folder.verify(pruned=step.verb == "export")
            self.events.put(StepFinished(step, seal, reused=True))
        else:
            for source in self.plan.inputs(step).values():
                if source.verb == "export":
                    self._restore(source)
            if step.name not in self._resting:
                self.events.put(StepStarted(step))
                self._since[step.name] = time.monotonic()
            folder.begin()
            try:
                with Peak(self.gpu, self.backends.pids) as peak:
                    facts = self._stage(step, self._work(step))
            except judge.NotYet as patience:
                self._resting[step.name] = time.monotonic() + patience.seconds
                folder.spend(self._seconds(step))
                return False
            except BaseException:
                folder.spend(self._seconds(step))
                raise
            self._go_on()
            if peak.bytes and step.lane == "device":
                facts = {**facts, "peak_vram": peak.bytes}  # all of this run's processes together
            seconds, made_by = self._seconds(step), versions(libraries(step, self.plan.recipe))
            self.events.put(StepFinished(step, folder.seal(seconds, facts, _digests(facts), made_by), reused=False))
        with self._changed:
            self._finished.add(step.name)
            self._changed.notify_all()
        return True

    def _seconds(self, step: Step) -> float:
        """Seconds since this was asked last, or since the step began."""
        since, now = self._since[step.name], time.monotonic()
        self._since[step.name] = now
        return now - since

    @cached_property
    def model(self) -> str:
        """Folder of M[0]; fetched from the hub when it is first needed."""
        return folder_of(self.place)

    def _work(self, step: Step) -> Work:
        def report(progress: Progress) -> None:
            self._go_on()
            self.events.put(StepProgress(step, progress))

        inputs = {role: self.store.folder(source).path for role, source in self.plan.inputs(step).items()}
        return Work(step, self.store.folder(step).path, inputs, report)

    def _stage(self, step: Step, work: Work) -> dict[str, Json]:
        """Do a step through its stage and backends; its facts."""
        recipe, backends = self.plan.recipe, self.backends
        stages: Mapping[str, Callable[[], dict[str, Json]]] = {
            "base": lambda: base.run(work, backends.trainer, self.model, recipe.train, recipe.row.loss),
            "seed": lambda: seed.run(work),
            "generate": lambda: generate.run(work, backends.generator),
            "compose": lambda: compose.run(work),
            "train": lambda: train.run(work, backends.trainer, self.model, TrainSettings(**step.params["settings"])),
            "export": lambda: export.run(work, backends.exporter, backends.generator, self.model),
            "answer": lambda: generate.run(work, backends.generator),
            "judge": lambda: judge.run(work, backends.judge),
            "measure": lambda: measure.run(work, backends.generator, lambda role: self._load(step, role)),
            "score": lambda: score.run(work),
        }
        if self.swap and step.verb in ("load_base", "train"):
            self._free("generator", "exporter")
        if self.swap and step.verb in ("export", "training_samples", "evaluate_samples", "text_metrics"):
            self._free("trainer")
        if not self.swap and step.verb in ("export", "training_samples", "evaluate_samples", "text_metrics"):
            self._base_first()
        if step.verb in ("training_samples", "evaluate_samples"):
            self._load(step, "model")
        return stages[step.verb]()

    def _base_first(self) -> None:
        """Where a GPU is shared, the base takes its memory before the generator takes what is left: also in a later sitting."""
        done = {step.name for step in self.plan if step.name in self._finished or step.key in self.reuse}
        to_train = any(step.verb == "train" and step.name not in done for step in self.plan)
        if self.gpu.there and to_train and not getattr(self.backends.trainer, "running", True):
            self.backends.trainer.load(self.model, self.plan.recipe.train)

    def _free(self, *names: str) -> None:
        """End backends and wait until the GPU has their memory back: the next one plans with what is free."""
        running = [backend for name in names if isinstance(backend := getattr(self.backends, name), Child) and backend.running]
        if running:
            self.backends.close(*names)
            self.gpu.wait_for_release()

    def _load(self, step: Step, role: str) -> None:
        """Make the exported model of an input the generator's current one."""
        source = self.plan.inputs(step)[role]
        gguf, lora = self._exported(source)
        slots = self.plan.recipe.slots
        self.backends.generator.load(
            gguf, lora, self.model, slots=None if slots == "auto" else slots, context=self.context, exact=False
        )

    def _restore(self, step: Step) -> None:
        """Write an exported model again that `keep`, or who emptied the cache of bases, removed."""
        folder = self.store.folder(step)
        if not (folder.complete() and self._exported(step)[0].exists()):
            folder.sweep()
            work = replace(self._work(step), report=lambda progress: self.events.put(StepProgress(step, progress)))
            made = export.run(work, self.backends.exporter, self.backends.generator, self.model)
            folder.take_again(_digests(made))
            self._written[step.name] = folder.path / made["gguf"]

    def _exported(self, step: Step) -> tuple[Path, Path | None]:
        """As `exported_files`; a cached base may lie elsewhere than when the step was finished."""
        gguf, lora = exported_files(self.store, step)
        return self._written.get(step.name, gguf), lora

    def _prune(self) -> None:
        """Remove merged files that no unfinished step reads, as `keep` says."""
        keep = self.plan.recipe.keep
        if keep == "all":
            return
        exports = [step for step in self.plan if step.verb == "export"]
        for step in exports if keep == "adapters" else exports[:-1]:
            readers = [reader.name for reader in self.plan if step.name in dict(reader.inputs).values()]
            with self._changed:
                if step.name not in self._finished or not self._finished.issuperset(readers):
                    continue
            merged = self.store.folder(step).path / "model.gguf"
            merged.unlink(missing_ok=True)


def exported_files(store: Store, step: Step) -> tuple[Path, Path | None]:
    """The GGUF of a finished export, and the LoRA GGUF to lay over it, if any.

    Raises:
        RunError: If the step is not finished.
    """
    folder = store.folder(step)
    seal = folder.seal_of()
    if seal is None:
        raise RunError(f"`{step.name}` is not finished")
    lora = seal.facts["lora"]
    return folder.path / seal.facts["gguf"], folder.path / lora if lora else None


def _digests(facts: Mapping[str, Json]) -> dict[str, str]:
    """SHA-256 by file name of a merged file, as taken while it was written."""
    return {facts["gguf"]: facts["sha256"]} if facts.get("sha256") else {}


def context_needed(plan: Plan) -> int:
    """Tokens that one sequence of this plan may take: the longest prompt with the longest answer, rounded up.

    A prompt has less than a token to two bytes, and a chat template 64 tokens. What the model's template takes beyond them the
    generator adds, which has the tokenizer.
    """
    needed = 0
    for step in plan:
        if step.verb in ("training_samples", "evaluate_samples"):
            longest = max(map(_size, step.params["prompts"].values()), default=0)
            needed = max(needed, step.params["sampling"]["max_tokens"] + longest // 2 + CONTEXT_STEP)
        elif step.verb == "text_metrics":
            texts = [str(row.get("text") or row.get("messages")) for row in [*step.params["high"], *step.params["low"]]]
            needed = max(needed, max(map(_size, texts), default=0) // 2 + CONTEXT_STEP)
    return -(-needed // CONTEXT_STEP) * CONTEXT_STEP


def _size(text: str) -> int:
    return len(text.encode())
