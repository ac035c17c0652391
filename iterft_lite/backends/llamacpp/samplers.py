"""Drawing the next token of many sequences: on the host with numpy, or inside llama.cpp's graph on the GPU.

Each sequence has a random stream of its own, seeded by its row, and takes one number of it a token: what a row draws depends on
its seed and its logits, not on its neighbours. Truncated sampling in the graph is llama.cpp's own, with streams of its own; the
distributions are the same (a test compares them). Truncation follows temperature, in transformers' order: top-k, top-p, min-p.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import llama_cpp  # before numpy, and after `llamacpp_library`, whose settings it reads
import numpy as np
import numpy.typing as npt

from iterft_lite.backends.llamacpp.sampling import BLOCK, Floats, Ints, choose, unnormalised
from iterft_lite.backends.llamacpp.tail import F32, I32, Ends, Graph, Tail
from iterft_lite.errors import BackendError
from iterft_lite.protocols import Sampling

AHEAD = 256
"""Uniform numbers drawn from a row's generator at a time."""


class Sampler(Protocol):
    """Draws tokens for numbered slots."""

    def start(self, slot: int, seed: int) -> None:
        """Give a slot a new row, with its seed."""
        ...

    def move(self, source: int, target: int) -> None:
        """Move a row to another slot."""
        ...

    def draw(self, slots: Ints, rows: Ints) -> Ints:
        """Tokens for `slots`, whose last token is at the batch's positions `rows`; both int32 [n]."""
        ...

    def close(self) -> None:
        """Give back what llama.cpp holds for it."""
        ...


class Streams:
    """A random stream a slot.

    Args:
        slots: Sequences at most.
    """

    def __init__(self, slots: int) -> None:
        self._generators: list[np.random.Generator | None] = [None] * slots
        self._uniforms = np.zeros((slots, AHEAD))
        self._next = np.zeros(slots, dtype=np.int64)

    def start(self, slot: int, seed: int) -> None:
        """Give a slot a new stream."""
        self._generators[slot] = np.random.Generator(np.random.PCG64(seed))
        self._next[slot] = AHEAD

    def move(self, source: int, target: int) -> None:
        """Move a stream to another slot."""
        self._generators[target] = self._generators[source]
        self._uniforms[target] = self._uniforms[source]
        self._next[target] = self._next[source]

    def take(self, slots: Ints) -> npt.NDArray[np.float64]:
        """The next number of each slot, uniform in [0, 1), float64 [n]."""
        for slot in slots[self._next[slots] == AHEAD]:
            generator = self._generators[slot]
            assert generator is not None
            # One number a token would be a Python call for each row and token. A block is the same stream of numbers.
            generator.random(out=self._uniforms[slot])
            self._next[slot] = 0
        taken = self._uniforms[slots, self._next[slots]]
        self._next[slots] += 1
        return taken


