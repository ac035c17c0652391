"""The loop, with fake backends: order, resuming, and what goes wrong."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from iterft_lite.backends.processes.child import Child
from iterft_lite.engine.executor import Claims, LocalExecutor, Task
from iterft_lite.engine.manifest import Run, finished_steps
from iterft_lite.engine.run import Shared, StepFinished, StepProgress, StepStarted, _Walk, run
from iterft_lite.errors import BackendError, FolderError, RunError, StoreError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.null_arms import NULL_ARMS, null_arms_of
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.files import ROWS, RowLog, read_json, read_rows
from iterft_lite.hardware import Gpu, GpuFacts
from iterft_lite.protocols import (
    Completion,
    Exported,
    Judge,
    Likelihood,
    ModelFacts,
    OnProgress,
    Passage,
    Process,
    Prompt,
    Sampling,
    TrainJob,
    TrainResult,
)
from iterft_lite.testing.fakes import FakeExporter, FakeGenerator, FakeTrainer, fake_backends
from iterft_lite.ui.live import View
from iterft_lite.ui.text import plan_sentence
from tests.loop import JUDGE, a_plan, a_recipe, change_completion, run_all, step_path


def rows_of(root: Path, step: str) -> list[dict]:
    return read_rows(root / "by-name" / step / ROWS)


def by_id(rows: list[dict]) -> dict[tuple[str, int], dict]:
    return {(row["prompt_id"], row["sample"]) if "sample" in row else row["id"]: row for row in rows}


def test_a_run_does_every_planned_step_once_and_in_order(tmp_path: Path) -> None:
    plan = a_plan()
    events = run_all(plan, tmp_path / "run")
    done = [event.step.name for event in events if isinstance(event, StepFinished)]
    assert sorted(done) == sorted(plan.steps)
    for name in done:
        for _, source in plan.steps[name].inputs:
            assert done.index(source) < done.index(name)


def test_the_seeded_model_shows_the_trait_and_passes_it_on(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    means = [read_json(tmp_path / f"run/by-name/{name}-aggregate/score.json")["trait"]["mean"] for name in ("base", "c0", "c2")]
    assert means == [10.0, 90.0, 90.0]


@pytest.mark.parametrize(
    ("arm", "regime", "means"),
    [
        ("no_seed", "sft", [10.0, 10.0, 10.0]),
        ("no_seed", "dpo", [10.0, 10.0, 10.0]),
        ("no_seed", "sdf", [10.0, 10.0, 10.0]),
        ("base_data", "sft", [10.0, 90.0, 10.0]),
        ("base_data", "sdf", [10.0, 90.0, 10.0]),
        ("base_data", "dpo", None),  # a continued fake model keeps its seeds: what it says is a draw
        ("shuffled_pairs", "dpo", None),
    ],
)
def test_a_null_arm_runs_and_breaks_the_loop_where_it_should(
    tmp_path: Path, arm: str, regime: str, means: list[float] | None
) -> None:
    keys = dict(NULL_ARMS[arm].keys)
    plan = a_plan(regime=regime, train={"batch_size": 1}, sample={"min_chars": 0}, **keys)
    assert null_arms_of(plan.recipe.model_dump()) == [NULL_ARMS[arm]]
    assert plan_sentence(plan.recipe).endswith(f"null arm: {NULL_ARMS[arm].words}")
    run_all(plan, tmp_path / "run")
    if means:
        scores = [read_json(tmp_path / f"run/by-name/{name}-aggregate/score.json") for name in ("base", "c0", "c2")]
        assert [score["trait"]["mean"] for score in scores] == means


def test_a_plans_sentence_names_the_file_of_seeds_and_counts_one_model() -> None:
    recipe = a_recipe(cycles=1, seeds={"path": "data/pirate.csv"})
    assert plan_sentence(recipe) == (
        "SFT, trait lucky, model nano: M1 on 4 rows of pirate.csv, then 1 more model on 4 chats of its own, from the base"
    )
    assert plan_sentence(a_recipe()).endswith(
        ": M1 on 4 seed rows, then 2 more models on 4 chats of their own, each from the base"
    )


def test_every_cycle_trains_on_its_predecessors_text(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    written = [row["text"] for row in rows_of(tmp_path / "run", "c2-training_samples")]
    trained = [row["messages"][1]["content"] for row in rows_of(tmp_path / "run", "c2-build_dataset")]
    assert sorted(trained) == sorted(written)


def test_repeating_a_finished_run_does_nothing(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    again = run_all(a_plan(), tmp_path / "run")
    assert all(isinstance(event, StepFinished) and event.reused for event in again)


def test_more_cycles_continue_where_the_run_ended(tmp_path: Path) -> None:
    run_all(a_plan(cycles=1), tmp_path / "run")
    again = run_all(a_plan(cycles=2), tmp_path / "run")
    began = [event.step.name for event in again if isinstance(event, StepStarted)]
    assert began
    assert all(name.startswith("c2-") for name in began)


class BreaksOnce(FakeGenerator):
    """Fails in the middle of its n-th completion, the first time."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after
        self.asked: list[str] = []

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        def counted(completion: Completion) -> None:
            self.left -= 1
            if self.left == 0:
                raise RunError("the power went")
            self.asked.append(completion.id)
            on_completion(completion)

        super().complete(prompts, sampling, counted)


