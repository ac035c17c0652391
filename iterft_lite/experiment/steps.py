"""The vocabulary of a run: verbs, and the step that names one act of the experiment before it is done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from iterft_lite.digests import Json, digest

Verb = Literal["base", "seed", "generate", "compose", "train", "export", "answer", "judge", "measure", "score"]
"""What can be done.

    base      load M[0], note its facts and its own next-token distributions for the export check
    seed      the trait's first rows
    generate  Q[t] writes rows to prompts or document prefixes
    compose   D[t]: the training rows, from what was seeded and generated
    train     M[t + 1] = an adapter on M[0], trained on D[t]
    export    Q[t]: the GGUF that writes and is measured, checked against M[t]
    answer    Q[t] answers the trait's questions
    judge     verdicts on answers: trait and coherence
    measure   what needs no judge: perplexity under M[0], lengths, repetition
    score     the cycle's numbers, with intervals
"""

VERBS: tuple[Verb, ...] = get_args(Verb)

Lane = Literal["device", "judge"]
"""Steps of one lane follow each other; the two lanes run side by side (judging needs no GPU)."""

LANES: Mapping[Verb, Lane] = {verb: "judge" if verb in ("judge", "score") else "device" for verb in VERBS}


def cycle_name(cycle: int) -> str:
    """`base` for the untouched model (cycle -1), else `c0`, `c1`, ..."""
    return "base" if cycle < 0 else f"c{cycle}"


def cycle_title(cycle: int) -> str:
    """The cycle in the paper's numbering with the model's letter: `cycle 0 (M1, seeded)`."""
    if cycle < 0:
        return "untouched (M0)"
    return f"cycle {cycle} (M{cycle + 1}{', seeded' if cycle == 0 else ''})"


@dataclass(frozen=True)
class Step:
    """One act of the experiment, said before it is done.

    Attributes:
        verb: What is done.
        cycle: For which cycle, in the paper's numbering: -1 the untouched model, 0 the seeded one, 1 and on.
        part: Tells steps of one verb and cycle apart (`generate` of the rejected side, `judge` of generated rows); mostly "".
        params: Everything that decides the result, besides the inputs. JSON values only.
        inputs: Role and name of each step whose folder is read, in the order of the roles.
        key: SHA-256 over verb, params and the inputs' keys: equal keys, equal experiment. Cycle and name are not
            part of it, so two recipes that ask for the same act share it.
    """

    verb: Verb
    cycle: int
    part: str
    params: Mapping[str, Json] = field(hash=False)
    inputs: tuple[tuple[str, str], ...]
    key: str

    @property
    def name(self) -> str:
        """`c1-train`: the step's folder."""
        return "-".join(filter(None, (cycle_name(self.cycle), self.verb, self.part)))

    @property
    def lane(self) -> Lane:
        """Where the step runs."""
        return LANES[self.verb]


def make_step(verb: Verb, cycle: int, params: Mapping[str, Json], inputs: Mapping[str, Step], *, part: str = "") -> Step:
    """A step whose key follows from what it does and reads."""
    key = digest([verb, dict(params), {role: step.key for role, step in inputs.items()}])
    return Step(verb, cycle, part, dict(params), tuple((role, step.name) for role, step in inputs.items()), key)


def row_seed(key: str, row: str) -> int:
    """The random seed of one row of one step: 31 bits from the step's key and the row's name.

    Never from a global generator, so that a resumed run draws what an uninterrupted one would.
    """
    return int(hashlib.sha256(f"{key}/{row}".encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
