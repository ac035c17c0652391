"""Many sequences at once over llama.cpp: slots, shared prefixes, batches, continuous refilling.

A sequence sits in a slot: a row of the token table and a stream of the key-value cache. Every step decodes one batch: the next
token of each sequence that is writing and a piece of each prompt that is still being read. A slot whose sequence has ended
takes the next one at once. A prompt that begins like another one that is, or soon will be, in the cache copies that part.

The cache has a stream a slot (not `kv_unified`): attention then looks at a sequence's own tokens only. llama.cpp computes
streams together only where slots are numbered without gaps, so batches are in slot order, and towards the end of a call,
when nothing refills them, sequences move down into empty slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# llama.cpp's settings, then llama.cpp, then numpy
from iterft_lite.backends.llamacpp.library import SMALL, Weights, free_vram, offloads

# isort: split
import llama_cpp
import numpy as np
import numpy.typing as npt

from iterft_lite.backends.llamacpp.context import Batch, Context
from iterft_lite.backends.llamacpp.samplers import ChainSampler, GraphSampler, HostSampler, Sampler, output_logits
from iterft_lite.backends.llamacpp.sampling import Floats, Ints
from iterft_lite.backends.llamacpp.scheduling import Expected, Pace
from iterft_lite.errors import BackendError
from iterft_lite.hardware import available_memory
from iterft_lite.protocols import Sampling

MOST_SLOTS = 256
"""llama.cpp's own limit of sequences a context."""

SMALL_SLOTS = 32
"""Sequences at once up to which a small model writes faster on a CPU."""


@dataclass(frozen=True)
class Request:
    """A sequence to continue.

    Attributes:
        tokens: The prompt, at least one.
        seed: Of its sampling.
        limit: Tokens to draw at most.
        kind: Requests of one kind are expected to grow equally long.
    """

    tokens: Sequence[int]
    seed: int
    limit: int
    kind: Hashable = None


@dataclass(frozen=True)
class Finished:
    """A request's end.

    Attributes:
        index: Place of the request.
        ids: What was drawn, an end token included.
        finish: Why it ended.
    """

    index: int
    ids: list[int]
    finish: Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Rows:
    """Some of a batch's rows of logits.

    Attributes:
        index: Place of the sequence that they belong to.
        begin: Position of the first; the others follow.
        rows: Which of the batch's they are.
    """

    index: int
    begin: int
    rows: slice