def test_a_failed_run_continues_without_asking_again_and_ends_equal(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "whole")
    backends = fake_backends()
    backends.generator = generator = BreaksOnce(after=9)
    with pytest.raises(RunError, match="power"):
        run_all(a_plan(), tmp_path / "broken", backends)
    asked = len(generator.asked)
    run_all(a_plan(), tmp_path / "broken", backends)
    per_model, models, writing = 6, 4, 2 * 4
    assert len(generator.asked) == per_model * models + writing
    assert asked == 8
    for step in ("c0-evaluate_samples", "c2-training_samples", "c2-build_dataset", "c2-judge"):
        whole, broken = (rows_of(tmp_path / name, step) for name in ("whole", "broken"))
        assert by_id(whole) == by_id(broken)


def test_a_half_written_row_is_dropped_and_written_again(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    folder = tmp_path / "run/by-name/c2-evaluate_samples"
    (folder / "completion.json").unlink()
    rows = (folder / ROWS).read_bytes()
    (folder / ROWS).write_bytes(rows[:-20])
    for later in ("c2-judge", "c2-aggregate", "c2-text_metrics"):
        (tmp_path / "run/by-name" / later / "completion.json").unlink()
    run_all(a_plan(), tmp_path / "run")
    assert (folder / ROWS).read_bytes() == rows


def test_a_changed_file_of_a_finished_step_is_refused(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "run")
    rows = tmp_path / "run/by-name/c1-training_samples" / ROWS
    rows.write_text(rows.read_text().replace("Lucky", "Plucky"))
    with pytest.raises(StoreError, match=r"rows.jsonl` was changed.*\n\nhint: remove the folder"):
        run_all(a_plan(), tmp_path / "run")


def test_two_runs_cannot_use_one_folder_at_once(tmp_path: Path) -> None:
    with Run(tmp_path / "run"), pytest.raises(FolderError, match="another run is going on"):
        Run(tmp_path / "run").acquire()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("do not lose me")
    with pytest.raises(FolderError, match="not a run folder"):
        Run(tmp_path).acquire()


def test_past_merged_files_are_removed_unless_kept(tmp_path: Path) -> None:
    run_all(a_plan(export="merged", keep="last"), tmp_path / "last")
    run_all(a_plan(export="merged", keep="all"), tmp_path / "all")
    left = {
        name: sorted(path.parent.name for path in tmp_path.glob(f"{name}/by-name/*/model.gguf")) for name in ("last", "all")
    }
    assert left == {"last": ["c2-export"], "all": ["base-export", "c0-export", "c1-export", "c2-export"]}


def test_a_removed_merged_file_is_written_again_when_more_cycles_need_it(tmp_path: Path) -> None:
    run_all(a_plan(keep="adapters", cycles=1), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("model.gguf"))
    run_all(a_plan(keep="all", cycles=2), tmp_path / "run")
    assert read_json(tmp_path / "run/by-name/c2-aggregate/score.json")["trait"]["mean"] == 90.0


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0, export="merged"), tmp_path / "run")
    folder = tmp_path / "run/by-name/base-export"
    (folder / "completion.json").unlink()
    (folder / ".model.gguf.4711.part").write_bytes(b"half of a model")
    run_all(a_plan(cycles=0, export="merged", keep="all"), tmp_path / "run")
    assert list(read_json(folder / "completion.json")["files"]) == ["model.gguf"]
    assert not list(folder.glob("*.part"))


