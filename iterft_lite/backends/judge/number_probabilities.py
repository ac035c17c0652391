"""The probabilities of every number from 1 to 100 as the answer to a question, under a GGUF.

Questions that come together are decoded together, and what they begin with is read once. The numbers are a tree of tokens
(`number_trie.py`): the model is read after each of its inner nodes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# llama.cpp comes before numpy
from iterft_lite.backends.llamacpp.library import Weights, free_vram, offloads

# isort: split
import llama_cpp
import numpy as np
import numpy.typing as npt

from iterft_lite.backends.chat_templates import environment
from iterft_lite.backends.judge.number_trie import REFUSAL, TOGETHER, NumberProbabilities, NumberTrie, Prefix, number_trie
from iterft_lite.backends.llamacpp.engine import Engine
from iterft_lite.backends.llamacpp.samplers import output_logits
from iterft_lite.backends.llamacpp.sampling import Floats, Ints, chosen_logprobs
from iterft_lite.errors import BackendError, ModelError

SHARE = 0.4
"""Of the GPU's free memory that the judge's cache takes at most: the rest is the trainer's and the generator's."""

ON_CPU = 16
"""Questions decoded at once without a GPU."""

CONTEXT = 6144
"""Tokens of rubric and answer together at most: the longest shown answer has some 3,500."""

USUAL_CONTEXT = 2048
"""Room for most of them. The cache has so much for every ask, and is made larger when a longer one comes."""

ALIKE = 64
"""Tokens at its beginning that tell a rubric from others; and so little is not worth copying."""

BUFFER = 2**24
"""Bytes of the GPU's free memory for each token that is read at once: a fiftieth or so of them is used."""

PLACE = "\ue000"
"""Stands for the prompt while the template is rendered (a private-use character, in no template)."""

Slots = npt.NDArray[np.int64]


