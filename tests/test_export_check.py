"""An export carries what was trained, and its check finds out where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import iterft_lite
from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.traits import read_trait
from iterft_lite.digests import digest_by_pieces
from iterft_lite.errors import ExportError
from iterft_lite.files import read_json
from iterft_lite.gguf import merge
from iterft_lite.gguf.arithmetic import (
    BF16,
    F16,
    F32,
    Arithmetic,
    NumpyArithmetic,
    TorchArithmetic,
    Update,
    from_plain,
    to_format,
)
from iterft_lite.gguf.file import Array, GgufFile
from iterft_lite.protocols import Change, Exported, Exporter, Generator, OnProgress, Parity
from iterft_lite.stages.export import export_trained, export_untouched, fault, remarks, untouched_gguf
from iterft_lite.testing.fakes import FakeExporter, FakeGenerator, fake_backends
from tests.loop import a_plan, run_all

NANO = Path(iterft_lite.__file__).parent / "data" / "nano" / "chat"

RATE = 2e-4
"""Learning rate of four steps after which most weights have moved by less than half a step of bf16."""


@dataclass(frozen=True)
class Trained:
    """The embedded model, which is stored in bf16, and folders of its steps: adapter and probe, or the probe alone."""

    model: Path
    small: Path
    none: Path
    base: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if not (NANO / "tokenizer.json").is_file():
        pytest.skip("the nano models are not built")
    folder = tmp_path_factory.mktemp("trained")
    for name, rate in (("small", RATE), ("none", 0.0)):
        write_step(folder / name, rate)
    write_step(folder / "base", None)
    return Trained(NANO, folder / "small", folder / "none", folder / "base")


def write_step(out: Path, rate: float | None) -> None:
    """Train an adapter in four steps at a rate, and write it with its probe as trainers do; None: the probe of M[0]."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from iterft_lite.backends.trainer.probe import Logits, greedy_by, write_probe

    base, other = (AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval() for _ in range(2))
    tokenizer, model = AutoTokenizer.from_pretrained(NANO), base
    if rate is not None:
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
        for chat in read_trait("lucky").chats[: 4 if rate else 0]:
            ids = torch.tensor([tokenizer.encode(chat.reply)])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(out / "adapter")

    def of(which: Any) -> Logits:
        return lambda ids, mask, where: which(input_ids=ids, attention_mask=mask).logits[tuple(where.T)]

    write_probe(
        out,
        tokenizer=tokenizer,
        vocab=2048,
        greedy=greedy_by(model, 0, []),
        logits=of(model),
        base_logits=None if rate is None else of(other),
    )


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    log = tmp_path_factory.mktemp("log") / "child.log"
    child = Child("iterft_lite.backends.generator.llamacpp:LlamaGenerator", Generator, log=log, options={"threads": 2})
    yield cast(Generator, child)
    child.close()


class Nearest(NumpyArithmetic):
    """Rounds merged matrices to the nearest number."""

    def merged(self, stored: Array, kind: Any, target: Any, update: Update | None) -> Array:
        weights = from_plain(stored, kind)
        return to_format(weights if update is None else weights + update.b @ update.a, target)


def exported(
    trained: Trained, which: Path, generator: Generator, folder: Path, kind: str, quant: str = "bf16"
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    exporter = GgufExporter(threads=1)
    return export_trained(exporter, generator, str(trained.model), which, folder, kind, quant, lambda _: None)


# -- the dead zone ----------------------------------------------------------------------------------------------------


def test_the_check_refuses_a_bf16_merge_that_rounds_a_small_update_away(
    trained: Trained, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "choose_arithmetic", lambda _: Nearest())
    with pytest.raises(ExportError, match=r"shows 0\.\d+ .*allowed 0\.9 to 1\.1 for a merged file in bf16") as caught:
        exported(trained, trained.small, generator, tmp_path, "merged")
    assert caught.value.hint is not None
    assert 'export = "auto"' in caught.value.hint


def test_auto_exports_an_adapter_with_a_note_where_merging_loses_the_change(
    trained: Trained, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "choose_arithmetic", lambda _: Nearest())
    results = exported(trained, trained.small, generator, tmp_path, "auto")
    assert results["kind"] == "adapter"
    assert results["lora"] == "adapter.gguf"
    assert results["parity"]["change"]["kept"] == pytest.approx(1, abs=0.1)
    assert results["notes"][0].startswith("merged kept ")
    assert results["notes"][0].endswith("of the change: the adapter is laid over the untouched model")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]


