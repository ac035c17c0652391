"""The backends of a run, each in a child process that is started when first called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from iterft_lite.backends.judge.identity import judge_worker
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.protocols import Exporter, Generator, Judge, Trainer

TRAINERS = {
    "peft": "iterft_lite.backends.trainer.trl:PeftTrainer",
    "unsloth": "iterft_lite.backends.trainer.unsloth:UnslothTrainer",
}


@dataclass
class Backends:
    """What a run works through. In a run these are proxies of child processes; tests put fakes here."""

    trainer: Trainer
    exporter: Exporter
    generator: Generator
    judge: Judge

    def close(self, *names: str) -> None:
        """End the named backends' processes, or all; they start again when called again."""
        for name in names or ("trainer", "exporter", "generator", "judge"):
            backend = getattr(self, name)
            if isinstance(backend, Child):
                backend.close()

    def pids(self) -> list[int]:
        """Numbers of the processes that are there."""
        backends = (self.trainer, self.exporter, self.generator, self.judge)
        return [backend.pid for backend in backends if isinstance(backend, Child) and backend.pid is not None]


def threads_of(recipe: Recipe) -> int:
    """CPU threads a backend may use."""
    return recipe.threads if recipe.threads != "auto" else os.cpu_count() or 1


def open_backends(
    recipe: Recipe,
    trait: Trait,
    judge: JudgeIdentity,
    logs: Path,
    keep_free: int = 0,
    *,
    seeds: tuple[Chat, ...] | tuple[Document, ...] = (),
) -> Backends:
    """Proxies for a resolved recipe; no process is started yet.

    Args:
        seeds: The run's own seed rows, where it has other ones than the trait: what an embedded judge is fitted on.
        keep_free: Bytes of GPU memory that the generator leaves to the trainer beside it.
    """
    threads = str(threads_of(recipe))
    environment = {"OMP_NUM_THREADS": threads}
    worker, options = judge_worker(judge, recipe, Material(trait, seeds, recipe.model), ledger=logs / "judge_usd.txt")
    return Backends(
        trainer=cast(Trainer, Child(TRAINERS[recipe.trainer], Trainer, log=logs / "trainer.log", environment=environment)),
        exporter=cast(
            Exporter,
            Child(
                "iterft_lite.backends.exporter.gguf:GgufExporter", Exporter, log=logs / "exporter.log", environment=environment
            ),
        ),
        generator=cast(
            Generator,
            Child(
                "iterft_lite.backends.generator.llamacpp:LlamaGenerator",
                Generator,
                log=logs / "generator.log",
                environment=environment | {"ITERFT_THREADS": threads, "ITERFT_KEEP_FREE": str(keep_free)},
            ),
        ),
        judge=cast(Judge, Child(worker, Judge, log=logs / "judge.log", options=options)),
    )