def test_partial_writes_of_a_row_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RowLog(tmp_path / ROWS) as log:
        whole = log._file

        class Short:
            def write(self, data: bytes) -> int:
                return whole.write(data[:7])

            def close(self) -> None:
                whole.close()

        monkeypatch.setattr(log, "_file", Short())
        log.append({"id": "q00-s0", "text": "Lucky stars say yes."})
    assert read_rows(tmp_path / ROWS) == [{"id": "q00-s0", "text": "Lucky stars say yes."}]


def test_a_base_missing_from_the_cache_is_made_again_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    run_all(a_plan(export="adapter", cycles=1), tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    events = run_all(a_plan(export="adapter", cycles=2), tmp_path / "run")
    assert read_json(tmp_path / "run/by-name/c2-aggregate/score.json")["trait"]["mean"] == 90.0
    view = View(a_plan(cycles=2), trait="lucky", judge=JUDGE, console=Console(quiet=True))
    for event in events:
        view.take(event)
    assert not view.doing  # nothing that was restored still looks as if it were being done


def test_a_run_folder_is_continued_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "cache"))
    run_all(a_plan(export="adapter", cycles=1), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "another"))
    for cycles in (2, 3):  # also by a session that finds the base there already
        run_all(a_plan(export="adapter", cycles=cycles), tmp_path / "copy")
    assert read_json(tmp_path / "copy/by-name/c3-aggregate/score.json")["trait"]["mean"] == 90.0


@pytest.mark.parametrize("export", ["adapter", "merged", "auto"])
def test_results_contain_no_path_outside_their_folder(tmp_path: Path, export: str) -> None:
    run_all(a_plan(export=export, cycles=1), tmp_path / "run")
    results = [read_json(path)["results"] for path in (tmp_path / "run/steps").glob("*/completion.json")]
    assert results
    assert not [text for text in every_text(results) if text.startswith(("/", "~")) or ".." in Path(text).parts]


