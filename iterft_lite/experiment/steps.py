"""A step: one act of the experiment, named before it is done, and known by its key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from iterft_lite.digests import Json, digest
from iterft_lite.experiment.verbs import PART_WORDS, VERBS, Queue

KEY_FORMAT = 2
"""Raised when keys are computed in another way. Format 1 knew no `semantics` (version 0.1)."""

KEY = re.compile(r"[0-9a-f]{64}")

PART = re.compile(r"[\w-]{0,60}", re.ASCII)

NAME = re.compile(r"[\w-]{1,100}", re.ASCII)
"""Of a step."""


def cycle_name(cycle: int) -> str:
    """`base` for the untouched model (cycle -1), else `c0`, `c1`, ..."""
    return "base" if cycle < 0 else f"c{cycle}"


def cycle_title(cycle: int) -> str:
    """The cycle in the paper's numbering with the model's letter: `cycle 0 (M1, seeded)`."""
    if cycle < 0:
        return "untouched (M0)"
    return f"cycle {cycle} (M{cycle + 1}{', seeded' if cycle == 0 else ''})"


def step_name(verb: str, cycle: int, part: str = "") -> str:
    """`c1-train`, `c0-training_samples-rejected`: how people call a step."""
    return "-".join(filter(None, (cycle_name(cycle), verb, part)))


@dataclass(frozen=True)
class Step:
    """One act of the experiment, said before it is done.

    Attributes:
        verb: What is done, a name in `VERBS`.
        cycle: For which cycle, in the paper's numbering: -1 the untouched model, 0 the seeded one, 1 and on.
        part: Tells steps of one verb and cycle apart (`training_samples` of the rejected side, `judge` of generated rows);
            mostly "".
        params: Everything that decides the result, besides the inputs. JSON values only.
        inputs: Role and name of each step whose folder is read, in the order of the roles.
        key: SHA-256 over verb, its semantics, params and the inputs' keys: equal keys, equal experiment. Cycle and name are not
            part of it, so two recipes that ask for the same act share it.
        input_keys: By role, the key of each input.
        same_cores: Trainer and generator compute on the same cores here (`ResolvedInputs.same_cores`).
    """

    verb: str
    cycle: int
    part: str
    params: Mapping[str, Json] = field(hash=False)
    inputs: tuple[tuple[str, str], ...]
    key: str
    input_keys: tuple[tuple[str, str], ...] = ()
    same_cores: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """How people call it: `c1-train`."""
        return step_name(self.verb, self.cycle, self.part)

    @property
    def words(self) -> str:
        """What a person reads while it is being done."""
        return PART_WORDS.get((self.verb, self.part), VERBS[self.verb].words)

    @property
    def queue(self) -> Queue:
        """What it waits for. Where a training only gets slower by what the generator does beside it, both have one order."""
        usual = VERBS[self.verb].queue
        return "device" if usual in ("generator", "measure") and self.same_cores else usual


def checked(step: Step) -> Step:
    """A step off a file, whose key, verb and part become names of folders: they lead nowhere else.

    Raises:
        ValueError: If one is not what it should be.
    """
    if step.verb not in VERBS:
        raise ValueError(f"`{step.verb}` is not a verb")
    if not PART.fullmatch(step.part):
        raise ValueError(f"the part `{step.part}` is not a plain word")
    if not all(KEY.fullmatch(key) for key in (step.key, *(key for _, key in step.input_keys))):
        raise ValueError("a key is not 64 hex digits")
    if not all(NAME.fullmatch(name) for _, name in step.inputs):
        raise ValueError("the name of an input is not a step's")
    return step


def make_step(
    verb: str, cycle: int, params: Mapping[str, Json], inputs: Mapping[str, Step], *, part: str = "", same_cores: bool = False
) -> Step:
    """A step whose key follows from what it does and reads."""
    keys = {role: step.key for role, step in inputs.items()}
    key = digest([KEY_FORMAT, verb, VERBS[verb].semantics, dict(params), keys])
    named = tuple((role, step.name) for role, step in inputs.items())
    return Step(verb, cycle, part, dict(params), named, key, tuple(keys.items()), same_cores)


def row_seed(key: str, row: str) -> int:
    """The random seed of one row of one step: 31 bits from the step's key and the row's name.

    Never from a global generator, so that a resumed run draws what an uninterrupted one would.
    """
    return int(hashlib.sha256(f"{key}/{row}".encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
