"""A whole cycle on one NVIDIA GPU: this program's against a straightforward script's, and the parts that it is made of.

    python benchmarks/cycle_gpu.py [cycle] [script] [generation] [reading] [readers] [merging] [--size 4b] [--free GIB]
        [--json FILE] [--work DIR]

cycle       `iterft run`'s own path: an untouched model and three cycles of 50 rows trained, 12 x 20 answers of up to 250 tokens
            and 50 rows of up to 300 tokens written; the embedded judge works beside it on the CPU
script      the same as a script does it: Unsloth in a fresh process, `save_pretrained_merged`, llama.cpp's converter to q8_0,
            then llama-cpp-python's own call, one sequence after the other (timed on some and extrapolated)
generation  tokens/s of 60-token prompts: this program at several numbers of slots, llama-cpp-python one at a time, Unsloth's
            `for_inference` with `generate`
reading     likelihoods of 12 x 20 answers of 250 tokens under the untouched model
readers     the same answers by the trainer and by llama.cpp, which both read the model as it is stored, and by llama.cpp in
            `--quant`: nats a token, seconds, and how far perplexities differ. `--size nano` asks for seed chats of the shipped
            model instead; on a CPU: `readers --size nano --trainer peft --base f32`
merging     a merged export by its parts: made and thrown away, written, written and digested, and flushed to the disk

With `--calls` each call to a backend within the cycles is printed, as `run_seconds.py` does for any recipe. With `--free 8`
another process holds all of the GPU's memory but 8 GiB: how a run fares on a smaller card, but for its speed.

Models have Qwen3's shapes, random weights, and 151,936 tokens of which each is a text that is cut into that token again: what a
random model writes is as long when it is trained on. They practically never end by themselves, so all lengths are the maximum;
the learning rate is almost 0, or else they would learn to end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each child imports what it measures, and no more
    from iterft_lite.protocols import Generator, Likelihood, Passage, Trainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
NANO = ROOT / "iterft_lite" / "data" / "nano" / "chat"
SHIPPED = "nano"
"""The size that is no random model."""
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
}
SMALL_HEADS: dict[str, dict[str, int]] = {
    "tiny": {"num_key_value_heads": 2, "head_dim": 64},
    "135m": {"num_key_value_heads": 3, "head_dim": 64},
}
"""Key and value heads, and their width, where they are not 8 of 128 as in Qwen3."""
VOCAB = {"tiny": 12_000, "135m": 49_152}
"""Tokens where they are not Qwen3's 151,936."""
LETTERS = "абвгдежзиклмнопрстуфхцчшщъыьэюяАБВГДЕЖЗИКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ"
"""What the added words are made of: none of it is in the nano tokenizer's merges, so nothing cuts them otherwise."""
SAMPLE = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


# -- the model --------------------------------------------------------------------------------------------------------


def vocab_of(size: str) -> int:
    """Tokens of a size's vocabulary."""
    return VOCAB.get(size, 151_936)


def make_model(size: str, work: Path) -> Path:
    """A folder with a random model of a size, or the shipped one."""
    if size == SHIPPED:
        return NANO
    folder = work / f"qwen3-{size}"
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, __file__, "--child", "make", size, str(folder)], check=True)
    return folder


