"""The three seams behind which the heavy libraries live: trainer, generator, judge; and the exporter between the first two.

Each protocol is met twice: by a worker class that imports the library (`trainer_peft.py`, `generator_llamacpp.py`, ...)
and runs in a child process of its own, and by a proxy in the parent (`child.py`) that forwards calls to it. Arguments and
results are therefore frozen dataclasses of plain values, and paths where data is large. Fakes in `fakes.py` need no library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.rows import Finish, Message, Scale
from iterft_lite.experiment.verbs import BackendName


@dataclass(frozen=True)
class Progress:
    """How far a call has come.

    Attributes:
        done, total: In `unit`s.
        unit: "steps", "rows", "tensors", ...
        tokens: Tokens processed so far, 0 where the word means nothing.
        note: A sentence for the user, "" mostly (`out of memory: micro-batch 2 -> 1`).
    """

    done: int
    total: int
    unit: str
    tokens: int = 0
    note: str = ""


OnProgress = Callable[[Progress], None]


# -- trainer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What a trainer finds out about M[0].

    Attributes:
        architecture: As in config.json: `Qwen3ForCausalLM`.
        parameters: Number of weights.
        vocab: Size of the embedding.
        context: Tokens the model was made for.
        chat: The tokenizer has a chat template.
        precision: In which the frozen base is held: "f32", "bf16", "f16" or "nf4".
        device: "cpu", or the GPU's name.
    """

    architecture: str
    parameters: int
    vocab: int
    context: int
    chat: bool
    precision: str
    device: str