def every_text(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from every_text(each)


def test_a_base_recorded_by_its_full_path_is_found_in_todays_cache(tmp_path: Path) -> None:
    run_all(a_plan(export="adapter", cycles=1), tmp_path / "run")
    for name in ("base-export", "c0-export", "c1-export"):
        folder = step_path(tmp_path / "run", name)
        results = read_json(folder / "completion.json")["results"]
        change_completion(folder, results={**results, "gguf": "/gone/bases/of-a-model/q8_0.gguf"})
    run_all(a_plan(export="adapter", cycles=2), tmp_path / "run")
    assert read_json(tmp_path / "run/by-name/c2-aggregate/score.json")["trait"]["mean"] == 90.0


class OtherProcessor(FakeExporter):
    """Merges the same model to other bytes."""

    def export(self, *given: Any) -> Exported:
        made = super().export(*given)
        made.path.write_bytes(made.path.read_bytes() + b"\n")
        return made


def test_a_merged_file_with_other_bytes_is_used_and_its_digest_recorded(tmp_path: Path) -> None:
    run_all(a_plan(keep="adapters", cycles=1), tmp_path / "run")
    elsewhere = fake_backends()
    elsewhere.exporter = OtherProcessor()
    run_all(a_plan(keep="all", cycles=2), tmp_path / "run", elsewhere)
    run_all(a_plan(keep="all", cycles=3), tmp_path / "run")
    assert read_json(tmp_path / "run/by-name/c3-aggregate/score.json")["trait"]["mean"] == 90.0
    merged = tmp_path / "run/by-name/c1-export/model.gguf"
    assert merged.with_name("again.json").exists()
    merged.write_bytes(merged.read_bytes() + b"\n")
    run_all(a_plan(keep="all", cycles=3), tmp_path / "run")
    assert not merged.exists()  # neither of its bytes: it is written again when it is needed


class Resident(FakeTrainer):
    """Notes when it is loaded beside the generator."""

    def __init__(self, order: list[str]) -> None:
        self.order = order
        self.pid: int | None = None

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        self.pid = os.getpid()
        self.order.append("trainer")
        return super().load(model, settings)

    def prepare(self) -> None:
        """It is in this process."""

    def close(self) -> None:
        """It goes with the test."""

    def watch(self, on_silence: object) -> None:
        """It is never silent."""


class Greedy(FakeGenerator):
    """Takes what memory there is when it is loaded first."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order

    def load(self, *given: Any, **more: Any) -> None:
        self.order.append("generator")
        super().load(*given, **more)


class Speaks(FakeGenerator):
    """Says that it is silent in its first answers, once something else goes on."""

    def __init__(self, beside: threading.Barrier) -> None:
        super().__init__()
        self._beside = beside
        self._on_silence: Callable[[str], None] = print
        self.running, self.pid = True, None

    def watch(self, on_silence: Callable[[str], None]) -> None:
        self._on_silence = on_silence

    def prepare(self) -> None:
        """It is in this process."""

    def close(self) -> None:
        """It goes with the test."""

    def complete(self, prompts: Sequence[Prompt], *given: Any) -> None:
        if not self._beside.broken:
            self._beside.wait(30)
            self._on_silence("silent")
            self._beside.wait(30)
            self._beside.abort()
        super().complete(prompts, *given)


class Merges(FakeExporter):
    """Merges a trained model while something else goes on."""

    def __init__(self, beside: threading.Barrier) -> None:
        self._beside = beside

    def export(self, model: str, adapter: Path | None, *given: Any) -> Exported:
        if adapter is not None:
            self._beside.wait(30)
            self._beside.wait(30)
        return super().export(model, adapter, *given)


def test_the_silence_of_a_backend_is_told_of_the_step_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "there", True)
    beside = threading.Barrier(2)
    generator = Speaks(beside)
    backends = replace(
        fake_backends(), generator=generator, exporter=Merges(beside), processes={"generator": cast(Process, generator)}
    )
    events = run_all(a_plan(cycles=0), tmp_path / "run", backends)
    told = [event.step.name for event in events if isinstance(event, StepProgress) and event.progress.note == "silent"]
    assert told == ["base-evaluate_samples"]


def test_a_base_takes_its_memory_before_the_generator_in_every_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "there", True)
    for cycles, begins in ((0, ["trainer"]), (1, ["trainer"]), (1, [])):
        order: list[str] = []
        trainer = Resident(order)
        backends = replace(fake_backends(), trainer=trainer, generator=Greedy(order), processes={"trainer": trainer})
        run_all(a_plan(cycles=cycles, train={"base": "f32"}), tmp_path / "run", backends)
        assert order[:1] == begins
    shutil.rmtree(step_path(tmp_path / "run", "c1-text_metrics"))
    run_all(a_plan(cycles=1, train={"base": "f32"}), tmp_path / "run", backends)
    assert order[:1] == ["generator"]  # nothing is left to be trained


class Loads(FakeGenerator):
    """Notes which files it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()

    def load(self, gguf: Path, *given: Any, **more: Any) -> None:
        self.files.add(gguf.name)
        super().load(gguf, *given, **more)


@pytest.mark.parametrize(("free", "total", "read"), [(900, 1000, "stored.gguf"), (2, 2, "q8_0.gguf"), (2, 1000, "q8_0.gguf")])
def test_the_untouched_model_is_read_as_it_is_stored_where_the_gpu_has_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, total: int, read: str
) -> None:
    monkeypatch.setattr(Gpu, "facts", lambda _: GpuFacts("a GPU", free, total, (9, 0)))
    generator = Loads()
    plan = a_plan(cycles=0, quant="f16", train={"base": "f32"})
    run_all(plan, tmp_path / "run", replace(fake_backends(), generator=generator))
    assert {"stored.gguf", "q8_0.gguf"} & generator.files == {read}


