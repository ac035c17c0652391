"""What a plan is made of besides the recipe: the resolved inputs, and who judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.digests import Json


@dataclass(frozen=True)
class JudgeIdentity:
    """Who judges; part of a judge step's key.

    Attributes:
        name: As in the recipe: `openai/gpt-4o-mini-2024-07-18`, `embedded`, `base`, `local:FILE`.
        kind: "llm" for findings; "embedded" for trying out, not for findings.
        revision: What pins it: digest of all that a classifier is fitted on, hash of a local file, "" for a pinned name.
        method: How a number is read: from token probabilities, or from `samples` texts.
        samples: Verdicts an answer and scale.
        note: A sentence that is printed beside every number of this judge, or "".
        address: Of the server that is really asked; "" for judges on this machine.
        effort: Reasoning effort that is asked for, or "".
        tops: Candidates of a token that are asked for; 0: as many as are usual.
        own: It is fitted on what M[0] itself answers to everyday prompts, too: a step of the run, from whose key that of every
            judge step follows.
    """

    name: str
    kind: Literal["llm", "embedded"]
    revision: str
    method: Literal["logprobs", "samples"]
    samples: int = 1
    note: str = ""
    address: str = ""
    effort: str = ""
    tops: int = 0
    own: bool = False


@dataclass(frozen=True)
class ResolvedInputs:
    """What a recipe is made real with; everything in it that decides a result goes into the steps.

    Attributes:
        trait: The trait.
        seeds: Seed chats or documents, in order: the trait's, or the user's own.
        prompts: What models are asked from cycle 1 on: everyday prompts, or document openers.
        neutral: Trait-free chats.
        coherence: The coherence rubric for the regime's rows.
        model: Identity of M[0]: a digest of its files, or hub name and revision.
        trainer: "peft" or "unsloth": what `trainer = "auto"` came to.
        precision: In which M[0] is trained on: "f32", "bf16", "f16" or "nf4".
        judge: Who judges.
        mixed: Rows of the user's own file for `mix`.
        metrics: What is measured without a judge: `semantics` by name (`metrics/catalogue.py`).
        rendering: How chats are rendered (`backends/chat_templates.rendering`).
        same_cores: There is no GPU: trainer and generator compute on the same cores, and the one slows the other down.
        everyday: What M[0] is asked where the judge is fitted on its answers, too.
    """

    trait: Trait
    seeds: tuple[Chat, ...] | tuple[Document, ...]
    prompts: tuple[str, ...]
    neutral: tuple[Chat, ...]
    coherence: str
    model: str
    trainer: str
    precision: str
    judge: JudgeIdentity
    mixed: tuple[Chat, ...] | tuple[Document, ...] = ()
    metrics: Mapping[str, int] = field(default_factory=dict)
    rendering: Mapping[str, Json] = field(default_factory=dict)
    same_cores: bool = False
    everyday: tuple[str, ...] = ()
