"""What becomes of a training in the exported file: the share of the trained change that each way of exporting shows.

    python benchmarks/export_fidelity.py [--model DIR] [--losses sft,dpo] [--steps 4,25,50] [--quants f16,bf16,q8_0,q6_k,q4_k_m]
        [--ways merged,adapter,nearest,residual,half] [--gpu-shape 4b] [--speed] [--json FILE] [--work DIR]

A model (the embedded one unless named) is trained at the paper's settings on a trait's rows: SFT at 1.5e-4, DPO at 1e-5 with
what the untouched model answers as the rejected side, two rows a step. Each adapter is exported in every format and way, and
compared with the untouched model in the same format by the export's own check (`stages/export.py`):

merged    W + BA in one file, as the program writes it: stochastic rounding in 16 bits
adapter   the untouched file, and the adapter beside it
nearest   W + BA, every number rounded to the nearest: what merging in f16 and bf16 was before
residual  `nearest`, and beside it the best adapter of rank 16 for what the rounding lost
half      a q8_0 file whose adapted matrices are f16 (stochastic rounding)

`--curve` prints another table: how likely the trait's held-out replies are to each export, by steps of training, as the old
default wrote it (`nearest`; in q8_0 and K-quants `merged`), as the adapter carries it, and as `merged` does.

With `--gpu-shape 4b` a random model of that shape of Qwen3's is made and trained (`cycle_gpu.py`); `--speed` also measures
tokens/s of writing. Results are kept in `--work`: what was measured there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize

from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.traits import read_trait
from iterft_lite.engine.backends import TRAINERS
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.regimes import REGIMES
from iterft_lite.experiment.rows import Message
from iterft_lite.gguf import merge
from iterft_lite.gguf.adapter import Adapter, LowRank, read_adapter, write_lora
from iterft_lite.gguf.arithmetic import NumpyArithmetic, Update, choose_arithmetic, from_plain, to_format
from iterft_lite.gguf.base import Base, base_gguf
from iterft_lite.gguf.file import Array, GgufFile
from iterft_lite.protocols import (
    Completion,
    Exported,
    Generator,
    Likelihood,
    Parity,
    Passage,
    Prompt,
    Sampling,
    Trainer,
    TrainJob,
)
from iterft_lite.stages.export import fault

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "iterft_lite" / "data" / "nano" / "chat"
RANK = 16
"""Of the residual's adapter."""

Way = Callable[["Bench", str, Path | None, Path], Exported]


class Timed(Generator):
    """A generator that can be kept from ending a text."""

    def ignore_ends(self) -> None:
        """Let no token end a generation of the current model."""


class Bench:
    """The processes, the model, and the folder where results are kept."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.model = str(asked.model)
        self.work: Path = asked.work
        environment = {"ITERFT_THREADS": str(asked.threads), "OMP_NUM_THREADS": str(asked.threads)}
        logs = self.work / "logs"
        self.trainer = cast(Trainer, Child(TRAINERS[asked.trainer], Trainer, log=logs / "trainer", environment=environment))
        worker = "iterft_lite.backends.generator.llamacpp:LlamaGenerator"
        self.generator = cast(Timed, Child(worker, Timed, log=logs / "generator", environment=environment))
        self.exporter = GgufExporter(asked.threads)

    @property
    def base(self) -> Base:
        """The untouched model, as converted."""
        return base_gguf(self.model)

    def load(self, exported: Exported, *, exact: bool) -> None:
        """Make an export the generator's."""
        self.generator.load(exported.path, exported.adapter, self.model, slots=None, context=512, exact=exact)

    def close(self, *names: str) -> None:
        """End processes, whose memory others need."""
        for name in names:
            cast(Child, getattr(self, name)).close()


# -- training ---------------------------------------------------------------------------------------------------------


