"""Null arms: runs in which the loop that is studied is cut, one place each. What a study holds its effects against.

no_seed         M[1] = M[0]: nothing is there to be amplified
base_data       D[t] is written by Q[0]: no model learns from what itself wrote
shuffled_pairs  the sides of D[t] are shuffled: no side is preferred
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iterft_lite.digests import Json


@dataclass(frozen=True)
class NullArm:
    """What is known of a null arm.

    Attributes:
        name: As in a study.
        words: What is different, for people.
        keys: Recipe keys and values that make it; a recipe that has them is one.
    """

    name: str
    words: str
    keys: Mapping[str, Json]


NULL_ARMS: dict[str, NullArm] = {
    arm.name: arm
    for arm in (
        NullArm("no_seed", "no seed rows, M1 is M0", {"seed_rows": 0}),
        NullArm("base_data", "M0 writes the data of every cycle", {"writer": "base"}),
        NullArm("shuffled_pairs", "the sides of pairs are shuffled from cycle 1 on", {"pairs": "shuffled"}),
    )
}
"""All null arms by name."""


def null_arms_of(recipe: Mapping[str, Json]) -> list[NullArm]:
    """The null arms that a recipe, as it stands in a manifest, is."""
    return [arm for arm in NULL_ARMS.values() if all(recipe.get(key) == value for key, value in arm.keys.items())]
