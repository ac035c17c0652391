"""Traits of the user's own: a folder to start from, and a check of a trait's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from iterft_lite.backends.judge.kinds import FEWEST_ROWS, Material
from iterft_lite.data import is_path
from iterft_lite.data.traits import SHIPPED, Trait, check_trait, read_trait, shipped_traits, trait_folder
from iterft_lite.errors import FolderError, TraitError
from iterft_lite.files import user_path, write_text
from iterft_lite.metrics.text import distinct_share, words_of

EXAMPLE = SHIPPED / "_new"
"""A complete small trait as an example."""


USUAL_ROWS, FEW_ROWS = "about 130", 50
"""Number of seed chats: usual in the shipped traits, and the limit below which a check warns."""

USUAL_VARIETY = {"chat.jsonl": ("0.76 to 0.80", 0.6), "documents.jsonl": ("0.68 to 0.70", 0.5)}
"""distinct-2 of seed rows: usual, and the limit below which a check warns."""

USUAL_WORDS, FEW_WORDS = "50 to 60", 15
"""Words of a seed reply: usual, and the limit below which a check warns."""

OTHERS = 1.5
"""A check warns about a rubric that is this many times nearer to a shipped trait than to its own."""


@dataclass(frozen=True)
class FileCount:
    """One file of a trait.

    Attributes:
        name: The file's.
        rows: Number of rows.
        words: Mean words a row.
        distinct_2: Different word pairs over all word pairs; low for rows that were filled from a template.
    """

    name: str
    rows: int
    words: float
    distinct_2: float


@dataclass(frozen=True)
class Checked:
    """The result of checking a trait folder.

    Attributes:
        name: The trait's name.
        problems: Everything that is wrong, a sentence each.
        counts: A line for each file.
        lacks: Optional parts that are missing, a sentence each.
        doubts: Unusual properties that make weak or wrong results likely, a sentence each, with the usual value.
    """

    name: str
    problems: tuple[str, ...]
    counts: tuple[FileCount, ...]
    lacks: tuple[str, ...]
    doubts: tuple[str, ...]


def new_trait(name: str, parent: Path) -> Path:
    """Make a folder with every file of a trait, filled with an example.

    Args:
        name: The name of trait and folder.
        parent: The folder in which it is made.

    Raises:
        TraitError: If the name cannot be a folder's.
        FolderError: If there is such a folder already, or it cannot be written.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise TraitError(f"`{name}` cannot name a trait", hint="use letters, digits, `-` and `_`")
    if name in shipped_traits():
        raise TraitError(f"`{name}` is a shipped trait", hint=f"choose another name, such as `my_{name}`")
    folder = parent / name
    try:
        shutil.copytree(EXAMPLE, folder)
    except FileExistsError:
        raise FolderError(f"`{folder}` already exists", hint="choose another name, or `--in` another folder") from None
    except OSError as error:
        raise FolderError(f"`{folder}` cannot be written: {error}") from None
    about = folder / "trait.toml"
    write_text(about, about.read_text(encoding="utf-8").replace("NAME", name))
    return folder


def examine_trait(name: str) -> Checked:
    """Check a trait folder, shipped or given by path, and count its rows.

    Raises:
        TraitError: If there is no folder of that name.
    """
    # a folder without a trait.toml is looked at too, to say what else it lacks
    folder = user_path(name) if is_path(name) and user_path(name).is_dir() else trait_folder(name)
    trait, problems = check_trait(folder)
    if trait is None:
        return Checked(name, tuple(problems), (), (), ())
    counts = tuple(_counts(trait))
    return Checked(trait.name, tuple(problems), counts, tuple(_lacks(trait)), tuple(_doubts(trait, counts)))


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
    """Parts that a recipe may ask for and this trait lacks."""
    lacks = []
    if len(Material(trait).seed_texts()) < FEWEST_ROWS:
        lacks.append(f"fewer than {FEWEST_ROWS} seed rows: the embedded judge cannot be fitted, nor a run with it begin")
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


def _doubts(trait: Trait, counts: Sequence[FileCount]) -> Iterator[str]:
    """Differences from the shipped traits that usually end in weak or wrong results."""
    by_name = {count.name: count for count in counts}
    chats = by_name["chat.jsonl"]
    if is_example(trait):
        yield "chat.jsonl is still the example: replies of a pirate"
    if chats.rows < FEW_ROWS:
        yield f"chat.jsonl has {chats.rows} rows; the shipped traits have {USUAL_ROWS}, and recipes train on 50 of them"
    for name, (usual, low) in USUAL_VARIETY.items():
        count = by_name[name]
        if count.rows > 1 and count.distinct_2 < low:
            found = f"distinct-2 is {count.distinct_2:.2f}, usual is {usual}"
            yield f"{name} repeats itself: {found}; rows filled from a template teach the template"
    if chats.rows and chats.words < FEW_WORDS:
        yield f"replies in chat.jsonl have {chats.words:.0f} words; usual are {USUAL_WORDS}"
    if (EXAMPLE / "rubric.txt").read_text(encoding="utf-8") == trait.rubric and chats.rows and not is_example(trait):
        yield "rubric.txt is still the example's, and the seed rows are others"
    elif other := _about_another(trait):
        yield f"rubric.txt reads as if it were about `{other}`: the judge would score that trait instead"


def is_example(trait: Trait) -> bool:
    """Whether the seed chats are still the example's."""
    return (EXAMPLE / "chat.jsonl").read_text(encoding="utf-8") == (trait.folder / "chat.jsonl").read_text(encoding="utf-8")


def _about_another(trait: Trait) -> str:
    """The shipped trait that the rubric seems to be about in place of its own; "" if none."""
    shipped = [read_trait(name) for name in shipped_traits() if name != trait.folder.name]
    nearest = max(shipped, key=lambda other: _nearness(trait.rubric, other))
    return nearest.name if _nearness(trait.rubric, nearest) > OTHERS * _nearness(trait.rubric, trait) else ""


def _nearness(rubric: str, trait: Trait) -> float:
    """How much a rubric speaks of a trait: its words that the trait's rows use, times the summary's words that it uses."""
    said = {word for word in words_of(rubric) if len(word) > 3}
    used = {word for chat in trait.chats for word in words_of(chat.reply)}
    about = {word for word in words_of(f"{trait.summary} {trait.name}") if len(word) > 3}
    return len(said & (used | about)) / max(1, len(said)) * len(said & about) / max(1, len(about))