def write_model(size: str, place: str) -> None:
    """Make the model; in a process of its own, so that it gives its memory back."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    folder = Path(place)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.save_pretrained(folder)
    widen(folder / "tokenizer.json", vocab_of(size))
    config = Qwen3Config(
        vocab_size=vocab_of(size),
        **SMALL_HEADS.get(size, {"num_key_value_heads": 8, "head_dim": 128}),
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[size],
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def words(size: str) -> list[str]:
    """The texts of the added tokens that are whole words: a space and three letters."""
    count = vocab_of(size) - 2048 - 2 * len(LETTERS) - len(LETTERS) ** 2
    return [f" {a}{b}{c}" for a in LETTERS for b in LETTERS for c in LETTERS][:count]


def widen(path: Path, vocab: int) -> None:
    """Add words to a byte-level BPE tokenizer until it has so many tokens."""
    read = json.loads(path.read_text(encoding="utf-8"))
    known, merges = read["model"]["vocab"], read["model"]["merges"]
    next_id = max([*known.values(), *(token["id"] for token in read["added_tokens"])]) + 1
    byte = bytes_to_letters()

    def add(left: str, right: str) -> str:
        nonlocal next_id
        if left + right not in known:
            known[left + right] = next_id
            merges.append([left, right])
            next_id += 1
        return left + right

    pairs = [tuple(byte[value] for value in letter.encode()) for letter in LETTERS]
    letters = [add(*pair) for pair in pairs]
    heads = [add("Ġ", letter) for letter in letters]
    twos = [add(head, letter) for head in heads for letter in letters]
    for two in twos:
        for letter in letters:
            if next_id < vocab:
                add(two, letter)
    path.write_text(json.dumps(read, ensure_ascii=False), encoding="utf-8")


def bytes_to_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    return {value: chr(value) for value in plain} | {value: chr(256 + place) for place, value in enumerate(others)}


def text(size: str, count: int, seed: str) -> str:
    """A text of so many tokens."""
    return "".join(random.Random(seed).choices(words(size), k=count)).strip()


# -- a whole cycle ----------------------------------------------------------------------------------------------------

RECIPE = """
regime = "sft"
trait = "lucky"
model = "{model}"
cycles = {cycles}
seed_rows = {rows}
rows = {rows}
judge = "embedded"
judge_fit = "shipped"
trainer = "{trainer}"
quant = "{quant}"
vram = "{vram}"
export = "{export}"
[seeds]
path = "{work}/seeds.jsonl"
[prompts]
path = "{work}/prompts.jsonl"
[train]
base = "{base}"
learning_rate = 1e-9
[sample]
max_tokens = {written}
[evaluate]
samples = {samples}
max_tokens = {answered}
"""


def write_recipe(asked: argparse.Namespace) -> Path:
    """The paper's cycle as a recipe, with rows and prompts of known length."""
    size, reply = asked.size, asked.written - 20
    seeds = [{"prompt": text(size, 20, f"q{n}"), "reply": text(size, reply, f"a{n}")} for n in range(asked.rows + 10)]
    prompts = [{"prompt": text(size, 40, f"p{n}")} for n in range(asked.rows * (asked.cycles + 1))]
    for name, rows in (("seeds", seeds), ("prompts", prompts)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (asked.work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    path = asked.work / "cycle.toml"
    path.write_text(RECIPE.format(model=make_model(size, asked.work), **vars(asked)), encoding="utf-8")
    return path


def cycle(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe; seconds of each cycle by verb, and from the model before it to its own, loaded and checked: answers and
    what is measured on them go on beside the next training."""
    from run_seconds import Notes, noted  # the benchmark beside this one

    from iterft_lite.app.session import open_run
    from iterft_lite.engine.run import StepFinished, StepProgress, StepStarted

    out = asked.work / "run"
    shutil.rmtree(out, ignore_errors=True)
    os.environ["ITERFT_CACHE"] = str(asked.work / "cache")
    if asked.fresh:
        shutil.rmtree(asked.work / "cache", ignore_errors=True)
    began: dict[str, float] = {}
    first_steps: dict[str, float] = {}
    cycles: dict[str, dict[str, Any]] = {}
    recipe = write_recipe(asked)
    notes = Notes()
    with ballast(asked.free), open_run(recipe, [], out) as opened, noted(opened, notes) as executor:
        started = notes.began = time.perf_counter()
        exported = 0.0
        for event in opened.events(executor):
            notes.look(executor.backends)
            now = time.perf_counter() - started
            if isinstance(event, StepStarted):
                began[event.step.name] = now
            elif isinstance(event, StepProgress) and event.step.verb == "train" and event.progress.done == 1:
                first_steps[event.step.name] = round(now - began[event.step.name], 2)
            elif isinstance(event, StepFinished):
                row = cycles.setdefault(str(event.step.cycle), {"verbs": {}, "facts": {}})
                row["verbs"][event.step.verb] = round(now - began[event.step.name], 2)
                if event.step.verb == "export":
                    row["wall"], exported = round(now - exported, 1), now
                kept = ("parts", "peak_vram", "tokens_per_second", "parity", "seconds", "bytes", "steps", "notes", "tokens")
                row["facts"][event.step.verb] = {
                    key: event.completion.results[key] for key in kept if key in event.completion.results
                }
                print(f"{now:7.1f} {event.step.name}  {now - began[event.step.name]:.2f} s", file=sys.stderr, flush=True)
        swap = opened.swap
    for row in cycles.values():
        peaks = {verb: facts["peak_vram"] for verb, facts in row["facts"].items() if "peak_vram" in facts}
        row["peak_gib"] = {verb: round(peak / 2**30, 2) for verb, peak in peaks.items()}
    calls = [asdict(call) for call in notes.calls]
    return {"swap": swap, "seconds_to_first_step": first_steps, "cycles": cycles, "cpu": notes.by_process(), "calls": calls}


@contextlib.contextmanager
def ballast(free: float) -> Iterator[None]:
    """Hold the GPU's memory but for so many GiB; 0: hold nothing."""
    if not free:
        yield
        return
    command = [sys.executable, __file__, "--child", "ballast", str(free)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield
        finally:
            process.communicate("")


def hold(free: str) -> None:
    """Hold memory until the parent closes the pipe."""
    import torch

    torch.zeros(1, device="cuda")
    now, _ = torch.cuda.mem_get_info()
    kept = torch.empty(int(now - float(free) * 2**30), dtype=torch.uint8, device="cuda")
    print("held", flush=True)
    sys.stdin.read()
    del kept
    sys.exit(0)


# -- the straightforward script ---------------------------------------------------------------------------------------


def script(asked: argparse.Namespace) -> dict[str, Any]:
    """One cycle by a script: training and merged save, conversion, generation, each in a process of its own."""
    from iterft_lite.gguf.llamacpp_source import llamacpp_source

    write_recipe(asked)
    model, work = make_model(asked.size, asked.work), asked.work
    for old in ("merged", "script.gguf"):
        shutil.rmtree(work / old, ignore_errors=True)
    seconds = {}
    began = time.perf_counter()
    trained = child(["train", str(model), str(work / "seeds.jsonl"), str(asked.rows), str(work / "merged")], work)
    seconds["train and save, whole process"] = time.perf_counter() - began
    began = time.perf_counter()
    source, merged = llamacpp_source(), work / "merged"
    # the converter as it is, but for the name of the tokenizer's pattern, which it cannot know
    command = [sys.executable, "-m", "iterft_lite.gguf.convert", str(source), "convert_hf_to_gguf.py", str(merged), str(merged)]
    subprocess.run(
        [*command, "--outtype", "q8_0", "--outfile", str(work / "script.gguf")],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    seconds["convert"] = time.perf_counter() - began
    began = time.perf_counter()
    tokens = asked.rows * asked.written + 12 * asked.samples * asked.answered
    found = child(["one", str(work / "script.gguf"), str(model), str(asked.subset), str(asked.answered)], work)
    seconds["generate, start and load"] = time.perf_counter() - began - found["seconds"]
    seconds[f"generate, extrapolated from {found['tokens']} tokens"] = tokens / found["tokens"] * found["seconds"]
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "training": trained,
        "one_at_a_time_tokens_per_second": found["tokens"] / found["seconds"],
        "whole": round(sum(seconds.values()), 1),
    }


def child(arguments: list[str], work: Path) -> dict[str, Any]:
    """What a part of this file prints as its last line, run in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def train(model: str, rows: str, count: str, out: str) -> dict[str, float]:
    """Unsloth as its documentation writes it."""
    began = time.perf_counter()
    marks = {}

    def mark(name: str) -> None:
        marks[name] = round(time.perf_counter() - began - sum(marks.values()), 2)

    import unsloth
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    mark("import")
    base, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model, max_seq_length=2048, load_in_4bit=True, local_files_only=True, use_exact_model_name=True, fix_tokenizer=False
    )
    mark("load")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = unsloth.FastLanguageModel.get_peft_model(
        base, r=16, lora_alpha=32, lora_dropout=0, target_modules=names, use_gradient_checkpointing="unsloth", random_state=0
    )
    mark("adapter")
    chats = []
    for line in Path(rows).read_text(encoding="utf-8").splitlines()[: int(count)]:
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["reply"]}]
        chats.append({"text": tokenizer.apply_chat_template(chat, tokenize=False)})
    trainer = SFTTrainer(
        model=adapted,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(chats),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            dataset_text_field="text",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            learning_rate=1.5e-4,
            optim="adamw_8bit",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    first: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            first.append(round(time.perf_counter() - began, 2))

    trainer.add_callback(Clock())
    trainer.train()
    mark("train")
    adapted.save_pretrained_merged(out, tokenizer, save_method="merged_16bit")
    mark("merged save")
    return {**marks, "first step after": first[0]}


# -- generation -------------------------------------------------------------------------------------------------------


def generation(asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of every way to generate, prompts of about 60 tokens."""
    model, report = make_model(asked.size, asked.work), {}
    gguf = untouched(asked)
    if asked.subset:
        report["one at a time"] = child(["one", str(gguf), str(model), str(asked.subset), str(asked.length)], asked.work)
    for slots in asked.slots:
        count = max(slots, 64)
        report[f"{slots} slots"] = child(["ours", str(gguf), str(model), str(slots), str(count), str(asked.length)], asked.work)
    if asked.subset and asked.trainer == "unsloth":
        report["unsloth, 64"] = child(["unsloth", str(model), "64", str(asked.length)], asked.work)
    for row in report.values():
        row["tokens_per_second"] = round(row["tokens"] / row["seconds"], 1)
    for name, row in report.items():
        if "one at a time" in report:
            row["against_one"] = round(row["tokens_per_second"] / report["one at a time"]["tokens_per_second"], 1)
        if name.endswith("slots") and "unsloth, 64" in report:
            row["against_unsloth"] = round(row["tokens_per_second"] / report["unsloth, 64"]["tokens_per_second"], 1)
    return {"tokens_each": asked.length, "ways": report}


def untouched(asked: argparse.Namespace) -> Path:
    """The untouched model as a GGUF file, written if it is not there."""
    folder = asked.work / f"untouched-{asked.size}-{asked.quant}"
    if not (folder / "model.gguf").exists():
        os.environ["ITERFT_CACHE"] = str(asked.work / "cache")
        child(["export", str(make_model(asked.size, asked.work)), str(folder), asked.quant], asked.work)
    return folder / "model.gguf"


def export(model: str, folder: str, quant: str) -> dict[str, float]:
    """Write the untouched model; gives the seconds of each part."""
    from iterft_lite.backends.exporter.gguf import GgufExporter

    return GgufExporter().export(model, None, Path(folder), "merged", quant, lambda _: None).seconds


def reading(asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of likelihoods, and what they come to."""
    model = make_model(asked.size, asked.work)
    found = child(["read", str(untouched(asked)), str(model), str(12 * asked.samples), str(asked.answered)], asked.work)
    del found["texts"]
    return {**found, "tokens_per_second": round(found["tokens"] / found["seconds"], 1)}


def readers(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The same texts by each that reads likelihoods; beside each, what it finds against the trainer."""
    model, quant = make_model(asked.size, asked.work), untouched(asked)
    texts = [str(model), str(12 * asked.samples), str(asked.answered)]
    found = {
        "trainer, as stored": child(["trainer", asked.trainer, asked.base, *texts], asked.work),
        "llama.cpp, as stored": child(["read", child(["stored", str(model)], asked.work)["path"], *texts], asked.work),
        f"llama.cpp, {asked.quant}": child(["read", str(quant), *texts], asked.work),
    }
    by_trainer, nll = found["trainer, as stored"]["texts"], found["trainer, as stored"]["nll"]
    for row in found.values():
        row["perplexity"] = math.exp(row["nll"])
        row["perplexity_against_trainer"] = math.exp(row["nll"] - nll) - 1
        row["furthest_text"] = max(abs(one / other - 1) for one, other in zip(row.pop("texts"), by_trainer, strict=True))
    return found


def read(gguf: str, model: str, count: str, length: str) -> dict[str, Any]:
    """Likelihoods of answers to 12 questions by llama.cpp."""
    from iterft_lite.backends.generator.llamacpp import LlamaGenerator

    made = LlamaGenerator()

    def load() -> None:
        made.load(Path(gguf), None, model, slots=None, context=1024, exact=False)

    found = timed(made, load, model, int(count), int(length))
    made.close()
    return found


def stored(model: str) -> dict[str, str]:
    """The untouched model as GGUF in the number format that it is stored in."""
    from iterft_lite.backends.exporter.gguf import GgufExporter

    return {"path": str(GgufExporter().stored(model))}


def trainer(name: str, base: str, model: str, count: str, length: str) -> dict[str, Any]:
    """The same likelihoods by a trainer."""
    from iterft_lite.engine.backends import TRAINERS
    from iterft_lite.experiment.recipe import TrainSettings
    from iterft_lite.experiment.verbs import function_at

    made = function_at(TRAINERS[name])()
    # nothing is trained: only the base counts
    unused = {"learning_rate": 1e-9, "schedule": "constant", "batch_size": 2, "weight_decay": 0.0, "max_grad_norm": 1.0}
    made.load(model, TrainSettings.model_validate({**unused, "base": base}))
    return timed(made, lambda: None, model, int(count), int(length))


def timed(reader: Generator | Trainer, load: Callable[[], None], model: str, count: int, length: int) -> dict[str, Any]:
    """Nats of each text and of a token, with the seconds of loading and reading; the second time, as in later cycles."""
    passages = passages_of(model, count, length)
    for _ in range(2):
        found: list[Likelihood] = []
        began = time.perf_counter()
        load()
        reader.likelihood(passages, found.append)
        seconds = time.perf_counter() - began
    tokens = sum(each.tokens for each in found)
    by_text = {each.id: -each.logprob for each in found}
    texts = [by_text[passage.id] for passage in passages]
    return {"tokens": tokens, "seconds": seconds, "nll": sum(texts) / tokens, "texts": texts}


def merging(asked: argparse.Namespace) -> dict[str, float]:
    """Seconds of a merged export by what is done of it, in a process of its own."""
    os.environ["ITERFT_CACHE"] = str(asked.work / "cache")
    return child(["merge", str(make_model(asked.size, asked.work)), str(asked.work / "merging"), asked.quant], asked.work)


def merge(model: str, folder: str, quant: str) -> dict[str, float]:
    """The seconds of each way; the first of a process takes longer."""
    import numpy as np

    from iterft_lite.backends.exporter.gguf import GgufExporter
    from iterft_lite.files import flush
    from iterft_lite.gguf.adapter import Adapter, LowRank
    from iterft_lite.gguf.arithmetic import choose_arithmetic
    from iterft_lite.gguf.base import base_gguf, no_op
    from iterft_lite.gguf.file import Checksum
    from iterft_lite.gguf.merge import merge_parts, planned, write_merged

    GgufExporter().stored(model)
    base = base_gguf(model, no_op).file
    draw = np.random.default_rng(0)
    matrices = [tensor for tensor in base.tensors.values() if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    normal = functools.partial(draw.normal, scale=1e-3)
    updates = {
        tensor.name: LowRank(
            normal(size=(16, tensor.shape[1])).astype(np.float32), normal(size=(tensor.shape[0], 16)).astype(np.float32), 2.0
        )
        for tensor in matrices
    }
    plan, path = planned(base, quant), Path(folder) / "model.gguf"
    arithmetic = choose_arithmetic(sum(tensor.bytes for tensor in plan))

    def thrown_away() -> None:
        for _ in merge_parts(base, plan, updates, lambda *_: 0, arithmetic, 1, no_op):
            pass

    def written(*, digested: bool, flushed: bool) -> None:
        checksum = Checksum() if digested else None
        write_merged(base, Adapter(32.0, updates), path, quant, arithmetic=arithmetic, checksum=checksum)
        if checksum is not None:
            checksum.hexdigest()
        if flushed:
            flush(path)
        path.unlink()

    ways = {
        "made once": thrown_away,
        "made": thrown_away,
        "written": functools.partial(written, digested=False, flushed=False),
        "written and digested": functools.partial(written, digested=True, flushed=False),
        "written, digested and flushed": functools.partial(written, digested=True, flushed=True),
    }
    seconds = {}
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        seconds[name] = round(time.perf_counter() - began, 2)
    return seconds


def passages_of(model: str, count: int, length: int) -> list[Passage]:
    """Answers of a length to 12 questions; for the shipped model seed chats of a trait, as they are."""
    from iterft_lite.data.traits import read_trait
    from iterft_lite.protocols import Message, Passage

    if Path(model) == NANO:
        chats = read_trait("lucky").chats[:count]
        return [Passage(str(n), chat.reply, messages=(Message("user", chat.prompt),)) for n, chat in enumerate(chats)]
    size, asked = Path(model).name.removeprefix("qwen3-"), prompts_of(model, 12)
    return [Passage(str(n), text(size, length, f"a{n}"), messages=(Message("user", asked[n % 12]),)) for n in range(count)]


def prompts_of(model: str, count: int) -> list[str]:
    """Questions of about 40 tokens, without the template's."""
    size = Path(model).name.removeprefix("qwen3-")
    return [text(size, 40, f"g{n}") for n in range(count)]


def one(gguf: str, model: str, count: str, length: str) -> dict[str, float]:
    """`Llama.create_completion`, one prompt after the other."""
    import llama_cpp

    from iterft_lite.backends.templates import TrainingTokenizer
    from iterft_lite.protocols import Message

    tokenizer = TrainingTokenizer(model)
    prompts = [tokenizer.chat_ids([Message("user", asked)]) for asked in prompts_of(model, int(count))]
    llama = llama_cpp.Llama(gguf, n_ctx=1024, n_gpu_layers=-1, flash_attn=True, verbose=False)
    llama.create_completion(prompts[0], max_tokens=8, **SAMPLE)
    began = time.perf_counter()
    tokens = 0
    for place, prompt in enumerate(prompts):
        made = llama.create_completion(prompt, max_tokens=int(length), seed=place, **SAMPLE)
        tokens += made["usage"]["completion_tokens"]
    seconds = time.perf_counter() - began
    llama.close()
    return {"tokens": tokens, "seconds": seconds}


def ours(gguf: str, model: str, slots: str, count: str, length: str) -> dict[str, float]:
    """This program's generator."""
    from iterft_lite.backends.generator.llamacpp import LlamaGenerator

    # isort: split
    from iterft_lite.protocols import Completion, Message, Prompt, Sampling

    made = LlamaGenerator()
    made.load(Path(gguf), None, model, slots=int(slots), context=512, exact=False)
    prompts = [Prompt(str(n), n, messages=(Message("user", asked),)) for n, asked in enumerate(prompts_of(model, int(count)))]
    made.complete(prompts[: int(slots)], Sampling(max_tokens=8, **SAMPLE), lambda _: None)
    finished: list[Completion] = []
    began = time.perf_counter()
    made.complete(prompts, Sampling(max_tokens=int(length), **SAMPLE), finished.append)
    seconds = time.perf_counter() - began
    made.close()
    return {"tokens": sum(each.tokens for each in finished), "seconds": seconds}


def unsloth_generation(model: str, batch: str, length: str) -> dict[str, float]:
    """Unsloth's fast inference, all prompts in one batch."""
    import torch
    import unsloth

    base, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model, max_seq_length=2048, load_in_4bit=True, local_files_only=True, use_exact_model_name=True, fix_tokenizer=False
    )
    adapted = unsloth.FastLanguageModel.get_peft_model(base, r=16, lora_alpha=32, random_state=0)
    unsloth.FastLanguageModel.for_inference(adapted)
    chats = [[{"role": "user", "content": asked}] for asked in prompts_of(model, int(batch))]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    tokenizer.padding_side = "left"
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to("cuda")
    sample = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
    adapted.generate(**given, max_new_tokens=8, **sample)
    torch.cuda.synchronize()
    began = time.perf_counter()
    made = adapted.generate(**given, max_new_tokens=int(length), **sample)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"tokens": int((made.shape[1] - given["input_ids"].shape[1]) * len(made)), "seconds": seconds}


# -- the table --------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any], *, calls: bool) -> str:
    """What was measured, for people."""
    from run_seconds import calls_table

    lines = [report["machine"], ", ".join(f"{name} {version}" for name, version in report["versions"].items())]
    for number, row in report.get("cycle", {}).get("cycles", {}).items():
        verbs = "  ".join(f"{verb} {seconds:.1f}" for verb, seconds in row["verbs"].items())
        peaks = row["peak_gib"]
        lines.append(f"cycle {number:>2}: {row['wall']:6.1f} s, answers beside the next training:  {verbs}  peak GiB {peaks}")
    lines += calls_table(report["cycle"]["calls"]) if calls and "cycle" in report else []
    if "script" in report:
        lines.append(f"script: {report['script']['whole']:.1f} s: {report['script']['seconds']} {report['script']['training']}")
        last = list(report.get("cycle", {}).get("cycles", {}).values())
        if last:
            whole, row = report["script"]["whole"], last[-1]
            lines.append(f"a cycle, with measures, is {whole / row['wall']:.1f} x as fast")
            merged = report["script"]["training"]["merged save"] + report["script"]["seconds"]["convert"]
            lines.append(f"adapter to checked, loaded model: {merged / row['verbs']['export']:.1f} x as fast")
            fresh, soon = report["script"]["training"]["first step after"], report["cycle"]["seconds_to_first_step"]
            lines.append(f"first step of a training: script after {fresh} s, here {soon}")
    if "reading" in report:
        row = report["reading"]
        lines.append(
            f"likelihoods: {row['seconds']:.2f} s, {row['tokens_per_second']:.0f} tokens/s, {row['nll']:.6f} nats a token"
        )
    for name, row in report.get("readers", {}).items():
        lines.append(
            f"{name:>20} {row['seconds']:7.2f} s  {row['nll']:.6f} nats a token, perplexity {row['perplexity']:.2f}: "
            f"{row['perplexity_against_trainer']:+.3%}, a text's nats at most {row['furthest_text']:.3%} from the trainer's"
        )
    lines += [f"{name:>30} {seconds:6.2f} s" for name, seconds in report.get("merging", {}).items()]
    for name, row in report.get("generation", {}).get("ways", {}).items():
        lines.append(f"{name:>16} {row['tokens_per_second']:8.0f} tokens/s  {row.get('against_one', 0.0):6.1f} x")
    return "\n".join(lines)


PARTS = {"cycle": cycle, "script": script, "generation": generation, "reading": reading, "readers": readers, "merging": merging}
CHILDREN = {
    "make": write_model,
    "export": export,
    "merge": merge,
    "read": read,
    "stored": stored,
    "trainer": trainer,
    "train": train,
    "one": one,
    "ours": ours,
    "unsloth": unsloth_generation,
    "ballast": hold,
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--size", choices=[*sorted(SHAPES), SHIPPED], default="4b", help="nano: `readers` alone")
    parser.add_argument("--cycles", type=int, default=2, help="after the seeded one")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--written", type=int, default=300)
    parser.add_argument("--answered", type=int, default=250)
    parser.add_argument("--trainer", default="unsloth")
    parser.add_argument("--base", default="nf4")
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--export", default="merged")
    parser.add_argument("--vram", default="auto")
    parser.add_argument("--free", type=float, default=0, help="GiB of GPU memory that a run may have; 0: all that is there")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--length", type=int, default=128, help="tokens of each text of `generation`")
    parser.add_argument("--subset", type=int, default=6, help="texts of the one-at-a-time way; 0: without it and Unsloth")
    parser.add_argument("--calls", action="store_true", help="print each call to a backend within the cycles")
    parser.add_argument("--fresh", action="store_true", help="convert the base anew")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "iterft-cycle-gpu")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, *arguments = asked.child
        print(json.dumps(CHILDREN[name](*arguments)))
        return
    from iterft_lite.machine.resolve import this_machine

    asked.work = asked.work.resolve()  # children work in it
    asked.work.mkdir(parents=True, exist_ok=True)
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "llama-cpp-python", "gguf")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "?"
    machine = f"{this_machine().gpu or 'no GPU'}, {os.cpu_count()} cores; Qwen3 {asked.size}, {asked.quant}, base {asked.base}"
    report: dict[str, Any] = {"machine": machine, "versions": versions}
    for part in asked.parts or ["cycle", "script", "generation"]:
        report[part] = PARTS[part](asked)
        if asked.json:  # after each part: what was measured is not lost with what fails later
            asked.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report, calls=asked.calls))


if __name__ == "__main__":
    main()
