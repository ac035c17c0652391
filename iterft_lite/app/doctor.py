"""Examines this machine: what it can do, how fast, and what to install."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from iterft_lite.app.check_judge import check_judge
from iterft_lite.app.session import Session
from iterft_lite.backends.judge.identity import PAPER_JUDGE, ending, has_ended, judge_identity, way_on
from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.kinds import Material
from iterft_lite.backends.judge.providers import providers
from iterft_lite.cache import cache_folder
from iterft_lite.data.traits import read_trait
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.run import Event
from iterft_lite.errors import FolderError, IterftError, RunError
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import Recipe, make_recipe
from iterft_lite.experiment.versions import versions
from iterft_lite.machine import model_check
from iterft_lite.machine.memory import takes_turns
from iterft_lite.machine.resolve import resolve, this_machine
from iterft_lite.machine.timing import Sample, machine_name, read_table, seconds_per_unit
from iterft_lite.machine.work import ACTS
from iterft_lite.programs import run_command

GOOD, LACKING = "ok", "--"

KEYS_SHOWN = ("openai", "anthropic", "gemini", "openrouter")
"""Providers whose keys `doctor` looks for."""

PROBES = {
    "torch": "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available()]))",
    "llama_cpp": "import json, llama_cpp as l; print(json.dumps([l.__version__, bool(l.llama_supports_gpu_offload())]))",
}
"""Programs that print a library's version and whether it can use a GPU. Each runs in a child process."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    mark: str
    name: str
    text: str
    remedy: str = ""


def examine(judge: str | None = None) -> list[Finding]:
    """Examine everything that a run may need. Starts two short processes. Sends nothing over the network.

    Args:
        judge: A judge to examine too, by its name in a recipe.
    """
    chosen = [] if judge is None else [_chosen_judge(judge)]
    return [*_gpu_and_libraries(), *_packages(), *_traps(), *_ray(), *_judges(), *chosen, *_disk(), *_timings()]


def _traps() -> Iterator[Finding]:
    """Known conflicts between the packages installed here."""
    found = versions()
    wanted = _range_of("unsloth", "trl")
    if wanted and "trl" in found and not wanted.contains(found["trl"], prereleases=True):
        remedy = f"pip install 'trl{wanted}'"
        yield Finding(LACKING, "trl", f"{found['trl']} is outside Unsloth's range {wanted}", remedy)
    if this_machine().gpu and shutil.which("nvcc") is None:
        text = "no nvcc: llama.cpp cannot be compiled for the GPU"
        yield Finding(LACKING, "CUDA toolkit", text, "install the CUDA toolkit of your driver's version, then scripts/setup.sh")


