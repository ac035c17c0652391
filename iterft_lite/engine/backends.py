"""The backends of a run. Each runs in a child process, which starts at the first call; a recipe can name fakes instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast

from iterft_lite.backends.judge.identity import judge_worker
from iterft_lite.backends.judge.kinds import Material, kind_of
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.verbs import BackendName
from iterft_lite.protocols import Backends, Exporter, Generator, Judge, Process, Trainer
from iterft_lite.testing.fakes import FAKE, FakeExporter, FakeGenerator, FakeJudge, FakeTrainer

TRAINERS = {
    "peft": "iterft_lite.backends.trainer.peft:PeftTrainer",
    "trl": "iterft_lite.backends.trainer.trl:TrlTrainer",
    "unsloth": "iterft_lite.backends.trainer.unsloth:UnslothTrainer",
}

UNUSED = ("scipy", "sklearn")
"""Packages that transformers imports where they are installed, for models and decoding that the plain trainer has no use for: a
third of the time that it takes to start."""

EXPORTER = "iterft_lite.backends.exporter.gguf:GgufExporter"
GENERATOR = "iterft_lite.backends.generator.llamacpp:LlamaGenerator"


def threads_of(recipe: Recipe) -> int:
    """Number of CPU threads that a backend may use."""
    return recipe.threads if recipe.threads != "auto" else os.cpu_count() or 1


def hidden_from_trainer(recipe: Recipe) -> tuple[str, ...]:
    """Packages that a resolved recipe's trainer is to start without (see `Child`)."""
    if recipe.trainer != "peft":
        return ()
    quantised = recipe.train.base == "nf4" or recipe.train.optimizer == "adamw_8bit"
    return UNUSED if quantised else (*UNUSED, "bitsandbytes")


def open_backends(
    recipe: Recipe,
    trait: Trait,
    judge: JudgeIdentity,
    logs: Path,
    keep_free: int = 0,
    *,
    seeds: tuple[Chat, ...] | tuple[Document, ...] = (),
    gpu: str = "",
    swap: bool = False,
) -> Backends:
    """Backends for a resolved recipe. Starts no process yet.

    Args:
        logs: Folder of the processes' output.
        keep_free: GPU memory that the generator leaves to the trainer, bytes.
        seeds: The user's own seed rows, if any: an embedded judge is fitted on them.
        gpu: The only GPU that trainer, exporter and generator see, as CUDA_VISIBLE_DEVICES names it; "" for all that this
            process sees.
        swap: Trainer and generator take turns on the GPU: there is too little memory for the exporter too, which merges on the
            CPU (CUDA's own half GiB cost a generator on 8 GiB two thirds of its speed).
    """
    threads = str(threads_of(recipe))
    environment = {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    processes: dict[BackendName, Process] = {}

    def child(name: BackendName, worker: str, protocol: type, **given: object) -> Child:
        made = Child(worker, protocol, log=logs / f"{name}.log", **given)  # type: ignore[arg-type]  # as `Child` takes them
        processes[name] = made
        return made

    def trainer() -> Trainer:
        hidden = hidden_from_trainer(recipe)
        return cast(Trainer, child("trainer", TRAINERS[recipe.trainer], Trainer, environment=environment, hidden=hidden))

    def exporter() -> Exporter:
        variables = environment | ({"CUDA_VISIBLE_DEVICES": ""} if swap else {})
        return cast(Exporter, child("exporter", EXPORTER, Exporter, environment=variables))

    def generator() -> Generator:
        variables = environment | {"ITERFT_THREADS": threads, "ITERFT_KEEP_FREE": str(keep_free)}
        return cast(Generator, child("generator", GENERATOR, Generator, environment=variables))

    def judging() -> Judge:
        processes["judge"] = made = judge_child(
            judge, recipe, Material(trait, seeds, recipe.model), logs, logs / "judge_usd.txt"
        )
        return cast(Judge, made)

    return Backends(
        FakeTrainer() if recipe.trainer == FAKE else trainer(),
        FakeExporter() if recipe.generator == FAKE else exporter(),
        FakeGenerator() if recipe.generator == FAKE else generator(),
        FakeJudge() if judge.name == FAKE else judging(),
        processes,
    )


def judge_child(judge: JudgeIdentity, recipe: Recipe, material: Material, logs: Path, ledger: Path) -> Child:
    """A judge in a child process. The process gets API keys only if it asks a provider.

    Args:
        ledger: File of the dollars spent.
    """
    worker, options = judge_worker(judge, recipe, material, ledger=ledger)
    secrets: Literal["judges", "none"] = "judges" if kind_of(judge.name).remote else "none"
    # numpy's own threads spin while they wait for each other: fitting the embedded judge took 8 CPU seconds instead of 2
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    return Child(worker, Judge, log=logs / "judge.log", options=options, secrets=secrets, environment=environment)
