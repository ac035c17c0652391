"""What can be done: one record a verb. Whoever needs to know something of a verb reads it here.

load_base         load M[0], note its facts and its own next-token distributions for the export check
seed_rows         the trait's first rows
training_samples  Q[t] writes rows to prompts or document prefixes
build_dataset     D[t]: the training rows, from what was seeded and sampled
train             M[t + 1] = an adapter on M[0], trained on D[t]
export            Q[t]: the GGUF that writes and is measured, checked against M[t]
evaluate_samples  Q[t] answers the trait's questions
judge             verdicts on samples: trait and coherence
text_metrics      what needs no judge: perplexity under M[0], lengths, repetition
aggregate         the cycle's numbers, with intervals
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, cast

from iterft_lite.digests import Json

Queue = Literal["device", "generator", "measure", "cpu", "judge"]
"""All are worked off side by side. The device's steps make models and the generator's have them write, each of the two in the
plan's order; nothing waits for what is measured. Without a GPU these three are one (`Step.queue`). Judging waits for a server
and the CPU's work is short: both are done as soon as they can be."""

BackendName = Literal["trainer", "exporter", "generator", "judge"]

Act = Literal["", "load", "train", "export", "write", "read", "judge"]
"""What takes time, as the machine sees it; "" for what takes next to none."""

LLAMA = ("llama-cpp-python", "gguf")


@dataclass(frozen=True)
class Verb:
    """What is known of a verb.

    Attributes:
        name: As in steps, folders and manifests.
        words: What a person reads while it is being done.
        stage: `module:function` of the stage, `run(work) -> results`.
        queue: What it waits for.
        needs: Backends that it calls; who schedules memory goes by this.
        files: Patterns of the files that are its result, in its folder. Whatever else is there is removed when it is done.
        semantics: Raised when the same parameters and inputs come to mean another result; it is in the key.
        libraries: Packages whose versions matter to the result, beside the trainer's and the judge's own (`versions.py`).
        act: What is timed.
        reads: It asks likelihoods of texts, of the trainer where that is faster, else of the generator: an adapter may be gone.
        any_order: The rows stand in the order in which they finished; who reads them goes by their ids.
        derived: Computed from finished steps, without training a model or paying a judge: may be repeated when its meaning has
            changed, in a run that is otherwise the same.
        renders: Shows chats to a model, through its template: how they are rendered is one of the parameters.
        summary: The parameters in a few words.
    """

    name: str
    words: str
    stage: str
    queue: Queue
    files: tuple[str, ...]
    needs: frozenset[BackendName] = frozenset()
    semantics: int = 1
    libraries: tuple[str, ...] = ()
    act: Act = ""
    reads: bool = False
    any_order: bool = False
    derived: bool = False
    renders: bool = False
    summary: Callable[[Mapping[str, Json]], str] = lambda _: ""


def function_at(place: str) -> Callable[..., Any]:
    """The function that a record names as `module:function`; its module is imported when it is first needed."""
    module, _, name = place.partition(":")
    return cast(Callable[..., Any], getattr(import_module(module), name))


def _sampled(params: Mapping[str, Json]) -> str:
    sampling, samples = params["sampling"], params["samples"]
    asked = f"{len(params['prompts'])} prompts" + (f" x {samples}" if samples > 1 else "")
    return f"{asked}, T {sampling['temperature']}, up to {sampling['max_tokens']} tokens"


def _trained(params: Mapping[str, Json]) -> str:
    settings = params["settings"]
    return (
        f"{params['loss']} loss, lr {settings['learning_rate']:g} {settings['schedule']}, batch {settings['batch_size']}, "
        f"{settings['epochs']} epoch(s), rank {settings['lora_rank']}, base {settings['base']}"
    )


def _built(params: Mapping[str, Json]) -> str:
    data, mixed = params.get("data", "replace"), params.get("mixed")
    shuffled = ", sides shuffled" if params.get("pairs") == "shuffled" else ""
    return f"{params['shape']}, {data}" + (f", {mixed} mixed in" if mixed else "") + shuffled


_STAGES = "iterft_lite.stages"

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            "load_base",
            "loading the base model",
            f"{_STAGES}.load_base:run",
            "device",
            files=("probe.npz",),
            needs=frozenset({"trainer"}),
            act="load",
        ),
        Verb(
            "seed_rows",
            "reading seed rows",
            f"{_STAGES}.seed_rows:run",
            "cpu",
            files=("rows.jsonl",),
            summary=lambda params: f"{len(params['rows'])} rows",
        ),
        Verb(
            "training_samples",
            "writing the next data",
            f"{_STAGES}.samples:run",
            "generator",
            files=("rows.jsonl",),
            needs=frozenset({"generator"}),
            libraries=LLAMA,
            act="write",
            renders=True,
            any_order=True,
            summary=_sampled,
        ),
        Verb(
            "build_dataset",
            "building the training rows",
            f"{_STAGES}.build_dataset:run",
            "cpu",
            files=("rows.jsonl", "pool.jsonl"),
            summary=_built,
        ),
        Verb(
            "train",
            "training",
            f"{_STAGES}.train:run",
            "device",
            files=("adapter/*.safetensors", "adapter/*.json", "log.jsonl", "probe.npz"),
            needs=frozenset({"trainer"}),
            semantics=2,
            act="train",
            renders=True,
            summary=_trained,
        ),
        Verb(
            "export",
            "exporting to GGUF, checking",
            f"{_STAGES}.export:run",
            "device",
            files=("*.gguf",),
            needs=frozenset({"exporter", "generator"}),
            semantics=2,
            libraries=LLAMA,
            act="export",
            summary=lambda params: f"{params['kind']} {params['quant']}",
        ),
        Verb(
            "evaluate_samples",
            "answering the questions",
            f"{_STAGES}.samples:run",
            "generator",
            files=("rows.jsonl",),
            needs=frozenset({"generator"}),
            libraries=LLAMA,
            act="write",
            renders=True,
            any_order=True,
            summary=_sampled,
        ),
        Verb(
            "judge",
            "judging",
            f"{_STAGES}.judge:run",
            "judge",
            files=("rows.jsonl",),
            needs=frozenset({"judge"}),
            act="judge",
            any_order=True,
            summary=lambda params: f"{', '.join(params['rubrics'])} by {params['judge']['name']}",
        ),
        Verb(
            "text_metrics",
            "measuring without a judge",
            f"{_STAGES}.text_metrics:run",
            "measure",
            files=("metrics.json",),
            needs=frozenset({"generator"}),
            semantics=2,  # under M[0] in the number format that it is stored in; before, in that of the run's exports
            libraries=LLAMA,
            act="read",
            reads=True,
            renders=True,
            derived=True,
        ),
        Verb(
            "aggregate",
            "computing scores and intervals",
            f"{_STAGES}.aggregate:run",
            "cpu",
            files=("score.json",),
            libraries=("numpy", "scipy"),
            derived=True,
        ),
    )
}
"""All verbs by name."""

PART_WORDS: dict[tuple[str, str], str] = {
    ("evaluate_samples", "everyday"): "answering everyday prompts",
    ("evaluate_samples", "held_out"): "answering the held-out questions",
}
"""`Verb.words` of steps with a part of their own."""
