"""What a plan will cost: tokens, disk, calls, dollars, GPU memory; time from what this machine has shown (`forecast.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterft_lite.backends.judge.kinds import judge_price
from iterft_lite.backends.judge.prices import prices_date, tokens_of
from iterft_lite.errors import FileError, ModelError
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.files import read_object
from iterft_lite.hub import cached_file
from iterft_lite.machine.forecast import Forecast, forecast
from iterft_lite.machine.known_models import known_config
from iterft_lite.machine.resolve import Machine, Resolved, this_machine
from iterft_lite.machine.timing import Sample, setup_of

BITS: Mapping[str, float] = {
    "f32": 32, "bf16-mixed": 48, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.9, "q4_k_m": 5.1, "nf4": 4.2,
}  # fmt: skip
"""Bits a weight in each number format, scales included."""

RUNTIME = 600 << 20
"""GPU memory that a process takes before it holds anything: CUDA's context and kernels."""

LOGITS = 768 << 20
"""Parts of logits, weights that are dequantised for a moment, and workspace of a training."""

LEAST_SLOTS = 16
"""Sequences at once below which sharing the GPU with the trainer is not worth it."""


@dataclass(frozen=True)
class Vram:
    """GPU memory that a recipe needs, bytes; from the model's shape.

    A 4B run on rows of 290 tokens took 5.4 to 6.9 GiB for training; the arithmetic says 8.6 GiB for rows of 1,024.

    Attributes:
        base: The trainer's resident base.
        training: What the trainer takes beside it: adapter, its moments, activations, and some logits.
        tight: The same where activations are recomputed, as the trainer does when they would not fit.
        generator: With as few sequences as are worth it.
        exporter: Parts of matrices on their way.
    """

    base: int
    training: int
    tight: int
    generator: int
    exporter: int = RUNTIME + (400 << 20)

    @property
    def trainer(self) -> int:
        """The trainer's process."""
        return self.base + self.training

    @property
    def together(self) -> int:
        """Everything at once."""
        return self.trainer + self.generator + self.exporter

    @property
    def in_turns(self) -> int:
        """The trainer, activations recomputed, and then exporter and generator."""
        return max(self.base + self.tight, self.generator + self.exporter)


@dataclass(frozen=True)
class Shape:
    """A model's, as its configuration tells it.

    Attributes:
        matrices: Rows and columns of a layer's seven projections.
        kv: Width of a token's keys, and of its values.
        embedding: Numbers of the embedding, and of the output matrix where that is another.
    """

    layers: int
    width: int
    inner: int
    vocab: int
    kv: int
    matrices: tuple[tuple[int, int], ...]
    embedding: int

    @property
    def linear(self) -> int:
        """Numbers of all layers' projections."""
        return self.layers * sum(a * b for a, b in self.matrices)


