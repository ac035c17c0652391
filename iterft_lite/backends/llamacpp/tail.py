"""Operations at the end of llama.cpp's graph, over the logits of all rows at once.

llama.cpp lets a sampler add operations to its graph, for one row of logits: for 256 sequences that makes thousands of small
kernels a token. The row that a sampler is given is a view of all rows (`llm_graph_context::build_sampling`). So the first
sampler of a graph adds operations over the whole matrix here, and the others add none: a dozen kernels, whatever the number of
rows, and a number a row comes back instead of a vocabulary's logits.

How a graph is built: each sampler's `backend_reset`, then `backend_apply` once for each of its rows, or once with row 0 where
it has none; before a graph is computed, `backend_set_input` of each sampler that has rows. A graph may be computed again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import llama_cpp  # before numpy
import numpy as np
import numpy.typing as npt

from iterft_lite.errors import BackendError

F32, I32 = 0, 26  # ggml_type

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.int32]


class Tensor(ctypes.Structure):
    """The beginning of ggml.h's `ggml_tensor`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
    )


def _signatures() -> Mapping[str, Sequence[Any]]:
    """Arguments of ggml's functions after the context; all of them give a tensor."""
    tensor, integer, whole, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
    one, two = [tensor], [tensor, tensor]
    return {
        **dict.fromkeys(("argmax", "cumsum", "step", "log", "sum_rows"), one),
        **dict.fromkeys(("add", "sub", "mul", "get_rows"), two),
        "soft_max_ext": [tensor, tensor, real, real],
        "scale_bias": [tensor, real, real],
        "clamp": [tensor, real, real],
        "cast": [tensor, integer],
        "reshape_2d": [tensor, whole, whole],
        "reshape_3d": [tensor, whole, whole, whole],
        "view_1d": [tensor, whole, size],
        "view_2d": [tensor, whole, whole, size, size],
        "new_tensor_2d": [integer, whole, whole],
    }


def _library() -> Any:
    from llama_cpp._ggml import libggml

    for name, arguments in _signatures().items():
        function = getattr(libggml, f"ggml_{name}")
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *arguments]
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, arguments in (
        ("set_input", [pointer]),
        ("set_output", [pointer]),
        ("build_forward_expand", [pointer, pointer]),
        ("backend_tensor_set", [pointer, pointer, size, size]),
        ("backend_tensor_get", [pointer, pointer, size, size]),
    ):
        function = getattr(libggml, f"ggml_{name}")
        function.restype, function.argtypes = None, arguments
    return libggml


ggml = _library()


class Graph:
    """Adds operations to a graph; tensors are addresses.

    Args:
        context: ggml's, in which tensors are made.
        logits: All rows, float32 [rows, vocab].
    """

    def __init__(self, context: int, logits: int) -> None:
        self._context = context
        self.logits = logits
        shape = Tensor.from_address(logits).ne
        self.vocab, self.rows = int(shape[0]), int(shape[1])

    def __getattr__(self, name: str) -> Callable[..., int]:
        """ggml's operation of this name."""
        function = getattr(ggml, f"ggml_{name}")
        return lambda *arguments: cast(int, function(self._context, *arguments))

    def given(self, kind: int) -> int:
        """A tensor that is filled before each computation: a number a row, [1, rows] in ggml's order of dimensions."""
        made = self.new_tensor_2d(kind, 1, self.rows)
        ggml.ggml_set_input(made)
        return made

    def soft_max(self, scale: float = 1.0) -> int:
        """Probabilities of logits times `scale`."""
        return self.soft_max_ext(self.logits, None, scale, 0.0)

    def at(self, values: int, columns: int) -> int:
        """One value of each row, [1, rows].

        Args:
            values: float32 [rows, vocab].
            columns: int32, one a row.
        """
        found = self.get_rows(self.reshape_3d(values, 1, self.vocab, self.rows), self.reshape_2d(columns, 1, self.rows))
        return self.reshape_2d(found, 1, self.rows)


@dataclass(frozen=True)
class Ends:
    """Where numbers go into added operations and come out, 4 bytes a row; `given` is None where nothing goes in."""

    given: int | None
    found: int


