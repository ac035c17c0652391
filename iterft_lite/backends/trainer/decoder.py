"""A decoder's layers forwards and backwards, written out, for training on a CPU.

Of a small model's step half is not arithmetic: transformers' modules and autograd make some 4,000 small passes over memory,
each launched from Python. What every Llama-like layer does is written here as one function of the residual stream x and its
gradient g, with passes joined and results laid where they are read next. With n(.) a norm without its weight, P[.] a group of
projections (`products.Group`) and R a rotation by position:

    forwards                                         backwards
    a = P[q k v](n(x) * w1)                          d  = P[gate up]'(silu'(P[down]'(g)))
    q, k = R(n(a_q) * wq), R(n(a_k) * wk)            g += n'(d * w2)
    x = x + P[o](attention of each row(q, k, v))     d  = P[q k v]'(R'(attention'(P[o]'(g))))
    b = P[gate up](n(x) * w2)                        g += n'(d * w1)
    x = x + P[down](silu(b_gate) * b_up)

Rows know nothing of each other: each core takes some of them through all layers, and their gradients are added up. A core then
waits for the others twice a step, not at every product.

(Vaswani et al. 2017; Zhang and Sennrich 2019, RMSNorm; Shazeer 2020, SwiGLU; Su et al. 2021, RoPE.) The residual stream, norms,
rotations and scores are float32; factors of products have the types that `Factors` says. A model is taken only if its own code
gives the same hidden states: what its layers do is never guessed from its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from iterft_lite.backends.trainer.logprobs import Head
from iterft_lite.backends.trainer.packing import LONG, Cache, Rows, attend, attend_back
from iterft_lite.backends.trainer.products import Factors, Group, Products, evened, evened_back, is_rms_norm

EVEN = 16
"""Rows are padded to multiples of so many tokens. For every shape of a product that it has not seen oneDNN writes a kernel, a
millisecond or two each: with rows as they come no two steps had shapes in common, and a third of a training went there."""

CLOSE = 1e-4
"""Share of the largest number by which hidden states may differ from those of the model's own code."""


