"""What a stage is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from iterft_lite.digests import Json
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.rows import SAMPLES, Message, RowType, Sample
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import BackendName
from iterft_lite.files import ROWS
from iterft_lite.protocols import Backends, Progress

Row = TypeVar("Row")


@dataclass(frozen=True)
class Work:
    """One step to be done.

    Attributes:
        step: What.
        recipe: As resolved.
        folder: Where to write, and nowhere else; holds the rows of an interrupted session.
        inputs: Folders of the steps that are read, by role.
        report: Takes progress.
        backends: To do it with; a stage calls those that its verb's record names.
        model: Gives the folder of M[0]; it is fetched when it is first asked for.
        load: Makes the exported model of an input role the generator's current one.
        streams: Texts are read by the trainer, which is faster at it than llama.cpp, and through which a GPU's stored weights
            stream anyway: it is idle while an export is checked and data are written.
        release: Lets other steps have a backend before this one ends.
    """

    step: Step
    recipe: Recipe
    folder: Path
    inputs: Mapping[str, Path]
    report: Callable[[Progress], None]
    backends: Backends
    model: Callable[[], str]
    load: Callable[[str], None]
    streams: bool = False
    release: Callable[[BackendName], None] = lambda _: None

    @property
    def params(self) -> Mapping[str, Json]:
        """The step's parameters."""
        return self.step.params

    @property
    def rows(self) -> Path:
        """The file of the step's own rows."""
        return self.folder / ROWS

    @property
    def told(self) -> tuple[Message, ...]:
        """The system message that models are asked after: none where the step has none."""
        system = self.params.get("system")
        return () if system is None else (Message("system", str(system)),)

    def read(self, role: str, kind: RowType[Row]) -> list[Row]:
        """The rows of an input; none if there is no such input."""
        return kind.read(self.inputs[role] / ROWS) if role in self.inputs else []

    def samples(self, role: str) -> list[Sample]:
        """The samples of an input, in the order of their ids."""
        return sorted(self.read(role, SAMPLES), key=lambda sample: sample.id)
