"""Every error a user can meet.

    IterftError                 a message, and a hint after a blank line
    |-- UserError        (2)    the user's mistake: nothing was started, nothing is lost
    |   |-- RecipeError         the recipe, or a `--set`, is wrong; every problem at once
    |   |-- TraitError          a trait folder, prompt file or dataset is wrong; file and line named
    |   |-- ModelError          the model cannot be found or is not of the kind that the regime needs
    |   `-- FolderError         the run folder cannot be used: other recipe, locked, not writable, not a run
    `-- RunError         (1)    the run failed; what was finished is kept
        |-- StoreError          a step could not be written (disk full) or its files were changed (checksum)
        |   `-- FileError       a file cannot be read, or does not hold what it should; a ValueError too
        |-- Diverged            a training whose loss, gradients or weights left all bounds: a result, not a damaged file
        |-- ExportError         an exported model does not agree with the trained one, or there is no room for it
        |-- BackendError        a trainer, generator or judge failed; carries the end of its log
        `-- BudgetError         going on would pass `max_usd`

The numbers are exit codes. A bug keeps its traceback: it is not an IterftError.
"""

from __future__ import annotations

from collections.abc import Sequence


class IterftError(Exception):
    """An error with a message for people and, often, a remedy.

    Args:
        message: What is wrong, lower-case, with names in backticks.
        hint: What to do about it; printed after a blank line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UserError(IterftError):
    """The user's mistake; exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be used.

    Args:
        problems: All of them, a sentence each.
        source: The file that holds the recipe.
        hint: The remedy, where one fits all.
    """

    def __init__(self, problems: Sequence[str], *, source: str, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} problem{'s' * (len(problems) != 1)}\n{lines}", hint=hint)


class TraitError(UserError):
    """A trait folder, a prompt file or a dataset that cannot be used."""


class ModelError(UserError):
    """A model that cannot be found or used."""


class FolderError(UserError):
    """A run folder that cannot be used."""


class RunError(IterftError):
    """A run that failed; exit code 1."""


class StoreError(RunError):
    """A step that could not be written, or was changed after it was sealed."""


class FileError(StoreError, ValueError):
    """A file that cannot be read or does not hold what it should; a ValueError for who treats a damaged file as none."""


class Diverged(RunError):  # noqa: N818  # what happened, as the docs call it
    """A training whose loss, gradients or weights are no numbers any more, or beyond all bounds; nothing of it is kept."""


class ExportError(RunError):
    """An exported model that does not agree with the trained one, or does not fit on the disk."""


class BackendError(RunError):
    """A trainer, generator or judge that failed.

    Args:
        kind: The name of the exception in the backend, for the caller to tell apart what it can act on.
    """

    def __init__(self, message: str, *, kind: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class BudgetError(RunError):
    """Judging on would pass the recipe's `max_usd`."""