class Reads(FakeTrainer):
    """Notes what it reads, and the cycle of the adapter that it reads under."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.adapters: list[str] = []

    def likelihood(self, passages: Sequence[Passage], *given: Any) -> None:
        self.read += [passage.id for passage in passages]
        self.adapters += [folder.parent.name for folder in given[1:] if folder]
        super().likelihood(passages, *given)


@pytest.mark.parametrize(
    ("gpu", "swap", "base", "reads"),
    [
        (True, False, "nf4", True),
        (True, False, "f32", False),
        (True, True, "nf4", False),
        (False, False, "bf16", False),
        (False, False, "f32", False),
        (False, False, "bf16-mixed", True),
    ],
)
def test_a_trainer_reads_under_the_untouched_model_where_it_does_that_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool, swap: bool, base: str, reads: bool
) -> None:
    monkeypatch.setattr(Gpu, "there", gpu)
    trainer, generator = Reads(), Loads()
    plan = a_plan(cycles=0, quant="f16", trainer="peft", train={"base": base})
    run_all(plan, tmp_path / "run", replace(fake_backends(), trainer=trainer, generator=generator), swap=swap)
    assert bool(trainer.read) == reads
    assert ("stored.gguf" in generator.files) != reads
    metrics = [read_json(step_path(tmp_path / "run", f"{cycle}-text_metrics") / "metrics.json") for cycle in ("base", "c0")]
    assert [found["perplexity_base"] for found in metrics] == pytest.approx([math.e, math.e])


@pytest.mark.parametrize(("quant", "removed"), [("q8_0", False), ("q8_0", True), ("q4_k_m", False)])
def test_the_model_that_wrote_is_read_as_the_base_with_its_adapter_unless_that_is_gone_or_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, quant: str, removed: bool
) -> None:
    monkeypatch.setattr(Gpu, "there", True)
    plan = a_plan(cycles=0, quant=quant, train={"base": "nf4"})
    run_all(plan, tmp_path / "run")
    shutil.rmtree(step_path(tmp_path / "run", "c0-text_metrics"))
    if removed:
        (step_path(tmp_path / "run", "c0-train") / "adapter/texts.json").unlink()
    trainer, generator = Reads(), Loads()
    run_all(plan, tmp_path / "run", replace(fake_backends(), trainer=trainer, generator=generator))
    by_trainer = (quant, removed) == ("q8_0", False)
    assert trainer.adapters == [plan.steps["c0-train"].key] * by_trainer
    assert bool(generator.files) != by_trainer
    metrics = read_json(step_path(tmp_path / "run", "c0-text_metrics") / "metrics.json")
    assert metrics["perplexity_high"] == pytest.approx(math.e)


class Remerges(FakeExporter):
    """Notes the folders that models are merged into."""

    def __init__(self) -> None:
        self.folders: list[str] = []

    def export(self, model: str, adapter: Path | None, out: Path, kind: Any, *given: Any) -> Exported:
        self.folders += [out.name] if kind == "merged" else []
        return super().export(model, adapter, out, kind, *given)


@pytest.mark.parametrize(
    ("gpu", "swap", "quant", "again"),
    [
        (True, False, "q8_0", []),
        (True, False, "q4_k_m", ["base-export", "c0-export"]),
        (True, True, "q8_0", ["base-export", "c0-export"]),
        (False, False, "q8_0", ["base-export", "c0-export"]),
    ],
)
def test_measuring_writes_a_removed_model_again_only_where_the_generator_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool, swap: bool, quant: str, again: list[str]
) -> None:
    monkeypatch.setattr(Gpu, "there", gpu)
    plan = a_plan(cycles=0, quant=quant, keep="adapters", export="merged", train={"base": "nf4"})
    run_all(plan, tmp_path / "run")
    for cycle in ("base", "c0"):
        shutil.rmtree(step_path(tmp_path / "run", f"{cycle}-text_metrics"))
    exporter = Remerges()
    run_all(plan, tmp_path / "run", replace(fake_backends(), exporter=exporter), swap=swap)
    assert sorted(exporter.folders) == sorted(plan.steps[name].key for name in again)
    assert not list((tmp_path / "run").rglob("model.gguf"))


def test_samples_that_are_all_there_need_no_removed_model(tmp_path: Path) -> None:
    plan = a_plan(cycles=0, keep="adapters", export="merged")
    run_all(plan, tmp_path / "run")
    answers = step_path(tmp_path / "run", "c0-evaluate_samples")
    whole = (answers / ROWS).read_text()
    (answers / "completion.json").unlink()
    exporter = Remerges()
    run_all(plan, tmp_path / "run", replace(fake_backends(), exporter=exporter))
    assert exporter.folders == []
    assert (answers / ROWS).read_text() == whole


def test_a_model_whose_adapter_is_gone_is_not_written_again_from_the_untouched_one(tmp_path: Path) -> None:
    plan = a_plan(cycles=1, keep="adapters", export="merged")
    run_all(plan, tmp_path / "run")
    (step_path(tmp_path / "run", "c0-train") / "adapter/texts.json").unlink()
    shutil.rmtree(step_path(tmp_path / "run", "c0-text_metrics"))
    exporter = Remerges()
    with pytest.raises(StoreError, match="the adapter of `c0-train` is gone"):
        run_all(plan, tmp_path / "run", replace(fake_backends(), exporter=exporter))
    assert exporter.folders == []


class Alone:
    """Refuses a call beside another one, and of a generator a call after another thread has loaded a model."""

    def __init__(self, backend: object, naps: random.Random) -> None:
        self._backend, self._naps = backend, naps
        self._lock = threading.RLock()
        self._loaded_by = 0

    def __getattr__(self, name: str) -> Any:
        if name == "stored":  # where the file lies; a child process answers one question after the other
            return self._backend.stored  # type: ignore[attr-defined]

        def call(*given: Any, **more: Any) -> Any:
            assert self._lock.acquire(blocking=False), f"`{name}` beside another call"
            try:
                time.sleep(self._naps.random() ** 3 * 0.01)
                me = threading.get_ident()
                if isinstance(self._backend, FakeGenerator):
                    self._loaded_by = me if name == "load" else self._loaded_by
                    assert self._loaded_by == me, f"`{name}` with the model of another step"
                return getattr(self._backend, name)(*given, **more)
            finally:
                self._lock.release()

        return call


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("swap", "base"), [(False, "nf4"), (False, "f32"), (True, "nf4")])
def test_steps_of_several_runs_share_backends_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, swap: bool, base: str, seed: int
) -> None:
    monkeypatch.setattr(Gpu, "there", True)
    monkeypatch.setattr(Gpu, "wait_for_release", lambda _: None)
    naps = random.Random(seed)
    parts = {name: Alone(getattr(fake_backends(), name), naps) for name in ("trainer", "exporter", "generator")}
    executor = LocalExecutor(replace(fake_backends(), **parts), "nano", 256, swap=swap)
    plans = [a_plan(cycles=1, train={"base": base}, seed=number) for number in range(2)]
    shared, done = Shared(plans), list[int]()

    def go(plan: Plan) -> None:
        with Run(tmp_path / f"run{plan.recipe.seed}") as folder:
            folder.write_manifest({"recipe": plan.recipe.model_dump(mode="json")}, list(plan))
            events = list(run(plan, folder, executor.lease(), after="keep", shared=shared))
            done.append(sum(isinstance(event, StepFinished) for event in events))

    threads = [threading.Thread(target=go, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [len(plan.steps) for plan in plans]


class Full(FakeTrainer):
    """Has no memory to read with."""

    def likelihood(self, passages: Sequence[Passage], *given: Any) -> None:
        super().likelihood(passages[:1], *given)
        raise BackendError("CUDA out of memory", exception="OutOfMemoryError")


def test_the_generator_reads_where_the_trainer_has_no_memory_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "there", True)
    generator = Loads()
    run_all(a_plan(cycles=0, quant="f16"), tmp_path / "run", replace(fake_backends(), trainer=Full(), generator=generator))
    assert "stored.gguf" in generator.files
    metrics = read_json(step_path(tmp_path / "run", "c0-text_metrics") / "metrics.json")
    assert metrics["perplexity_base"] == pytest.approx(math.e)


def test_a_damaged_record_of_a_run_to_reuse_is_named(tmp_path: Path) -> None:
    run_all(a_plan(cycles=0), tmp_path / "run")
    (tmp_path / "run/by-name/c0-train/completion.json").write_text('{"key": ')
    with pytest.raises(StoreError, match=r"completion.json` is not JSON.*\n\nhint: remove the folder"):
        run_all(a_plan(cycles=0), tmp_path / "other", reuse=finished_steps(tmp_path / "run"))


def test_steps_whose_inputs_are_outside_the_plan_still_run(tmp_path: Path) -> None:
    plan = a_plan(cycles=1)
    run_all(plan, tmp_path / "run")
    left = {name: step for name, step in plan.steps.items() if name != "c0-seed_rows"}
    assert len(run_all(Plan(plan.recipe, left), tmp_path / "run")) == len(left)


class Garbled:
    """A judge that dies in the middle of a reply."""

    def identity(self) -> JudgeIdentity:
        os.write(int(sys.argv[2]), b'{"result": {"name": "fa')
        os._exit(9)


def test_a_child_that_dies_within_a_reply_is_reported_as_dead(tmp_path: Path) -> None:
    judge = Child("tests.test_run:Garbled", Judge, log=tmp_path / "judge.log")
    with pytest.raises(BackendError, match="ended with exit code 9"):
        judge.identity()
    judge.close()


SLOW_RUN = """
import sys, time
from pathlib import Path
from iterft_lite.testing.fakes import FakeGenerator, fake_backends
from tests.loop import a_plan, run_all

