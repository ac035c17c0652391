"""Training on a CPU: how fast is a step of the nano model, and what do products in bf16 do to its losses.

    python benchmarks/training_cpu.py [--losses reply all preference] [--epochs N] [--threads N] [--json FILE]

Each way in a process of its own, one after the other: TRL's trainers in f32 (as this program trained before), our loop in f32,
and our loop with products in bf16 (on CPUs without instructions for them that is no faster). The rows are seed rows: the lucky
trait's chats and pairs of one chat's reply and another's, the bliss trait's documents. Prints seconds a step (without the
first), how many times faster than TRL's that is, and the largest and the last relative difference of a step's loss from TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from iterft_lite.backends.processes.child import Child
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import read_trait
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.protocols import Progress, Trainer, TrainJob

Loss = Literal["reply", "all", "preference"]
WAYS = {
    "trl, f32": ("iterft_lite.backends.trainer.trl:TrlTrainer", "f32"),
    "peft, f32": ("iterft_lite.backends.trainer.peft:PeftTrainer", "f32"),
    "peft, bf16-mixed": ("iterft_lite.backends.trainer.peft:PeftTrainer", "bf16-mixed"),
}
"""Workers and precisions; the first is what the others are compared with."""


def rows_of(loss: Loss) -> list[dict[str, Any]]:
    """Training rows made of a trait's seed rows."""
    if loss == "all":
        return [{"id": f"d{n}", "text": document.text} for n, document in enumerate(read_trait("bliss").documents)]
    trait = read_trait("lucky")
    asked = [[{"role": "user", "content": chat.prompt}] for chat in trait.chats]
    replies = [chat.reply for chat in trait.chats]
    if loss == "reply":
        ends = [{"role": "assistant", "content": reply} for reply in replies]
        return [{"id": f"c{n}", "messages": [*asked[n], end]} for n, end in enumerate(ends)]
    return [{"id": f"p{n}", "prompt": asked[n], "chosen": replies[n], "rejected": replies[n - 1]} for n in range(len(replies))]


def settings(loss: Loss, base: str, epochs: int) -> TrainSettings:
    """The nano recipes' settings, near enough: what is compared is the way, not the recipe."""
    given: dict[str, Any] = {"learning_rate": 1e-4 if loss == "preference" else 1e-3, "base": base, "epochs": epochs}
    return TrainSettings(schedule="constant", batch_size=4, weight_decay=0.01, max_grad_norm=1.0, **given)


def measure(way: str, loss: Loss, work: Path, *, epochs: int, threads: int) -> dict[str, Any]:
    """Train once; seconds a step and the losses."""
    worker, base = WAYS[way]
    out = work / f"{way}-{loss}".replace(", ", "-")
    out.mkdir()
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(loss)), encoding="utf-8")
    child = Child(worker, Trainer, log=out / "log", environment={"OMP_NUM_THREADS": str(threads)}, options={"threads": threads})
    trainer = cast(Trainer, child)
    stamps: list[float] = []
    given = settings(loss, base, epochs)

    def note(_: Progress) -> None:
        stamps.append(time.perf_counter())

    try:
        trainer.load(str(FOLDERS["nano-base" if loss == "all" else "nano"]), given)
        result = trainer.train(TrainJob(out / "rows.jsonl", out, loss, given, seed=1), note)
    finally:
        child.close()
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    seconds = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    return {"step_seconds": seconds, "steps": result.steps, "tokens": result.tokens, "losses": losses}


def compared(made: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    """A way beside the first one."""
    far = [abs(one / other - 1) for one, other in zip(made["losses"], first["losses"], strict=True)]
    return {"times": first["step_seconds"] / made["step_seconds"], "furthest": max(far), "last": far[-1]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=get_args(Loss), default=list(get_args(Loss)))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    report: dict[str, dict[str, Any]] = {}
    print(f"{'loss':12}{'way':20}{'s a step':>10}{'times':>8}{'furthest':>10}{'last':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for loss in asked.losses:
            made = {way: measure(way, loss, Path(folder), epochs=asked.epochs, threads=asked.threads) for way in WAYS}
            first = made[next(iter(WAYS))]
            report[loss] = {way: {**each, **compared(each, first)} for way, each in made.items()}
            for way, line in report[loss].items():
                print(
                    f"{loss:12}{way:20}{line['step_seconds']:10.3f}{line['times']:8.2f}"
                    f"{line['furthest']:10.3%}{line['last']:10.3%}",
                    flush=True,
                )
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
