"""Forward and backward passes recorded as CUDA graphs: a step is then one launch instead of thousands.

At the paper's batch of 2 rows a step's arithmetic takes a quarter of the time in which Python launches its kernels. A graph is
recorded once for each shape and launched as a whole afterwards. It reads and writes memory where it was when it was recorded:
inputs are copied there, weights and gradients have to stay (see `loop.join` and `adapters.set_adapter`). Rows are padded to
even lengths, so that there are few shapes; the padding is behind the text and outside of the loss.

What a recording needs is in the CUDA C++ Programming Guide, "CUDA Graphs", and in torch's notes on `torch.cuda.graph`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from iterft_lite.backends.trainer.encoding import IGNORED
from iterft_lite.backends.trainer.resident import first_line

Batch = dict[str, torch.Tensor]
Passes = Callable[[Batch], dict[str, torch.Tensor]]

EVEN = 64
"""Lengths of recorded batches are multiples of so many tokens."""

MOST = 40
"""Shapes that are recorded; what comes after is launched kernel by kernel."""

SWITCH = "ITERFT_CUDA_GRAPHS"
"""Environment variable: 0 launches every kernel by itself."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    found: dict[str, torch.Tensor]


class Graphs:
    """Runs passes: the first of a shape as they are, the second recorded, all later ones repeated from the recording.

    Args:
        device: The GPU.
        longest: Tokens that a row may have at most.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        self._device, self._longest = device, longest
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._weights: list[tuple[int, int]] = []
        self._pool = torch.cuda.graph_pool_handle()
        self.failure = "" if os.environ.get(SWITCH, "1") != "0" else f"{SWITCH}=0"

    def __len__(self) -> int:
        """Shapes that are recorded."""
        return len(self._recorded)

    def begin(self, weights: Sequence[torch.Tensor]) -> None:
        """A training begins: recordings that read or write elsewhere than these weights and gradients are are dropped."""
        # A graph holds addresses, not tensors. Replayed after a weight has moved, it would train memory that nobody reads,
        # silently.
        places = [(weight.data_ptr(), weight.grad.data_ptr() if weight.grad is not None else 0) for weight in weights]
        if places != self._weights:
            self.clear()
            self._weights = places

    def clear(self) -> None:
        """Drop every recording with its memory."""
        self._recorded.clear()
        self._met.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def even(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """A batch padded on the right to an even length."""
        return stretched(batch, EVEN, self._longest)

    def run(self, kind: Hashable, passes: Passes, batch: Batch) -> dict[str, torch.Tensor]:
        """What `passes` gives for a batch on the GPU; its numbers are valid until the next call.

        Args:
            kind: What tells passes apart that differ in more than their batch.
            passes: Launches kernels only: it never waits for the GPU, and it keeps nothing.
            batch: Tensors on the GPU.
        """
        shape = (kind, *((name, tuple(value.shape), value.dtype) for name, value in sorted(batch.items())))
        recorded = self._recorded.get(shape)
        # A shape is run once before it is recorded: the first run allocates, compiles and picks kernels, which a recording must
        # not.
        if recorded is None and shape in self._met and not self.failure and len(self._recorded) < MOST:
            recorded = self._record(shape, passes, batch)
        if recorded is None:
            self._met.add(shape)
            return self._beside(passes, batch)
        for name, value in batch.items():
            # the graph reads its own input tensors
            recorded.inputs[name].copy_(value)
        recorded.graph.replay()
        return recorded.found

    def _beside(self, passes: Passes, batch: Batch) -> dict[str, torch.Tensor]:
        """Launch on the stream that recordings are made on: what autograd prepares belongs to a stream."""
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            found = passes(batch)
        # both streams wait for each other: this one reads what the other has written before, and gives back what it made
        before.wait_stream(self._stream)
        return found

    def _record(self, shape: Hashable, passes: Passes, batch: Batch) -> _Recorded | None:
        """Record, which launches nothing; None where the model does something that cannot be recorded."""
        inputs = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                # All graphs share one pool: they never run at the same time, so the memory of one's activations is the next
                # one's.
                found = passes(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)
            # a model that cannot be recorded once is not tried again: it runs kernel by kernel from here on
            self.failure = first_line(error)
            self._recorded.clear()
            return None
        self._recorded[shape] = _Recorded(graph, inputs, found)
        return self._recorded[shape]


def stretched(batch: Mapping[str, torch.Tensor], even: int, longest: int) -> Batch:
    """A batch whose rows are padded on the right to a multiple of `even` tokens, or to `longest`; other columns stay."""
    made = {}
    for name, value in batch.items():
        more = 0 if value.ndim < 2 else max(0, min(-(-value.shape[1] // even) * even, longest) - value.shape[1])
        made[name] = torch.nn.functional.pad(value, (0, more), value=IGNORED if name == "labels" else 0) if more else value
    return made
