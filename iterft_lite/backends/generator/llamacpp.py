"""The generator over llama.cpp: chats and documents in, completions, likelihoods and comparisons out.

Runs in a process of its own (`child.py`), without torch.
"""

from __future__ import annotations

import atexit
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# llama.cpp comes before numpy
from iterft_lite.backends.llamacpp.library import SMALL, Weights, free_vram, offloads, version

# isort: split
import numpy as np

from iterft_lite.backends.generator.parity import Probe, compare, token_difference, untouched_logits
from iterft_lite.backends.llamacpp.engine import MOST_SLOTS, SMALL_SLOTS, Engine, Request
from iterft_lite.backends.llamacpp.likelihoods import Reader
from iterft_lite.backends.llamacpp.sampling import Doubles, Floats
from iterft_lite.backends.llamacpp.scheduling import Expected
from iterft_lite.backends.llamacpp.together import Together, engines_that_pay
from iterft_lite.backends.passages import Text, likelihood_of, text_of
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import BackendError, ModelError
from iterft_lite.experiment.rows import Message
from iterft_lite.protocols import Completion, Likelihood, Parity, Passage, Prompt, Sampling

BIG_ONES = 4
"""Big models that may be loaded at once: M[0] as it is stored and as it is exported, and those of two cycles."""

ROOM_BESIDE = 4
"""Free GPU memory, in sizes of the model that comes, that lets the others stay: itself, its cache, and what others may take."""

ROOM_STEP = 256
"""A sequence's room is rounded up to this many tokens, as llama.cpp does: the next cycle's longest text is a little longer."""

READING = 4 * 2**30
"""Free GPU memory below which the caches of loaded models make room for reading."""

KEPT_READER = 12 * 2**30
"""Free GPU memory from which what a model was read with stays for the next time: a second, each time, at 4 B parameters."""

