"""A sweep: the cells of a study, side by side where there is room, over one store.

The coordinator knows cells: which are left, which may be tried again, which are a result as they failed. Each place (a GPU, or
the CPU) has resident backends, and one or two chains that take a cell each and walk its plan (`engine/run.py`). Judging is in
one place for all: one budget, one pace, one cache. Whatever is finished is finished for every cell that asks for it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from iterft_lite.app.check_judge import begun_hint
from iterft_lite.app.session import needs_gpu, take
from iterft_lite.app.study_calibrate import Calibrated, OnProbe, calibrated
from iterft_lite.app.study_estimate import costs_by_key
from iterft_lite.app.study_plan import Calibration, PlannedCell, StudyPlan, refuse_other, steps_of, write_study
from iterft_lite.app.sweep_places import Bench, Place, Seat, signature_of
from iterft_lite.app.sweep_time import TimeLeft
from iterft_lite.backends.judge.identity import has_ended
from iterft_lite.digests import Json
from iterft_lite.engine.manifest import finished_in, finished_steps
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
)
from iterft_lite.engine.study import CELLS, STOP, CellState, State, StudyFolder, SweepState
from iterft_lite.errors import RecipeError, RunError, UserError, failure_of
from iterft_lite.experiment.grid import chosen
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.files import FolderLock, disk_errors

ATTEMPTS = 3
"""How often a cell is begun whose machine or provider failed."""

PAUSE = 10.0
"""Seconds of rest after a first failure of the machine or the provider, twice as many after a second."""

WRITE_EVERY = 1.0
"""Seconds between two writings of the state, at least."""

MOST_USD = 1e6
"""What no step has cost."""

ALIKE = 2
"""First cells that fail alike, none having succeeded, stop the sweep."""


# -- events


@dataclass(frozen=True)
class CellStarted:
    """A cell is being run at a place."""

    cell: str
    place: str
    attempt: int


@dataclass(frozen=True)
class CellEvent:
    """Something has happened in a cell's run."""

    cell: str
    event: Event


@dataclass(frozen=True)
class CellEnded:
    """A cell is not continued for now: it is done, has failed, or is to be tried again ("queued")."""

    cell: str
    state: CellState


SweepEvent = CellStarted | CellEvent | CellEnded


# -- the sweep