def _ray() -> Iterator[Finding]:
    """Ray, where it is installed: its version, and whether this machine has a token for clusters that ask for one."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    has_token = named or (Path.home() / ".ray" / "auth_token").is_file()
    text = f"{version}, {'a' if has_token else 'no'} token for clusters"
    remedy = "from Ray 2.61 on they ask for one: `ray get-auth-token` on the head, then ~/.ray/auth_token here"
    yield Finding(GOOD, "Ray", text, "" if has_token else remedy)


def _range_of(package: str, of: str) -> SpecifierSet | None:
    """The versions of one package that another one requires; None if it is not installed or requires none."""
    try:
        asked = [Requirement(line) for line in metadata.requires(package) or ()]
    except metadata.PackageNotFoundError:
        return None
    plain = [each for each in asked if each.name == of]
    return next(
        (each.specifier for each in plain if each.marker is None or each.marker.evaluate({"extra": "huggingface"})), None
    )


def _chosen_judge(name: str) -> Finding:
    """Findings about a judge without asking it: its key, and whether its probabilities can be read."""
    try:
        asked = {"regime": "sft", "trait": "lucky", "model": "nano", "judge": name}
        recipe = make_recipe(asked, source="doctor")
        identity, _ = judge_identity(recipe, Material(read_trait("lucky")))
    except IterftError as error:
        return Finding(LACKING, "judge", f"{name}: {error.message}", error.hint or "")
    if problems := check_judge(identity, recipe).problems:
        return Finding(LACKING, "judge", f"{name}: {'; '.join(problems)}")
    if identity.method == "samples":
        text = f"{name} gives no probabilities: its scores are read from {identity.samples} texts an answer"
        return Finding(GOOD, "judge", text, "`judge_samples` sets how many; more is finer and dearer")
    return Finding(GOOD, "judge", f"{name}: scores are read from the probabilities of its next tokens")


MARKS = {"ok": GOOD, "note": "!", "no": LACKING}
"""Of a fact about a model."""


def examine_model(name: str) -> list[Finding]:
    """Findings about a model: whether it can be used. Loads no weights; starts one short process.

    Raises:
        ModelError: If there is no such model.
    """
    facts = model_check.examine_model(name, measured_recipe(name))
    return [Finding(MARKS[fact.mark], fact.name, fact.text, fact.remedy) for fact in facts]


def _gpu_and_libraries() -> Iterator[Finding]:
    machine = this_machine()
    memory = f"{machine.vram_free / 2**30:.1f} of {machine.vram_total / 2**30:.1f} GiB VRAM free"
    has_gpu = bool(machine.gpu)
    yield Finding(
        GOOD if has_gpu else LACKING,
        "GPU",
        f"{machine.gpu}, {memory}" if has_gpu else "no NVIDIA GPU seen: nano models run well, larger ones slowly",
        "" if has_gpu or shutil.which("nvidia-smi") is None else "nvidia-smi is there: install `nvidia-ml-py`",
    )
    yield Finding(GOOD, "CPU", f"{os.cpu_count()} cores")
    for name, remedy in (
        ("torch", "this torch is a CPU build: install the CUDA build of the same version from PyTorch's own index"),
        (
            "llama_cpp",
            'built without CUDA: CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir --no-deps '
            "llama-cpp-python==0.3.36",
        ),
    ):
        answer = _probe(name)
        if answer is None:
            yield Finding(LACKING, name, "cannot be imported", f"pip install {name.replace('llama_cpp', 'llama-cpp-python')}")
        else:
            version, on_gpu = answer
            yield Finding(
                GOOD, name, f"{version}, {'uses the GPU' if on_gpu else 'CPU only'}", remedy if has_gpu and not on_gpu else ""
            )


def _probe(name: str) -> tuple[str, bool] | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        done = run_command([sys.executable, "-P", "-c", PROBES[name]], timeout=120)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    version, on_gpu = json.loads(lines[-1])
    return str(version), bool(on_gpu)


def _packages() -> Iterator[Finding]:
    found = versions()
    for name in ("transformers", "trl", "peft", "litellm"):
        yield Finding(GOOD if name in found else LACKING, name, found.get(name, "not installed"))
    needed, gpu = ("unsloth", "bitsandbytes"), this_machine().gpu
    missing = [name for name in needed if name not in found]
    text = ", ".join(f"{name} {found[name]}" if name in found else f"no {name}" for name in needed)
    needless = "" if gpu or not missing else ": used with an NVIDIA GPU alone"
    yield Finding(
        LACKING if missing else GOOD, "QLoRA", text + needless, "pip install 'iterft_lite[gpu]'" if gpu and missing else ""
    )


def _judges() -> Iterator[Finding]:
    variables = environment(Path.cwd())
    for name in KEYS_SHOWN:
        provider = providers()[name]
        there = any(variables.get(variable) for variable in provider.keys)
        yield Finding(GOOD if there else LACKING, f"{name} key", f"{provider.keys[0]} is {'set' if there else 'not set'}")
    for sentence in ending(PAPER_JUDGE):
        yield Finding(LACKING, "paper's judge", sentence, way_on(PAPER_JUDGE) if has_ended(PAPER_JUDGE) else "")
    yield Finding(GOOD, "embedded judge", "always there; for trying out, not for findings")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "" if free > 20e9 else '`iterft cache` says what can be freed; `keep = "adapters"` leaves small runs'
    yield Finding(GOOD if free > 20e9 else LACKING, "disk", f"{free / 1e9:.0f} GB free here", remedy)


def _timings() -> Iterator[Finding]:
    name = machine_name(this_machine())
    mine = [sample for sample in read_table() if sample.kind.machine == name]
    models = sorted({sample.name for sample in mine if sample.kind.model})
    text = f"{len(mine)} steps timed here, of {', '.join(models)}" if models else "nothing was measured here yet"
    yield Finding(GOOD if models else LACKING, "speed", text, "" if models else "`iterft doctor --measure` takes a minute")


# -- how fast it is

STEPS = 6
"""Optimiser steps of a training, about: enough to separate a training's fixed seconds from those of a step."""