class Decoder:
    """The layers of a PEFT model, computed by this module. `Decoder.of` tells whether a model's can be.

    Args:
        model: The PEFT model, in float32.
        products: Of the model.
        cores: Rows are shared out among so many.
    """

    def __init__(self, model: Any, products: Products, cores: int = 1) -> None:
        own = model.get_base_model().get_decoder()
        groups = {id(layer): group for group in products.groups for layer in group.layers}
        self._embed, self._rotary, self.norm = own.embed_tokens, own.rotary_emb, own.norm
        self.layers = [_Layer.of(layer, groups) for layer in own.layers]
        self._products, self._cores = products, cores
        self._threads = ThreadPoolExecutor(cores, "rows", torch.set_num_threads, (1,))
        self._refresh: tuple[Factors, Callable[..., None]] | None = None
        self._weights = [weight for layer in self.layers for group in layer.groups for weight in group.weights]

    @classmethod
    def of(cls, model: Any, products: Products, cores: int = 1) -> Decoder | None:
        """That of a model, or None if its layers are others than these.

        Args:
            model: The PEFT model, in float32, as `Products` takes it.
            products: Of the model; not laid.
            cores: As of the class.
        """
        try:
            made = cls(model, products, cores)
            return made if made._agrees(model) else None
        except (AttributeError, KeyError, ValueError, RuntimeError, TypeError):
            return None

    def states(self, ids: torch.Tensor, lengths: Sequence[int], factors: Factors) -> torch.Tensor:
        """Last hidden states, float32 [tokens, width], of rows that stand one after the other.

        Args:
            ids: int64 [rows, tokens], padded on the right.
            lengths: Tokens of each row that are wanted.
            factors: Types of the factors of products.
        """
        self._renew(factors)
        given = [_evenly(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        keep = torch.is_grad_enabled()
        found: torch.Tensor = _Layers.apply(given, lengths, self, factors, keep, *self._weights)  # type: ignore[no-untyped-call]
        return found

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, head: Callable[[torch.Tensor], torch.Tensor], rounded: torch.dtype
    ) -> list[list[int]]:
        """The likeliest tokens after each prompt, on one core: a token of a few rows is not worth two.

        Args:
            prompts: Token ids.
            count: How many tokens.
            head: Logits of last hidden states.
            rounded: Type of the factors of products.
        """
        factors = Factors(rounded)
        self._renew(factors)
        (made,) = self.each([lambda: self._greedy([torch.tensor(prompt) for prompt in prompts], count, head, factors)])
        return cast(list[list[int]], made)

    def remembers(self, tokens: int) -> bool:
        """Whether `greedy` can do rows of so many tokens: every layer looks at all of them, and keeps what it saw."""
        return tokens <= LONG and all(layer.window is None or layer.window >= tokens for layer in self.layers)

    def _greedy(
        self, rows: list[torch.Tensor], count: int, head: Callable[[torch.Tensor], torch.Tensor], factors: Factors
    ) -> list[list[int]]:
        lengths = torch.tensor([len(row) for row in rows])
        passes = _Passes(self, rows, factors)
        states = passes.forward()[lengths.cumsum(0) - 1]
        caches = [Cache(kept, lengths, count) for kept in passes.seen()]
        made = [head(states).argmax(-1)]
        for step in range(count - 1):
            x, turn = self.begin(made[-1], lengths + step)
            for layer, cache in zip(self.layers, caches, strict=True):
                _Step(layer, cache, turn, factors).forward(x)
            made.append(head(evened(x, self.norm.variance_epsilon)[0] * self.norm.weight).argmax(-1))
        return cast(list[list[int]], torch.stack(made, 1).tolist())

    def begin(self, ids: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Embeddings float32 [tokens, width] of token ids, and cosine and sine of their positions, [tokens, 1, head width]."""
        given = self._embed(ids).float()
        cosine, sine = self._rotary(given, places[None])
        return given, (cosine[0, :, None].float(), sine[0, :, None].float())

    def _renew(self, factors: Factors) -> None:
        """Have products take the adapter as it is now."""
        if self._refresh is None or self._refresh[0] != factors:
            self._refresh = factors, self._products.refreshed(factors)
        self._refresh[1]()

    def each(self, work: Iterable[Callable[[], Any]]) -> list[Any]:
        """What each of some calls gives, made side by side."""
        return [made.result() for made in [self._threads.submit(torch.no_grad()(call)) for call in work]]

    def shared_out(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers for each core, about as many tokens for each: the longest row first, to who has least."""
        parts: list[list[int]] = [[] for _ in range(min(self._cores, len(lengths)))]
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            min(parts, key=lambda part: sum(lengths[each] for each in part)).append(row)
        return parts

    @torch.no_grad()
    def _agrees(self, model: Any) -> bool:
        own = model.get_base_model().get_decoder()
        ids = torch.arange(2 * 9).reshape(2, 9) * 31 % self._embed.num_embeddings
        lengths = (9, 4)
        turns = self._rotary(self._embed(ids), torch.arange(9)[None])
        if any(not torch.equal(*turn.chunk(2, -1)) for turn in turns):
            return False  # `_turned` turns back only where both halves of a head have the same angles
        expected = torch.cat([own(input_ids=row[None, :n], use_cache=False)[0][0] for row, n in zip(ids, lengths, strict=True)])
        # two rows of different lengths, one of them cut: a mask or a position that is off by one shows here
        made = self.states(ids, lengths, Factors())
        return made.shape == expected.shape and bool((made - expected).abs().max() <= CLOSE * expected.abs().max())  # NaN: no


@dataclass(frozen=True)
class Reading:
    """A decoder as texts are read with it (a `likelihoods.Read`).

    Attributes:
        decoder: With what is laid on its layers.
        end: What makes logits of its states.
        factors: Types of the factors of products.
    """

    decoder: Decoder
    end: Head
    factors: Factors

    @torch.no_grad()
    def states(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """See `likelihoods.Read`."""
        found = self.decoder.states(ids, lengths, self.factors)
        made = found.new_zeros(*ids.shape, found.shape[-1])
        made[torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]] = found
        return made

    def head(self) -> Head:
        """What makes logits of them."""
        return self.end


@dataclass(frozen=True)
class _Layer:
    """What a layer is made of.

    Attributes:
        before, between: Norms of the residual stream, before attention and before the feed-forward part.
        qkv, o, gate_up, down: Its projections.
        heads, shared, width: Query heads, key and value heads, and the width of each.
        scaling: Of scores.
        head_norm: Weight [heads + shared, width] and epsilon of the norm of each query and key; None: there is none.
        window: See `Rows`.
    """

    before: Any
    between: Any
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    heads: int
    shared: int
    width: int
    scaling: float
    head_norm: tuple[torch.Tensor, float] | None
    window: int | None

    @classmethod
    def of(cls, layer: Any, groups: dict[int, Group]) -> _Layer:
        """The parts of one of transformers' layers.

        Raises:
            AttributeError, KeyError, ValueError: If it has others.
        """
        attention, mlp = layer.self_attn, layer.mlp
        qkv, o, gate_up, down = (
            groups[id(part)] for part in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
        )
        width = attention.head_dim
        heads, shared = (part.out_features // width for part in (attention.q_proj, attention.k_proj))
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        head_norm = None
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
            weights = [norms[2].weight.expand(heads, -1), norms[3].weight.expand(shared, -1)]
            head_norm = torch.cat(weights).detach(), float(norms[2].variance_epsilon)
        shapes = [len(group.layers) for group in (qkv, o, gate_up, down)]
        if shapes != [3, 1, 2, 1] or not all(map(is_rms_norm, norms)) or not _is_silu(mlp.act_fn):
            raise ValueError("other parts than a Llama-like layer's")
        # Mistral's layers ask the configuration, others know their own
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        return cls(norms[0], norms[1], qkv, o, gate_up, down, heads, shared, width, attention.scaling, head_norm, window)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class _Layers(torch.autograd.Function):
    """All layers and the last norm; gradients of the adapters alone: embeddings are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        given: list[torch.Tensor],
        lengths: Sequence[int],
        decoder: Decoder,
        factors: Factors,
        keep: bool,
        *_: torch.Tensor,
    ) -> torch.Tensor:
        padded = [len(row) for row in given]
        shares = decoder.shared_out(padded)
        ctx.decoder, ctx.lengths, ctx.shares = decoder, lengths, shares
        ctx.passes = [_Passes(decoder, [given[row] for row in share], factors, keep=keep) for share in shares]
        made = decoder.each(each.forward for each in ctx.passes)
        rows: dict[int, torch.Tensor] = {}
        for part, share in zip(made, shares, strict=True):
            rows |= zip(share, torch.split(part, [padded[row] for row in share]), strict=True)
        return torch.cat([rows[row][:length] for row, length in enumerate(lengths)])

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows = [_evenly(row) for row in torch.split(slopes[0], list(ctx.lengths))]
        parts = [torch.cat([rows[row] for row in share]) for share in ctx.shares]
        made = ctx.decoder.each(partial(each.backward, part) for each, part in zip(ctx.passes, parts, strict=True))
        for more in made[1:]:
            torch._foreach_add_(made[0], more)
        return (None, None, None, None, None, *made[0])


class _Passes:
    """Some rows' way through all layers and back.

    Args:
        decoder: Whose layers.
        rows: Token ids of each, int64 [tokens].
        factors: Types of the factors of products.
        keep: What `backward` and `seen` need; else a layer's memory is free for the next one.
    """

    def __init__(self, decoder: Decoder, rows: Sequence[torch.Tensor], factors: Factors, *, keep: bool = True) -> None:
        self._decoder, self._rows, self._factors, self._keep = decoder, rows, factors, keep
        self._kept: list[_Pass] = []

    def forward(self) -> torch.Tensor:
        """Last hidden states, float32 [tokens, width]."""
        places = torch.cat([torch.arange(len(row)) for row in self._rows])
        x, turn = self._decoder.begin(torch.cat(list(self._rows)), places)
        lengths = tuple(map(len, self._rows))
        for layer in self._decoder.layers:
            through = _Pass(layer, Rows(lengths, layer.window), turn, self._factors)
            through.forward(x)
            if self._keep:
                self._kept.append(through)
        norm = self._decoder.norm
        self._end = evened(x, norm.variance_epsilon)
        made: torch.Tensor = self._end[0] * norm.weight
        return made

    def seen(self) -> list[list[Any]]:
        """What `attend` kept of each row, for each layer."""
        return [kept.seen for kept in self._kept]

    def backward(self, slope: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the adapters' weights in the order of the layers, from that of the states."""
        g = evened_back(slope * self._decoder.norm.weight, *self._end)
        made: list[torch.Tensor] = []
        while self._kept:  # each layer's memory is free for the one before it
            made = self._kept.pop().backward(g, further=bool(self._kept)) + made
        return made


class _Pass:
    """One layer's pass over one batch: forwards, then backwards.

    Args:
        layer: The layer.
        rows: Of the batch, as this layer sees them.
        turn: Cosine and sine of each position, float32 [tokens, 1, width].
        factors: Types of the factors of products.
    """

    def __init__(self, layer: _Layer, rows: Rows, turn: tuple[torch.Tensor, torch.Tensor], factors: Factors) -> None:
        self._layer, self._rows, self._turn, self._factors = layer, rows, turn, factors

    def forward(self, x: torch.Tensor) -> None:
        """Add what the layer makes to the residual stream, float32 [tokens, hidden], in place."""
        self._attention(x)
        self._feed_forward(x)

    def backward(self, g: torch.Tensor, *, further: bool) -> list[torch.Tensor]:
        """Gradients of the adapter's weights, in the order of the groups; `g` becomes that of the layer's input if wanted."""
        later = self._feed_forward_back(g)
        return self._attention_back(g, further) + later

    def _normed(self, x: torch.Tensor, norm: Any, group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The norm of x as the input of a group's products, and `evened`'s two."""
        even, inverse = evened(x, norm.variance_epsilon)
        wide = group.room(len(x), self._factors.forward)
        torch.mul(even, norm.weight, out=wide[:, : group.width])
        return wide, even, inverse

    def _kept(self, made: torch.Tensor) -> torch.Tensor:
        return made.to(self._factors.backward)

    # -- attention

    def _attention(self, x: torch.Tensor) -> None:
        layer, tokens = self._layer, len(x)
        wide, *norm = self._normed(x, layer.before, layer.qkv)
        a = layer.qkv.made(wide)
        self._before = self._kept(wide), *norm
        heads = layer.heads + layer.shared
        split = heads * layer.width
        asked = a[:, :split].view(tokens, heads, layer.width).float()
        if layer.head_norm is None:
            turned = asked
        else:
            self._even, self._inverse = evened(asked, layer.head_norm[1])
            turned = self._even * layer.head_norm[0]
        turned = _turned(turned, *self._turn)
        turned[:, : layer.heads] *= layer.scaling
        wide = layer.o.room(tokens, self._factors.forward)
        out = wide[:, : layer.o.width].view(tokens, layer.heads, layer.width)
        value = a[:, split:].view(tokens, layer.shared, layer.width)
        self.seen = self._attend(turned[:, : layer.heads], turned[:, layer.heads :], value, out)
        x += layer.o.made(wide)
        self._attended = self._kept(wide)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> list[Any]:
        return attend(query, key, value, self._rows, self._factors, out)

    def _attention_back(self, g: torch.Tensor, further: bool) -> list[torch.Tensor]:
        layer, tokens, dtype = self._layer, len(g), self._factors.backward
        d, later = layer.o.back(self._attended, g.to(dtype))
        assert d is not None
        heads = layer.heads + layer.shared
        slope = torch.empty(tokens, layer.qkv.outs, dtype=dtype)
        turned = torch.empty(tokens, heads, layer.width)
        value = slope[:, heads * layer.width :].view(tokens, layer.shared, layer.width)
        attend_back(
            d.view(tokens, layer.heads, layer.width),
            self._rows,
            self.seen,
            turned[:, : layer.heads],
            turned[:, layer.heads :],
            value,
        )
        turned[:, : layer.heads] *= layer.scaling
        cosine, sine = self._turn
        asked = _turned(turned, cosine, -sine)
        if layer.head_norm is not None:
            asked = evened_back(asked.mul_(layer.head_norm[0]), self._even, self._inverse)
        slope[:, : heads * layer.width].view(tokens, heads, layer.width).copy_(asked)
        d, made = layer.qkv.back(self._before[0], slope, further=further)
        if d is not None:
            g += evened_back(d * layer.before.weight, *self._before[1:])
        return made + later

    # -- feed-forward

    def _feed_forward(self, x: torch.Tensor) -> None:
        layer = self._layer
        wide, *norm = self._normed(x, layer.between, layer.gate_up)
        b = layer.gate_up.made(wide)
        self._between = self._kept(wide), *norm
        gate, up = b[:, : layer.down.width], b[:, layer.down.width :]
        wide = layer.down.room(len(x), self._factors.forward)
        opened = torch.nn.functional.silu(gate)
        torch.mul(opened, up, out=wide[:, : layer.down.width])
        x += layer.down.made(wide)
        self._gated, self._opened, self._acted = self._kept(b), self._kept(opened), self._kept(wide)

    def _feed_forward_back(self, g: torch.Tensor) -> list[torch.Tensor]:
        layer = self._layer
        d, later = layer.down.back(self._acted, g.to(self._factors.backward))
        assert d is not None
        gate, up = self._gated[:, : layer.down.width], self._gated[:, layer.down.width :]
        slope = torch.empty_like(self._gated)
        torch.mul(d, self._opened, out=slope[:, layer.down.width :])
        torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=slope[:, : layer.down.width])
        d, made = layer.gate_up.back(self._between[0], slope)
        assert d is not None
        g += evened_back(d * layer.between.weight, *self._between[1:])
        return made + later


class _Step(_Pass):
    """One layer's pass over the next token of each row.

    Args:
        layer: The layer.
        cache: Of its keys and values.
        turn, factors: See `_Pass`.
    """

    def __init__(self, layer: _Layer, cache: Cache, turn: tuple[torch.Tensor, torch.Tensor], factors: Factors) -> None:
        super().__init__(layer, Rows((1,), layer.window), turn, factors)
        self._cache = cache

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> list[Any]:
        self._cache.add(key, value)
        out.copy_(self._cache.seen_by(query))
        return []


def _evenly(row: torch.Tensor) -> torch.Tensor:
    """A row with zeros behind its end, to a multiple of `EVEN`: causal attention does not look there, and no gradient comes."""
    return torch.cat([row, row.new_zeros(-len(row) % EVEN, *row.shape[1:])])


def _turned(given: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Pairs of numbers, half a head apart, turned by an angle each. Su et al. 2021, equation 34.

    Args:
        given: float32 [tokens, heads, width].
        cosine, sine: Of the angles, [tokens, 1, width], both halves alike. The sine's negative turns back.
    """
    half = given.shape[-1] // 2
    made = given * cosine
    made[..., :half].addcmul_(given[..., half:], sine[..., half:], value=-1)
    made[..., half:].addcmul_(given[..., :half], sine[..., half:])
    return made


def _is_silu(function: Any) -> bool:
    tried = torch.linspace(-4, 4, 33)
    return torch.equal(function(tried), torch.nn.functional.silu(tried))
