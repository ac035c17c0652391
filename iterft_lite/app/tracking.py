"""A run's numbers in an experiment tracker: TensorBoard, Weights & Biases, Trackio or MLflow (`track = ["tensorboard"]`).

Each tracker's library runs in a process of its own, fed by a thread of its own: what it prints goes to a log, what it waits for
is not waited for, and what goes wrong in it is one note and no more. Which steps it was told of stands in the run's folder, so
each step's numbers go to each tracker once, however often a run is taken up again; a tracker that is named later gets all.

    RUN/tracking/NAME.json      what the run is called there, and the keys of the steps that it was told of
    RUN/tracking/tensorboard/   what TensorBoard reads; the others keep their data where they always do
"""

from __future__ import annotations

import contextlib
import importlib
import math
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from iterft_lite.backends.processes.child import Child
from iterft_lite.digests import Json
from iterft_lite.engine.run import Event, StepFinished, StepProgress
from iterft_lite.errors import FileError, FolderError
from iterft_lite.experiment.recipe import Recipe, TrackerName
from iterft_lite.experiment.recipe_keys import flat
from iterft_lite.experiment.rows import SCALES
from iterft_lite.experiment.steps import Step
from iterft_lite.files import read_record, read_rows, write_json
from iterft_lite.protocols import Progress

FOLDER = "tracking"

PROJECT = "iterft_lite"
"""What trackers file all runs under."""

LOG_FILE = "log.jsonl"
"""In a training's folder: a line an optimiser step."""

TRAINED = ("loss", "learning_rate", "grad_norm", "margin", "accuracy")
"""Columns of it that are tracked."""

CLOSING = 20.0
"""Seconds that a tracker is given to send what it still has, once the run has ended."""

LEAVING = 3.0
"""The same, of a run that failed or was interrupted."""

ID = re.compile("[0-9a-f]{12}")
"""What a run is called in a tracker."""

Axis = Literal["cycle", "step"]


@dataclass(frozen=True)
class Tracked:
    """A run, as a tracker sees it.

    Attributes:
        id: Ours, kept in the run's folder.
        name: Of the run.
        study: Of the study that it is a cell of; "" for none.
        folder: Of what the tracker writes in the run's folder.
        settings: Recipe keys and their values.
    """

    id: str
    name: str
    study: str
    folder: Path
    settings: dict[str, Json]


@dataclass(frozen=True)
class Point:
    """Numbers at a place of an axis: a cycle, or an optimiser step counted over all cycles."""

    axis: Axis
    at: int
    values: dict[str, float]


class Tracker(Protocol):
    """What a tracker's process answers."""

    def begin(self, run: Tracked) -> None:
        """Open the run, a new one or one to continue."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Take numbers."""
        ...

    def finish(self) -> None:
        """Send what was not sent yet."""
        ...