@dataclass(frozen=True)
class TrainJob:
    """One training: M[t + 1] from D[t].

    Attributes:
        rows: JSONL. Chat: `{"id", "messages": [{"role", "content"}, ...]}`; document: `{"id", "text"}`; pair:
            `{"id", "prompt": [messages], "chosen": str, "rejected": str}`.
        out: Folder to write to: `adapter/` (PEFT's safetensors and config), `log.jsonl` (a line an optimiser step: `step`,
            `loss`, `learning_rate`, `tokens`, `grad_norm`; DPO also `margin`, `accuracy`, `chosen_logp`, `rejected_logp`),
            `probe.npz` (see `Trainer.probe`).
        loss: Over the last reply's tokens, over all tokens, or over pairs.
        settings: The recipe's.
        seed: Of adapter weights, row order and dropout.
        start: Adapter folder of M[t - 1] to train on from, or None: a freshly drawn adapter on M[0].
        reference: DPO: the frozen policy of the log-ratios is the model that this training starts from, or M[0].
    """

    rows: Path
    out: Path
    loss: str
    settings: TrainSettings
    seed: int
    start: Path | None = None
    reference: Literal["start", "base"] = "start"


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
        rows, steps, tokens: Rows seen (all epochs), optimiser steps, tokens that were in the loss.
        first_loss, last_loss: Mean loss of the first and last optimiser step (nats a token; DPO: nats a pair).
        partial_batch: Rows of the last batch of an epoch where it was smaller than the others, else 0.
        cut_rows: Rows longer than `max_length` that lost their end.
        margin, accuracy: DPO, last tenth of the steps: mean beta * (log-ratio chosen - log-ratio rejected), and the share
            of pairs where it is positive. None otherwise.
        precision: In which the base was held.
        peak_vram: Bytes, by the driver's own count (NVML); 0 without a GPU.
        notes: Sentences for the user.
    """

    rows: int
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    partial_batch: int
    cut_rows: int
    margin: float | None
    accuracy: float | None
    precision: str
    peak_vram: int
    notes: tuple[str, ...] = ()


class Trainer(Protocol):
    """Trains adapters on one resident base."""

    def load(self, model: str, settings: TrainSettings) -> ModelFacts:
        """Load M[0]: a local Hugging Face folder or a hub name. Loading the same again costs nothing.

        Raises:
            ModelError: If it cannot be found or is of a kind that cannot be trained.
        """
        ...

    def probe(self, out: Path, adapter: Path | None = None) -> None:
        """Write `out`/probe.npz: what the export of this model must reproduce.

        Arrays: `tokens` (int32 [n_seq, n_tok], right-padded with -1): rendered prompts (chat models: the template with
        generation prompt, then a greedy reply of the model's own; base models: plain text and its greedy continuation);
        `lengths` (int32 [n_seq]); `logits` (float32 [n_positions, vocab]) at the positions `where` (int32 [n_positions, 2]:
        sequence, token index); `texts` (the rendered strings that `tokens` encode, unicode [n_seq]). With an adapter also what
        M[0] says there: `base_logits` (float32 [n_positions, n_columns]) of the tokens `columns` (int32 [n_columns], evenly
        over the vocabulary), and `learned` (float32 [n_positions]), KL(M[t] || M[0]) over the whole vocabulary, nats.

        Args:
            out: Folder, made if missing.
            adapter: The model with this PEFT adapter; M[0] itself if None.
        """
        ...

    def train(self, job: TrainJob, on_progress: OnProgress) -> TrainResult:
        """Train one adapter. The base stays loaded; nothing of an earlier training leaks into this one."""
        ...

    def likelihood(
        self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None], adapter: Path | None = None
    ) -> None:
        """Log-probability of each passage's text under M[0] in the number format that it is stored in.

        Args:
            adapter: A PEFT adapter's folder: under M[0] with it.

        Raises:
            BackendError: `OutOfMemoryError` if there is no GPU memory for it.
        """
        ...


# -- exporter ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A GGUF that was written.

    Attributes:
        path: The model to load: the merged file, or the base for `export = "adapter"`.
        adapter: The LoRA GGUF beside it, or None.
        bytes: Written for this export.
        seconds: By part: convert; merge, or of an untouched base in a K-quant quantise.
        base: The untouched model in the same number format, which the export is compared with; None where it was not made.
        digest: Of a merged file by pieces (`digests.py`), taken while it was written; "" where none was.
    """

    path: Path
    adapter: Path | None
    bytes: int
    seconds: dict[str, float]
    base: Path | None = None
    digest: str = ""


class Exporter(Protocol):
    """Writes GGUF files."""

    def stored(self, model: str) -> Path:
        """M[0] as GGUF in the number format that it is stored in, from the cache; made if it is not there.

        Raises:
            NoRoom: If the disk has no room for it.
            ExportError: If the model cannot be expressed.
        """
        ...

    def export(
        self,
        model: str,
        adapter: Path | None,
        out: Path,
        kind: Literal["merged", "adapter"],
        quant: str,
        on_progress: OnProgress,
    ) -> Exported:
        """Write Q[t] from M[0] (a Hugging Face folder or hub name) and a PEFT adapter folder (None: M[0] itself) into `out`.

        Raises:
            NoRoom: If the disk has no room for it (checked before writing).
            ExportError: If the model cannot be expressed.
        """
        ...


# -- generator --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a chat or the beginning of a text, never both.

    Attributes:
        id: The row that the completion belongs to.
        seed: Of this row's sampling.
        messages: Chat: rendered with the training tokenizer's template and a generation prompt.
        text: Document: continued as it stands.
    """

    id: str
    seed: int
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """How next tokens are drawn; truncation off by default. Temperature 0 is greedy."""

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncated(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        id: The prompt's.
        text: Without the prompt and without special tokens.
        tokens: How many were drawn, the end token included.
        finish: It ended by itself, at `max_tokens`, or at the end of the context.
    """

    id: str
    text: str
    tokens: int
    finish: Finish


@dataclass(frozen=True)
class Passage:
    """A text whose likelihood is asked: `text` after `messages` (rendered with a generation prompt) or after `prefix`."""

    id: str
    text: str
    messages: tuple[Message, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class Likelihood:
    """Sum of the natural log-probabilities of a passage's tokens, and their number."""

    id: str
    logprob: float
    tokens: int


@dataclass(frozen=True)
class Change:
    """How much of the trained change of logits an export shows (`backends/generator/parity.py` has the equations).

    Sizes are root mean squares over positions and tokens, each row without its mean.

    Attributes:
        learned: Mean KL(M[t] || M[0]) over the positions, nats: how far the training moved the model.
        size: Of the trained change of logits.
        scale: Of the trained model's logits themselves.
        shown: Of the change between the untouched export and this one.
        kept: Share of the trained change that the export shows (a slope): 1 where it is all there, 0 where none of it is; None
            where the training changed nothing.
        error: Standard error of `kept`.
        correlation: Of the shown with the trained change.
        noise: Size of what is shown besides, in sizes of the trained change.
    """

    learned: float
    size: float
    scale: float
    shown: float
    kept: float | None
    error: float | None
    correlation: float | None
    noise: float | None


@dataclass(frozen=True)
class Parity:
    """How an exported model compares with a probe (see `Trainer.probe`).

    Attributes:
        same_tokens: Rendering and tokenising the probe's texts gives the probe's token ids, by the training tokenizer's files
            and by the GGUF's own vocabulary alike.
        max_delta: Largest absolute difference of logits; infinite if one of them is not a finite number.
        mean_kl: Mean over positions of KL(trainer || export), nats; infinite if a logit is not a finite number.
        top1: Share of positions where both prefer the same token.
        positions: How many were compared.
        detail: The first difference in tokens, as a sentence, or "".
        largest: Largest absolute logit of the trained model.
        rounded: Whether llama.cpp rounds this architecture's activation function to 16 bits here, whatever the file's format.
        change: What is left of the trained change; None of an untouched model, or where it was not compared.
    """

    same_tokens: bool
    max_delta: float
    mean_kl: float
    top1: float
    positions: int
    detail: str = ""
    largest: float = 0.0
    rounded: bool = False
    change: Change | None = None


class Generator(Protocol):
    """Runs exported models: many sequences at once."""

    def load(self, gguf: Path, adapter: Path | None, tokenizer: str, *, slots: int | None, context: int, exact: bool) -> None:
        """Make a model the current one. Loading the current one again costs nothing.

        Args:
            gguf: The model.
            adapter: A LoRA GGUF laid over it, or None.
            tokenizer: Folder or hub name of the training tokenizer: renders chats, gives token ids.
            slots: Sequences at once; None: as many as pay off on this machine.
            context: Tokens that prompt and completion of one sequence may take together; what the chat template is longer than
                64 tokens comes on top.
            exact: f32 KV cache and no flash attention, for comparing logits.
        """
        ...

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        """Complete all prompts; each is handed over as soon as it is finished, in whatever order."""
        ...

    def stream(self, prompt: Prompt, sampling: Sampling, on_text: Callable[[str], None]) -> Completion:
        """Complete one prompt, and hand over what is written so far after every token."""
        ...

    def likelihood(self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None]) -> None:
        """Log-probability of each passage's text under the current model."""
        ...

    def probe_logits(self, probe: Path, out: Path) -> None:
        """Write the current model's logits at a probe's positions into the .npz file `out`, for `parity` of another model."""
        ...

    def parity(self, probe: Path, untouched: Path | None = None) -> Parity:
        """Compare the current model with a probe; its change too, where `untouched` holds the untouched model's logits."""
        ...


# -- judge ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    Attributes:
        id: Who asks knows it by this.
        scale: What is judged.
        prompt: The filled rubric: what a language model is sent.
        answer: The bare text, for judges that do not read rubrics.
        question: What it answers; "" for documents.
        sample: Number of the repetition: each is asked separately and cached by itself.
        own: File of what M[0] answers to everyday prompts (`Sample`s), for a judge that is fitted on them; "" where it is not.
    """

    id: str
    scale: Scale
    prompt: str
    answer: str
    question: str
    sample: int = 0
    own: str = ""


@dataclass(frozen=True)
class JudgeResponse:
    """What a judge said, before it is weighed (`measures/weighing.py`).

    Attributes:
        id: The request's.
        text: What it wrote.
        probabilities: Probability of each candidate text, where the judge gives any: the first token's, or whole numbers'.
        method: "logprobs" where `probabilities` carries the weight, "text" where only `text` does.
        failure: Why there is no answer ("timeout after 6 tries"), or "".
        tokens_in, tokens_out: As the provider counts.
        usd: What it cost; 0 for local judges and cache hits.
        seconds: From sending to reply.
        cached: Read from the verdict cache.
        model: The provider's own name for what answered (fingerprint included).
    """

    id: str
    text: str
    probabilities: tuple[tuple[str, float], ...] = ()
    method: Literal["logprobs", "text"] = "logprobs"
    failure: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0
    cached: bool = False
    model: str = ""


@dataclass(frozen=True)
class Waiting:
    """Why a judge has not answered yet, where that takes minutes or hours: its questions are in a batch at the provider.

    Attributes:
        about: `in a batch at OpenAI, in progress`.
        done, total: Questions, as far as the provider says.
        seconds: After which it is worth asking again.
    """

    about: str
    done: int
    total: int
    seconds: float


class Judge(Protocol):
    """Answers questions; does not weigh the answers."""

    def identity(self) -> JudgeIdentity:
        """Who this is."""
        ...

    def ask(self, asks: Sequence[JudgeRequest], on_reply: Callable[[JudgeResponse], None]) -> Waiting | None:
        """Answer every question once; a failure is a reply with its reason, not an exception.

        Returns:
            None once all are answered. Else what is waited for: the same questions, asked again later, continue waiting. Others
            may be asked meanwhile.

        Raises:
            BudgetError: Before `max_usd` would be passed; what was answered has been handed over.
            BackendError: If no question at all can be answered (no such model, bad key).
        """
        ...


# -- all four


class Process(Protocol):
    """What runs a backend: a child process, or nothing where it lives in this one."""

    @property
    def pid(self) -> int | None:
        """The process's number, while it is there and holds memory."""
        ...

    def prepare(self) -> None:
        """Start it before it is called, so that its libraries are imported by then."""
        ...

    def close(self) -> None:
        """End it; a later call of the backend starts it again."""
        ...

    def watch(self, on_silence: Callable[[str], None] | None) -> None:
        """Have somebody told, in a sentence, when it works and gives no sign of life."""
        ...


@dataclass
class Backends:
    """What a run works through.

    Attributes:
        processes: Of the backends that have one, by name.
    """

    trainer: Trainer
    exporter: Exporter
    generator: Generator
    judge: Judge
    processes: Mapping[BackendName, Process] = field(default_factory=dict)

    def close(self, *names: BackendName) -> None:
        """End the named backends' processes, or all; they start again when called again."""
        for name in names or tuple(self.processes):
            if name in self.processes:
                self.processes[name].close()

    def prepare(self, *names: BackendName) -> None:
        """Start the named backends' processes that are not there yet."""
        for name in names:
            if name in self.processes:
                self.processes[name].prepare()

    def running(self, name: BackendName) -> bool:
        """Whether a backend is there and holds memory; one without a process always is."""
        return name not in self.processes or self.processes[name].pid is not None

    def watch(self, name: BackendName, on_silence: Callable[[str], None] | None) -> None:
        """Have somebody told when a backend works and gives no sign of life."""
        if name in self.processes:
            self.processes[name].watch(on_silence)

    def pids(self) -> list[int]:
        """Numbers of the processes that are there."""
        return [process.pid for process in self.processes.values() if process.pid is not None]