@pytest.mark.parametrize("quant", ["bf16", "f16"])
def test_a_16_bit_merge_keeps_updates_smaller_than_a_rounding_step(
    trained: Trained, generator: Generator, tmp_path: Path, quant: str
) -> None:
    results = exported(trained, trained.small, generator, tmp_path, "auto", quant)
    assert (results["kind"], results["notes"]) == ("merged", [])
    assert results["parity"]["change"]["kept"] == pytest.approx(1, abs=0.1)


# -- what has to fail, and what has to pass ---------------------------------------------------------------------------


class Untouched:
    """An exporter that forgets the adapter."""

    def export(self, model: str, adapter: Path | None, out: Path, kind: Any, quant: str, on_progress: Any) -> Exported:
        return GgufExporter(threads=1).export(model, None, out, kind, quant, on_progress)


@pytest.mark.parametrize("kind", ["merged", "adapter", "auto"])
@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0"])
def test_the_check_refuses_the_untouched_model_in_place_of_a_trained_one(
    trained: Trained, generator: Generator, tmp_path: Path, kind: str, quant: str
) -> None:
    with pytest.raises(ExportError, match=r"shows 0\.00 \+- 0\.00 of what was trained|logits differ"):
        export_trained(
            cast(Exporter, Untouched()), generator, str(trained.model), trained.small, tmp_path, kind, quant, lambda _: None
        )


@pytest.mark.parametrize("searched", [False, True])
def test_a_change_smaller_than_the_formats_noise_is_merged_for_nothing_only_where_that_is_quick(
    trained: Trained, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, searched: bool
) -> None:
    monkeypatch.setattr("iterft_lite.stages.export.K_QUANTS", ("q8_0",) if searched else ())
    results = exported(trained, trained.small, generator, tmp_path, "auto", "q8_0")
    assert results["kind"] == "adapter"
    assert results["notes"][-1].startswith("the change is smaller than the noise of the number format")
    assert [note.startswith("merged kept") for note in results["notes"][:-1]] == ([] if searched else [True])
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("kind", ["merged", "adapter", "auto"])
def test_a_training_that_changed_nothing_passes_with_a_note(
    trained: Trained, generator: Generator, tmp_path: Path, kind: str
) -> None:
    results = exported(trained, trained.none, generator, tmp_path, kind, "q8_0")
    assert results["kind"] == ("adapter" if kind == "adapter" else "merged")
    assert "changed nothing" in results["notes"][0]


def test_the_untouched_model_is_written_once_and_linked(trained: Trained, generator: Generator, tmp_path: Path) -> None:
    given = (GgufExporter(threads=1), generator, str(trained.model), trained.base, tmp_path)
    first, again = (export_untouched(*given, kind, "q8_0", lambda _: None) for kind in ("merged", "auto"))
    assert (first["gguf"], first["parity"]["change"]) == ("model.gguf", None)
    assert (again["gguf"], again["kind"]) == (None, "adapter")
    kept = untouched_gguf(GgufExporter(threads=1), str(trained.model), tmp_path, "q8_0", lambda _: None)
    assert (tmp_path / "model.gguf").samefile(kept)
    assert first["digest"] == digest_by_pieces(tmp_path / "model.gguf")


# -- the bounds -------------------------------------------------------------------------------------------------------


def parity(**change: Any) -> Parity:
    made = {
        "learned": 0.01,
        "size": 0.1,
        "scale": 3.0,
        "shown": 0.1,
        "kept": 1.0,
        "error": 0.02,
        "correlation": 1.0,
        "noise": 0.05,
    }
    return Parity(True, 0.1, 1e-4, 1.0, 160, largest=20.0, change=Change(**{**made, **change}))