class Tail:
    """A chain for each slot of a context, whose operations are added for all of them together.

    Args:
        context: llama.cpp's; the chains stay attached until `close`.
        slots: Sequences.
        add: Adds the operations.
        feed: What goes into them: takes for each slot with outputs its rows, gives a number a row.
        tokens: What comes out are tokens: llama.cpp keeps them for each row of a batch, whatever number of graphs computed it.
            Otherwise `found` reads what the last graph gave.

    Raises:
        BackendError: If the device takes no samplers.
    """

    def __init__(
        self,
        context: Any,
        slots: int,
        add: Callable[[Graph], Ends],
        feed: Callable[[Mapping[int, list[int]], int], Numbers],
        *,
        tokens: bool,
    ) -> None:
        self._context = context
        self._add, self._feed, self._tokens = add, feed, tokens
        self._ends: Ends | None = None
        self._count = 0
        self._rows: dict[int, list[int]] = {}
        self._active: dict[int, list[int]] = {}
        self._filled = 0
        self._interface = self._callbacks()
        self._chains: list[Any] = []
        for slot in range(slots):
            self._chains.append(self._chain(slot))
            if not llama_cpp.llama_set_sampler(context, slot, self._chains[-1]):
                self.close()
                raise BackendError(
                    "this device adds nothing to llama.cpp's graph", exception="sampling", hint='set sampling to "host"'
                )

    def found(self) -> npt.NDArray[np.float32]:
        """What came out of the last graph that was computed, a number a row, float32 [rows]."""
        made = np.empty(self._count, dtype=np.float32)
        if self._ends is not None and self._count:
            ggml.ggml_backend_tensor_get(self._ends.found, made.ctypes.data, 0, made.nbytes)
        return made

    def close(self) -> None:
        """Detach the chains and free them."""
        for slot, chain in enumerate(self._chains):
            llama_cpp.llama_set_sampler(self._context, slot, None)
            llama_cpp.llama_sampler_free(chain)
        self._chains = []

    def _chain(self, slot: int) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        # 0 would be no address
        link = llama_cpp.llama_sampler_init(ctypes.byref(self._interface), ctypes.c_void_p(slot + 1))
        llama_cpp.llama_sampler_chain_add(chain, link)
        return chain

    def _callbacks(self) -> Any:
        kinds: dict[str, Any] = dict(llama_cpp.llama_sampler_i._fields_)
        return llama_cpp.llama_sampler_i(
            name=kinds["name"](lambda _: b"tail"),
            apply=kinds["apply"](lambda *_: None),
            backend_init=kinds["backend_init"](lambda *_: True),
            backend_reset=kinds["backend_reset"](self._reset),
            backend_apply=kinds["backend_apply"](self._apply),
            backend_set_input=kinds["backend_set_input"](self._set_input),
        )

    def _reset(self, _link: Any) -> None:
        self._ends = None
        self._rows, self._active, self._filled = {}, {}, 0

    def _apply(self, link: Any, context: int, graph: int, data: Any) -> None:
        row = data.contents
        view = Tensor.from_address(row.logits)
        # Whatever stays set here is copied to the host for each row: 0.6 MB of logits at a vocabulary of 150,000.
        row.logits = row.probs = row.candidates = None
        if not view.view_src:  # llama.cpp counts the operations of a chain
            row.sampled = self._add(Graph(context, ctypes.addressof(view))).found
            return
        whole = Tensor.from_address(view.view_src)
        if self._ends is None:
            # the rows are padded by one, which nothing here needs
            added = Graph(context, whole.src[0])
            self._ends, self._count = self._add(added), added.rows
            ggml.ggml_set_output(self._ends.found)
            # nothing else in the graph reads the result: without this it would not be computed
            ggml.ggml_build_forward_expand(graph, self._ends.found)
        # the offset of the view in bytes over the bytes of a row says which row this sampler was given
        place = view.view_offs // whole.nb[1]
        # A slot may have several rows (a reading context asks at many positions). Which slot is calling is the link's context.
        self._rows.setdefault(link.contents.ctx - 1, []).append(place)
        row.sampled = ggml.ggml_view_1d(context, self._ends.found, 1, 4 * place) if self._tokens and self._count else None

    def _set_input(self, link: Any) -> None:
        slot = link.contents.ctx - 1
        # llama.cpp calls once for each sampler with rows. Numbers are known only when the last of them has called: all rows are
        # filled then, in one copy.
        self._active[slot] = self._rows[slot]
        self._filled += len(self._rows[slot])
        if self._filled < self._count:
            return
        if self._ends is not None and self._ends.given is not None:
            numbers = self._feed(self._active, self._count)
            ggml.ggml_backend_tensor_set(self._ends.given, numbers.ctypes.data, 0, numbers.nbytes)
        self._active, self._filled = {}, 0