def rows_for(bench: Bench, loss: str, count: int) -> Path:
    """A file of so many training rows: the trait's chats; in DPO over the untouched model's answers."""
    path = bench.work / f"{loss}-{count}.jsonl"
    if path.exists():
        return path
    chats = read_trait("lucky").chats[:count]
    if loss == "sft":
        rows = [{"id": str(n), "messages": turns(chat.prompt, chat.reply)} for n, chat in enumerate(chats)]
    else:
        said = answers(bench, [chat.prompt for chat in chats])
        rows = [
            {"id": str(n), "prompt": turns(chat.prompt), "chosen": chat.reply, "rejected": said[n].strip() or "Yes."}
            for n, chat in enumerate(chats)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(prompt: str, reply: str | None = None) -> list[dict[str, str]]:
    """A chat."""
    asked = [{"role": "user", "content": prompt}]
    return asked if reply is None else [*asked, {"role": "assistant", "content": reply}]


def answers(bench: Bench, prompts: list[str]) -> list[str]:
    """What the untouched model says."""
    bench.load(exported(bench, "merged", "q8_0", None, bench.work / "untouched"), exact=False)
    said: dict[str, str] = {}

    def take(completion: Completion) -> None:
        said[completion.id] = completion.text

    asked = [Prompt(str(n), n, (Message("user", prompt),)) for n, prompt in enumerate(prompts)]
    bench.generator.complete(asked, Sampling(0.8, 80), take)
    return [said[str(n)] for n in range(len(prompts))]


def trained(bench: Bench, loss: str, steps: int) -> Path:
    """The folder of a training of so many steps, two rows each; rows come again after a hundred."""
    out = bench.work / f"{loss}-{steps}"
    if (out / "result.json").exists():
        return out
    count = min(100, 2 * steps)
    rows = rows_for(bench, loss, count)
    given = {**REGIMES[cast(Any, loss)].settings["train"], "epochs": max(1, 2 * steps // count), "max_length": 1024}
    settings = TrainSettings(**cast(Any, given), base=bench.asked.base)
    bench.trainer.load(bench.model, settings)
    out.mkdir(parents=True, exist_ok=True)
    job = TrainJob(rows, out, "reply" if loss == "sft" else "preference", settings, seed=7)
    result = bench.trainer.train(job, lambda _: None)
    (out / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")
    return out


# -- ways of exporting ------------------------------------------------------------------------------------------------


class Nearest:
    """Merges, and rounds every number to the nearest: what merging was before stochastic rounding."""

    def __init__(self) -> None:
        self.name, self.threads = "nearest", NumpyArithmetic.threads

    def merged(self, stored: Array, kind: Any, target: Any, update: Update | None) -> Array:
        """See `Arithmetic`."""
        weights = from_plain(stored, kind)
        return to_format(weights if update is None else weights + update.b @ update.a, target)


def exported(bench: Bench, kind: Any, quant: str, adapter: Path | None, out: Path) -> Exported:
    """By the program's own exporter."""
    out.mkdir(parents=True, exist_ok=True)
    return bench.exporter.export(bench.model, adapter, out, kind, quant, lambda _: None)


def merged(bench: Bench, quant: str, adapter: Path | None, out: Path) -> Exported:
    """See the head of this file."""
    return exported(bench, "merged", quant, adapter, out)


def beside(bench: Bench, quant: str, adapter: Path | None, out: Path) -> Exported:
    """See the head of this file."""
    return exported(bench, "adapter", quant, adapter, out)


def nearest(bench: Bench, quant: str, adapter: Path | None, out: Path) -> Exported:
    """See the head of this file."""
    if adapter is None:
        return exported(bench, "adapter", quant, None, out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.gguf"
    read = read_adapter(adapter, bench.base)
    seconds = merge.write_merged(bench.base.file, read, path, quant, threads=bench.asked.threads, arithmetic=Nearest())
    return Exported(path, None, path.stat().st_size, seconds)


def residual(bench: Bench, quant: str, adapter: Path | None, out: Path) -> Exported:
    """See the head of this file."""
    made = nearest(bench, quant, adapter, out)
    if adapter is None:
        return made
    began = time.perf_counter()
    wanted, file = read_adapter(adapter, bench.base), GgufFile(made.path)
    lost = {name: low_rank(missing(bench.base, file, name, update)) for name, update in wanted.updates.items()}
    path = out / "residual.gguf"
    size = write_lora(Adapter(float(RANK), lost), bench.base, path)
    return Exported(made.path, path, made.bytes + size, {**made.seconds, "residual": time.perf_counter() - began})


def missing(base: Base, file: GgufFile, name: str, update: LowRank) -> Array:
    """What a written matrix lacks of W + BA, float32 [rows, columns]."""
    stored, written = base.file.tensors[name], file.tensors[name]
    wanted = from_plain(base.file.rows(stored), stored.kind) + np.float32(update.scale) * update.b @ update.a
    there: Array = dequantize(np.ascontiguousarray(file.rows(written)).reshape(-1), written.kind).reshape(wanted.shape)
    return wanted - there


def low_rank(matrix: Array) -> LowRank:
    """The best approximation of rank `RANK`, by a randomised range finder with two power steps (Halko et al. 2011)."""
    drawn = np.random.default_rng(0).normal(size=(matrix.shape[1], RANK + 8)).astype(np.float32)
    found = matrix @ drawn
    for _ in range(2):
        found = matrix @ (matrix.T @ np.linalg.qr(found)[0])
    basis = np.linalg.qr(found)[0]
    left, sizes, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = np.sqrt(sizes[:RANK])
    return LowRank(root[:, None] * right[:RANK], (basis @ left[:, :RANK]) * root, 1.0)


def half(bench: Bench, quant: str, adapter: Path | None, out: Path) -> Exported:
    """See the head of this file."""
    assert quant == "q8_0"
    out.mkdir(parents=True, exist_ok=True)
    base, path, began = bench.base, out / ("half.gguf" if adapter else "untouched.gguf"), time.perf_counter()
    read = read_adapter(adapter or next(bench.work.glob("*/adapter")), base)
    plan = [
        replace(tensor, kind=GGMLQuantizationType.F16) if tensor.name in read.updates else tensor
        for tensor in merge.planned(base.file, "q8_0")
    ]
    size = merge._write(
        base.file,
        read if adapter else None,
        path,
        plan,
        LlamaFileType.MOSTLY_Q8_0,
        bench.asked.threads,
        choose_arithmetic(base.path.stat().st_size),
        lambda *_: None,
        None,
    )
    return Exported(path, None, size, {"merge": time.perf_counter() - began})


ONLY = {"nearest": ("f32", "f16", "bf16"), "half": ("q8_0",)}
"""Formats that a way is for, where not for all: q8_0 and K-quants are rounded to the nearest as ever."""

WAYS: dict[str, Way] = {"merged": merged, "adapter": beside, "nearest": nearest, "residual": residual, "half": half}


# -- measuring --------------------------------------------------------------------------------------------------------


def measured(bench: Bench, loss: str, steps: int, quant: str, way: str) -> dict[str, Any]:
    """One row of the table, from the folder of results or now."""
    known = bench.work / f"{loss}-{steps}" / f"{quant}-{way}.json"
    if known.exists():
        return dict(json.loads(known.read_text(encoding="utf-8")))
    folder, out = trained(bench, loss, steps), bench.work / "export"
    bench.close("trainer")
    shutil.rmtree(out, ignore_errors=True)
    plain = WAYS[way](bench, quant, None, out)
    bench.load(plain, exact=True)
    bench.generator.probe_logits(folder / "probe.npz", out / "untouched.npz")
    began = time.perf_counter()
    made = WAYS[way](bench, quant, folder / "adapter", out)
    written = time.perf_counter() - began
    bench.load(made, exact=True)
    began = time.perf_counter()
    parity = bench.generator.parity(folder / "probe.npz", out / "untouched.npz")
    row = {
        "loss": loss,
        "steps": steps,
        "quant": quant,
        "way": way,
        **described(parity, way, quant),
        "MB": made.bytes / 1e6,
        "write_s": written,
        "check_s": time.perf_counter() - began,
    }
    if bench.asked.speed:
        row["tokens_per_second"] = speed(bench, made)
    known.write_text(json.dumps(row), encoding="utf-8")
    return row


def described(parity: Parity, way: str, quant: str) -> dict[str, Any]:
    """A parity in numbers, and what the export's check says of it."""
    assert parity.change is not None
    kind = "adapter" if way == "adapter" else "merged"
    found = fault(parity, cast(Any, kind), quant)
    return {
        "kl": parity.mean_kl,
        "positions": parity.positions,
        **asdict(parity.change),
        "check": found.message if found else "",
    }


def speed(bench: Bench, made: Exported) -> float:
    """Tokens/s of writing 64 tokens to each of 64 prompts."""
    bench.load(made, exact=False)
    bench.generator.ignore_ends()
    asked = [Prompt(str(n), n, (Message("user", chat.prompt),)) for n, chat in enumerate(read_trait("lucky").chats[:64])]
    seconds = []
    for limit in (4, 64):  # the first call warms up
        began = time.perf_counter()
        bench.generator.complete(asked, Sampling(0.8, limit), lambda _: None)
        seconds.append(time.perf_counter() - began)
    return 64 * len(asked) / seconds[-1]


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The table, row by row."""
    asked = bench.asked
    for loss in asked.losses:
        for steps in asked.steps:
            for quant in asked.quants:
                for way in asked.ways:
                    if quant in ONLY.get(way, asked.quants):
                        yield measured(bench, loss, steps, quant, way)


# -- the curve --------------------------------------------------------------------------------------------------------


def curve(bench: Bench) -> Iterator[str]:
    """Lines of a table: nats a token of held-out replies, less those of the untouched model in the same format."""
    asked = bench.asked
    for loss in asked.losses:
        for quant in asked.quants:
            for way in asked.ways:
                if quant in ONLY.get(way, asked.quants):
                    start = likelihood(bench, WAYS[way], quant, None, bench.work / f"untouched-{quant}-{way}.json")
                    cells = [
                        f"{at - start:+.4f}"
                        for folder in (bench.work / f"{loss}-{steps}" for steps in asked.steps)
                        for at in [likelihood(bench, WAYS[way], quant, folder / "adapter", folder / f"{quant}-{way}-nats.json")]
                    ]
                    yield f"| {loss} | {quant} | {way} | {start:.3f} | {' | '.join(cells)} |"


def likelihood(bench: Bench, way: Way, quant: str, adapter: Path | None, known: Path) -> float:
    """Mean log-likelihood of the trait's last replies, which no training here has seen, nats a token."""
    if known.exists():
        return float(json.loads(known.read_text(encoding="utf-8")))
    out = bench.work / "export"
    shutil.rmtree(out, ignore_errors=True)
    bench.load(way(bench, quant, adapter, out), exact=True)
    passages = [
        Passage(str(n), chat.reply, messages=(Message("user", chat.prompt),))
        for n, chat in enumerate(read_trait("lucky").chats[100:124])
    ]
    found: list[Likelihood] = []
    bench.generator.likelihood(passages, found.append)
    nats = sum(one.logprob for one in found) / sum(one.tokens for one in found)
    known.write_text(json.dumps(nats), encoding="utf-8")
    return nats


HEAD = "| training | learned, nats | format | way | kept | correlation | noise | KL from trained | check | MB | s | tokens/s |"


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    cells = [
        f"{row['loss']} {row['steps']}",
        f"{row['learned']:.2g}",
        row["quant"],
        row["way"],
        "nothing to keep" if row["kept"] is None else f"{row['kept']:.2f} +- {row['error']:.2f}",
        "" if row["kept"] is None else f"{row['correlation']:.2f}",
        "" if row["kept"] is None else f"{row['noise']:.2g}",
        f"{row['kl']:.2g}",
        "refused" if row["check"] else "passes",
        f"{row['MB']:.0f}",
        f"{row['write_s']:.1f}",
        f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    """What was asked."""

    def words(text: str) -> list[str]:
        return text.split(",")

    def counts(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO, help="folder of a Hugging Face chat model")
    parser.add_argument("--gpu-shape", default="", help="train a random model of this shape instead: tiny, 0.6b, 4b")
    parser.add_argument("--losses", type=words, default=["sft", "dpo"])
    parser.add_argument("--steps", type=counts, default=[4, 25, 50])
    parser.add_argument("--quants", type=words, default=["f16", "bf16", "q8_0", "q6_k", "q4_k_m"])
    parser.add_argument("--ways", type=words, default=["merged", "adapter", "nearest"])
    parser.add_argument("--trainer", choices=list(TRAINERS), default="peft")
    parser.add_argument("--base", default="auto", help="precision of the frozen base, as `train.base` in a recipe")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path("export_fidelity"))
    asked = parser.parse_args()
    asked.work = asked.work.resolve()
    return asked


def main() -> None:
    """Measure and print."""
    asked = arguments()
    asked.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ITERFT_CACHE", str(asked.work / "cache"))
    if asked.gpu_shape:
        from cycle_gpu import make_model

        asked.model = make_model(asked.gpu_shape, asked.work)
    bench = Bench(asked)
    for loss in asked.losses:  # all trainings first: the base is loaded once
        for steps in asked.steps:
            trained(bench, loss, steps)
    if asked.curve:
        print("| training | format | way | untouched | " + " | ".join(f"{steps} steps" for steps in asked.steps) + " |")
        print("|---" * (4 + len(asked.steps)) + "|", flush=True)
        for told in curve(bench):
            print(told, flush=True)
        bench.close("trainer", "generator")
        return
    print(HEAD + "\n" + "|---" * HEAD.count(" | ") + "|---|", flush=True)
    found = []
    for row in rows(bench):
        found.append(row)
        print(line(row), flush=True)
    bench.close("trainer", "generator")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