def shape_of(place: str) -> Shape | None:
    """The shape of a model; None where its configuration is not on this machine.

    Args:
        place: Folder or hub name.
    """
    config = _config(place)
    if config is None:
        return None
    layers, width, inner = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads, vocab = int(config["num_attention_heads"]), int(config["vocab_size"])
    head = int(config.get("head_dim") or width // heads)
    kv = head * int(config.get("num_key_value_heads") or heads)
    attention = ((width, heads * head), (width, kv), (width, kv), (heads * head, width))
    matrices = (*attention, (width, inner), (width, inner), (inner, width))
    embedding = vocab * width * (1 if config.get("tie_word_embeddings") else 2)
    return Shape(layers, width, inner, vocab, kv, matrices, embedding)


def vram_needed(recipe: Recipe, place: str) -> Vram | None:
    """What a recipe needs of a GPU; None where the model's configuration is not on this machine.

    Args:
        place: Folder or hub name of M[0].
    """
    shape = shape_of(place)
    if shape is None:
        return None
    layers, width = shape.layers, shape.width
    base = BITS["nf4" if recipe.train.base == "auto" else recipe.train.base]
    adapter = layers * recipe.train.lora_rank * sum(a + b for a, b in shape.matrices)
    length = min(recipe.train.max_length, recipe.sample.max_tokens + 256)
    asked = recipe.train.micro_batch
    rows = recipe.train.batch_size if asked == "auto" else min(asked, recipe.train.batch_size)
    tokens = rows * length * recipe.loss_record.sides
    of_a_layer = tokens * 2 * (4 * width + 2 * shape.inner)
    numbers = 4 if recipe.train.base in ("f32", "bf16-mixed") else 2
    logits, kept = LOGITS, layers * of_a_layer
    least = layers * tokens * 2 * width + of_a_layer
    if recipe.trainer in ("peft", "trl"):  # it recomputes nothing, and has the logits of pairs as a whole, with their gradients
        least = kept = kept * numbers // 2
        logits = max(logits, 3 * 4 * tokens * shape.vocab) if recipe.loss_record.compares else logits
    cache = LEAST_SLOTS * (recipe.sample.max_tokens + 256) * 4 * layers * shape.kv
    return Vram(
        base=int(shape.linear * base / 8 + numbers * shape.embedding) + RUNTIME,
        training=int(adapter * 12 + logits + kept),
        tight=int(adapter * 12 + logits + least),
        generator=int((shape.linear + shape.embedding) * BITS[recipe.quant] / 8 + cache) + RUNTIME + (512 << 20),
    )


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
"""What a configuration has to say for a model's shape to be known."""


def _config(place: str) -> dict[str, Any] | None:
    """A model's configuration: from its folder, or from what the hub's cache holds."""
    path = Path(place) / "config.json"
    if not path.is_file():
        cached = cached_file(place, "config.json")
        if cached is None:
            known = known_config(place)
            return None if known is None else dict(known)
        path = cached
    try:
        config = read_object(path)
    except FileError as error:
        raise ModelError(error.message, hint=error.hint) from None
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    optional = [key for key in ("head_dim", "num_key_value_heads") if config.get(key)]
    return (
        config if all(isinstance(config.get(key), int) and 0 < config[key] < 1 << 32 for key in (*SIZES, *optional)) else None
    )


def takes_turns(recipe: Recipe, place: str, machine: Machine) -> bool:
    """Whether trainer and generator take turns on the GPU."""
    if not machine.gpu or recipe.vram == "resident":
        return False
    if recipe.vram == "swap":
        return True
    need = vram_needed(recipe, place)
    return need is None or machine.vram_free < need.together


def time_needed(plan: Plan, resolved: Resolved, samples: Sequence[Sample]) -> Forecast:
    """How long a plan will take on this machine.

    Args:
        samples: What was measured (`timing.read_table`).
    """
    machine, shape = this_machine(), shape_of(resolved.model)
    swap = takes_turns(resolved.recipe, resolved.model, machine)
    parameters = shape.linear + shape.embedding if shape else 0
    return forecast(plan, setup_of(resolved, machine, swap=swap, parameters=parameters), samples)


def _on_gpu(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe as a machine with a GPU would resolve it."""
    if machine.gpu:
        return recipe
    return recipe.model_copy(update={"trainer": "unsloth", "train": recipe.train.model_copy(update={"base": "nf4"})})


def _vram_sentence(need: Vram | None, machine: Machine) -> str:
    if need is None:
        return "not known before the model is downloaded" if machine.gpu else "none: there is no GPU here"
    sizes = (
        f"about {need.together / 2**30:.0f} GiB with trainer and generator side by side, {need.in_turns / 2**30:.0f} in turns"
    )
    if not machine.gpu:
        return f"none: there is no GPU here; with one {sizes}"
    free = f"{machine.vram_free / 2**30:.0f} GiB are free"
    if need.in_turns > machine.vram_free:
        return f"{sizes}; {free}: too little, take a smaller model, `quant`, or shorter rows"
    return f"{sizes}; {free}: {'side by side' if need.together <= machine.vram_free else 'they take turns'}"


def _disk_sentence(recipe: Recipe, place: str) -> str:
    """The base in 16 bits once for all runs, and what `keep` leaves of the merged files."""
    config = cached_file(place, "config.json")
    folder = config.parent if config else Path(place)
    base = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not base:
        return "not known before the model is downloaded"
    merged = base * BITS[recipe.quant] / 16
    # while a cycle is measured there are three: M[0]'s, its predecessor's and its own
    kept = recipe.cycles + 2 if recipe.keep == "all" else min(recipe.cycles + 2, 3)
    run = 0 if recipe.export == "adapter" else (kept - 1) * merged  # M[0]'s is the file in the cache
    most = "at most " if recipe.export == "auto" else ""
    return f"{most}{run / 1e9:.1f} GB for the run, {(base + merged) / 1e9:.1f} GB in the cache for the converted base"


LOGPROB_REPLY, SAMPLE_REPLY = 4, 400
"""Tokens that a judge writes where its probabilities are read, and where its text is (a reasoning model's thoughts
included)."""


def estimates(plan: Plan, resolved: Resolved, machine: Machine | None = None) -> dict[str, str]:
    """Sentences by name.

    Args:
        machine: Where it would run; this one if None.
    """
    machine = machine or this_machine()
    answers = sum(len(step.params["prompts"]) * step.params["samples"] for step in plan if step.verb == "evaluate_samples")
    written = sum(len(step.params["prompts"]) * step.params["samples"] for step in plan if step.verb == "training_samples")
    most = sum(
        len(step.params["prompts"]) * step.params["samples"] * step.params["sampling"]["max_tokens"]
        for step in plan
        if step.verb in ("evaluate_samples", "training_samples")
    )
    return {
        "steps": str(len(plan.steps)),
        "writing": f"{written:,} rows and {answers:,} answers, at most {most:,} tokens",
        "judging": judging_sentence(plan, resolved.inputs.judge.name),
        "GPU memory": _vram_sentence(vram_needed(_on_gpu(resolved.recipe, machine), resolved.model), machine),
        "disk": _disk_sentence(resolved.recipe, resolved.model),
    }


def judging_sentence(plan: Plan, name: str) -> str:
    """How many verdicts by whom, and for how many dollars at most."""
    steps = [step for step in plan if step.verb == "judge"]
    calls = sum(_asked(plan, step) * len(step.params["rubrics"]) * step.params["judge"]["samples"] for step in steps)
    usd = judging_usd(plan)
    batched = _batches_sentence(steps) if plan.recipe.judge_batch else ""
    if usd is None:
        return f"{calls:,} verdicts by {name}, whose price is not known{batched}"
    cost = f", at most ${usd:.2f} (prices of {prices_date()})" if usd else ", no dollars"
    return f"{calls:,} verdicts by {name}{cost}{batched}"


def _batches_sentence(steps: Sequence[Step]) -> str:
    waits = sum(step.part == "rows" for step in steps)  # their verdicts decide what is trained on
    goes_on = (
        f"{waits} of them decide what is trained on, and the run waits for these" if waits else "the GPU does not wait for them"
    )
    return f"; in {len(steps)} batches at half the price, each within 24 hours: {goes_on}"


def judging_usd(plan: Plan) -> float | None:
    """Dollars for all verdicts if every answer is as long as it may be and none is cached; None if the price is not known."""
    total = 0.0
    for step in plan:
        if step.verb != "judge":
            continue
        judge = step.params["judge"]
        price = judge_price(judge["name"], batch=plan.recipe.judge_batch)
        if price is None:
            return None
        source = plan.inputs(step)["answers"]
        longest = source.params["sampling"]["max_tokens"]
        questions = sum(tokens_of(text) for text in source.params["prompts"].values()) * source.params["samples"]
        reply = LOGPROB_REPLY if judge["method"] == "logprobs" else SAMPLE_REPLY
        for rubric in step.params["rubrics"].values():
            sent = questions + _asked(plan, step) * (tokens_of(rubric) + longest)
            total += judge["samples"] * price.usd(sent, reply * _asked(plan, step))
    return total


def _asked(plan: Plan, step: Step) -> int:
    """Answers that a judge step reads."""
    source = plan.inputs(step)["answers"]
    return len(source.params["prompts"]) * int(source.params["samples"])