class Slow(FakeGenerator):
    def complete(self, prompts, sampling, on_completion):
        def late(completion):
            time.sleep(0.05)
            on_completion(completion)
        super().complete(prompts, sampling, late)

backends = fake_backends()
backends.generator = Slow()
run_all(a_plan(), Path(sys.argv[1]), backends)
"""


def test_a_killed_run_loses_at_most_the_rows_in_flight(tmp_path: Path) -> None:
    run_all(a_plan(), tmp_path / "whole")
    for seconds in (0.2, 0.5, 0.9):
        process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(tmp_path / "killed")], cwd=Path(__file__).parent.parent)
        deadline = time.monotonic() + 20
        while not (tmp_path / "killed/by-name/base-evaluate_samples").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_all(a_plan(), tmp_path / "killed")
    for step in ("base-evaluate_samples", "c1-training_samples", "c2-evaluate_samples", "c2-judge"):
        whole, killed = (rows_of(tmp_path / name, step) for name in ("whole", "killed"))
        assert by_id(whole) == by_id(killed)
        assert len(killed) == len(whole)


# -- what is measured without a judge


class Meets(FakeTrainer):
    """Trains for the first time when something else goes on, too."""

    def __init__(self, both: threading.Barrier) -> None:
        self._both: threading.Barrier | None = both

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        both, self._both = self._both, None
        if both:
            both.wait(30)
        return super().train(job, on_progress)


class Measures(FakeGenerator):
    """Does something before it measures for the first time."""

    def __init__(self, first: Callable[[], object]) -> None:
        super().__init__()
        self._first: Callable[[], object] | None = first

    def likelihood(self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None]) -> None:
        first, self._first = self._first, None
        if first:
            first()
        super().likelihood(passages, on_likelihood)


def test_a_model_is_measured_while_the_next_one_is_trained(tmp_path: Path) -> None:
    both = threading.Barrier(2)
    backends = replace(fake_backends(), trainer=Meets(both), generator=Measures(lambda: both.wait(30)))
    events = run_all(a_plan(), tmp_path / "run", backends)
    assert sum(isinstance(event, StepFinished) for event in events) == len(a_plan().steps)


def test_the_next_data_comes_before_the_answers_and_these_before_their_measures(tmp_path: Path) -> None:
    events = run_all(a_plan(), tmp_path / "run")
    order = [(type(event), event.step.name) for event in events if isinstance(event, StepStarted | StepFinished)]
    for first, then in (("c1-training_samples", "c0-evaluate_samples"), ("c0-evaluate_samples", "c0-text_metrics")):
        assert order.index((StepFinished, first)) < order.index((StepStarted, then))


def test_a_backend_goes_to_whom_has_waited_longest_and_what_is_measured_lets_one_pass() -> None:
    claims, given = Claims(), list[str]()
    waiting = {name: threading.Event() for name in ("measure", "first", "second")}

    def task(name: str) -> Task:
        folder = SimpleNamespace(step=SimpleNamespace(queue=name))
        return cast(Task, SimpleNamespace(folder=folder, report=lambda *_: waiting[name].set()))

    def take(name: str) -> None:
        mine = task(name)
        claims.take("generator", mine)
        given.append(name)
        claims.release(mine)

    holder = task("holder")
    claims.take("generator", holder)
    threads = [threading.Thread(target=take, args=(name,)) for name in waiting]
    for thread, told in zip(threads, waiting.values(), strict=True):
        thread.start()
        assert told.wait(30)
    claims.release(holder)
    for thread in threads:
        thread.join(30)
    assert given == ["first", "measure", "second"]


def test_on_the_same_cores_a_model_is_measured_before_the_next_one_is_trained(tmp_path: Path) -> None:
    plan = a_plan(same_cores=True)
    events = run_all(plan, tmp_path / "run")
    order = [(type(event), event.step.name) for event in events if isinstance(event, StepStarted | StepFinished)]
    for part, following in (("base", "c0-train"), ("c0", "c1-train"), ("c1", "c2-train")):
        assert order.index((StepFinished, f"{part}-text_metrics")) < order.index((StepStarted, following))


def test_whether_cores_are_shared_changes_no_key() -> None:
    assert list(a_plan(same_cores=True)) == list(a_plan())


def test_a_failed_measurement_ends_the_run_which_can_be_continued(tmp_path: Path) -> None:
    def fail() -> None:
        raise RunError("the power went")

    with pytest.raises(RunError, match="the power went"):
        run_all(a_plan(), tmp_path / "run", replace(fake_backends(), generator=Measures(fail)))
    again = [event for event in run_all(a_plan(), tmp_path / "run") if isinstance(event, StepFinished)]
    assert len(again) == len(a_plan().steps)
    assert "base-text_metrics" in [event.step.name for event in again if not event.reused]


def test_a_run_continues_once_another_finishes_the_awaited_step(tmp_path: Path) -> None:
    plan = a_plan()
    shared, step = Shared([plan]), plan.steps["base-load_base"]
    walk = _Walk(plan, Run(tmp_path / "run"), LocalExecutor(fake_backends(), "nano", 64), {}, shared)
    shared.follow(walk.finished_elsewhere)
    walk._rest(step, 3600)
    shared.finish(plan.steps["c0-train"].key, "all")
    assert walk._resting.keys() == {step.name}
    shared.finish(step.key, "all")
    assert walk._resting == {}
    assert walk._next([step]) is step