class HostSampler:
    """Inverse transform sampling over all slots' logits at once.

    Args:
        context: llama.cpp's context, which has just decoded.
        slots: Sequences at most.
        vocab: Width of the logits.
        sampling: How to draw.
    """

    def __init__(self, context: Any, slots: int, vocab: int, sampling: Sampling) -> None:
        self._context = context
        self._vocab = vocab
        self._sampling = sampling
        streams = Streams(slots)
        self.start, self.move, self._take = streams.start, streams.move, streams.take
        # padded to whole blocks with probability 0
        self._weights = np.zeros((slots, -(-vocab // BLOCK) * BLOCK), dtype=np.float32)

    def draw(self, slots: Ints, rows: Ints) -> Ints:
        """Tokens for `slots` from the logits of the last decoding, whose rows are in the same order."""
        logits = output_logits(self._context, len(rows), self._vocab)
        if self._sampling.temperature == 0:
            greedy: Ints = logits.argmax(axis=1).astype(np.int32)
            return greedy
        weights = self._weights[: len(rows)]
        unnormalised(logits, self._sampling, out=weights[:, : self._vocab])
        return choose(weights, self._take(slots))

    def close(self) -> None:
        """Nothing is held."""


def output_logits(context: Any, count: int, vocab: int) -> Floats:
    """The logits of the last decoding, float32 [count, vocab], in the order in which they were asked for; not a copy."""
    pointer = llama_cpp.llama_get_logits(context)
    if not pointer:
        raise BackendError("llama.cpp gave no logits")
    address = ctypes.addressof(pointer.contents)
    return np.ctypeslib.as_array((ctypes.c_float * (count * vocab)).from_address(address)).reshape(count, vocab)


class GraphSampler:
    """Inverse transform sampling inside the decoding graph, over all sequences at once; only token ids come to the host.

    The token is the first whose cumulated probability passes a uniform number's share of the sum: as many tokens as do not pass
    it come before.

    Args:
        context: llama.cpp's context; what is added to its graph stays until `close`.
        slots: Sequences.
        sampling: How to draw, without truncation.
    """

    def __init__(self, context: Any, slots: int, sampling: Sampling) -> None:
        self._context = context
        self._temperature = sampling.temperature
        self._streams = Streams(slots)
        self.start, self.move = self._streams.start, self._streams.move
        self._tail = Tail(context, slots, self._add, self._uniforms, tokens=True)

    def draw(self, slots: Ints, rows: Ints) -> Ints:  # noqa: ARG002  # in the order of `rows`
        """The tokens that the last decoding has drawn."""
        return drawn_tokens(self._context, rows)

    def close(self) -> None:
        """Take it out of the graph."""
        self._tail.close()

    def _add(self, graph: Graph) -> Ends:
        if self._temperature == 0:
            return Ends(None, graph.argmax(graph.logits))
        shares = graph.given(F32)
        # The sums of 150,000 float32 numbers do not end at exactly 1. The uniform number is taken as a share of the last sum.
        sums = graph.cumsum(graph.soft_max(1 / self._temperature))
        stride = 4 * graph.vocab
        # a view of the last column: row stride as in the whole matrix, beginning 4 bytes before its first row ends
        whole = graph.view_2d(sums, 1, graph.rows, stride, stride - 4)
        # step(sum - share) is 1 from the drawn token on; their count, counted from the end, gives its index: vocab - count.
        # There is no search in ggml, and a comparison of all columns is one kernel.
        passed = graph.sum_rows(graph.step(graph.sub(sums, graph.mul(whole, shares))))
        return Ends(shares, graph.cast(graph.scale_bias(graph.clamp(passed, 1.0, graph.vocab), -1.0, graph.vocab), I32))

    def _uniforms(self, active: Mapping[int, list[int]], rows: int) -> Floats:
        """A uniform number a row, from the stream of its slot; below 1 by so much that no rounding makes it the whole."""
        numbers = np.zeros(rows, dtype=np.float32)
        slots = np.fromiter(active, dtype=np.int32, count=len(active))
        places = np.fromiter((own[0] for own in active.values()), dtype=np.int64, count=len(active))
        # rows that no slot owns get 0 and draw a token that nobody reads
        numbers[places] = self._streams.take(slots) * (1 - 2.0**-20)
        return numbers


def drawn_tokens(context: Any, rows: Ints) -> Ints:
    """Tokens that were drawn in the graph, int32 [n].

    Args:
        context: llama.cpp's context, which has just decoded.
        rows: The batch's positions that they were drawn at.

    Raises:
        BackendError: If one was not.
    """
    take = llama_cpp.llama_get_sampled_token_ith
    drawn = np.fromiter((take(context, row) for row in rows.tolist()), dtype=np.int32, count=len(rows))
    if (drawn < 0).any():
        raise BackendError("llama.cpp drew no token", exception="sampling", hint='set sampling to "host"')
    return drawn


class ChainSampler:
    """Chains of llama.cpp's samplers, one a sequence, that run inside the decoding graph: for truncated sampling.

    Args:
        context: llama.cpp's context; the chains stay attached until `close`.
        slots: Sequences: all of them have a chain.
        sampling: How to draw.
    """

    def __init__(self, context: Any, slots: int, sampling: Sampling) -> None:
        self._context = context
        self._sampling = sampling
        self._chains = [self._chain(0) for _ in range(slots)]
        for slot, chain in enumerate(self._chains):
            if not llama_cpp.llama_set_sampler(context, slot, chain):
                self.close()
                raise BackendError(
                    "this GPU cannot sample inside the graph", exception="sampling", hint='set sampling to "host"'
                )

    def start(self, slot: int, seed: int) -> None:
        """Give a slot a new row: its chain takes over the state of a freshly seeded one, and the graph stays as it is."""
        if self._sampling.temperature == 0:
            return
        # Setting another sampler would make llama.cpp rebuild its graph. Copying the state of a fresh one does not.
        fresh = self._chain(seed)
        llama_cpp.llama_sampler_copy(fresh, self._chains[slot])
        llama_cpp.llama_sampler_free(fresh)

    def move(self, source: int, target: int) -> None:
        """Move a row to another slot."""
        llama_cpp.llama_sampler_copy(self._chains[source], self._chains[target])

    def draw(self, slots: Ints, rows: Ints) -> Ints:  # noqa: ARG002  # in the order of `rows`
        """The tokens that the last decoding has drawn."""
        return drawn_tokens(self._context, rows)

    def close(self) -> None:
        """Detach the chains and free them."""
        for slot, chain in enumerate(self._chains):
            llama_cpp.llama_set_sampler(self._context, slot, None)
            llama_cpp.llama_sampler_free(chain)
        self._chains = []

    def _chain(self, seed: int) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for link in self._links(seed):
            llama_cpp.llama_sampler_chain_add(chain, link)
        return chain

    def _links(self, seed: int) -> Sequence[Any]:
        sampling = self._sampling
        if sampling.temperature == 0:
            return [llama_cpp.llama_sampler_init_greedy(), _only_tokens()]
        links = [llama_cpp.llama_sampler_init_temp(sampling.temperature)]
        if sampling.top_k > 0:
            links.append(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            links.append(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            links.append(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
        return [*links, llama_cpp.llama_sampler_init_dist(_short(seed)), _only_tokens()]


def _short(seed: int) -> int:
    """A seed in 32 bits; llama.cpp takes the largest as a wish for a random one."""
    return (seed ^ seed >> 32) % 0xFFFFFFFF


def _only_tokens() -> Any:
    """A last link: the graph then copies no row's logits and probabilities to the host (1.2 MB a token of Qwen3)."""
    return llama_cpp.llama_sampler_init(ctypes.byref(_ONLY_TOKENS), None)


def _forget(_sampler: Any, _context: Any, _graph: Any, data: Any) -> None:
    data.contents.logits = None
    data.contents.probs = None
    data.contents.candidates = None


def _interface() -> Any:
    """The table of functions of a sampler that does nothing on the host and `_forget` in the graph."""
    kinds: dict[str, Any] = dict(llama_cpp.llama_sampler_i._fields_)
    return llama_cpp.llama_sampler_i(
        name=kinds["name"](lambda _: b"only-tokens"),
        apply=kinds["apply"](lambda *_: None),
        backend_init=kinds["backend_init"](lambda *_: True),
        backend_apply=kinds["backend_apply"](_forget),
        copy_state=kinds["copy_state"](lambda *_: None),
    )


_ONLY_TOKENS = _interface()
