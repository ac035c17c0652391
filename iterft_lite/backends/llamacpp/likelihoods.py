"""Log-probabilities of given tokens: a context that only reads, and gives a number a token.

Nothing is written here, so no cache outlives a text: texts of about one length are read side by side, padded behind their ends,
where a causal model does not look. One call of llama.cpp computes one graph then (texts of one length are never split), and the
graph ends in the log-probabilities of the tokens that come next (`tail.py`): whole logits stay where they were computed.

llama.cpp reserves four numbers of the host's memory for each token of the vocabulary and each token that is read at once, and
clears them: 1.2 GB for 512 tokens of 151,936. More at once is a little faster, and takes longer to begin with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from iterft_lite.backends.llamacpp.library import Weights

# isort: split
import numpy as np

from iterft_lite.backends.llamacpp.context import Batch, Context
from iterft_lite.backends.llamacpp.sampling import Doubles, Ints
from iterft_lite.backends.llamacpp.tail import I32, Ends, Graph, Tail
from iterft_lite.backends.passages import Text

TOKENS = 512
"""Tokens that are read at once."""

PIECE = 64
"""Of them, of one text."""


class Reader:
    """A context on a model for reading.

    Args:
        weights: The model.
        longest: Tokens of the longest text.
        exact: f32 cache, no flash attention.
        threads: CPU threads.
        adapter: llama.cpp's handle of an adapter to lay over the model, or None.

    Attributes:
        longest, exact: As given.

    Raises:
        BackendError: If there is no memory for it.
    """

    def __init__(self, weights: Weights, *, longest: int, exact: bool, threads: int, adapter: Any | None) -> None:
        self._slots = TOKENS // PIECE
        self.longest, self.exact = longest, exact
        settings = Context.parameters(slots=self._slots, length=longest, exact=exact, threads=threads)
        settings.n_batch = settings.n_ubatch = settings.n_outputs_max = settings.n_outputs_max_per_seq = TOKENS
        self._context = Context(weights, settings)
        self._context.adapt(adapter)
        self._batch = Batch(TOKENS)
        self._wanted: Ints = np.zeros(0, dtype=np.int32)
        self._tail = Tail(self._context.pointer, self._slots, _logprobs, self._targets, tokens=False)

    def adapt(self, adapter: Any | None) -> None:
        """Lay another adapter over the model, or none."""
        self._context.adapt(adapter)

    def read(self, texts: Sequence[Text]) -> Iterator[tuple[int, Doubles]]:
        """Yield, in any order and in pieces, a text's place and natural log-probabilities of some more of its tokens.

        Raises:
            BackendError: If decoding fails.
        """
        # sorted by length, so that texts that are read side by side need little padding
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place].ids))
        for start in range(0, len(order), self._slots):
            group = order[start : start + self._slots]
            self._context.forget()
            longest = len(texts[group[0]].ids) - 1  # the last token predicts nothing that is asked for
            # Texts of a group stand in slots 0, 1, 2, ... with equally many tokens each: one graph, whatever their own lengths
            # are.
            step = TOKENS // len(group)
            for begin in range(0, longest, step):
                yield from self._piece(texts, group, begin, min(begin + step, longest))

    def close(self) -> None:
        """Give all memory back."""
        self._tail.close()
        self._context.close()

    def _piece(self, texts: Sequence[Text], group: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, Doubles]]:
        """Read the tokens from `begin` to `end` of a group of texts."""
        batch, count, size = self._batch, 0, end - begin
        sizes, wanted = list[int](), list[int]()
        for slot, place in enumerate(group):
            text, part = texts[place], slice(count, count + size)
            own = text.ids[begin:end]
            batch.tokens[part] = 0
            # behind its end a text is padded with token 0, whose outputs nobody asks for
            batch.tokens[count : count + len(own)] = own
            batch.positions[part] = np.arange(begin, end)
            batch.slots[part] = slot
            # what stands at a place tells about the next one
            asked = range(max(begin, text.first - 1), min(end, len(text.ids) - 1))
            batch.wanted[part] = [place in asked for place in range(begin, end)]
            sizes.append(len(asked))
            wanted += [text.ids[place + 1] for place in asked]
            count += size
        self._wanted = np.asarray(wanted, dtype=np.int32)
        self._context.decode(batch, count)
        ends = np.cumsum(sizes)
        # a piece may hold no asked token (a long prompt before the answer): it still has to be read into the cache
        found = self._tail.found().astype(np.float64) if wanted else np.zeros(0)
        for place, stop, length in zip(group, ends.tolist(), sizes, strict=True):
            if length:
                yield place, found[stop - length : stop]

    def _targets(self, _active: Mapping[int, list[int]], rows: int) -> Ints:
        """The tokens that are asked about, in the order of the batch's outputs."""
        assert len(self._wanted) == rows
        return self._wanted


def _logprobs(graph: Graph) -> Ends:
    """log softmax(x)[t] = x[t] - max x + log softmax(x)[argmax x]: the largest share never underflows."""
    targets = graph.given(I32)
    largest = graph.argmax(graph.logits)
    distance = graph.sub(graph.at(graph.logits, targets), graph.at(graph.logits, largest))
    return Ends(targets, graph.add(distance, graph.log(graph.at(graph.soft_max(), largest))))
