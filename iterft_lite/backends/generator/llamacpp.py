"""The generator over llama.cpp: chats and documents in, completions, likelihoods and comparisons out.

Runs in a process of its own (`child.py`), without torch.
"""

from __future__ import annotations

import atexit
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# llama.cpp comes before numpy
from iterft_lite.backends.llamacpp.library import SMALL, Weights, free_vram, offloads, version

# isort: split
import numpy as np

from iterft_lite.backends.llamacpp.engine import MOST_SLOTS, Engine, Request
from iterft_lite.backends.llamacpp.sampling import Floats, chosen_logprobs, log_softmax
from iterft_lite.backends.llamacpp.scheduling import Expected
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import BackendError, ModelError
from iterft_lite.experiment.rows import Message
from iterft_lite.protocols import Completion, Likelihood, Parity, Passage, Prompt, Sampling

BIG_ONES = 3
"""Big models that may be loaded at once."""

ROOM_BESIDE = 4
"""Free GPU memory, in sizes of the model that comes, that lets the others stay: itself, its cache, and what others may take."""

TEMPLATE_ROOM = 64
"""Tokens of a chat template that a context which is asked for has room for; those beyond are added, in steps of as many."""


class LlamaGenerator:
    """Meets `Generator`.

    Args:
        threads: CPU threads; None: `ITERFT_THREADS`, else one a core.
        sampling: Where tokens are drawn: on the host, in llama.cpp's graph, or as fits the device.
        sharing: "auto" decodes common beginnings of prompts once; "none" does not.
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        sampling: Literal["auto", "host", "graph"] = "auto",
        sharing: Literal["auto", "none"] = "auto",
    ) -> None:
        self._threads = threads or int(os.environ.get("ITERFT_THREADS") or os.cpu_count() or 1)
        self._sampling = sampling
        self._sharing = sharing
        self._loaded: dict[tuple[str, int, int], _Loaded] = {}
        self._current: _Loaded | None = None
        self._tokenizers: dict[str, TrainingTokenizer] = {}
        self._tokenizer: TrainingTokenizer | None = None
        self._expected = Expected()
        atexit.register(self.close)

    def load(self, gguf: Path, adapter: Path | None, tokenizer: str, *, slots: int | None, context: int, exact: bool) -> None:
        """Make a model the current one.

        What a chat template adds beyond `TEMPLATE_ROOM` tokens (a default system prompt) comes on top of `context`: it is known
        here, where the tokenizer is, and would else be taken from the answers.

        Raises:
            ModelError: If a file is missing or cannot be used.
            BackendError: If there is no memory for it.
        """
        if tokenizer not in self._tokenizers:
            self._tokenizers[tokenizer] = TrainingTokenizer(tokenizer)
        self._tokenizer = self._tokenizers[tokenizer]
        self._current = None
        context += _beyond(self._tokenizer.template_tokens())
        loaded = self._model(gguf)
        settings = _Settings(slots, context, exact)
        if loaded.engine is None or loaded.settings != settings:
            loaded.settings = settings
            self._open(loaded, context)
        self._adapt(loaded, adapter)
        self._current = loaded

    def _open(self, loaded: _Loaded, context: int) -> Engine:
        """Make a context of so many tokens a sequence on a loaded model."""
        slots, exact = loaded.settings.slots, loaded.settings.exact
        loaded.drop_engine()
        self._make_room(loaded, context * loaded.weights.kv_bytes * (2 if exact else 1))
        loaded.engine = Engine(
            loaded.weights,
            slots=slots,
            context=context,
            exact=exact,
            threads=self._threads,
            sampling=self._sampling,
            sharing=self._sharing,
            expected=self._expected,
        )
        assert self._tokenizer is not None
        loaded.engine.ends_at(self._tokenizer.ends)
        return loaded.engine

    def _adapt(self, loaded: _Loaded, adapter: Path | None) -> None:
        """Lay an adapter over a loaded model, or none."""
        assert loaded.engine is not None
        wanted = version(adapter) if adapter else None
        if loaded.adapter != wanted:
            loaded.engine.adapt(loaded.weights.adapter(adapter) if adapter else None)
            loaded.adapter = wanted
        loaded.lora = adapter

    def _fit(self, longest: int) -> None:
        """Have room for sequences of so many tokens, as far as the model was made for them.

        What `load` is given is an estimate of people who have no tokenizer: texts in many scripts take a token a byte.
        """
        engine, loaded = self._ready()[0], self._current
        assert loaded is not None
        most = loaded.weights.trained_context or longest
        if engine.context < min(longest, most):
            lora = loaded.lora
            self._open(loaded, min(most, -(-longest // TEMPLATE_ROOM) * TEMPLATE_ROOM))
            self._adapt(loaded, lora)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        """Complete all prompts.

        Raises:
            ModelError: Before anything is decoded, if a prompt does not fit the context or is empty.
            BackendError: If decoding fails.
        """
        _, tokenizer = self._ready()
        tokens = [self._before(prompt.messages, prompt.text) for prompt in prompts]
        self._fit(max(map(len, tokens), default=0) + sampling.max_tokens)
        engine, _ = self._ready()
        requests = [self._request(*pair, sampling.max_tokens) for pair in zip(prompts, tokens, strict=True)]
        with _clean(engine):
            for finished in engine.complete(requests, sampling):
                prompt, request = prompts[finished.index], requests[finished.index]
                written = finished.ids[:-1] if finished.finish == "stop" else finished.ids
                text = (tokenizer.answer if prompt.messages else tokenizer.text)(written, after=request.tokens)
                on_completion(Completion(prompt.id, text, len(finished.ids), finished.finish))

    def stream(self, prompt: Prompt, sampling: Sampling, on_text: Callable[[str], None]) -> Completion:
        """Complete one prompt, and hand over what is written so far after every token.

        Raises:
            ModelError, BackendError: As `complete`.
        """
        tokens = self._before(prompt.messages, prompt.text)
        self._fit(len(tokens) + sampling.max_tokens)
        engine, tokenizer = self._ready()
        request = self._request(prompt, tokens, sampling.max_tokens)
        words, ids = tokenizer.answer if prompt.messages else tokenizer.text, list[int]()

        def take(_: int, token: int) -> None:
            ids.append(token)
            # a character of several tokens is no text before its last one
            on_text(words(ids, after=request.tokens).rstrip("\ufffd"))

        with _clean(engine):
            finished = next(iter(engine.complete([request], sampling, take)))
        written = finished.ids[:-1] if finished.finish == "stop" else finished.ids
        return Completion(prompt.id, words(written, after=request.tokens), len(finished.ids), finished.finish)

    def likelihood(self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None]) -> None:
        """Log-probability of each passage's text; the very first token of a text without anything before it is not counted.

        A passage counts as far as the context reaches.

        Raises:
            ModelError: Before anything is decoded, if what comes before a passage leaves no room in the context.
            BackendError: If decoding fails, or a probability is not a finite number.
        """
        whole = [self._passage(passage) for passage in passages]
        self._fit(max((len(before) + len(ids) for before, ids in whole), default=0))
        engine, _ = self._ready()
        pairs = [self._within(passage.id, *pair) for passage, pair in zip(passages, whole, strict=True)]
        sequences = [before + ids for before, ids in pairs]
        starts = [max(1, len(before)) for before, _ in pairs]
        sums = [0.0] * len(pairs)
        left = [len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        for index, passage in enumerate(passages):
            if left[index] <= 0:
                on_likelihood(Likelihood(passage.id, 0.0, 0))
        # the logits at a position tell about the next token; those of the last token are not needed
        inputs = [sequence[:-1] for sequence in sequences]
        with _clean(engine), ThreadPoolExecutor(self._threads) as pool:
            for logits, parts in engine.logits(inputs, [start - 1 for start in starts]):
                sizes = [part.rows.stop - part.rows.start for part in parts]
                after = [sequences[part.index][part.begin + 1 :][:size] for part, size in zip(parts, sizes, strict=True)]
                found = chosen_logprobs(logits, np.concatenate(after)[:, None], pool, self._threads)
                for part, size in zip(parts, sizes, strict=True):
                    index = part.index
                    sums[index] += float(found[part.rows].sum())
                    if not math.isfinite(sums[index]):
                        raise BackendError(
                            f"the model's probabilities of passage `{passages[index].id}` are not finite numbers",
                            hint="activations leave the range of its number format; another `quant` may hold them",
                        )
                    left[index] -= size
                    if not left[index]:
                        count = len(sequences[index]) - starts[index]
                        on_likelihood(Likelihood(passages[index].id, sums[index], count))

    def parity(self, probe: Path) -> Parity:
        """Compare the current model with a probe: a folder with probe.npz, or that file.

        Raises:
            ModelError: If the probe cannot be read or does not fit the context.
            BackendError: If decoding fails.
        """
        engine, _ = self._ready()
        asked = _Probe(probe / "probe.npz" if probe.is_dir() else probe)
        longest = max(map(len, asked.sequences), default=0)
        if longest > engine.context:
            raise ModelError(f"the probe has {longest} tokens, the context {engine.context}")
        detail = self._token_difference(asked.texts, asked.sequences)
        vocab = min(engine.weights.vocab_size, asked.logits.shape[1])
        first = [min(places, default=len(sequence)) for sequence, places in zip(asked.sequences, asked.places, strict=True)]
        deltas, divergences, same = [], [], []
        with _clean(engine):
            for logits, parts in engine.logits(asked.sequences, first):
                for part in parts:
                    for offset, ours in enumerate(logits[part.rows, None, :vocab]):
                        row = asked.places[part.index].get(part.begin + offset)
                        if row is None:
                            continue
                        theirs = asked.logits[row : row + 1, :vocab]
                        deltas.append(float(np.abs(theirs - ours).max()))
                        log_p, log_q = log_softmax(theirs), log_softmax(ours)
                        divergences.append(float((np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64)))
                        same.append(int(theirs.argmax()) == int(ours.argmax()))
        if not deltas:
            raise ModelError(f"`{probe}` asks for no position")
        numbers = bool(np.isfinite([deltas, divergences]).all())
        return Parity(
            same_tokens=not detail,
            max_delta=max(deltas) if numbers else math.inf,
            mean_kl=max(0.0, float(np.mean(divergences))) if numbers else math.inf,
            top1=float(np.mean(same)),
            positions=len(deltas),
            detail=detail,
        )

    def ignore_ends(self) -> None:
        """Let no token end a generation of the current model: for measuring speed."""
        engine, _ = self._ready()
        engine.ignore_ends()

    def close(self) -> None:
        """Give all memory back."""
        self._current = None
        for loaded in self._loaded.values():
            loaded.close()
        self._loaded = {}

    # -- models -------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[Engine, TrainingTokenizer]:
        if self._current is None or self._current.engine is None or self._tokenizer is None:
            raise BackendError("no model is loaded", exception="order")
        return self._current.engine, self._tokenizer

    def _model(self, gguf: Path) -> _Loaded:
        """The loaded model of a file. Two small ones stay; of big ones as many as a GPU has ample room for, three at most:
        M[0]'s, which measures every cycle, and those of two cycles.
        """
        key = version(gguf)
        if key in self._loaded:
            self._loaded[key] = self._loaded.pop(key)  # now the latest
            return self._loaded[key]
        size = max(0, key[2])
        for old in list(self._loaded):  # the one that was used longest ago comes first
            if old[0] == key[0]:  # rewritten since
                self._loaded.pop(old).close()
        small = size < SMALL and all(loaded.weights.size < SMALL for loaded in self._loaded.values())
        if not small:
            for loaded in self._loaded.values():
                loaded.drop_engine()  # a context is made in no time; its cache is often larger than the model
        while self._loaded and (len(self._loaded) > 1 if small else not self._fits_beside(size)):
            self._loaded.pop(next(iter(self._loaded))).close()
        self._loaded[key] = _Loaded(Weights(gguf))
        return self._loaded[key]

    def _make_room(self, coming: _Loaded, sequence: int) -> None:
        """Drop the contexts of other big models where the cache of a new one would not have ample room beside them.

        Args:
            sequence: Bytes of cache that a sequence takes.
        """
        if coming.weights.size >= SMALL and offloads() and free_vram() < 2 * MOST_SLOTS * sequence:
            for other in self._loaded.values():
                if other is not coming:
                    other.drop_engine()

    def _fits_beside(self, size: int) -> bool:
        """Whether a big model may be loaded with the others still there: without a GPU there is no hurry."""
        return len(self._loaded) < BIG_ONES and offloads() and free_vram() > ROOM_BESIDE * size

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _before(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of a rendered chat, or of the beginning of a document."""
        _, tokenizer = self._ready()
        return tokenizer.chat_ids(messages) if messages else tokenizer.document_ids(text)

    def _request(self, prompt: Prompt, ids: list[int], limit: int) -> Request:
        engine, _ = self._ready()
        if not ids:
            raise ModelError(f"prompt `{prompt.id}` is empty, and the tokenizer has no token to begin with")
        if len(ids) >= engine.context:
            raise ModelError(
                f"prompt `{prompt.id}` has {len(ids)} tokens, the context {engine.context}",
                hint="a longer context, a model with one, or a shorter prompt",
            )
        return Request(ids, prompt.seed, limit, kind=tuple(ids))

    def _passage(self, passage: Passage) -> tuple[list[int], list[int]]:
        """Token ids of what comes before a passage, and of the passage."""
        _, tokenizer = self._ready()
        if passage.messages:
            before, ids = tokenizer.reply_ids(passage.messages, passage.text, end=False)
        elif passage.prefix:
            before, ids = tokenizer.document_ids(passage.prefix), tokenizer.content_ids(passage.text)
        else:
            before, ids = [], tokenizer.document_ids(passage.text)
            if ids[:1] == [tokenizer.bos]:
                before, ids = ids[:1], ids[1:]
        return before, ids

    def _within(self, name: str, before: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
        """A passage as far as the context reaches."""
        engine, _ = self._ready()
        if len(before) >= engine.context:
            raise ModelError(
                f"what comes before passage `{name}` has {len(before)} tokens, the context {engine.context}",
                hint="a longer context, or a model with one",
            )
        # broken characters of an answer can come to more tokens than it was generated in
        return before, ids[: engine.context - len(before)]

    def _token_difference(self, texts: Sequence[str], sequences: Sequence[Sequence[int]]) -> str:
        """The first difference between a probe's ids and those that its texts have now, as a sentence, or ""."""
        engine, tokenizer = self._ready()
        for place, (text, ids) in enumerate(zip(texts, sequences, strict=True)):
            expected = list(ids)
            # what the tokenizer puts first is no part of the text
            begins = tokenizer.bos is not None and expected[:1] == [tokenizer.bos]
            theirs = expected[1:] if begins and tokenizer.ids(text)[:1] != [tokenizer.bos] else expected
            composed = unicodedata.normalize("NFC", text)  # llama.cpp does not
            for whose, ours in (
                ("the training tokenizer's", tokenizer.ids(text)),
                ("the GGUF's", engine.weights.ids(composed)),
            ):
                if ours != theirs:
                    at = next(
                        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
                    )
                    return (
                        f"text {place} of the probe: {whose} token {at} is {ours[at : at + 1] or 'missing'}, "
                        f"the trainer's is {theirs[at : at + 1] or 'missing'}"
                    )
        return ""


def _beyond(tokens: int) -> int:
    """How much longer a context has to be for a chat template of so many tokens."""
    return -(-max(0, tokens - TEMPLATE_ROOM) // TEMPLATE_ROOM) * TEMPLATE_ROOM


@dataclass(frozen=True)
class _Settings:
    """What a context was asked to be."""

    slots: int | None
    context: int
    exact: bool


class _Loaded:
    """A model in memory, its context, and the adapter that is laid over it."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.engine: Engine | None = None
        self.settings = _Settings(None, 0, exact=False)
        self.adapter: tuple[str, int, int] | None = None
        self.lora: Path | None = None

    def drop_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.adapter = None, None

    def close(self) -> None:
        self.drop_engine()
        self.weights.close()


class _Probe:
    """A probe as read: see `Trainer.probe`."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                tokens, lengths, where = arrays["tokens"], arrays["lengths"], arrays["where"]
                self.logits: Floats = arrays["logits"].astype(np.float32)
                self.texts = [str(text) for text in arrays["texts"]]
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"the probe `{path}` cannot be read: {error}") from None
        self.sequences: list[list[int]] = [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]
        # for each sequence: position -> row of the logits
        self.places: list[dict[int, int]] = [{} for _ in self.sequences]
        for row, (sequence, position) in enumerate(where.tolist()):
            self.places[sequence][position] = row


@contextmanager
def _clean(engine: Engine) -> Iterator[None]:
    """Leave no half-written sequence behind, whatever happens."""
    try:
        yield
    finally:
        engine.forget()
