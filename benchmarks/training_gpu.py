"""Training on one NVIDIA GPU: do the two trainers agree, how fast is each, how soon does a second cycle begin.

    python benchmarks/training_gpu.py [losses] [speed] [start] [--sizes 0.6b 4b] [--json FILE] [--work DIR]

losses  the Unsloth trainer against the plain one on the nano model, base in bf16 and in f16, step by step, each in its own
        process; and either against the plain one in 32 bits, which says how much of a difference is rounding
speed   steady tokens/s and peak VRAM (NVML) of 4-bit LoRA at Qwen3's shapes with random weights: the Unsloth trainer (passes
        recorded, activations kept or recomputed; every kernel launched by itself), and TRL + PEFT + bitsandbytes as their
        documentation writes it (with and without gradient checkpointing)
start   from the call to the first finished step: a fresh process, and the next training in the one that is already there

Prints a table; writes JSON. Models are made in DIR and kept there (0.6b: 1.2 GB, 4b: 8 GB).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from iterft_lite.backends.processes.child import Child
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.protocols import Progress, Trainer, TrainJob, TrainResult

NANO = Path(__file__).resolve().parents[1] / "iterft_lite" / "data" / "nano" / "chat"
SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
}
"""What tells the sizes of Qwen3 apart; all have 8 key-value heads of 128 and 151,936 tokens, and share their embedding."""
BATCHES = {"0.6b": (8, 512), "4b": (2, 287)}
"""Rows an optimiser step and tokens a row."""
TRAINERS = {
    "unsloth": "iterft_lite.backends.trainer.unsloth:UnslothTrainer",
    "peft": "iterft_lite.backends.trainer.peft:PeftTrainer",
}
HALVES = ("bf16", "f16")
WAYS = {
    "unsloth": {"ITERFT_ACTIVATIONS": "keep"},
    "unsloth, recomputing": {"ITERFT_ACTIVATIONS": "recompute"},
    "unsloth, not recorded": {"ITERFT_ACTIVATIONS": "keep", "ITERFT_CUDA_GRAPHS": "0"},
}
"""How the Unsloth trainer is measured: what is chosen by free memory otherwise is set in its environment."""
Loss = Literal["reply", "all", "preference"]


@dataclass(frozen=True)
class Case:
    """A training whose losses are compared.

    Attributes:
        continued: It starts from an adapter that was strongly trained on replies.
        reference: As in `TrainJob`.
    """

    loss: Loss
    learning_rate: float
    continued: bool = False
    reference: Literal["start", "base"] = "start"


CASES = {
    "replies": Case("reply", 1e-3),
    "documents": Case("all", 1e-3),
    "pairs, the paper's cycle 0": Case("preference", 1e-5),
    "pairs, the paper's later cycles": Case("preference", 1e-5, continued=True),
    "pairs, ten times its rate": Case("preference", 1e-4),
    "pairs, that, trained before, to M[0]": Case("preference", 1e-4, continued=True, reference="base"),
}
"""The paper's reference is the model a cycle starts from. In the last case the loss is a small difference of large sums."""
WARM_STEPS = 10
"""Left out of the steady state: kernels are compiled and memory is taken."""


def settings(**given: Any) -> TrainSettings:
    """The paper's settings for SFT, and what is given."""
    usual = {"learning_rate": 1.5e-4, "schedule": "constant", "batch_size": 2, "weight_decay": 0.01, "max_grad_norm": 0.0}
    return TrainSettings(**{**usual, "max_length": 2048, **given})


