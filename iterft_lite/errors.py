"""Every error a user can meet, and of which kind a failure is.

    IterftError                 a message, and a hint after a blank line
    |-- UserError        (2)    the user's mistake: nothing was started, nothing is lost            kind "user"
    |   |-- RecipeError         the recipe, or a `--set`, is wrong; every problem at once
    |   |-- TraitError          a trait folder, prompt file or dataset is wrong; file and line named
    |   |-- ModelError          the model cannot be found or is not of the kind that the regime needs
    |   `-- FolderError         the run folder cannot be used: other recipe, not writable, not a run
    |       `-- Busy            another process holds it
    `-- RunError         (1)    the run failed; what was finished is kept
        |-- ResultError         the model's own result: it diverged, or writes nothing usable       kind "result"
        |   `-- Diverged        a training whose loss, gradients or weights are not finite
        |-- StoreError          a step could not be written (disk full) or its files were changed   kind "machine"
        |   |-- NoRoom          the disk has no room for a file: found before it is written
        |   `-- FileError       a file cannot be read, or does not hold what it should; a ValueError too
        |-- ExportError         a model or an adapter cannot be written as GGUF                     kind "user"
        |   |-- NotFetched      what an export needs could not be fetched from the network          kind "machine"
        |   `-- CheckFailed     an exported model does not agree with the trained one (export.py)   kind "result"
        |-- BackendError        a trainer, generator or judge failed; carries the end of its log    kind by its cause
        `-- BudgetError         going on would exceed `max_usd`                                     kind "user"

The numbers are exit codes. The kind says what a study can do about it: the machine's and the provider's failures are worth
another try, a model's result is a result, the user's mistake and a bug are for a person. A bug keeps its traceback: it is no
IterftError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FailureKind = Literal["user", "result", "machine", "provider", "bug"]


class IterftError(Exception):
    """An error with a message for people and, often, a remedy.

    Args:
        message: What is wrong, lower-case, with names in backticks.
        hint: What to do about it; printed after a blank line.
    """

    exit_code = 1
    kind: FailureKind = "machine"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        # by its attributes: the arguments of a class's own constructor are no longer known when it travels between machines
        return _unpickled, (type(self), self.args), self.__dict__


def _unpickled(kind: type[IterftError], args: tuple[Any, ...]) -> IterftError:
    return kind.__new__(kind, *args)


class UserError(IterftError):
    """The user's mistake; exit code 2."""

    exit_code = 2
    kind: FailureKind = "user"


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


class Busy(FolderError):  # noqa: N818  # read as a word
    """Another process holds what is wanted: it is worth waiting."""


class RunError(IterftError):
    """A run that failed; exit code 1."""


class ResultError(RunError):
    """A failure that says something of the model, not of the program: doing it again comes to the same."""

    kind: FailureKind = "result"


class Diverged(ResultError):  # noqa: N818  # read as a word
    """A training whose loss, gradients or weights are not finite any more, or beyond all bounds; nothing of it is kept."""


class StoreError(RunError):
    """A step that could not be written, or was changed after it was finished."""


class NoRoom(StoreError):  # noqa: N818  # read as words
    """A file that the disk has no room for: other cells may give some back."""


class FileError(StoreError, ValueError):
    """A file that cannot be read or does not hold what it should; a ValueError for who treats a damaged file as none."""


class ExportError(RunError):
    """A model, or an adapter, that cannot be written as GGUF: every other export of it would fail alike."""

    kind: FailureKind = "user"


class NotFetched(ExportError):  # noqa: N818  # read as words
    """What an export needs could not be fetched: the network may come back."""

    kind: FailureKind = "machine"


MACHINE = frozenset({"died", "memory", "OutOfMemoryError", "MemoryError", "OSError", "FileNotFoundError", "TimeoutError"})
"""Exceptions of backends that are the machine's doing: it ran out of memory, a process was ended, the disk failed."""

PROVIDER = frozenset(
    {
        "APIConnectionError",
        "APIError",
        "AuthenticationError",
        "BadRequestError",
        "InternalServerError",
        "NotFoundError",
        "PermissionDeniedError",
        "RateLimitError",
        "ServiceUnavailableError",
        "Timeout",
        "away",
    }
)
"""Exceptions of judges that are their provider's doing."""


class BackendError(RunError):
    """A trainer, generator or judge that failed.

    Args:
        exception: The name of the exception in the backend, for the caller to tell apart what it can act on.
        provider: It is a judge's provider that failed.
    """

    def __init__(self, message: str, *, exception: str = "", hint: str | None = None, provider: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.exception = exception
        if provider or exception in PROVIDER:
            self.kind = "provider"
        else:
            self.kind = "machine" if exception in MACHINE else "bug"


class BudgetError(RunError):
    """Further judging would exceed the recipe's `max_usd`."""

    kind: FailureKind = "user"


@dataclass(frozen=True)
class Failure:
    """How a step, a run or a cell ended, as events, records and exit codes carry it.

    Attributes:
        hint: What to do; "" where nothing is known.
    """

    kind: FailureKind
    message: str
    hint: str


def failure_of(error: BaseException) -> Failure:
    """Any exception as a failure: what is not one of this program's own errors is a bug, told with its type."""
    if isinstance(error, IterftError):
        return Failure(error.kind, error.message, error.hint or "")
    return Failure("bug", f"{type(error).__name__}: {error}".removesuffix(": "), "")