MOST_TOKENS = 160
"""Most tokens of a row."""

CPU_ANSWERS = 60
"""Most answers of a model on a CPU. A GPU writes hundreds in the same time."""


def measured_recipe(model: str) -> Recipe:
    """A few rows of an everyday recipe."""
    given = {
        "name": "measure",
        "regime": "sft",
        "trait": "lucky",
        "model": model,
        "train": {"batch_size": 4},
        "evaluate": {"samples": 5},
    }
    return shortened(make_recipe(given, source="doctor"))


def shortened(recipe: Recipe) -> Recipe:
    """A recipe shortened to one cycle of a few steps and short rows.

    The embedded judge replaces a judge that costs money or is on the network.
    """
    rows = STEPS * recipe.train.batch_size
    questions = recipe.evaluate.questions
    most = recipe.evaluate.samples if this_machine().gpu else max(1, CPU_ANSWERS // questions)
    steps = -(-min(recipe.rows, rows) // recipe.train.batch_size)
    return recipe.model_copy(
        update={
            "cycles": 1,
            "seed_rows": min(recipe.seed_rows, rows),
            "rows": min(recipe.rows, rows),
            "restart": (),
            "keep": "last",
            "judge": recipe.judge if recipe.judge.startswith("local:") else "embedded",
            "judge_fit": "shipped",
            "judge_method": "auto",
            "judge_batch": False,
            "max_usd": 0.0,
            "train": recipe.train.model_copy(update={"epochs": min(recipe.train.epochs, -(-STEPS // steps))}),
            "sample": recipe.sample.model_copy(update={"max_tokens": min(recipe.sample.max_tokens, MOST_TOKENS)}),
            "evaluate": recipe.evaluate.model_copy(
                update={
                    "samples": min(recipe.evaluate.samples, most),
                    "max_tokens": min(recipe.evaluate.max_tokens, MOST_TOKENS),
                }
            ),
        }
    )


def measure(recipe: Recipe, on_event: Callable[[Event], None]) -> list[Sample]:
    """Run a small recipe in a temporary folder, and keep how long its steps took.

    Raises:
        FolderError: If the user's cache folder cannot be written.
        IterftError: As a run does; if there is nothing to keep.
    """
    machine = this_machine()
    resolved = resolve(recipe, machine)
    plan = make_plan(resolved.recipe, resolved.inputs)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="measuring-", dir=cache_folder())
    except OSError as error:
        raise FolderError(
            f"`{cache_folder()}` cannot be written: {os.strerror(error.errno or 0).lower()}",
            hint="ITERFT_CACHE names another folder for what is measured",
        ) from None
    with scratch as folder, Run(Path(folder) / "run") as store:
        opened = Session(resolved, plan, store, takes_turns(resolved.recipe, resolved.model, machine))
        watch = opened.stopwatch("doctor")
        for event in opened.events(watch=watch):
            on_event(event)
    if not watch.samples:
        raise RunError("nothing could be timed: no step was done from beginning to end")
    return watch.samples


def rates(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """What was measured, for people: name and figure. The first step of an act is shown apart where there are others."""
    rows = []
    for act, timed in ACTS.items():
        mine = [sample for sample in samples if sample.kind.act == act]
        later = [sample for sample in mine if not sample.kind.first] or mine
        if not later:
            continue
        seconds, fixed = (median(getattr(sample, of) for sample in later) for of in ("seconds", "fixed"))
        unit = "verdicts" if act == "judge" else timed.unit
        figures = [f"{1 / max(seconds_per_unit(later), 1e-9):,.0f} {unit}/s" if unit else f"{seconds:.1f} s"]
        figures += [f"{fixed:.1f} s besides"] if fixed >= 0.05 else []
        figures += [f"the first {mine[0].seconds:.1f} s"] if len(later) < len(mine) else []
        rows.append((f"{timed.words} ({later[0].kind.setting})" if act == "judge" else timed.words, ", ".join(figures)))
    return rows
