"""What a stage is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.digests import Json
from iterft_lite.experiment.steps import Step
from iterft_lite.files import ROWS, read_rows
from iterft_lite.protocols import Progress


@dataclass(frozen=True)
class Work:
    """One step to be done.

    Attributes:
        step: What.
        folder: Where to write, and nowhere else; holds the rows of an interrupted sitting.
        inputs: Folders of the steps that are read, by role.
        report: Takes progress.
    """

    step: Step
    folder: Path
    inputs: Mapping[str, Path]
    report: Callable[[Progress], None]

    @property
    def params(self) -> Mapping[str, Json]:
        """The step's parameters."""
        return self.step.params

    @property
    def rows(self) -> Path:
        """The file of the step's own rows."""
        return self.folder / ROWS

    def read(self, role: str) -> list[dict[str, Json]]:
        """The rows of an input; none if there is no such input."""
        return read_rows(self.inputs[role] / ROWS) if role in self.inputs else []