UNBOUNDED = 2**20
"""Tokens of a model that does not say what it was made for."""

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
        if loaded.settings != settings:
            loaded.drop_engine()
            loaded.settings = settings
        loaded.lay(adapter)
        self._current = loaded

    def _open(self, loaded: _Loaded, context: int, slots: int | None, threads: int = 0) -> Engine:
        """Make a context of so many tokens a sequence on a loaded model, with its adapter; all threads if 0."""
        self._make_room(loaded, context * loaded.weights.kv_bytes * (2 if loaded.settings.exact else 1))
        engine = Engine(
            loaded.weights,
            slots=slots,
            context=context,
            exact=loaded.settings.exact,
            threads=threads or self._threads,
            sampling=self._sampling,
            sharing=self._sharing,
            expected=self._expected,
        )
        assert self._tokenizer is not None
        engine.ends_at(self._tokenizer.ends)
        engine.adapt(loaded.lora())
        return engine

    def _open_all(self, loaded: _Loaded, context: int) -> Engine | Together:
        """What writes: on a CPU several engines, where a small model's many sequences are worth them."""
        slots, count = loaded.settings.slots, engines_that_pay(SMALL_SLOTS, self._threads)
        if slots or count == 1 or loaded.settings.exact or offloads() or loaded.weights.size >= SMALL:
            return self._open(loaded, context, slots)
        engines: list[Engine] = []
        try:
            for _ in range(count):
                engines.append(self._open(loaded, context, SMALL_SLOTS // count, self._threads // count))
        except BackendError:  # there is no memory for that many: as many as there is memory for
            for engine in engines:
                engine.close()
            return self._open(loaded, context, None)
        return Together(engines, self._expected)

    def _writer(self, longest: int = 0) -> Engine | Together:
        """The current model's context, with room for sequences of so many tokens, as far as the model was made for them.

        It is made when it is first written with, and no longer than it has to be: twice the room is half the sequences where
        memory is short. What `load` is given is an estimate of people who have no tokenizer.
        """
        loaded, _ = self._ready()
        context = loaded.engine.context if loaded.engine else 0
        wanted = min(longest or loaded.settings.context, loaded.most)
        if context < wanted:
            context = -(-wanted // ROOM_STEP) * ROOM_STEP
            loaded.drop_engine()
        if loaded.weights.on_host:
            raise BackendError(
                f"no memory for `{loaded.weights.path}` on the GPU",
                exception="memory",
                hint='a smaller `quant`, or `vram = "swap"`',
            )
        if loaded.engine is None:
            loaded.engine = self._open_all(loaded, context)
        return loaded.engine

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        """Complete all prompts.

        Raises:
            ModelError: Before anything is decoded, if a prompt does not fit the context or is empty.
            BackendError: If decoding fails.
        """
        engine, requests = self._requests(prompts, sampling.max_tokens)
        with _clean(engine):
            for finished in engine.complete(requests, sampling):
                prompt, request = prompts[finished.index], requests[finished.index]
                written = finished.ids[:-1] if finished.finish == "stop" else finished.ids
                text = self._text(prompt, request, written)
                on_completion(Completion(prompt.id, text, len(finished.ids), finished.finish))

    def stream(self, prompt: Prompt, sampling: Sampling, on_text: Callable[[str], None]) -> Completion:
        """Complete one prompt, and hand over what is written so far after every token.

        Raises:
            ModelError, BackendError: As `complete`.
        """
        engine, (request,) = self._requests([prompt], sampling.max_tokens)
        ids = list[int]()

        def take(_: int, token: int) -> None:
            ids.append(token)
            # a character of several tokens is no text before its last one
            on_text(self._text(prompt, request, ids).rstrip("\ufffd"))

        with _clean(engine):
            finished = next(iter(engine.complete([request], sampling, take)))
        written = finished.ids[:-1] if finished.finish == "stop" else finished.ids
        return Completion(prompt.id, self._text(prompt, request, written), len(finished.ids), finished.finish)

    def likelihood(self, passages: Sequence[Passage], on_likelihood: Callable[[Likelihood], None]) -> None:
        """Log-probability of each passage's text; the very first token of a text without anything before it is not counted.

        A passage counts as far as the context reaches.

        Raises:
            ModelError: Before anything is decoded, if what comes before a passage leaves no room in the context.
            BackendError: If decoding fails, or a probability is not a finite number.
        """
        loaded, tokenizer = self._ready()
        texts = [text_of(tokenizer, passage, loaded.most) for passage in passages]
        counts = [text.count for text in texts]
        for passage, count in zip(passages, counts, strict=True):
            if not count:
                on_likelihood(Likelihood(passage.id, 0.0, 0))
        asked = [place for place, count in enumerate(counts) if count]
        sums, left = [0.0] * len(texts), list(counts)
        with self._reading([texts[place] for place in asked]) as pieces:
            for number, found in pieces:
                place = asked[number]
                # pieces of a text come in any order and between those of others: a text is handed over when its last token has
                # come
                sums[place] += float(found.sum())
                left[place] -= len(found)
                if not left[place]:
                    on_likelihood(likelihood_of(passages[place], sums[place], counts[place]))

    @contextmanager
    def _reading(self, texts: Sequence[Text]) -> Iterator[Iterator[tuple[int, Doubles]]]:
        """Read texts with the current model."""
        if not texts:
            yield iter(())
            return
        loaded, _ = self._ready()
        # the reader's cache comes on top of the writers': on a full GPU those are dropped, and made again when they are needed
        if offloads() and free_vram() < READING:
            for other in self._loaded.values():
                other.drop_engine()
                if other is not loaded:
                    other.drop_reader()
        reader = loaded.reader_for(max(len(text.ids) for text in texts), self._threads)
        try:
            yield reader.read(texts)
        finally:
            if not offloads() or free_vram() < KEPT_READER:
                loaded.drop_reader()

    def probe_logits(self, probe: Path, out: Path) -> None:
        """Write the current model's logits where a probe asks for them: `logits`, float32 [n_positions, vocab], in `out`.

        Args:
            probe: A folder with probe.npz, or that file.
            out: An .npz file.

        Raises:
            ModelError: If the probe cannot be read or does not fit the context.
            BackendError: If decoding fails.
        """
        np.savez(out, logits=self._probed(Probe(probe)))

    def parity(self, probe: Path, untouched: Path | None = None) -> Parity:
        """Compare the current model with a probe: a folder with probe.npz, or that file.

        Args:
            probe: The trained model's.
            untouched: What `probe_logits` wrote of the untouched model in the same number format; None: no change is compared.

        Raises:
            ModelError: If the probe cannot be read or does not fit the context.
            BackendError: If decoding fails.
        """
        asked = Probe(probe)
        ours = self._probed(asked)
        return compare(
            asked,
            ours,
            None if untouched is None else untouched_logits(untouched),
            self._token_difference(asked.texts, asked.sequences),
            rounded=self._ready()[0].weights.rounds_activations(),
        )

    def _probed(self, asked: Probe) -> Floats:
        """The current model's logits at a probe's positions, float32 [n_positions, vocab of the probe or of the model]."""
        loaded, _ = self._ready()
        longest = max(map(len, asked.sequences), default=0)
        if longest > loaded.most:
            raise ModelError(f"the probe has {longest} tokens, the context {loaded.most}")
        made = np.zeros((len(asked.logits), min(loaded.weights.vocab_size, asked.logits.shape[1])), dtype=np.float32)
        # a context of its own: as many sequences as there are texts
        engine = self._open(loaded, longest, len(asked.sequences))
        try:
            for logits, parts in engine.logits(asked.sequences, asked.first):
                for part in parts:
                    for offset, row in enumerate(logits[part.rows]):
                        place = asked.places[part.index].get(part.begin + offset)
                        if place is not None:
                            made[place] = row[: made.shape[1]]
        finally:
            engine.close()
        return made

    def ignore_ends(self) -> None:
        """Let no token end a generation of the current model: for measuring speed."""
        self._writer().ignore_ends()

    def close(self) -> None:
        """Give all memory back."""
        self._current = None
        for loaded in self._loaded.values():
            loaded.close()
        self._loaded = {}

    # -- models -------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[_Loaded, TrainingTokenizer]:
        if self._current is None or self._tokenizer is None:
            raise BackendError("no model is loaded", exception="order")
        return self._current, self._tokenizer

    def _model(self, gguf: Path) -> _Loaded:
        """The loaded model of a file. Two small ones stay; of big ones as many as a GPU has ample room for."""
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
                if offloads() and free_vram() < KEPT_READER:
                    loaded.drop_reader()
        while self._loaded and (len(self._loaded) > 1 if small else not self._fits_beside(size)):
            self._loaded.pop(next(iter(self._loaded))).close()
        self._loaded[key] = _Loaded(_weights(gguf))
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

    def _text(self, prompt: Prompt, request: Request, ids: Sequence[int]) -> str:
        """The text of what was written after a prompt."""
        _, tokenizer = self._ready()
        return (tokenizer.answer if prompt.messages else tokenizer.text)(ids, after=request.tokens)

    def _requests(self, prompts: Sequence[Prompt], limit: int) -> tuple[Engine | Together, list[Request]]:
        """Prompts as sequences to continue, and a context that has room for each with its answer."""
        tokens = [self._before(prompt.messages, prompt.text) for prompt in prompts]
        engine = self._writer(max(map(len, tokens), default=0) + limit)
        return engine, [self._request(prompt, ids, limit, engine) for prompt, ids in zip(prompts, tokens, strict=True)]

    def _request(self, prompt: Prompt, ids: list[int], limit: int, engine: Engine | Together) -> Request:
        if not ids:
            raise ModelError(f"prompt `{prompt.id}` is empty, and the tokenizer has no token to begin with")
        if len(ids) >= engine.context:
            raise ModelError(
                f"prompt `{prompt.id}` has {len(ids)} tokens, the context {engine.context}",
                hint="a longer context, a model with one, or a shorter prompt",
            )
        # samples of one prompt grow about equally long: the prompt itself is the kind
        return Request(ids, prompt.seed, limit, kind=tuple(ids))

    def _token_difference(self, texts: Sequence[str], sequences: Sequence[Sequence[int]]) -> str:
        """The first difference between a probe's ids and those that its texts have now, as a sentence, or ""."""
        loaded, tokenizer = self._ready()
        for place, (text, ids) in enumerate(zip(texts, sequences, strict=True)):
            expected = list(ids)
            # what the tokenizer puts first is no part of the text
            begins = tokenizer.bos is not None and expected[:1] == [tokenizer.bos]
            theirs = expected[1:] if begins and tokenizer.ids(text)[:1] != [tokenizer.bos] else expected
            composed = unicodedata.normalize("NFC", text)  # llama.cpp does not
            readings = [("the training tokenizer's", tokenizer.ids(text)), ("the GGUF's", loaded.weights.ids(composed))]
            found = token_difference(place, readings, theirs)
            if found:
                return found
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
        self.engine: Engine | Together | None = None
        self._reader: Reader | None = None
        self.settings = _Settings(None, 0, exact=False)
        self._lora: Path | None = None
        self._laid: tuple[str, int, int] | None = None

    @property
    def most(self) -> int:
        """Tokens that a sequence may take at most."""
        return self.weights.trained_context or UNBOUNDED

    def lora(self) -> Any | None:
        """llama.cpp's handle of the adapter that is laid over the model, or None."""
        return self.weights.adapter(self._lora) if self._lora else None

    def lay(self, adapter: Path | None) -> None:
        """Lay an adapter over the model, or none."""
        wanted = version(adapter) if adapter else None
        self._lora = adapter
        if wanted != self._laid:
            self._laid = None
            handle = self.lora()
            if self.engine is not None:
                self.engine.adapt(handle)
            if self._reader is not None:
                self._reader.adapt(handle)
            self._laid = wanted

    def reader_for(self, longest: int, threads: int) -> Reader:
        """What reads texts of so many tokens: the one that is there, or a new one."""
        kept = self._reader
        if kept is None or kept.longest < longest or kept.exact != self.settings.exact:
            self.drop_reader()
            room = -(-longest // ROOM_STEP) * ROOM_STEP if offloads() else longest
            kept = Reader(self.weights, longest=room, exact=self.settings.exact, threads=threads, adapter=self.lora())
            self._reader = kept
        return kept

    def drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def drop_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def close(self) -> None:
        self.drop_engine()
        self.drop_reader()
        self.weights.close()


def _weights(gguf: Path) -> Weights:
    """A model on the GPU, or where it has no room for it, on the machine."""
    try:
        return Weights(gguf)
    except BackendError:
        if not offloads():
            raise
        return Weights(gguf, on_host=True)


@contextmanager
def _clean(engine: Engine | Together) -> Iterator[None]:
    """Leave no half-written sequence behind, whatever happens."""
    try:
        yield
    finally:
        engine.forget()