class Sweep:
    """Runs the cells of a study. Its lock is held (`open_sweep`).

    Args:
        folder: The study's.
        planned: All cells of the study's file.
        bench: Where they can run; at least one place.
        chosen: Names of the cells that are to be run now; all if None.
        retry: Names of cells that failed, or ended in a result, and are to be tried again nevertheless.
        keep_going: Go on although the first cells fail alike.
        forecast: Seconds of a step, by key, where they are known.
        pause: Seconds of rest after a failure of the machine or the provider.
        reuse: Folders of finished steps that other stores hold, by key.
    """

    def __init__(
        self,
        folder: StudyFolder,
        planned: Sequence[PlannedCell],
        bench: Bench,
        *,
        chosen: Iterable[str] | None = None,
        retry: Iterable[str] = (),
        keep_going: bool = False,
        forecast: Mapping[str, float] | None = None,
        pause: float = PAUSE,
        reuse: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.notes: list[str] = []
        """What a user should know of how the cells were found."""
        self.planned = {each.name: each for each in planned}
        self.choices = tuple(dict.fromkeys(choice for each in planned for choice in each.prepared.resolved.choices))
        """What was decided for the cells and why, a sentence each: the judge's address is among them."""
        self._bench = bench
        names = set(self.planned if chosen is None else chosen)
        self._keep_going = keep_going
        self._pause = pause
        self._reuse = reuse or {}
        self._shared = Shared(each.plan for each in planned if each.name in names)
        self._events: queue.Queue[SweepEvent | None] = queue.Queue()
        self._changed = threading.Condition()
        self._stopping = False
        self._common: str = ""
        """Why the whole sweep cannot go on; "" while it can."""
        self._resting: dict[str, float] = {}
        self._results: dict[str, dict[str, Json]] = {}
        """By key of a step that ended in a result, its failure."""
        self._context = max((context_needed(each.plan) for each in planned), default=0)
        """Of all cells: residents are changed for another model, not for a longer text."""
        self._signatures = {each.name: signature_of(each.prepared.resolved, self._context) for each in planned}
        distinct = steps_of(each.plan for each in planned)
        self._steps = distinct.distinct
        self._finished = self._steps.keys() & finished_steps(folder.root).keys() if folder.root.is_dir() else set()
        self._usd = _dollars(folder, [self._steps[key] for key in self._finished])
        self._left = TimeLeft(self._steps, forecast or {}, sum(_chains(seat.place, planned) for seat in bench.seats))
        self.cells = {name: self._first_state(each, set(retry)) for name, each in self.planned.items()}
        self._queue = [name for name, state in self.cells.items() if state.state == "queued" and name in names]

    def _first_state(self, planned: PlannedCell, retry: set[str]) -> CellState:
        """Where a cell is before anything is done."""
        steps = [step.key for step in planned.plan]
        finished = sum(key in self._finished for key in steps)
        cycles = planned.prepared.resolved.recipe.cycles
        state = replace(self._scored(planned), steps=len(steps), finished=finished, cycles=cycles)
        manifest = self.folder.run(planned.name).manifest()
        if finished == len(steps) and manifest is not None and {step.key for step in manifest.steps} >= set(steps):
            return replace(state, state="done")
        failure = self.folder.failure(planned.name)
        if failure and failure.get("kind") == "result" and planned.name not in retry:
            return replace(state, state="result", failure=failure, step=str(failure.get("step", "")))
        return state

    def _scored(self, planned: PlannedCell) -> CellState:
        """A cell's last scores, as far as its steps are finished."""
        state = CellState()
        for step in planned.plan:
            if step.verb == "aggregate" and not step.part and step.key in self._finished:
                found = self.folder.run(planned.name).folder(step).completion()
                state = state if found is None else _with_scores(state, step, found.results)
        return state

    # -- what is reported

    def state(self) -> SweepState:
        """Where everything is now."""
        with self._changed:
            cells = dict(self.cells)
        return SweepState(
            cells=cells,
            written=time.time(),
            ended=self._stopping,
            host=platform.node(),
            pid=os.getpid(),
            workers=tuple(seat.place.name for seat in self._bench.seats),
            usd=round(self._usd, 6),
            steps=len(self._steps),
            finished=len(self._finished),
            seconds_left=self._left.seconds(self._wanted() - self._finished - self._reuse.keys()),
        )

    def _wanted(self) -> set[str]:
        """Keys of the steps of all cells that are run or to be run."""
        going = [name for name, state in self.cells.items() if state.state in ("queued", "running", "done")]
        return {step.key for name in going for step in self.planned[name].plan}

    def failed(self) -> dict[str, CellState]:
        """Cells that failed, by name; those that ended in a result are not among them."""
        return {name: state for name, state in self.cells.items() if state.state == "failed"}

    # -- going on

    def events(self) -> Iterator[SweepEvent]:
        """Run what is left to run.

        Yields:
            What happens, in the order in which it does.

        Raises:
            RunError: If somebody asked the sweep to stop, or the first cells failed alike. What was finished is kept.
        """
        self.folder.forget_stop()
        chains = [seat for seat in self._bench.seats for _ in range(_chains(seat.place, list(self.planned.values())))]
        threads = [threading.Thread(target=self._chain, args=(seat,), daemon=True) for seat in chains]
        for thread in threads:
            thread.start()
        written, open_chains = 0.0, len(threads)
        try:
            while open_chains:
                with contextlib.suppress(queue.Empty):
                    event = self._events.get(timeout=WRITE_EVERY)
                    if event is None:
                        open_chains -= 1
                    else:
                        yield event
                if time.monotonic() - written >= WRITE_EVERY:
                    self._look_for_stop()
                    self.folder.write_state(self.state())
                    written = time.monotonic()
            if self._queue and not self._stopping:
                self._common = "no place is left to run on: all workers are lost"
        finally:
            self._stop()
            for thread in threads:
                thread.join()
            self._settle()
            self.folder.write_state(self.state())
        if self._common:
            raise RunError(self._common, hint="everything finished is kept: the same command continues")

    def _look_for_stop(self) -> None:
        if (self.folder.root / STOP).exists():
            self._stop("the sweep was asked to stop")

    def _stop(self, reason: str = "") -> None:
        """Have all chains end soon."""
        with self._changed:
            self._common = self._common or reason
            self._stopping = True
            self._changed.notify_all()
        self._bench.close()

    def _settle(self) -> None:
        """Cells that were being run when the sweep ended are to be run."""
        for name, state in self.cells.items():
            if state.state == "running":
                self.cells[name] = replace(state, state="queued", worker="", step="", done=0, total=0)

    # -- chains

    def _chain(self, seat: Seat) -> None:
        """Take one cell after the other to a place."""
        try:
            while (self._stopping or seat.usable()) and (name := self._next(seat)) is not None:
                self._run_cell(seat, self.planned[name])
        except BaseException as error:
            self._stop(f"the sweep itself failed: {type(error).__name__}: {error}")
        finally:
            self._events.put(None)

    def _next(self, seat: Seat) -> str | None:
        """The cell that a chain takes next, once there is one; None if there is none left."""
        with self._changed:
            while not self._stopping:
                name = self._best(seat)
                if name is not None:
                    self._queue.remove(name)
                    seat.running.add(name)
                    known = self.cells[name]
                    self.cells[name] = replace(
                        known, state="running", worker=seat.place.name, attempts=known.attempts + 1, failure=None
                    )
                    return name
                if not self._queue and not any(other.running for other in self._bench.seats):
                    break
                self._changed.wait(0.5)
            self._changed.notify_all()
            return None

    def _best(self, seat: Seat) -> str | None:
        """The first queued cell that can be run at a place now; one whose next step nobody else is about to make comes before
        one that would have to wait for it."""
        now = time.monotonic()
        ready = [name for name in self._queue if self._resting.get(name, 0.0) <= now and self._fits(seat, name)]
        busy = {self._next_key(other) for each in self._bench.seats for other in each.running}
        free = [name for name in ready if self._next_key(name) not in busy]
        return next(iter([*free, *ready]), None)

    def _fits(self, seat: Seat, name: str) -> bool:
        """Whether a cell can use what the cells at a place use, if there are any."""
        return all(self._signatures[other] == self._signatures[name] for other in seat.running)

    def _next_key(self, name: str) -> str:
        """The key of a cell's first unfinished step of the device."""
        steps = self.planned[name].plan
        return next((step.key for step in steps if step.queue == "device" and step.key not in self._finished), name)

    def _run_cell(self, seat: Seat, planned: PlannedCell) -> None:
        """Run a cell to its end, or to its failure."""
        name = planned.name
        self._events.put(CellStarted(name, seat.place.name, self.cells[name].attempts))
        failure = self._known_result(planned)
        try:
            if failure is None:
                failure = self._walk(seat, planned)
        finally:
            with self._changed:
                seat.running.discard(name)
                self._changed.notify_all()
        if not self._stopping:
            self._end(planned, failure)

    def _known_result(self, planned: PlannedCell) -> dict[str, Json] | None:
        """The result that another cell's same step came to."""
        return next((self._results[step.key] for step in planned.plan if step.key in self._results), None)

    def _walk(self, seat: Seat, planned: PlannedCell) -> dict[str, Json] | None:
        """Walk a cell's plan.

        Returns:
            How it failed; None if it did not.
        """
        failure: dict[str, Json] | None = None
        try:
            with contextlib.ExitStack() as stack:
                out, store = self.folder.run(planned.name).root, self.folder.root
                session = stack.enter_context(take(planned.prepared, out, store, self._reuse))
                executor = self._bench.executor(seat, session, self._context)
                events = stack.enter_context(contextlib.closing(session.events(executor, shared=self._shared)))
                for event in events:
                    self._note(planned, event)
                    if isinstance(event, StepFailed):
                        failure = failure_record(event)
                        if event.kind == "result":
                            self._results[event.step.key] = failure
                    if self._stopping:
                        break
        except Exception as error:
            return failure or _failure(error)
        finally:
            if self._stopping:  # ending the backends under a step is no failure of the cell's
                (self.folder.root / CELLS / planned.name / FAILURE).unlink(missing_ok=True)
        return failure

    def _end(self, planned: PlannedCell, failure: dict[str, Json] | None) -> None:
        """Note how a cell ended, and whether it is tried again."""
        name, state = planned.name, self.cells[planned.name]
        how: State = "done"
        if failure is not None:
            kind = failure["kind"]
            again = kind in ("machine", "provider") and state.attempts < ATTEMPTS
            how = "queued" if again else "result" if kind == "result" else "failed"
        with self._changed:
            step = str(failure["step"]) if failure else ""
            self.cells[name] = replace(state, state=how, failure=failure, worker="", step=step, done=0, total=0)
            if how == "queued":
                self._resting[name] = time.monotonic() + self._pause * state.attempts
                self._queue.append(name)
            ended = [self.cells[other] for other in self.planned if self.cells[other].state in ("done", "result", "failed")]
            self._changed.notify_all()
        if how in ("result", "failed"):
            others = [self.planned[other].plan for other in self.planned if self.cells[other].state in ("queued", "running")]
            self._shared.drop(planned.plan, others, self.folder.root)
        self._events.put(CellEnded(name, self.cells[name]))
        failures = [other.failure for other in ended if other.state == "failed" and other.failure]
        if not self._keep_going and len(failures) == len(ended) >= ALIKE and len({str(f["message"]) for f in failures}) == 1:
            self._stop(
                f"the first {len(failures)} cells failed alike, and none has succeeded: {failures[0]['message']}"
                " (`--keep-going` goes on nevertheless)"
            )

    # -- the state

    def _note(self, planned: PlannedCell, event: Event) -> None:
        """Take an event into the state, and tell it."""
        with self._changed:
            self.cells[planned.name] = self._moved(planned, self.cells[planned.name], event)
        self._events.put(CellEvent(planned.name, event))

    def _moved(self, planned: PlannedCell, state: CellState, event: Event) -> CellState:
        match event:
            case StepStarted(step):
                return replace(state, step=step.name, done=0, total=0)
            case StepProgress(step, progress):
                return replace(state, step=step.name, done=progress.done, total=progress.total)
            case StepFinished(step, completion, reused):
                if not reused:
                    self._left.took(step, completion.seconds)
                    self._usd += _usd_of(completion.results) if step.verb == "judge" else 0.0
                self._finished.add(step.key)
                finished = sum(each.key in self._finished for each in planned.plan)
                return _with_scores(replace(state, finished=finished), step, completion.results)
            case _:
                return state


def _with_scores(state: CellState, step: Step, results: Mapping[str, Json]) -> CellState:
    """A cell's state with what an aggregate step came to."""
    if step.verb != "aggregate" or step.part or step.cycle < state.cycle:
        return state
    return replace(state, cycle=step.cycle, score=mean_of(results, "trait"), coherence=mean_of(results, "coherence"))


def mean_of(results: Mapping[str, Json], scale: str) -> float | None:
    """The mean of a scale in what an aggregate step came to; None where nothing was scored, or something else stands there."""
    found = results.get(scale)
    mean = found.get("mean") if isinstance(found, Mapping) else None
    return float(mean) if isinstance(mean, (int, float)) and 0 <= mean <= 100 else None


def _usd_of(results: Mapping[str, Json]) -> float:
    """What a judge step has cost, dollars."""
    usd = results.get("usd")
    return float(usd) if isinstance(usd, (int, float)) and 0 <= usd < MOST_USD else 0.0


def _failure(error: Exception) -> dict[str, Json]:
    """A failure outside of any step, as it stands in a run's folder."""
    return {"step": "", **asdict(failure_of(error))}


def _dollars(folder: StudyFolder, finished: Iterable[Step]) -> float:
    """What the judging of finished steps has cost."""
    run = folder.run("")
    found = (run.folder(step).completion() for step in finished if step.verb == "judge")
    return sum(_usd_of(each.results) for each in found if each is not None)


def _chains(place: Place, planned: Sequence[PlannedCell]) -> int:
    """How many cells are run side by side at a place."""
    return max(1, min(place.chains, len(planned)))


# -- opening


@dataclass(frozen=True)
class Asked:
    """What a user says of a sweep besides the study.

    Attributes:
        only: `key=value` texts: the cells that are run now.
        limit: How many cells are run now at most; all if None.
        retry: `failed`, `lost`, or names of cells.
        keep_going: Go on although the first cells fail alike.
        reuse: Run folders, studies, or folders of them, whose finished steps are reused where they are the same.
    """

    only: tuple[str, ...] = ()
    limit: int | None = None
    retry: tuple[str, ...] = ()
    keep_going: bool = False
    reuse: tuple[Path, ...] = ()


@contextlib.contextmanager
def open_sweep(
    study: StudyPlan, out: Path, places: Sequence[Place], asked: Asked | None = None, on_event: OnProbe | None = None
) -> Iterator[Sweep]:
    """Take a study's folder, find the seed rows that its file leaves open, and plan its cells.

    Args:
        places: Where cells can run.
        on_event: Takes what happens in a calibration's probes.

    Raises:
        UserError: If a cell cannot be planned, `asked` names none, the study's judge was switched off since it began, or the
            folder is another study's. Nothing was done then.
        RunError: If a calibration fails.
    """
    asked, folder = asked or Asked(), StudyFolder(out)
    refuse_other(study, folder)
    _refuse_unknown(study, folder, asked)
    reuse = finished_in(asked.reuse)
    guessed = study.planned(study.guessed(), folder)  # problems of a cell are reported before anything is done
    _refuse_without_gpu(guessed, folder, reuse)
    _refuse_ended(guessed, folder, reuse)
    with locked(folder), contextlib.closing(Bench(places, out / "logs")) as bench:
        found = Calibrated(study.cells)
        if study.calibrations:
            found = calibrated(study, _searched(study, folder, asked), folder, bench, guessed, on_event, reuse)
        planned = study.planned(found.cells, folder) if study.calibrations else guessed
        write_study(study, planned, folder, found.records)
        names = [cell.name for cell in chosen(found.cells, asked.only)] if asked.only else [each.name for each in planned]
        forecast = {key: cost.seconds.mid for key, cost in costs_by_key(planned).items() if cost.seconds.mid}
        sweep = Sweep(
            folder,
            planned,
            bench,
            chosen=names[: asked.limit],
            retry=_retried(folder, asked.retry),
            keep_going=asked.keep_going,
            forecast=forecast,
            reuse=reuse,
        )
        sweep.notes = list(found.notes)
        yield sweep


def _refuse_unknown(study: StudyPlan, folder: StudyFolder, asked: Asked) -> None:
    """Refuse cells that `--only` and `--retry` name and the study does not have.

    Seed rows that are still to be found are not known yet, and with them what cells are called.

    Raises:
        RecipeError: With what there is.
    """
    only = [text for text in asked.only if not (study.calibrations and re.match(r"\s*seed_rows\s*=", text))]
    if only:
        chosen(study.cells, only)
    begun = folder.cells() if folder.manifest() else []
    names = {cell.name for cell in (begun if study.calibrations else study.cells)}
    unknown = [text for text in asked.retry if text not in {"failed", "lost", *names}]
    if unknown:
        hint = "`iterft sweep plan STUDY --cells` lists them"
        if study.calibrations:
            hint = "cells have their names once their seed rows are found: `iterft sweep status DIR` lists them then"
        raise RecipeError([f"the study has no cell `{text}`" for text in unknown], source="--retry", hint=hint)


def _refuse_without_gpu(planned: Sequence[PlannedCell], folder: StudyFolder, reuse: Mapping[str, Path]) -> None:
    """Refuse cells whose trainings need a GPU where there is none.

    Raises:
        UserError: With how many there are.
    """
    left = _unfinished([each.plan for each in planned if needs_gpu(each.prepared)], "train", folder, reuse)
    if left:
        raise UserError(
            f"{left} of {len(planned)} cells are trained with Unsloth, which needs an NVIDIA GPU, and this machine has none",
            hint="`--set trainer=auto` takes the trainer that works here; `--on ray:HOST:PORT` goes from a node with a GPU",
        )


def _refuse_ended(planned: Sequence[PlannedCell], folder: StudyFolder, reuse: Mapping[str, Path]) -> None:
    """Refuse to go on with a study whose judge was switched off since it began: its later cells could only be judged by
    another one, on another scale.

    Raises:
        UserError: With the way to another judge.
    """
    judges = [each.prepared.resolved.inputs.judge for each in planned]
    ended = {judge.name for judge in judges if has_ended(judge.name, judge.address)}
    # `judge = "auto"` of a cell that has not begun is the successor
    asked = {each.prepared.asked.judge for each, judge in zip(planned, judges, strict=True) if judge.name in ended}
    left = _unfinished([each.plan for each in planned if each.prepared.asked.judge in asked], "judge", folder, reuse)
    if left:
        raise UserError(
            f"`{', '.join(sorted(ended))}` was switched off by its provider, and {left} of {len(planned)} cells are not judged "
            "to their end",
            hint=begun_hint(folder.root, "study"),
        )


def _unfinished(plans: Sequence[Plan], verb: str, folder: StudyFolder, reuse: Mapping[str, Path]) -> int:
    """How many plans have steps of a verb that nobody has finished."""
    finished = {*reuse, *(finished_steps(folder.root) if plans and folder.root.is_dir() else ())}
    return sum(any(step.verb == verb and step.key not in finished for step in plan) for plan in plans)


def _searched(study: StudyPlan, folder: StudyFolder, asked: Asked) -> list[Calibration]:
    """The searches for seed rows of the cells that are asked for; and earlier ones, whose cells would be outside else."""
    records = (folder.manifest() or {}).get("calibrations") or []
    names = {each.name for each in study.searches(asked.only, asked.limit)} | {record.get("name") for record in records}
    return [each for each in study.calibrations if each.name in names]


def _retried(folder: StudyFolder, asked: Sequence[str]) -> set[str]:
    """The cells that `--retry` names."""
    states = folder.state().cells
    kinds = {"failed": ("failed", "result"), "lost": ("lost",)}
    wanted = {state for text in asked for state in kinds.get(text, ())}
    return {*asked, *(name for name, state in states.items() if state.state in wanted)}


@contextlib.contextmanager
def locked(folder: StudyFolder) -> Iterator[None]:
    """Hold a study's folder: one sweep at a time is in it.

    Raises:
        FolderError: If another sweep is, or the folder cannot be written.
    """
    with disk_errors(folder.root):
        folder.root.mkdir(parents=True, exist_ok=True)
    # the lock first: it tells a folder of ours, whatever happens next, from one that holds other files
    lock = FolderLock(folder.root / "lock", f"another sweep is going on in `{folder.root}`")
    lock.acquire()
    try:
        with disk_errors(folder.root):
            (folder.root / "steps").mkdir(exist_ok=True)
            (folder.root / CELLS).mkdir(exist_ok=True)
        yield
    finally:
        lock.release()


def ask_to_stop(folder: StudyFolder) -> bool:
    """Ask the sweep in a folder to end; it does within a second or two, and everything finished is kept.

    Returns:
        Whether there is one.

    Raises:
        FolderError: If the folder is not a study's.
    """
    if not folder.last_state().alive(time.time()):
        folder.known()
        return False
    folder.ask_to_stop()
    return True