# -- one class a tracker; each runs in a child process


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUN`, or the folder of a study."""

    def begin(self, run: Tracked) -> None:
        """Begin another file; TensorBoard reads all of a folder as one run."""
        self._writer = _library("tensorboard", "tensorboardX").SummaryWriter(str(run.folder))
        self._writer.add_text("recipe", "\n".join(f"    {key} = {value}" for key, value in run.settings.items()))

    def log(self, points: Sequence[Point]) -> None:
        """Each point at its own place: the two axes do not meet."""
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.at)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, or a folder that `wandb sync` sends later (`WANDB_MODE=offline`)."""

    def begin(self, run: Tracked) -> None:
        """Open or resume it."""
        wandb = _library("wandb", "wandb")
        given = {"name": run.name, "id": run.id, "group": run.study or None, "config": run.settings}
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=PROJECT, resume="allow", dir=str(run.folder), **given)
        # its own counter of steps only rises, and knows one axis
        self._run.define_metric("train/*", step_metric="step")
        for group in ("scores/*", "text/*"):
            self._run.define_metric(group, step_metric="cycle")

    def log(self, points: Sequence[Point]) -> None:
        """Each point with its place as another number."""
        for point in points:
            self._run.log({point.axis: point.at, **point.values})

    def finish(self) -> None:
        """Upload the rest."""
        self._run.finish()


class Trackio:
    """A run of Trackio, in its local database unless its own variables say otherwise."""

    def begin(self, run: Tracked) -> None:
        """Open or resume it."""
        trackio = _library("trackio", "trackio")
        name = f"{run.study}/{run.name}" if run.study else f"{run.name}-{run.id}"
        given = {"name": name, "group": run.study or None, "config": run.settings}
        self._run = trackio.init(project=PROJECT, resume="allow", embed=False, **given)

    def log(self, points: Sequence[Point]) -> None:
        """Each point with its place as another number."""
        for point in points:
            self._run.log({point.axis: point.at, **point.values})

    def finish(self) -> None:
        """Write the rest."""
        self._run.finish()


class MLflow:
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says, or in its database in the folder that the user is in."""

    def begin(self, run: Tracked) -> None:
        """Open or resume it: MLflow names its runs itself."""
        mlflow = _library("mlflow", "mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        found = self._client.search_runs([experiment], f"tags.iterft_id = '{run.id}'")
        if found:
            self._run = found[0].info.run_id
            return
        tags = {"iterft_id": run.id, **({"study": run.study} if run.study else {})}
        self._run = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for key, value in run.settings.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, points: Sequence[Point]) -> None:
        """A metric a number."""
        now = int(time.time() * 1000)
        for point in points:
            metrics = [self._metric(name, value, now, point.at) for name, value in point.values.items()]
            self._client.log_batch(self._run, metrics=metrics)

    def finish(self) -> None:
        """Say that it has ended."""
        self._client.set_terminated(self._run)


def _library(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'iterft_lite[{extra}]'") from None


WORKERS: Mapping[TrackerName, str] = {
    "tensorboard": "iterft_lite.app.tracking:TensorBoard",
    "wandb": "iterft_lite.app.tracking:Wandb",
    "trackio": "iterft_lite.app.tracking:Trackio",
    "mlflow": "iterft_lite.app.tracking:MLflow",
}
"""By tracker, what runs in its process."""


# -- what is reported


def _numbers(values: Mapping[str, Json], group: str) -> dict[str, float]:
    """Those of some values that are finite numbers."""
    plain = {name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {f"{group}/{name}": float(value) for name, value in plain.items() if math.isfinite(value)}


def points_of(step: Step, results: Mapping[str, Json], folder: Path, offset: int) -> Iterator[Point]:
    """What a tracker gets of a finished step; nothing of most.

    Args:
        results: The step's.
        folder: The step's.
        offset: Optimiser steps of the trainings before it.
    """
    if step.verb == "aggregate" and not step.part:
        scales = {scale: results.get(scale) or {} for scale in SCALES}
        means: dict[str, Json] = {scale: found.get("mean") for scale, found in scales.items()}
        bounds = {f"{scale}_{end}": found.get(end) for scale, found in scales.items() for end in ("low", "high")}
        yield Point("cycle", step.cycle, _numbers({**means, **bounds, "rate": results.get("rate")}, "scores"))
    elif step.verb == "text_metrics" and not step.part:
        yield Point("cycle", step.cycle, _numbers(results, "text"))
    elif step.verb == "train":
        for number, row in enumerate(read_rows(folder / LOG_FILE), 1):
            yield Point("step", offset + number, _numbers({name: row.get(name) for name in TRAINED}, "train"))


# -- feeding


@dataclass(frozen=True)
class Known:
    """What a tracker was told, as its file has it."""

    id: str
    steps: list[str] = field(default_factory=list)


def read_known(path: Path) -> Known | None:
    """What a tracker was told; None where that is not known, or somebody else's folder would choose which run is written to."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, FileError):
        known = read_record(path, Known)
        return known if ID.fullmatch(known.id) else None
    return None


class _Feed:
    """One tracker, its process and the thread that feeds it.

    Args:
        name: The tracker's.
        run: What it gets of the run; with another id where the run's folder knows one.
        log: File that its process prints to.
    """

    def __init__(self, name: TrackerName, run: Tracked, log: Path) -> None:
        self.problem = ""
        """Why nothing more is reported; one sentence."""
        self._name = name
        self._file = run.folder / f"{name}.json"
        self._known = read_known(self._file) or Known(secrets.token_hex(6))
        self._run = Tracked(self._known.id, run.name, run.study, run.folder / name, run.settings)
        self._child = Child(WORKERS[name], Tracker, log=log, secrets=name)
        self._todo: queue.Queue[tuple[str, list[Point]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def tell(self, key: str, points: list[Point]) -> None:
        """Have the numbers of a step told, unless they were."""
        if points and key not in self._known.steps and not self.problem:
            self._todo.put((key, points))

    def close(self, patience: float) -> None:
        """Have the rest sent, and wait so many seconds for that."""
        self._todo.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self.problem = self.problem or f"{self._name} is not done after {patience:.0f} s: it may lack the last numbers"
            self._child.close()

    def _work(self) -> None:
        begun = False
        try:
            for path in (self._file.parent, self._file.parent / self._name):
                if path.is_symlink():
                    raise FolderError(f"`{path}` is a symbolic link where a folder of the run belongs", hint="remove it")
            while (told := self._todo.get()) is not None:
                if not begun:
                    self._child.begin(self._run)
                    begun = True
                key, points = told
                self._child.log(points)
                self._known.steps.append(key)
                write_json(self._file, asdict(self._known))
            if begun:
                self._child.finish()
        except Exception as error:  # whatever it is, the run goes on
            self.problem = self.problem or f"{self._name} is not told any more: {getattr(error, 'message', error)}"
        finally:
            self._child.close()


def _points(event: StepFinished, folder: Path, offset: int) -> list[Point]:
    """What is reported of a finished step; nothing if its files cannot be read, which others report."""
    with contextlib.suppress(Exception):
        return list(points_of(event.step, event.completion.results, folder, offset))
    return []


def tracked(
    events: Generator[Event, None, None], recipe: Recipe, root: Path, study: str, folder_of: Callable[[Step], Path]
) -> Generator[Event, None, None]:
    """The same events, told to the recipe's trackers; what goes wrong in one is a note of the step at hand, once.

    Args:
        root: The run's folder.
        study: Name of the study that the run is a cell of; "" for none.
        folder_of: Gives the folder of a step.
    """
    settings = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if value is not None}
    run = Tracked("", recipe.name or root.name, study, root / FOLDER, settings)
    feeds = [_Feed(name, run, root / "logs" / f"{name}.log") for name in dict.fromkeys(recipe.track)]
    said: set[str] = set()
    offset, last, patience = 0, None, CLOSING

    def problems() -> Iterator[StepProgress]:
        for problem in [feed.problem for feed in feeds if feed.problem and feed.problem not in said]:
            said.add(problem)
            if last is not None:
                yield StepProgress(last, Progress(0, 0, "", note=problem))

    try:
        for event in events:
            last = event.step
            yield from problems()
            yield event
            if isinstance(event, StepFinished):
                points = _points(event, folder_of(event.step), offset)
                for feed in feeds:
                    feed.tell(event.step.key, points)
                offset += len(points) if event.step.verb == "train" else 0
    except BaseException:
        patience = LEAVING
        raise
    finally:
        events.close()
        for feed in feeds:
            feed.close(patience)
    yield from problems()