class BranchingEngine(Engine):
    """Reads prompts, and what the model would say next after each of several beginnings of an answer."""

    worth_sharing = ALIKE

    def branches(
        self, prompts: Sequence[Sequence[int]], beginnings: Sequence[Prefix]
    ) -> Iterator[tuple[list[int], Prefix, Floats]]:
        """Next-token logits after every beginning of every prompt's answer.

        Prompts are read once; the beginnings are decoded after them one by one, all prompts together, and cut off again. What
        the cache holds from the call before is used again: a rubric is read once for all its answers.

        Args:
            prompts: Token ids, with the longest beginning shorter than the context.
            beginnings: The empty one first.

        Yields:
            Places of some prompts, beginning, logits float32 [places, vocab], which may be written to; valid until the next is
            asked for.
        """
        self._detach()
        texts = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
        # of one rubric side by side, and of nearly one length
        order = sorted(range(len(texts)), key=lambda place: (texts[place][:ALIKE].tolist(), len(texts[place])))
        for start in range(0, len(order), self.slots):
            self._owner[:], self._waiting = -1, {}
            for place in order[start : start + self.slots]:
                slot = self._seat(texts[place])
                self._place(slot, texts[place], len(texts[place]) - 1)
                self._owner[slot] = place
            busy = np.flatnonzero(self._owner >= 0)
            lengths = self._known[busy]
            yield from self._read(busy, ())
            for beginning in beginnings[1:]:
                # Every prompt is followed by the same few tokens. They are written behind it, read, and taken back: the prompt
                # stays cached.
                self._tokens[busy[:, None], lengths[:, None] + np.arange(len(beginning))] = beginning
                self._known[busy] = lengths + len(beginning)
                yield from self._read(busy, beginning)
                self._known[busy] = lengths
                self._cut(busy)
        self._owner[:] = -1

    def _read(self, busy: Slots, beginning: Prefix) -> Iterator[tuple[list[int], Prefix, Floats]]:
        """Decode what is known of some slots; the logits after it, as soon as they are there."""
        while (self._held[busy] < self._known[busy]).any():
            self._resolve()
            count, slots = self._fill_even()
            self._decode(count)
            if len(slots):
                yield self._owner[slots].tolist(), beginning, output_logits(self._pointer, len(slots), self.weights.vocab_size)
            self._cut(busy)

    def _cut(self, busy: Slots) -> None:
        """Take out of the cache what is not known of a sequence."""
        for slot in busy[self._held[busy] > self._known[busy]].tolist():
            self._keep(slot, int(self._known[slot]))

    def _seat(self, tokens: Ints) -> int:
        """The first free slot whose cache begins like a prompt, nearly as far as any does."""
        common = self._common(tokens, len(tokens) - 1)
        # Nearly as far is enough, and the first such slot is taken: that keeps busy slots without gaps between them.
        shared = np.where(self._owner < 0, np.minimum(common, self._held), -1)
        return int(np.flatnonzero((shared >= shared.max() - ALIKE) & (self._owner < 0))[0])

    def _fill_even(self) -> tuple[int, Ints]:
        """Write the next batch of prompts: neighbours, each filled up to the length of the longest.

        llama.cpp computes sequences of one length in one pass and takes a pass for every difference. What stands behind a
        prompt changes nothing in it; `held` counts it until it is cut off.

        Returns:
            Its tokens, and the slots whose prompts end in it.
        """
        pending = np.where(self._owner >= 0, self._known - self._held, 0)
        pending[list(self._waiting)] = 0
        first = int(np.flatnonzero(pending)[0])
        end, size = first, 0
        # neighbours join as long as all of them, filled up to the longest, still fit into one batch
        while end < self.slots and pending[end] and (end - first + 1) * max(size, pending[end]) <= self._batch_size:
            size, end = max(size, int(pending[end])), end + 1
        end = max(end, first + 1)
        slots = np.arange(first, end, dtype=np.int32)
        # A single prompt longer than a batch comes in pieces. Filling must not run over the end of any slot's context either.
        size = int(min(size or self._batch_size, self._batch_size // len(slots), (self.context - self._held[slots]).min()))
        places = self._held[slots][:, None] + np.arange(size)
        batch, count = self._batch, size * len(slots)
        batch.tokens[:count] = self._tokens[slots[:, None], places].reshape(-1)
        batch.positions[:count] = places.reshape(-1)
        batch.slots[:count] = slots.repeat(size)
        last = places == self._known[slots][:, None] - 1
        batch.wanted[:count] = last.reshape(-1)
        self._held[slots] += size
        return count, slots[last.any(axis=1)]

    def _parameters(self, slots: int, exact: bool) -> Any:
        made = super()._parameters(slots, exact)
        if offloads():
            made.n_batch = made.n_ubatch = max(512, min(4096, free_vram() // BUFFER // 512 * 512))
        return made


class LocalModel:
    """Meets the `NumberReader` protocol.

    Args:
        path: The GGUF file.
        context: Tokens of a prompt at most.
        usual: Tokens that there is room for before a longer prompt comes.
        slots: Sequences at once; None: as many as pay off.

    Raises:
        ModelError: If the file is not a usable GGUF.
        BackendError: If its tokenizer cannot write the numbers, or there is no memory.
    """

    def __init__(self, path: str, *, context: int = CONTEXT, usual: int = USUAL_CONTEXT, slots: int | None = None) -> None:
        self.weights = Weights(Path(path))
        if not self.weights.partial:
            raise ModelError(f"`{path}` has recurrent layers: a local judge needs a transformer")
        self._threads = int(os.environ.get("ITERFT_THREADS") or os.cpu_count() or 1)
        self._slots = slots
        self.context = min(context, self.weights.trained_context or context)
        self._engine: BranchingEngine | None = self._open(min(usual, self.context))
        self.trie: NumberTrie = number_trie(self._number_ids, self._text)
        self._before, self._after = self._frame()
        self._refusal = self.plain_ids(REFUSAL)[0]
        self._pool = ThreadPoolExecutor(self._threads)

    def _open(self, context: int) -> BranchingEngine:
        """An engine with as many slots as there is memory for."""
        slots = self._slots or _slots(self.weights, context)
        while True:
            try:
                return BranchingEngine(self.weights, slots=slots, context=context, exact=False, threads=self._threads)
            except BackendError as error:
                if error.exception != "memory" or slots == 1:
                    raise
                slots //= 2

    def _engine_for(self, length: int) -> BranchingEngine:
        """An engine with room for sequences of a length."""
        context = self._engine.context if self._engine else min(USUAL_CONTEXT, self.context)
        while length > context < self.context:
            context = min(2 * context, self.context)
        if self._engine and self._engine.context < context:
            self._engine.close()  # before the next one looks what memory is free
            self._engine = None
        self._engine = self._engine or self._open(context)
        return self._engine

    def ready(self) -> None:
        """Return: what had to be loaded is."""

    def probabilities(self, prompts: Sequence[str]) -> list[NumberProbabilities]:
        """The probabilities of each number and of a refusal as the answer to each prompt."""
        nodes = self.trie.nodes
        heads = list(self._pool.map(self._head, prompts))
        fitting = [place for place, head in enumerate(heads) if len(head) + len(nodes[-1]) < self.context]
        asked = [heads[place] for place in fitting]
        wanted = {node: [*self.trie.digits[node], self._refusal] for node in nodes}
        found = {node: np.zeros((len(asked), len(wanted[node]))) for node in nodes}
        engine = self._engine_for(max(map(len, asked), default=0) + len(nodes[-1]) + 1)
        for places, node, rows in engine.branches(asked, nodes):
            found[node][places] = chosen_logprobs(rows, np.asarray([wanted[node]]), self._pool, self._threads)
        shares = self.trie.probabilities({node: dict(zip(wanted[node], found[node].T, strict=True)) for node in nodes})
        numbers = np.stack(list(shares.values()), axis=1).tolist()
        refusals = np.exp(found[()][:, -1]).tolist()
        most = f"tokens is longer than the judge's context of {self.context}"
        replies = [NumberProbabilities(len(head), failure=f"question of {len(head)} {most}") for head in heads]
        for place, row, refusal in zip(fitting, numbers, refusals, strict=True):
            replies[place] = NumberProbabilities(len(heads[place]), row, refusal)
        return replies

    def _head(self, prompt: str) -> list[int]:
        """What the model reads of a prompt."""
        return self._before + self.plain_ids(prompt) + self._after

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special: an answer cannot speak in the template's tokens."""
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self.weights.vocab, data, len(data), tokens, room, False, False)
        if count < 0:
            raise BackendError("llama.cpp cannot tokenise a text")
        return list(tokens[:count])

    def _number_ids(self, number: str) -> list[int]:
        """A number's tokens as they follow a line break: without the blank that some tokenizers put before a text."""
        line = self.plain_ids("\n")
        both = self.plain_ids("\n" + number)
        # the line break is what stands before the number in the reply too; where both melt into one token, the number by itself
        return both[len(line) :] if both[: len(line)] == line else self.plain_ids(number)

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(self._piece(token) for token in ids).decode("utf-8", "replace")

    def _piece(self, token: int, *, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(self.weights.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, size)]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after a prompt: the GGUF's own chat template; for a base model, a line to complete."""
        source = llama_cpp.llama_model_chat_template(self.weights.pointer, None)
        bos = llama_cpp.llama_vocab_bos(self.weights.vocab)
        if not source:
            begin = [bos] if bos >= 0 and llama_cpp.llama_vocab_get_add_bos(self.weights.vocab) else []
            return begin, self.plain_ids("\n\nScore:\n")
        rendered = (
            environment()
            .from_string(source.decode("utf-8"))
            .render(
                messages=[{"role": "user", "content": PLACE}],
                add_generation_prompt=True,
                enable_thinking=False,
                bos_token=self._piece(bos, special=True).decode() if bos >= 0 else "",
                eos_token="",
            )
        )
        before, found, after = rendered.partition(PLACE)
        if not found:
            raise ModelError(f"the chat template of `{self.weights.path}` leaves the user's message out")
        return self.weights.ids(before), self.weights.ids(after)


def _slots(weights: Weights, context: int) -> int:
    """Questions at once that memory is there for."""
    if not offloads():
        return ON_CPU
    return int(max(1, min(TOGETHER, SHARE * free_vram() // max(1, context * weights.kv_bytes))))
