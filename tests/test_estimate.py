"""What a plan costs in memory and time, as far as it follows from a model's configuration."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest

from iterft_lite.data.nano import FOLDERS
from iterft_lite.experiment.plan import make_plan
from iterft_lite.machine.estimate import Vram, shape_of, takes_turns, time_needed, vram_needed
from iterft_lite.machine.resolve import Machine, resolve, this_machine
from tests.loop import a_recipe

NANO = str(FOLDERS["nano"])


def parameters_in(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def test_parameters_follow_from_the_configuration() -> None:
    shape = shape_of(NANO)
    assert shape is not None
    assert shape.linear + shape.embedding == pytest.approx(parameters_in(Path(NANO) / "model.safetensors"), rel=0.01)


def test_a_model_that_is_not_here_has_no_shape_yet() -> None:
    assert shape_of("nobody/has-this-model") is None
    assert vram_needed(a_recipe(), "nobody/has-this-model") is None


@pytest.mark.parametrize(
    ("gpu", "free", "vram", "turns"),
    [
        ("", 0, "swap", False),
        ("a GPU", 1 << 40, "auto", False),
        ("a GPU", 1 << 30, "auto", True),
        ("a GPU", 1 << 30, "resident", False),
        ("a GPU", 1 << 40, "swap", True),
    ],
)
def test_trainer_and_generator_take_turns_where_they_do_not_fit(gpu: str, free: int, vram: str, turns: bool) -> None:
    assert takes_turns(a_recipe(vram=vram), NANO, Machine(gpu, free, free, True)) is turns


def test_without_measurements_the_time_is_not_known() -> None:
    resolved = resolve(a_recipe(judge="embedded"), this_machine())
    found = time_needed(make_plan(resolved.recipe, resolved.inputs), resolved, [])
    assert set(found.missing) == {"load", "train", "export", "write", "read", "judge"}


def test_the_plain_trainer_needs_more_than_unsloths() -> None:
    def needed(trainer: str, regime: str) -> Vram:
        found = vram_needed(a_recipe(trainer=trainer, regime=regime), NANO)
        assert found is not None
        return found

    for regime in ("sft", "dpo"):
        plain = needed("peft", regime)
        assert plain.tight == plain.training > needed("unsloth", regime).tight  # it recomputes nothing
