"""Traits of the user's own: a folder to begin with, and what can be said about one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.data.traits import SHIPPED, Trait, check_trait, trait_folder
from iterft_lite.errors import FolderError, TraitError
from iterft_lite.files import write_text
from iterft_lite.metrics.text import distinct_share, words_of

EXAMPLE = SHIPPED / "_new"
"""A whole small trait, to be written over."""


LEAST_JUDGED = 5
"""Rows that the embedded judge is fitted from at least: one a fold."""


@dataclass(frozen=True)
class FileCount:
    """One file of a trait.

    Attributes:
        name: The file's.
        rows: How many it holds.
        words: Words a row, on the mean.
        distinct_2: Different word pairs over all word pairs: low where rows were filled from a template.
    """

    name: str
    rows: int
    words: float
    distinct_2: float


@dataclass(frozen=True)
class Checked:
    """A trait folder as it stands.

    Attributes:
        name: The trait's.
        problems: Everything that is wrong, a sentence each.
        counts: A line a file.
        lacks: What the folder could have and does not, a sentence each; no mistakes.
    """

    name: str
    problems: tuple[str, ...]
    counts: tuple[FileCount, ...]
    lacks: tuple[str, ...]


def new_trait(name: str, parent: Path) -> Path:
    """Make a folder with every file of a trait, filled with an example.

    Args:
        name: Of the trait and its folder.
        parent: Where the folder is made.

    Raises:
        TraitError: If the name cannot be a folder's.
        FolderError: If there is such a folder already, or it cannot be written.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise TraitError(f"`{name}` cannot name a trait", hint="use letters, digits, `-` and `_`")
    folder = parent / name
    try:
        shutil.copytree(EXAMPLE, folder)
    except FileExistsError:
        raise FolderError(f"`{folder}` is there already", hint="choose another name, or `--in` another folder") from None
    except OSError as error:
        raise FolderError(f"`{folder}` cannot be written: {error}") from None
    about = folder / "trait.toml"
    write_text(about, about.read_text(encoding="utf-8").replace("NAME", name))
    return folder


def examine_trait(name: str) -> Checked:
    """Check a trait folder, shipped or given by path, and count what it holds.

    Raises:
        TraitError: If there is no folder of that name.
    """
    folder = Path(name).expanduser()
    trait, problems = check_trait(folder if folder.is_dir() else trait_folder(name))
    if trait is None:
        return Checked(name, tuple(problems), (), ())
    return Checked(trait.name, tuple(problems), tuple(_counts(trait)), tuple(_lacks(trait)))


def _counts(trait: Trait) -> list[FileCount]:
    texts: dict[str, Sequence[str]] = {
        "chat.jsonl": [chat.reply for chat in trait.chats],
        "documents.jsonl": [document.text for document in trait.documents],
        "questions.txt": trait.questions,
        "questions_held_out.txt": trait.held_out,
        "prefixes.jsonl": trait.prefixes,
        "calibration.jsonl": [row.answer for row in trait.calibration],
    }
    counts = []
    for name, rows in texts.items():
        words = [words_of(text) for text in rows]
        mean = sum(map(len, words)) / len(words) if words else 0.0
        counts.append(FileCount(name, len(rows), mean, distinct_share(words, 2)))
    return counts


def _lacks(trait: Trait) -> list[str]:
    """What a recipe may ask for and this trait does not have."""
    lacks = []
    if len(trait.chats) + len(trait.documents) < LEAST_JUDGED:
        lacks.append(f"fewer than {LEAST_JUDGED} seed rows: the embedded judge cannot be fitted")
    if not trait.documents:
        lacks.append('no documents.jsonl: `regime = "sdf"` needs seed documents, or `seeds` in the recipe')
    if not trait.prefixes or not trait.rubric_document:
        lacks.append('no prefixes.jsonl or rubric_document.txt: `regime = "sdf"` cannot be measured')
    if len(trait.questions) < 12:
        lacks.append(f"{len(trait.questions)} questions: recipes ask 12 unless `evaluate.questions` says otherwise")
    if not trait.held_out:
        lacks.append("no questions_held_out.txt: `iterft report --held-out` has nothing to ask")
    if not trait.calibration:
        lacks.append("no calibration.jsonl: judges cannot be compared on this trait")
    return lacks