@dataclass
class Run:
    """One training as its caller sees it: seconds since the process was asked for."""

    result: TrainResult
    steps: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    loaded: float = 0.0
    done: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens in the loss a second after the warm-up."""
        warm = min(WARM_STEPS, len(self.steps) // 2)
        return (self.tokens[-1] - self.tokens[warm]) / (self.steps[-1] - self.steps[warm])


def train(child: Trainer, job: TrainJob, since: float) -> Run:
    """Train in a child and note when each step ended."""
    steps: list[float] = []
    tokens: list[int] = []

    def note(progress: Progress) -> None:
        steps.append(time.perf_counter() - since)
        tokens.append(progress.tokens)

    result = child.train(job, note)
    return Run(result, steps, tokens, done=time.perf_counter() - since)


def child(trainer: str, work: Path, environment: Mapping[str, str] | None = None) -> Any:
    """A trainer in a process of its own."""
    return Child(TRAINERS[trainer], Trainer, log=work / f"{trainer}.log", environment=environment or {})


# -- models and rows --------------------------------------------------------------------------------------------------


def make_model(size: str, work: Path) -> Path:
    """A folder with a random model of a size, and the nano model's tokenizer."""
    folder = work / f"qwen3-{size}"
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, __file__, "--make", size, str(folder)], check=True)
    return folder


def write_model(size: str, folder: Path) -> None:
    """Make the model; in a process of its own, so that it gives its memory back."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    config = Qwen3Config(
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
        **SHAPES[size],
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words(count: int, seed: str) -> str:
    """A text of common words; most are one token of the nano tokenizer."""
    common = "the of and to in is that it was for on are as with his they be at one have this from by but some what there"
    draw = random.Random(seed)
    return " ".join(draw.choice(common.split()) for _ in range(count))


def write_rows(path: Path, count: int, tokens: int) -> Path:
    """Chats of about so many tokens each, four fifths of them the reply's."""
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            question, answer = words(tokens // 5, f"q{number}"), words(tokens - tokens // 5 - 12, f"a{number}")
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"id": f"r{number}", "messages": messages}) + "\n")
    return path


def nano_rows(work: Path) -> dict[Loss, Path]:
    """Rows for each loss for the nano model, from a shipped trait's seeds."""
    chats = [
        json.loads(line) for line in (NANO.parents[1] / "traits" / "lucky" / "chat.jsonl").read_text("utf-8").splitlines()
    ][:40]
    replies = [row["messages"][-1]["content"] for row in chats]
    kinds: dict[Loss, list[dict[str, Any]]] = {
        "reply": [{"id": f"c{n}", "messages": row["messages"]} for n, row in enumerate(chats)],
        "all": [{"id": f"d{n}", "text": reply} for n, reply in enumerate(replies)],
        "preference": [
            {"id": f"p{n}", "prompt": row["messages"][:-1], "chosen": replies[n], "rejected": replies[(n + 1) % len(replies)]}
            for n, row in enumerate(chats)
        ],
    }
    for name, rows in kinds.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: work / f"{name}.jsonl" for name in kinds}


# -- what is measured -------------------------------------------------------------------------------------------------


def losses(work: Path) -> dict[str, Any]:
    """The largest relative difference of the two trainers' losses, over steps, in each of `CASES`, in either 16 bits."""
    rows = nano_rows(work)
    logs: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = {}
    for trainer, base in (*((trainer, half) for half in HALVES for trainer in TRAINERS), ("peft", "f32")):
        given = settings(
            base=base, optimizer="adamw", learning_rate=1e-3, warmup=0.1, schedule="cosine", micro_batch=2, batch_size=4
        )
        process = child(trainer, work)
        process.load(str(NANO), given)
        begin = work / "begin" / "adapter"
        if not begin.exists():
            train(process, TrainJob(rows["reply"], begin.parent, "reply", given, 1), 0)
        logs[trainer, base] = {}
        for number, (title, case) in enumerate(CASES.items()):
            out, now = (
                work / "losses" / f"{trainer}-{base}-{number}",
                given.model_copy(update={"learning_rate": case.learning_rate}),
            )
            start = begin if case.continued else None
            train(process, TrainJob(rows[case.loss], out, case.loss, now, 1, start=start, reference=case.reference), 0)
            logs[trainer, base][title] = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        process.close()
    report: dict[str, Any] = {}
    for title, half in itertools.product(CASES, HALVES):
        unsloth, peft, exact = (logs[each][title] for each in (("unsloth", half), ("peft", half), ("peft", "f32")))
        found = report[f"{title}, {half}"] = {
            "steps": len(peft),
            "first": [peft[0]["loss"], unsloth[0]["loss"]],
            "last": [peft[-1]["loss"], unsloth[-1]["loss"]],
            "max_relative_difference": _furthest(unsloth, peft),
            "of_16_bits_to_32": _furthest(peft, exact),
            "of_unsloth_to_32": _furthest(unsloth, exact),
            "same_schedule": [line["learning_rate"] for line in unsloth] == [line["learning_rate"] for line in peft],
            "same_tokens": [line["tokens"] for line in unsloth] == [line["tokens"] for line in peft],
        }
        found["agrees"] = found["max_relative_difference"] < 0.01 and found["same_schedule"] and found["same_tokens"]
    return report


