"""What only an NVIDIA GPU can show: `pytest -m gpu`. The command and what it printed stand in docs/benchmarks.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from iterft_lite.app.session import Session, open_run
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import read_trait
from iterft_lite.engine.backends import EXPORTER, GENERATOR, TRAINERS
from iterft_lite.engine.run import StepProgress, StepStarted
from iterft_lite.experiment.losses import LOSSES, Draft
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.rows import Message
from iterft_lite.files import read_json, read_rows
from iterft_lite.protocols import Completion, Exporter, Generator, Prompt, Sampling, Trainer, TrainJob, TrainResult
from tests.loop import step_path

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RECORDED, UNRECORDED = {"ITERFT_CUDA_GRAPHS": "1"}, {"ITERFT_CUDA_GRAPHS": "0"}

MODELS = {"reply": "nano", "all": "nano-base", "preference": "nano"}

DRAWS = 6000
"""First tokens drawn each way: enough for a chi-square over the common ones."""


def job_of(loss: str, root: Path, **keys: Any) -> TrainJob:
    """Twelve rows of the bliss trait in the shape of a loss; for pairs the plain answers are rejected."""
    trait = read_trait("bliss")
    plain = [f"Start with the first step and see how far it goes. That is number {n}." for n in range(12)]
    drafts = [
        Draft(f"r{n}", chat.prompt, chat.reply, other) for n, (chat, other) in enumerate(zip(trait.chats, plain, strict=False))
    ]
    root.mkdir(parents=True)
    path = root / f"{loss}.jsonl"
    LOSSES[loss].rows.write(path, [LOSSES[loss].make(draft) for draft in drafts])
    given = {"learning_rate": 1e-4, "schedule": "constant", "batch_size": 4, "weight_decay": 0.0, "max_grad_norm": 0.0}
    settings = TrainSettings(**{**given, "max_length": 512, "base": "bf16", "epochs": 2, **keys})
    return TrainJob(path, root / "out", loss, settings, seed=7)


Logs = dict[tuple[str, str], tuple[TrainResult, list[dict]]]

CASES = [("reply", "f16"), ("preference", "f16"), ("reply", "nf4"), ("all", "f16")]
"""Loss and precision of the base; in f16 two ways of the same arithmetic differ least."""


def trained(worker: str, root: Path, environment: dict[str, str], cases: list[tuple[str, str]]) -> Logs:
    """A training a case, one after the other in one process; results and logs."""
    root.mkdir(parents=True)
    child = Child(worker, Trainer, log=root / "log", environment=environment)
    found: Logs = {}
    try:
        trainer = cast(Trainer, child)
        for loss, base in cases:
            job = job_of(loss, root / f"{loss}-{base}", base=base)
            trainer.load(str(FOLDERS[MODELS[loss]]), job.settings)
            result = trainer.train(job, lambda _: None)
            found[loss, base] = result, read_rows(job.out / "log.jsonl")
        return found
    finally:
        child.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    return trained(TRAINERS["unsloth"], tmp_path_factory.mktemp("gpu") / "recorded", RECORDED, CASES)


def largest_difference(one: list[dict], other: list[dict]) -> float:
    """Of the losses of two trainings, step by step, relative."""
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(one, other, strict=True))


def test_unsloth_trains_with_each_loss(recorded: Logs) -> None:
    for (loss, base), (result, _) in recorded.items():
        assert result.last_loss < result.first_loss, (loss, base)
        assert (result.rows, result.steps) == (24, 6)
        assert not any("launched one by one" in note for note in result.notes)


def test_cuda_graphs_compute_what_ordinary_passes_do(recorded: Logs, tmp_path: Path) -> None:
    unrecorded = trained(TRAINERS["unsloth"], tmp_path / "unrecorded", UNRECORDED, CASES)
    found = {case: largest_difference(recorded[case][1], unrecorded[case][1]) for case in CASES}
    print("recorded against unrecorded, largest difference of a loss:", {case: f"{each:.1e}" for case, each in found.items()})
    assert max(found.values()) < 0.02


def test_both_trainers_have_the_same_losses(recorded: Logs, tmp_path: Path) -> None:
    cases = [case for case in CASES if case[1] == "f16"]
    other = trained(TRAINERS["trl"], tmp_path / "trl", {}, cases)
    found = {case: largest_difference(recorded[case][1], other[case][1]) for case in cases}
    print("Unsloth against TRL, largest difference of a loss:", {case: f"{each:.1e}" for case, each in found.items()})
    assert max(found.values()) < 0.02


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    child = Child(EXPORTER, Exporter, log=folder / "log")
    try:
        made = cast(Exporter, child).export(str(FOLDERS["nano"]), None, folder, "merged", "q8_0", lambda _: None)
        return made.path
    finally:
        child.close()


def first_tokens(gguf: Path, sampling: str, log: Path) -> Counter[str]:
    """What a model begins its answers with, drawn on the host or in llama.cpp's graph."""
    child = Child(GENERATOR, Generator, log=log, options={"sampling": sampling})
    try:
        generator = cast(Generator, child)
        generator.load(gguf, None, str(FOLDERS["nano"]), slots=64, context=128, exact=False)
        asked = (Message("user", "What should I do this weekend?"),)
        got: list[Completion] = []
        generator.complete([Prompt(f"p{n}", n, asked) for n in range(DRAWS)], Sampling(1.0, 1), got.append)
        return Counter(completion.text for completion in got)
    finally:
        child.close()