class Engine:
    """A context on a model, with its slots.

    Args:
        weights: The model.
        slots: Sequences at once, or None: as many as pay off.
        context: Tokens a sequence may take; never more than the model was made for.
        exact: f32 cache, no flash attention, a fixed number of threads: for comparing logits.
        threads: CPU threads.
        sampling: Where tokens are drawn: "host", "graph", or "auto" (in the graph on a GPU).
        sharing: "auto" shares prefixes where there is more than one slot; "none" never does.
        expected: Lengths known from elsewhere; noted further here.

    Attributes:
        slots, context: As chosen.
        worth_sharing: Tokens of a common beginning from which on copying pays.

    Raises:
        BackendError: If there is no memory for it.
    """

    worth_sharing = 16

    def __init__(
        self,
        weights: Weights,
        *,
        slots: int | None,
        context: int,
        exact: bool,
        threads: int,
        sampling: Literal["auto", "host", "graph"] = "auto",
        sharing: Literal["auto", "none"] = "auto",
        expected: Expected | None = None,
    ) -> None:
        self.weights = weights
        self.context = min(context, weights.trained_context) if weights.trained_context else context
        gpu = offloads()
        self._threads = threads
        self._in_graph = sampling == "graph" or (sampling == "auto" and gpu and not exact)
        self._forced = sampling == "graph"
        self._context, self.slots = self._open(slots, exact, gpu)
        self._pointer, self._memory = self._context.pointer, self._context.memory
        self._batch_size = int(llama_cpp.llama_n_batch(self._pointer))
        self._batch = Batch(self._batch_size)
        self._outputs = self._outputs_at_most(self.slots)
        self._sampler: Sampler | None = None
        self._sampled_as: Sampling | None = None
        self._pace = Pace(self._thread_choices(gpu, exact))
        self._sharing = sharing == "auto" and self.slots > 1 and weights.partial
        self._ends = np.zeros(weights.vocab_size, dtype=bool)
        self._ends[weights.ends] = True
        self._expected = expected or Expected()
        # per slot: the sequence's tokens, how many are known, and how many of them the cache holds
        self._tokens = np.zeros((self.slots, self.context + 1), dtype=np.int32)
        self._known = np.zeros(self.slots, dtype=np.int64)
        self._held = np.zeros(self.slots, dtype=np.int64)
        self._prompt = np.zeros(self.slots, dtype=np.int64)
        self._most = np.zeros(self.slots, dtype=np.int64)
        # first position whose logits are wanted
        self._first = np.zeros(self.slots, dtype=np.int64)
        self._owner = np.full(self.slots, -1, dtype=np.int64)
        self._waiting: dict[int, tuple[int, int]] = {}

    # -- what it does -------------------------------------------------------------------------------------------------

    def ends_at(self, tokens: Sequence[int]) -> None:
        """Let other tokens end generations too."""
        self._ends[[token for token in tokens if 0 <= token < len(self._ends)]] = True

    def ignore_ends(self) -> None:
        """Let no token end a generation."""
        self._ends[:] = False

    def adapt(self, adapter: Any | None) -> None:
        """Lay an adapter over the model, or none."""
        self.forget()
        self._context.adapt(adapter)

    def forget(self) -> None:
        """Empty the cache."""
        self._context.forget()
        self._held[:] = 0
        self._known[:] = 0
        self._owner[:] = -1
        self._waiting = {}

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, on_token: Callable[[int, int], None] | None = None
    ) -> Iterator[Finished]:
        """Continue each request; yield each as soon as it has ended.

        Args:
            requests: Prompts shorter than the context.
            sampling: How to draw.
            on_token: Takes a request's place and each token that is drawn for it, as it is drawn.

        Raises:
            BackendError: If decoding fails.
        """
        self.forget()
        sampler = self._sampler_for(sampling)
        # Longest first: what is started last decides when the call ends, and should be short. One slot keeps the given order.
        order = self._expected.order([request.kind for request in requests]) if self.slots > 1 else list(range(len(requests)))
        queue = order[::-1]

        def start(slot: int, index: int) -> None:
            request = requests[index]
            sampler.start(slot, request.seed)
            self._most[slot] = min(len(request.tokens) + request.limit, self.context)

        # One turn of this loop is one batch: copy prefixes that were waited for, fill free slots, decode, draw, end what is
        # over.
        while queue or (self._owner >= 0).any():
            self._resolve()
            self._admit(queue, lambda index: (requests[index].tokens, len(requests[index].tokens) - 1), start)
            count, slots, rows = self._fill()
            self._decode(count)
            if not len(slots):
                continue
            drawn = sampler.draw(slots, rows)
            # A drawn token is known but not held yet: the next batch decodes it. `known - held` is what a slot still has to be
            # read.
            self._tokens[slots, self._known[slots]] = drawn
            self._known[slots] += 1
            if on_token is not None:
                for slot, token in zip(slots.tolist(), drawn.tolist(), strict=True):
                    on_token(int(self._owner[slot]), token)
            stopped = self._ends[drawn]
            over = stopped | (self._known[slots] >= self._most[slots])
            for slot, stop in zip(slots[over].tolist(), stopped[over].tolist(), strict=True):
                finished = self._finish(slot, requests, stop)
                self._expected.note(requests[finished.index].kind, len(finished.ids))
                yield finished
            if not queue and over.any():
                self._close_ranks(sampler)

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[tuple[Floats, list[Rows]]]:
        """Decode sequences and hand over their logits from a position on.

        Args:
            sequences: Token ids, not longer than the context.
            first: For each, the first position whose logits are wanted; beyond the end: none are.

        Yields:
            A batch's logits float32 [n, vocab], not a copy: valid until the next is asked for, and may be overwritten; and
            whose they are. A long sequence comes in several pieces, in order.
        """
        self.forget()
        self._detach()
        queue = [index for index in range(len(sequences)) if first[index] < len(sequences[index])][::-1]

        def start(slot: int, index: int) -> None:
            self._first[slot] = first[index]

        while queue or (self._owner >= 0).any():
            self._resolve()
            self._admit(queue, lambda index: (sequences[index], first[index]), start)
            # `_fill` moves `held` on; the difference is what this batch has read of each slot
            before = self._held.copy()
            count, slots, _ = self._fill(every=True)
            self._decode(count)
            rows = output_logits(self._pointer, int(self._batch.wanted[:count].sum()), self.weights.vocab_size)
            parts, taken = [], 0
            for slot in slots.tolist():
                begin = max(int(before[slot]), int(self._first[slot]))
                end = int(self._held[slot])
                parts.append(Rows(int(self._owner[slot]), begin, slice(taken, taken + end - begin)))
                taken += end - begin
            if taken:
                yield rows, parts
            for slot in np.flatnonzero((self._owner >= 0) & (self._held == self._known) & (self._known > 0)).tolist():
                if slot not in self._waiting:
                    self._owner[slot] = -1

    def close(self) -> None:
        """Give all memory back."""
        self._detach()
        self._context.close()

    # -- slots --------------------------------------------------------------------------------------------------------

    def _admit(
        self, queue: list[int], describe: Callable[[int], tuple[Sequence[int], int]], start: Callable[[int, int], None]
    ) -> None:
        """Give free slots the queue's last entries; `describe` gives a sequence and how much of it may be shared."""
        for slot in np.flatnonzero(self._owner < 0).tolist():
            if not queue:
                return
            index = queue.pop()
            tokens, shareable = describe(index)
            self._place(slot, np.asarray(tokens, dtype=np.int32), shareable)
            self._owner[slot] = index
            start(slot, index)

    def _place(self, slot: int, tokens: Ints, shareable: int) -> None:
        """Put a sequence into a slot, with as much of its beginning as is found in the cache."""
        # Three ways to a beginning: what the slot's last sequence has left in it (`own`, free), what another slot holds now
        # (`ready`, a copy), and what another slot will hold once its prompt is read (`planned`, a copy later). Waiting beats
        # reading the same tokens twice at once; the gain has to be worth a copy.
        own, donor, ready, planned_donor, planned = 0, -1, 0, -1, 0
        if self._sharing:
            common = self._common(tokens, min(shareable, len(tokens) - 1))
            own = min(int(common[slot]), int(self._held[slot]))
            # a slot is no donor to itself
            common[slot] = 0
            held = np.minimum(common, self._held)
            donor, planned_donor = int(held.argmax()), int(common.argmax())
            ready, planned = int(held[donor]), int(common[planned_donor])
        if planned >= max(own, ready) + self.worth_sharing:
            self._waiting[slot] = (planned_donor, planned)
            self._keep(slot, 0)
        elif ready >= own + self.worth_sharing:
            self._copy(donor, slot, ready)
        else:
            self._keep(slot, own)
        self._tokens[slot, : len(tokens)] = tokens
        self._known[slot] = self._prompt[slot] = len(tokens)
        self._first[slot] = len(tokens) - 1

    def _common(self, tokens: Ints, most: int) -> npt.NDArray[np.int64]:
        """How many of the first `most` tokens each slot's sequence shares, int64 [slots]; of a free slot's, those cached."""
        if most <= 0:
            return np.zeros(self.slots, dtype=np.int64)
        known = np.where(self._owner < 0, self._held, self._known)
        # One comparison of the whole table finds every common beginning: the first difference of a row is its length.
        other = self._tokens[:, :most] != tokens[:most]
        same = np.where(other.any(axis=1), other.argmax(axis=1), most)
        shared: npt.NDArray[np.int64] = np.minimum(same, known)
        return shared

    def _resolve(self) -> None:
        """Copy prefixes that were waited for, where they have been read by now."""
        for slot, (donor, count) in list(self._waiting.items()):
            if self._held[donor] >= count:
                del self._waiting[slot]
                self._copy(donor, slot, count)

    def _copy(self, source: int, target: int, count: int) -> None:
        """Give `target` the first `count` cached tokens of `source`. Streams are copied whole, then cut."""
        # a stream is copied as a whole, into one that was emptied
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._held[target] = self._held[source]
        self._keep(target, count)

    def _keep(self, slot: int, count: int) -> None:
        """Cut what the cache holds of a slot to its first `count` tokens."""
        if self._held[slot] > count or count == 0:
            llama_cpp.llama_memory_seq_rm(self._memory, slot, count if count else -1, -1)
        self._held[slot] = count

    def _finish(self, slot: int, requests: Sequence[Request], stopped: bool) -> Finished:
        index = int(self._owner[slot])
        self._owner[slot] = -1
        begin, end = int(self._prompt[slot]), int(self._known[slot])
        drawn = self._tokens[slot, begin:end].tolist()
        full = len(drawn) < requests[index].limit
        return Finished(index, drawn, "stop" if stopped else "context" if full else "length")

    def _close_ranks(self, sampler: Sampler) -> None:
        """Move the last sequences into free slots before them."""
        # Gaps between busy slots would make llama.cpp compute streams one after the other. The last busy slot moves into the
        # first free one until there are none. Nothing moves while a slot waits for a donor by its number.
        while not self._waiting and self.weights.partial:
            busy, free = np.flatnonzero(self._owner >= 0), np.flatnonzero(self._owner < 0)
            if not len(busy) or not len(free) or free[0] > busy[-1]:
                return
            source, target = int(busy[-1]), int(free[0])
            self._copy(source, target, int(self._held[source]))
            sampler.move(source, target)
            for state in (self._tokens, self._known, self._prompt, self._most, self._first, self._owner):
                state[target] = state[source]
            self._owner[source] = -1
            self._keep(source, 0)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _fill(self, *, every: bool = False) -> tuple[int, Ints, Ints]:
        """Write the next batch and count its tokens as held.

        Args:
            every: Logits of all positions from `first` on are wanted, not the last one's alone.

        Returns:
            Its tokens, the slots whose logits are among its outputs, in the batch's order, and the batch's positions of their
            last tokens; int32 [n].
        """
        # Slot order is batch order, and so the order of outputs: samplers and logits are matched to slots by it.
        busy = np.flatnonzero(self._owner >= 0).astype(np.int32)
        if self._waiting:
            busy = busy[[slot not in self._waiting for slot in busy.tolist()]]
        pending = self._known[busy] - self._held[busy]
        # nearly always: every sequence writes, and no prompt is being read
        if not every and pending.sum() == len(busy):
            return self._fill_single(busy)
        batch, count, outputs = self._batch, 0, 0
        slots, rows = [], []
        # sequences that write get their token whatever the prompts need
        room = self._batch_size - int((pending > 0).sum())
        for slot, need in zip(busy.tolist(), pending.tolist(), strict=True):
            if need <= 0:
                continue
            held = int(self._held[slot])
            # `room` has one token of every slot set aside already: this slot's own comes on top
            size = min(need, room + 1)
            begin = max(held, int(self._first[slot]))
            # A row of logits takes 0.6 MB at a vocabulary of 150,000. Where all positions are wanted, outputs are rationed too.
            if every and held + size > begin:
                size = min(size, begin - held + self._outputs - outputs)
                if size <= 0:
                    continue
            room -= size - 1
            part = slice(count, count + size)
            batch.tokens[part] = self._tokens[slot, held : held + size]
            batch.positions[part] = np.arange(held, held + size)
            batch.slots[part] = slot
            batch.wanted[part] = 0
            if held + size > begin:
                batch.wanted[count + begin - held : count + size] = 1
                outputs += held + size - begin
                slots.append(slot)
                rows.append(count + size - 1)
            self._held[slot] += size
            count += size
        return count, np.asarray(slots, dtype=np.int32), np.asarray(rows, dtype=np.int32)

    def _fill_single(self, busy: Ints) -> tuple[int, Ints, Ints]:
        """The usual batch: one token for each of `busy`."""
        count = len(busy)
        held = self._held[busy]
        self._batch.tokens[:count] = self._tokens[busy, held]
        self._batch.positions[:count] = held
        self._batch.slots[:count] = busy
        self._batch.wanted[:count] = 1
        self._held[busy] = held + 1
        return count, busy, np.arange(count, dtype=np.int32)

    def _decode(self, count: int) -> None:
        # only batches without prompts are timed: how long they take does not depend on what is in them
        steady = count <= self.slots
        seconds = self._context.decode(self._batch, count, self._pace.threads(count) if steady else self._pace.best)
        if steady:
            self._pace.took(seconds)

    # -- context ------------------------------------------------------------------------------------------------------

    def _sampler_for(self, sampling: Sampling) -> Sampler:
        if self._sampler is None or self._sampled_as != sampling:
            self._detach()
            if self._in_graph:
                kind = ChainSampler if sampling.truncated else GraphSampler
                self._sampler = kind(self._pointer, self.slots, sampling)
                if not self._graph_draws(self._sampler):
                    self._detach()
            if self._sampler is None:
                self._sampler = HostSampler(self._pointer, self.slots, self.weights.vocab_size, sampling)
            self._sampled_as = sampling
        return self._sampler

    def _graph_draws(self, sampler: Sampler) -> bool:
        """Try whether the device can run this chain of samplers: llama.cpp leaves out what it cannot, without a word."""
        # A sequence of two tokens through the real path: if no token comes back, the chain was left out of the graph.
        self._place(0, np.zeros(2, dtype=np.int32), 0)
        self._owner[0] = 0
        try:
            count, slots, rows = self._fill()
            self._decode(count)
            return len(sampler.draw(slots, rows)) == 1
        except BackendError:
            if self._forced:
                raise
            return False
        finally:
            self.forget()

    def _detach(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
        self._sampler = self._sampled_as = None

    def _thread_choices(self, gpu: bool, exact: bool) -> list[int]:
        small = self.weights.size < SMALL
        if gpu or exact or not small:
            return [self._threads]
        # one sequence promises the same bits every time: never by the clock
        return [1] if self.slots == 1 else [self._threads, 1]

    def _open(self, slots: int | None, exact: bool, gpu: bool) -> tuple[Context, int]:
        """Make the context; where the number of slots is free, with fewer until there is memory for it."""
        count = min(slots, MOST_SLOTS) if slots else self._slots_that_pay(exact, gpu)
        while True:
            try:
                return Context(self.weights, self._parameters(count, exact)), count
            except BackendError:
                if slots or count == 1:
                    raise
            count = max(1, count // 2)

    def _slots_that_pay(self, exact: bool, gpu: bool) -> int:
        """As many as memory holds: of a GPU's free bytes all but a gigabyte, a tenth, and what a trainer beside it will need;
        of the machine's a half.
        """
        cache = self.context * self.weights.kv_bytes * (2 if exact else 1)
        if gpu:
            # each sequence's row of logits passes through the graph and, with sampling there, four buffers on the way
            free = 0.9 * free_vram() - 2**30 - int(os.environ.get("ITERFT_KEEP_FREE") or 0)
            return int(max(1, min(MOST_SLOTS, free // (cache + 20 * self.weights.vocab_size))))
        # on a CPU arithmetic is the limit after a few sequences, sooner for large models: more would only take memory
        free = 0.5 * available_memory()
        pay = SMALL_SLOTS if self.weights.size < SMALL else 16 if self.weights.size < 2**30 else 8
        return int(max(1, min(pay, free // max(1, cache))))

    def _outputs_at_most(self, slots: int) -> int:
        """Rows of logits a batch: within 128 MB, which are 220 rows of Qwen3's vocabulary."""
        return max(slots, min(512, 2**25 // self.weights.vocab_size))

    def _parameters(self, slots: int, exact: bool) -> Any:
        made = Context.parameters(slots=slots, length=self.context, exact=exact, threads=self._threads)
        made.n_outputs_max = self._outputs_at_most(slots)
        made.n_outputs_max_per_seq = 1
        return made
