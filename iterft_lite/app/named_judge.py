"""A judge by its name on the command line: its identity, its folder in a run, its process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from iterft_lite.backends.judge.kinds import Material
from iterft_lite.data.traits import read_trait
from iterft_lite.digests import digest
from iterft_lite.engine.backends import judge_child
from iterft_lite.engine.manifest import Manifest, Run
from iterft_lite.errors import FolderError, UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import EVERYDAY
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.files import ROWS
from iterft_lite.machine.resolve import model_place
from iterft_lite.machine.sources import Sources
from iterft_lite.protocols import Judge


@dataclass(frozen=True)
class Named:
    """A judge's name on the command line: `openai/gpt-4o-mini#1` asks that judge a second time.

    Attributes:
        name: As in a recipe.
        again: Number of the repetition; 0 for the first time.
    """

    name: str
    again: int = 0

    def __str__(self) -> str:
        return f"{self.name}#{self.again}" if self.again else self.name


def named(text: str) -> Named:
    """Read a judge's name."""
    name, _, again = text.partition("#")
    if again and not again.isdigit():
        raise UserError(f"`{text}` is not a judge", hint="name a judge, or a judge and a repetition: `embedded#1`")
    return Named(name, int(again or 0))


def judge_folder(root: Path, judge: Named) -> Path:
    """The folder of another judge's verdicts in a run."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", str(judge)).strip("-.")[-60:]
    return root / "judges" / f"{plain}-{digest(str(judge))[:8]}"


class NotJudgedError(FolderError):
    """A judge has not been asked about a run."""


@contextlib.contextmanager
def open_judge(
    identity: JudgeIdentity, recipe: Recipe, material: Material, folder: Path, ledger: Path | None = None
) -> Iterator[Judge]:
    """A judge in a child process, which ends with the block.

    Args:
        folder: Folder of its log.
        ledger: File of the dollars that `max_usd` limits; in `folder` if None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = judge_child(identity, recipe, material, folder, ledger or folder / "judge_usd.txt")
    try:
        yield cast(Judge, child)
    finally:
        child.close()


def material_of(recipe: Recipe, model_identity: str = "") -> Material:
    """The material of a run's judges: its trait, its own seed rows, its model.

    Args:
        model_identity: Digest of M[0]'s content, as the run's manifest has it.

    Raises:
        TraitError: If the trait or the rows are gone.
    """
    trait = read_trait(recipe.trait)
    own = Sources(recipe, trait).seeds() if recipe.seeds else ()
    return Material(trait, own, model_place(recipe.model), model_identity)


def own_answers(run: Run, known: Manifest) -> str:
    """The file of what M[0] answers to everyday prompts where the judge of a manifest was fitted on that; else ""."""
    step = next((step for step in known.steps if step.part == EVERYDAY), None)
    return str((run.folder(step).path / ROWS).absolute()) if step and run.folder(step).finished else ""


def is_same(known: Mapping[str, Any], judge: JudgeIdentity) -> bool:
    """Whether a judge is the one that a folder names; also for folders of earlier versions."""
    now = asdict(judge)
    before = now | {"effort": "", "tops": 0} | dict(known)
    before["method"] = "logprobs" if before["method"] == "odds" else before["method"]
    return all(before[key] == now[key] for key in ("name", "revision", "method", "samples", "effort", "tops"))


def judged(root: Path, judge: Named) -> tuple[Run, Manifest]:
    """Another judge's folder and its manifest.

    Raises:
        NotJudgedError: If that judge has not been asked.
    """
    run = Run(judge_folder(root, judge))
    known = run.manifest() if run.root.is_dir() else None
    if known is None:
        raise NotJudgedError(
            f"`{judge}` has not judged `{root}`",
            hint=f"`iterft judge {root} --judge '{judge}'` has it judge the stored answers",
        )
    return run, known


def identity_in(root: Path, judge: Named) -> tuple[dict[str, Any], str]:
    """The identity of a judge that has judged a run, from the run's folder, and as of `own_answers`.

    Raises:
        FolderError: If that judge has not been asked.
    """
    run = Run(root)
    known = run.known()
    if not judge.again and judge.name == known.value["judge"]["name"]:
        return dict(known.value["judge"]), own_answers(run, known)
    run, known = judged(root, judge)
    return dict(known.value["identity"]), own_answers(run, known)