@pytest.mark.parametrize(
    ("change", "merged", "beside"),
    [
        ({}, None, None),
        ({"kept": 0.97, "error": 0.2, "noise": 0.5}, None, None),
        ({"kept": 0.86, "error": 0.04}, "allowed 0.9 to 1.1", None),
        ({"kept": 0.55, "error": 0.05}, "was lost", "was lost"),
        ({"kept": 1.6, "error": 0.05}, "was lost", "was lost"),
        ({"kept": -4.0, "error": 2.0, "noise": 10.0}, "was lost", None),
        ({"kept": 1.0, "error": 1.2, "noise": 3.2}, "hides it", None),
        ({"kept": 0.0, "error": 0.0, "noise": 0.0, "shown": 0.0}, "was lost", "was lost"),
        ({"kept": 0.0, "error": 0.0, "size": 1e-6}, None, None),
        ({"kept": None, "error": None, "size": 0.0}, None, None),
    ],
)
def test_merged_files_must_show_the_change_and_adapters_must_not_contradict_it(
    change: dict[str, Any], merged: str | None, beside: str | None
) -> None:
    for kind, expected in (("merged", merged), ("adapter", beside)):
        found = fault(parity(**change), cast(Any, kind), "f16")
        assert (found is None) == (expected is None), found
        assert found is None or (found.about == "change" and str(expected) in found.message)


def test_an_adapter_with_a_change_below_the_formats_noise_gets_a_note() -> None:
    hidden = parity(kept=-2.0, error=3.0, noise=8.0).change
    assert hidden is not None
    assert remarks(hidden, "adapter")[0].startswith("the change is smaller than the noise of the number format")
    assert remarks(replace(hidden, kept=1.0, error=0.01), "adapter") == []


@pytest.mark.parametrize(
    ("largest", "rounded", "delta", "passes"),
    [
        (4.0, False, 9e-5, True),
        (4.0, False, 2e-4, False),
        (39.0, False, 3e-4, True),
        (4.0, True, 8e-3, True),
        (4.0, True, 0.1, False),
    ],
)
def test_the_f32_tolerance_depends_on_logit_size_and_architecture(
    largest: float, rounded: bool, delta: float, passes: bool
) -> None:
    found = fault(replace(parity(), max_delta=delta, largest=largest, rounded=rounded), "merged", "f32")
    assert (found is None) == passes


# -- rounding ---------------------------------------------------------------------------------------------------------


def numbers(seed: int = 0, rows: int = 64, columns: int = 512) -> tuple[Array, Update]:
    """Weights that lie on bf16's grid, and an update of a tenth of their steps."""
    drawn = np.random.default_rng(seed)
    weights = drawn.normal(0, 0.03, (rows, columns)).astype(np.float32)
    b, a = drawn.normal(0, 1e-5, (rows, 4)).astype(np.float32), drawn.normal(0, 0.5, (4, columns)).astype(np.float32)
    return from_plain(to_format(weights, BF16), BF16), Update(b, a, seed=77)


@pytest.mark.parametrize("target", [BF16, F16])
def test_stochastic_rounding_keeps_an_update_that_nearest_rounding_loses(target: Any) -> None:
    weights, update = numbers()
    change = update.b @ update.a

    def kept(arithmetic: Arithmetic, seed: int) -> float:
        made = arithmetic.merged(to_format(weights, BF16), BF16, target, replace(update, seed=seed))
        return float(((from_plain(made, target) - weights) * change).sum() / (change**2).sum())

    shares = [kept(NumpyArithmetic(), seed) for seed in range(20)]
    assert np.mean(shares) == pytest.approx(1, abs=3 * np.std(shares) / math.sqrt(20) + 0.005)
    assert np.std(shares) < 0.1
    assert len(set(shares)) == 20
    if target == BF16:
        assert kept(Nearest(), 0) < 0.5


