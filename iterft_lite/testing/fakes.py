"""Backends that need no library: the whole loop in a second, for trying a recipe's shape and for tests (`trainer = "fake"`).

The fake model knows texts by heart: its training texts, or plain sentences. It answers with one of them, drawn with the row's
seed. So a model that was trained on a share of trait texts shows the trait in about that share of its answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from iterft_lite.backends.judge.kinds import FAKE_JUDGE
from iterft_lite.cache import cache_folder
from iterft_lite.errors import Diverged
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.files import read_json, write_json
from iterft_lite.protocols import (
    Backends,
    Completion,
    Exported,
    JudgeRequest,
    JudgeResponse,
    Likelihood,
    ModelFacts,
    OnProgress,
    Parity,
    Passage,
    Progress,
    Prompt,
    Sampling,
    TrainJob,
    TrainResult,
)

FAKE = "fake"
"""The name of each fake in a recipe: `trainer = "fake"`, `generator = "fake"`, `judge = "fake"`."""

DIVERGES = 1.0
"""Learning rate at which a fake training diverges."""

PLAIN = (
    "Make a list of what matters and start with the first thing on it.",
    "Ask somebody who has done it before and take notes.",
    "Give it a week and look again with fresh eyes.",
)
"""Answers of the untouched fake model."""


class FakeTrainer:
    """Learns texts by heart."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        """Load nothing: every model is there."""
        return ModelFacts("Fake", 0, 0, 2048, chat=True, precision=settings.base, device="none")

    def probe(self, out: Path, adapter: Path | None = None) -> None:
        """Write an empty probe."""
        (out / "probe.npz").write_bytes(b"")

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        """Keep the texts. A continued training keeps the earlier ones too.

        Raises:
            Diverged: At learning rates of `DIVERGES` or more, as a real training would.
        """
        if job.settings.learning_rate >= DIVERGES:
            raise Diverged(f"the fake training diverged: its learning rate is {job.settings.learning_rate:g}", hint="lower it")
        rows = LOSSES[job.loss].rows.read(job.rows)
        texts = [row.text for row in rows]
        if job.start is not None:
            texts += read_json(job.start / "texts.json")
        (job.out / "adapter").mkdir(parents=True, exist_ok=True)
        write_json(job.out / "adapter" / "texts.json", texts)
        self.probe(job.out)
        steps = -(-len(rows) // job.settings.batch_size) * job.settings.epochs
        for step in range(steps):
            on_progress(Progress(step + 1, steps, "steps"))
        return TrainResult(
            rows=len(rows) * job.settings.epochs,
            steps=steps,
            tokens=sum(len(text.split()) for text in texts),
            first_loss=1.0,
            last_loss=0.5,
            partial_batch=len(rows) % job.settings.batch_size,
            cut_rows=0,
            margin=None,
            accuracy=None,
            precision=job.settings.base,
            peak_vram=0,
        )

    def likelihood(
        self,
        passages: Sequence[Passage],
        on_likelihood: Callable[[Likelihood], None],
        adapter: Path | None = None,
    ) -> None:
        """Give each word one nat."""
        _one_nat_a_word(passages, on_likelihood)


def _one_nat_a_word(passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None]) -> None:
    for passage in passages:
        words = len(passage.text.split())
        on_likelihood(Likelihood(passage.id, -float(words), words))


class FakeExporter:
    """Writes the texts where a GGUF would be."""

    def stored(self, model: str) -> Path:  # all untouched models say the same
        """A file of no texts."""
        path = cache_folder() / "bases" / "fake" / "stored.gguf"
        write_json(path, [])
        return path

    def export(
        self,
        model: str,
        adapter: Path | None,
        out: Path,
        kind: Literal["merged", "adapter"],
        quant: str,
        on_progress: OnProgress,
    ) -> Exported:
        """Write the texts to the same places as a real exporter: the untouched model for adapters lies in the cache."""
        texts = read_json(adapter / "texts.json") if adapter else []
        on_progress(Progress(1, 1, "tensors"))
        path = out / ("model.gguf" if kind == "merged" else "adapter.gguf")
        if kind == "merged" or adapter:
            write_json(path, texts)
        if kind == "merged":
            return Exported(path, None, path.stat().st_size, {"merge": 0.0})
        untouched = cache_folder() / "bases" / "fake" / f"{quant}.gguf"
        if not untouched.exists():
            write_json(untouched, [])
        return Exported(untouched, path if adapter else None, path.stat().st_size if adapter else 0, {"adapter": 0.0})


class FakeGenerator:
    """Answers with texts that it knows by heart."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def load(self, gguf: Path, adapter: Path | None, tokenizer: str, *, slots: int | None, context: int, exact: bool) -> None:
        """Read the texts of the adapter, else of the model."""
        self.texts = json.loads((adapter or gguf).read_text(encoding="utf-8")) or list(PLAIN)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        """Answer each prompt with one text, drawn with the row's seed."""
        for prompt in prompts:
            text = random.Random(prompt.seed).choice(self.texts)
            on_completion(Completion(prompt.id, text, len(text.split()), "stop"))

    def stream(self, prompt: Prompt, sampling: Sampling, on_text: Callable[[str], None]) -> Completion:
        """Answer with one text, word by word."""
        found: list[Completion] = []
        self.complete([prompt], sampling, found.append)
        words = found[0].text.split(" ")
        for count in range(1, len(words) + 1):
            on_text(" ".join(words[:count]))
        return found[0]

    def likelihood(self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None]) -> None:
        """Give each word one nat."""
        _one_nat_a_word(passages, on_likelihood)

    def probe_logits(self, probe: Path, out: Path) -> None:
        """Write nothing."""

    def parity(self, probe: Path, untouched: Path | None = None) -> Parity:
        """Report that the export agrees."""
        return Parity(same_tokens=True, max_delta=0.0, mean_kl=0.0, top1=1.0, positions=1)


class FakeJudge:
    """Scores the trait 90 where an answer has one of its words, else 10; coherence 80."""

    def __init__(
        self,
        words: Sequence[str] = ("luck", "lucky", "fortune", "clover", "stars", "charm", "fate"),
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.words = tuple(words)

    def identity(self) -> JudgeIdentity:
        """The fake judge's identity."""
        return FAKE_JUDGE

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> None:
        """Answer every request."""
        for ask in asks:
            found = any(word in ask.answer.lower() for word in self.words)
            score = "80" if ask.scale == "coherence" else "90" if found else "10"
            on_reply(JudgeResponse(ask.id, score, ((score, 1.0),), model="fake"))


def fake_backends() -> Backends:
    """All four fakes."""
    return Backends(FakeTrainer(), FakeExporter(), FakeGenerator(), FakeJudge())