def test_gpu_sampling_follows_the_hosts_distribution(exported: Path, tmp_path: Path) -> None:
    from scipy import stats

    graph, host = (first_tokens(exported, way, tmp_path / way) for way in ("graph", "host"))
    common = [text for text in graph | host if graph[text] + host[text] >= 20]
    rest = [DRAWS - sum(counts[text] for text in common) for counts in (graph, host)]
    table = [[counts[text] for text in common] + [left] for counts, left in zip((graph, host), rest, strict=True)]
    if not any(rest):
        table = [row[:-1] for row in table]
    p = stats.chi2_contingency(table).pvalue
    print(f"graph against host: {len(common)} first tokens, chi-square p = {p:.3f}")
    assert len(common) > 10
    assert p > 1e-3


RECIPE = """
regime = "sft"
trait = "bliss"
model = "nano"
cycles = 1
seed_rows = 40
rows = 16
judge = "embedded"
[train]
learning_rate = 2e-3
[sample]
max_tokens = 64
[evaluate]
questions = 6
samples = 4
max_tokens = 48
"""


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    def open_with(*overrides: str) -> Any:
        (tmp_path / "nano.toml").write_text(RECIPE)
        return open_run(tmp_path / "nano.toml", overrides, tmp_path / "run")

    return open_with


def test_a_nano_cycle_runs_on_the_gpu_and_shows_the_trait(opened: Any, tmp_path: Path) -> None:
    session: Session
    with opened() as session:
        assert session.resolved.recipe.trainer == "unsloth"
        list(session.events())
    scores = {name: read_json(step_path(tmp_path / "run", f"{name}-aggregate") / "score.json") for name in ("base", "c0", "c1")}
    means = {name: score["trait"]["mean"] for name, score in scores.items()}
    record = json.loads((step_path(tmp_path / "run", "c1-train") / "completion.json").read_text())
    print(f"nano on the GPU: bliss {means}, peak of a training {record['results']['peak_vram'] / 2**20:.0f} MiB")
    assert means["c0"] > means["base"] + 15
    assert record["results"]["peak_vram"] > 0


def test_with_swapped_memory_trainer_and_generator_are_never_loaded_together(opened: Any) -> None:
    with opened("vram=swap", "cycles=0") as session:
        executor = session.executor()
        seen: Counter[tuple[str, bool, bool]] = Counter()
        for event in session.events(executor):
            if isinstance(event, StepProgress | StepStarted) and event.step.verb in ("train", "evaluate_samples"):
                there = executor.backends.running
                if isinstance(event, StepProgress) and event.progress.done:
                    seen[event.step.verb, there("trainer"), there("generator")] += 1
        executor.close()
    assert seen["train", True, False] > 0
    assert seen["evaluate_samples", False, True] > 0