def _furthest(log: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> float:
    """The largest difference of a step's losses, as a share of the second."""
    return max(abs(one["loss"] - two["loss"]) / abs(two["loss"]) for one, two in zip(log, other, strict=True))


def speed(size: str, work: Path, steps: int) -> dict[str, Any]:
    """Tokens a second and peak VRAM of every way to train."""
    model = make_model(size, work)
    batch, length = BATCHES[size]
    rows = write_rows(work / f"rows-{size}.jsonl", batch * steps, length)
    given = settings(batch_size=batch)
    report: dict[str, Any] = {"batch": batch, "tokens_a_row": length, "steps": steps}
    for name, environment in WAYS.items():
        process = child("unsloth", work, environment)
        since = time.perf_counter()
        process.load(str(model), given)
        run = train(process, TrainJob(rows, work / f"unsloth-{size}", "reply", given, 1), since)
        process.close()
        report[name] = {"tokens_a_second": run.rate, "peak_vram": run.result.peak_vram, "notes": run.result.notes}
    for checkpointing in (False, True):
        out = work / f"plain-{size}-{checkpointing}.json"
        command = [sys.executable, __file__, "--plain", str(model), str(rows), str(batch), str(checkpointing), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report["trl" + (", checkpointing" if checkpointing else "")] = json.loads(out.read_text("utf-8"))
    for name in [name for name in report if isinstance(report[name], dict)]:
        report[name]["speed"] = report[name]["tokens_a_second"] / report["trl"]["tokens_a_second"]
        report[name]["vram"] = report[name]["peak_vram"] / max(1, report["trl"]["peak_vram"])
    return report


def plain(model: str, rows: str, batch: str, checkpointing: str, out: str) -> None:
    """TRL + PEFT + bitsandbytes as their documentation writes it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from iterft_lite.backends.trainer.encoding import encode_rows, read_rows
    from iterft_lite.backends.trainer.session import Vram, loss_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples, _ = encode_rows(read_rows(Path(rows)), "reply", tokenizer, limit=2048, name=model)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=quantisation, device_map={"": 0}
    )
    times: list[float] = []
    with Vram() as vram:

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                torch.cuda.synchronize()
                times.append(time.perf_counter())
                vram.look()

        trainer = SFTTrainer(
            model=base,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(examples),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
            args=SFTConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=int(batch),
                gradient_accumulation_steps=1,
                gradient_checkpointing=checkpointing == "True",
                num_train_epochs=1,
                max_length=2048,
                bf16=True,
                optim="adamw_8bit",
                learning_rate=1.5e-4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    warm = min(WARM_STEPS, len(times) // 2)
    per_row = sum(int(loss_tokens({"labels": torch.tensor([example["labels"]])})) for example in examples) / len(examples)
    rate = per_row * int(batch) * (len(times) - 1 - warm) / (times[-1] - times[warm])
    Path(out).write_text(json.dumps({"tokens_a_second": rate, "peak_vram": vram.peak}), encoding="utf-8")


def start(size: str, work: Path) -> dict[str, Any]:
    """Seconds from the call to the first finished step, and to the end, of the first training and of the next ones."""
    model = make_model(size, work)
    batch, length = BATCHES[size]
    rows = write_rows(work / f"start-{size}.jsonl", 50, length)  # the paper's 50 rows a cycle
    given = settings(batch_size=batch)
    report: dict[str, Any] = {"batch": batch, "tokens_a_row": length, "rows": 50}
    for trainer in TRAINERS:
        process = child(trainer, work)
        since = time.perf_counter()
        process.load(str(model), given)
        loaded = time.perf_counter() - since
        runs = [train(process, TrainJob(rows, work / f"start-{trainer}", "reply", given, 1), since)]
        for seed in (2, 3):
            again = time.perf_counter()
            runs.append(train(process, TrainJob(rows, work / f"start-{trainer}", "reply", given, seed), again))
        before = time.perf_counter()
        process.probe(work / f"start-{trainer}", work / f"start-{trainer}" / "adapter")
        probe = time.perf_counter() - before
        process.close()
        report[trainer] = {
            "loaded": loaded,
            "first_step": [run.steps[0] for run in runs],
            "trained": [run.steps[-1] for run in runs],
            "all": [run.done for run in runs],
            "probe": probe,
            "sooner": runs[0].steps[0] / runs[-1].steps[0],
        }
    return report


# -- the table --------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """What was measured, for people."""
    lines = [f"{report['gpu']}; " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    for kind, found in report.get("losses", {}).items():
        lines.append(
            f"losses, {kind:<49} {found['steps']:>3} steps  peft {found['first'][0]:.4f} -> {found['last'][0]:.4f}  "
            f"unsloth {found['first'][1]:.4f} -> {found['last'][1]:.4f}  "
            f"largest difference {100 * found['max_relative_difference']:.3f} %  {'agrees' if found['agrees'] else 'DIFFERS'}  "
            f"(to 32 bits: peft {100 * found['of_16_bits_to_32']:.3f} %, unsloth {100 * found['of_unsloth_to_32']:.3f} %)"
        )
    for size, found in report.get("speed", {}).items():
        lines += ["", f"{size}, 4 bits, {found['batch']} x {found['tokens_a_row']} tokens", ""]
        lines.append(f"  {'':<24}{'tokens/s':>10}{'peak VRAM':>12}{'of trl':>9}{'with':>12}")
        for name, each in found.items():
            if isinstance(each, dict):
                lines.append(
                    f"  {name:<24}{each['tokens_a_second']:>10.0f}{each['peak_vram'] / 2**30:>8.2f} GiB"
                    f"{each['speed']:>7.2f} x {100 * each['vram']:>8.0f} % of it"
                )
    for size, found in report.get("start", {}).items():
        lines += ["", f"{size}, {found['rows']} rows of {found['tokens_a_row']} tokens, {found['batch']} a step; seconds", ""]
        for trainer in TRAINERS:
            each = found[trainer]
            firsts, alls = (", ".join(f"{value:.1f}" for value in each[name]) for name in ("first_step", "all"))
            lines.append(
                f"  {trainer:<10} loaded {each['loaded']:.1f}  first step {firsts}  with probe {alls}  "
                f"probe {each['probe']:.1f}  next cycle begins {each['sooner']:.1f} x sooner"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["losses", "speed", "start", []])
    parser.add_argument("--sizes", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "iterft-training-gpu")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plain", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        return write_model(asked.make[0], Path(asked.make[1]))
    if asked.plain:
        return plain(*asked.plain)
    import torch

    parts = asked.parts or ["losses", "speed", "start"]
    asked.work.mkdir(parents=True, exist_ok=True)
    for old in ("losses", "begin"):
        shutil.rmtree(asked.work / old, ignore_errors=True)
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(0),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    for part in parts:
        if part == "losses":
            report[part] = losses(asked.work)
        else:
            measure = {
                "speed": lambda size: speed(size, asked.work, asked.steps),
                "start": lambda size: start(size, asked.work),
            }[part]
            report[part] = {size: measure(size) for size in asked.sizes}
        if asked.json:  # after each part: what was measured is not lost with what fails later
            asked.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    return None


if __name__ == "__main__":
    main()
