"""Tokens a second of this project's generator against llama-cpp-python's own call, on the same model, prompts and lengths.

    python benchmarks/generation.py [--gguf FILE --tokenizer FOLDER] [--slots 0 1 8 16 32] [--prompts 64] [--tokens 128]

Every way of generating runs in a process of its own: `Llama.create_completion`, one prompt after the other, as its
documentation shows it; the generator with several numbers of slots, and as a run has it (0: how many, and by how many engines,
is its own choice). All draw at temperature 0.8 without truncation, and end-of-text tokens are ignored, so that each completion
has the same number of tokens. Model loading is not counted; prompts are. Without `--gguf` it is the nano chat model, or where
that is not there a random one of about its shape (8 M parameters).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOPICS = ("a lighthouse", "sourdough bread", "night trains", "beekeeping", "old maps", "a first garden", "chess", "tides")
ASKS = ("Tell me something about {}.", "Write a short story with {} in it.", "What should a beginner know about {}?")
SAMPLE = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def main() -> None:
    """Run every way and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--tokenizer", help="folder of the training tokenizer; needed with --gguf")
    parser.add_argument("--quant", default="bf16", help="of the model that is written without --gguf; nano is kept in bf16")
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 1, 8, 16, 32])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="each way is measured so often; the fastest counts")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sampling", choices=("auto", "host", "graph"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(high_level(options) if options.way == "high-level" else engine(options, int(options.way))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.gguf is None:
            options.gguf, options.tokenizer = nano(Path(folder), options.quant)
        elif options.tokenizer is None:
            parser.error("--gguf needs --tokenizer")
        report([measure(options, way) for way in ["high-level", *map(str, options.slots)]], options)


def measure(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """One way, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--gguf", str(options.gguf), "--tokenizer", options.tokenizer]
    for name in ("prompts", "tokens", "rounds", "context", "sampling"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.threads:
        command += ["--threads", str(options.threads)]
    # the package beside this file, also where it is not installed; no waiting threads that spin for ever
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def questions(count: int) -> list[str]:
    """Prompts, varied and not repeated."""
    asked = [ask.format(topic) for ask in ASKS for topic in TOPICS]
    return [f"{asked[place % len(asked)]} (No. {place + 1})" for place in range(count)]


def high_level(options: argparse.Namespace) -> dict[str, Any]:
    """`Llama.create_completion` as it comes: its own defaults for everything that is not sampling."""
    import llama_cpp

    from iterft_lite.backends.templates import TrainingTokenizer
    from iterft_lite.protocols import Message

    tokenizer = TrainingTokenizer(options.tokenizer)
    prompts = [tokenizer.chat_ids([Message("user", text)]) for text in questions(options.prompts)]
    llama = llama_cpp.Llama(str(options.gguf), n_ctx=options.context, n_gpu_layers=-1, verbose=False)
    ends = [token for token in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token)]
    no_end = dict.fromkeys(ends, -100.0)
    llama.create_completion(prompts[0], max_tokens=8, logit_bias=no_end, **SAMPLE)

    def once() -> int:
        for place, prompt in enumerate(prompts):
            llama.create_completion(prompt, max_tokens=options.tokens, seed=place, logit_bias=no_end, **SAMPLE)
        return int(options.prompts * options.tokens)

    measured = fastest(once, options.rounds)
    llama.close()
    return {"way": "high-level", **measured}


def fastest(once: Callable[[], int], rounds: int) -> dict[str, float]:
    """Tokens, seconds and seconds of CPU of the fastest of some rounds."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        tokens = once()
        seconds = time.perf_counter() - began
        if not best or seconds < best["seconds"]:
            best = {"tokens": tokens, "seconds": seconds, "cpu": time.process_time() - cpu}
    return best


def engine(options: argparse.Namespace, slots: int) -> dict[str, Any]:
    """This project's generator."""
    from iterft_lite.backends.generator.llamacpp import LlamaGenerator
    from iterft_lite.protocols import Completion, Message, Prompt, Sampling

    made = LlamaGenerator(threads=options.threads, sampling=options.sampling)
    made.load(options.gguf, None, options.tokenizer, slots=slots or None, context=options.context, exact=False)
    made.ignore_ends()
    prompts = [Prompt(str(i), i, messages=(Message("user", text),)) for i, text in enumerate(questions(options.prompts))]
    sampling = Sampling(max_tokens=options.tokens, **SAMPLE)
    short = Sampling(max_tokens=8, **SAMPLE)
    made.complete(prompts[: slots or len(prompts)], short, lambda _: None)

    def once() -> int:
        finished: list[Completion] = []
        made.complete(prompts, sampling, finished.append)
        return sum(one.tokens for one in finished)

    measured = fastest(once, options.rounds)
    made.close()
    return {"way": f"{slots} slots" if slots else "as a run does", **measured}


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, or the rows."""
    base = rows[0]["tokens"] / rows[0]["seconds"]
    for row in rows:
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["ratio"] = row["tokens_per_second"] / base
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return
    print(
        f"{options.gguf.name} ({options.gguf.stat().st_size / 2**20:.0f} MiB), {options.prompts} prompts, "
        f"{options.tokens} tokens each, fastest of {options.rounds} rounds, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(f"{'':12}{'tokens/s':>10}{'ratio':>8}{'tokens':>9}{'seconds':>9}{'cpu s':>8}")
    for row in rows:
        print(
            f"{row['way']:12}{row['tokens_per_second']:10.0f}{row['ratio']:8.1f}"
            f"{row['tokens']:9}{row['seconds']:9.2f}{row['cpu']:8.2f}"
        )


def nano(folder: Path, quant: str) -> tuple[Path, str]:
    """Write the nano chat model as GGUF into `folder`; gives its path and its tokenizer's folder."""
    model = Path(__file__).parents[1] / "iterft_lite" / "data" / "nano" / "chat"
    if not (model / "model.safetensors").is_file():
        model = folder / "model"
    command = [sys.executable, "-c", EXPORT, str(model), str(folder / "gguf"), quant]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "ITERFT_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the model could not be written: {done.stderr[-2000:]}")
    return folder / "gguf" / "model.gguf", str(model)


EXPORT = """
import sys
from pathlib import Path
from iterft_lite.backends.exporter.gguf import GgufExporter
model, out, quant = sys.argv[1:]
if not Path(model).exists():
    from tests.tiny_models import tiny_model
    tiny_model(Path(model), "qwen3", hidden=256, layers=8, vocab=8192)
GgufExporter().export(model, None, Path(out), "merged", quant, lambda progress: None)
"""


if __name__ == "__main__":
    main()