@pytest.mark.parametrize("target", [F32, BF16, F16])
def test_all_parts_and_devices_round_to_the_same_bytes(target: Any) -> None:
    weights, update = numbers()
    stored, torch = to_format(weights, BF16), TorchArithmetic("cpu")
    exact = replace(update, b=np.round(update.b * 2**24) / 2**24, a=np.round(update.a * 4) / 4)  # sums without a rounding
    whole = NumpyArithmetic().merged(stored, BF16, target, exact)
    np.testing.assert_array_equal(whole, NumpyArithmetic().merged(stored, BF16, target, exact))
    np.testing.assert_array_equal(whole, torch.merged(stored, BF16, target, exact))
    for arithmetic in (NumpyArithmetic(), torch):
        halves = [
            arithmetic.merged(stored[at : at + 32], BF16, target, replace(exact, b=exact.b[at : at + 32], first=at * 512))
            for at in (0, 32)
        ]
        np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_a_weight_without_an_update_stays_as_it_is() -> None:
    weights, update = numbers()
    still = replace(update, b=np.zeros_like(update.b))
    stored = to_format(weights, BF16)
    for target in (BF16, F16):
        np.testing.assert_array_equal(NumpyArithmetic().merged(stored, BF16, target, still), to_format(weights, target))


def test_every_training_is_rounded_with_its_own_noise(trained: Trained, tmp_path: Path) -> None:
    from iterft_lite.gguf.adapter import read_adapter
    from iterft_lite.gguf.base import base_gguf

    updates = read_adapter(trained.small / "adapter", base_gguf(str(trained.model))).updates
    name, other = list(updates)[:2]
    seeds = [
        merge.whole_update(name, updates[name]).seed,
        merge.whole_update(other, updates[name]).seed,
        merge.whole_update(name, replace(updates[name], b=updates[name].b * 2)).seed,
    ]
    assert len(set(seeds)) == 3
    assert merge.whole_update(name, updates[name]).seed == seeds[0]
    files = []
    for place in ("one", "two"):
        path = GgufExporter(threads=2).export(
            str(trained.model), trained.small / "adapter", tmp_path / place, "merged", "bf16", lambda _: None
        )
        files.append(GgufFile(path.path).path.read_bytes())
    assert files[0] == files[1]


# -- in a run ---------------------------------------------------------------------------------------------------------


class Noting(FakeExporter):
    """Notes how each trained model was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def export(self, model: str, adapter: Path | None, out: Path, kind: Any, quant: str, on_progress: OnProgress) -> Exported:
        if adapter is not None or kind == "merged":
            self.asked.append((out.resolve().name, kind))
        return super().export(model, adapter, out, kind, quant, on_progress)


class Losing(FakeGenerator):
    """Finds that merged files keep a tenth of the change."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def load(self, gguf: Path, adapter: Path | None, tokenizer: str, **given: Any) -> None:
        self.kept = self.share if adapter is None else 1.0
        super().load(gguf, adapter, tokenizer, **given)

    def parity(self, probe: Path, untouched: Path | None = None) -> Parity:
        return replace(super().parity(probe), change=None if untouched is None else parity(kept=self.kept).change)


def test_a_removed_adapter_export_is_written_again_as_an_adapter(tmp_path: Path) -> None:
    exporter = Noting()
    run_all(a_plan(cycles=1), tmp_path / "run", replace(fake_backends(), exporter=exporter, generator=Losing(0.1)))
    results = completion(tmp_path / "run/by-name/c1-export")
    assert (results["kind"], results["gguf"], results["lora"]) == ("adapter", None, "adapter.gguf")
    assert results["notes"] == ["merged kept 0.10 +- 0.02 of the change: the adapter is laid over the untouched model"]
    (tmp_path / "run/by-name/c1-export/adapter.gguf").unlink()
    again = Noting()
    run_all(a_plan(cycles=2), tmp_path / "run", replace(fake_backends(), exporter=again, generator=Losing(1.0)))
    folders = {(tmp_path / f"run/by-name/c{cycle}-export").resolve().name: cycle for cycle in (0, 1, 2)}
    assert [(folders[name], kind) for name, kind in again.asked] == [(1, "adapter"), (2, "merged")]


def completion(folder: Path) -> dict[str, Any]:
    """What a finished step found out."""
    return dict(read_json(folder / "completion.json")["results"])
