"""A frozen base's matrix products with an adapter on them, as a CPU computes them fast.

Of a training step on a CPU nine tenths are matrix products. What PEFT's layers leave on the table there:

- **Precision.** CPUs with bf16 instructions (AVX512-BF16, AMX) multiply bf16 numbers at twice to four times the speed of
  f32, and sum the products in f32. Base and adapter stay in f32, as do moments, norms, attention, the residual stream and the
  output matrix; only the factors of a projection's product are rounded. (Micikevicius et al. 2018, "Mixed Precision
  Training"; bf16 has f32's range, so that gradients need no scale.)
- **Launches and passes over memory.** Projections that read the same input are one product: q, k and v; gate and up. The
  adapter rides along as more columns: with x widened by its low-rank image h = s x A^T,

      y = x W^T + h B^T = [x | h] [W | B]^T        forwards, one product after h
      [dx0 | dh] = dy [W | B]                      backwards, one product
      dx = dx0 + s dh A,  dA = s dh^T x,  dB = dy^T h

  The base is frozen: nothing is computed for W. Where x needs no gradient (the first layer) dh alone is.

Projections are recognised as PEFT layers over plain linear ones; siblings share a product where they are called with the very
same tensor, so that the order in which an architecture calls them does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that read the same input in most architectures."""


@dataclass(frozen=True)
class Factors:
    """Types that the factors of products are rounded to, in either pass."""

    forward: torch.dtype = torch.float32
    backward: torch.dtype = torch.float32


class Products:
    """Projections of a PEFT model, computed together and in a precision of choice while this is on.

    The base's weights become views of the widened matrices [W | B]: in float32 nothing is held twice.

    Args:
        model: The PEFT model, its base in float32; its adapter is "default".
    """

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_base_model().get_decoder()
        self.groups = [Group(layers) for layers in _siblings(model)]
        self._norms = [module for module in model.modules() if is_rms_norm(module)]
        self._hook: Any = None

    def lay(self, factors: Factors | None) -> None:
        """Lay the products over the model's layers, or take them away (None): the layers are then PEFT's, and exact."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for group in self.groups:
            group.lay(factors)
        for norm in self._norms:
            vars(norm).pop("forward", None)
            if factors is not None:
                norm.forward = _norm_forward(norm)
        if factors is not None:
            self._hook = self._decoder.register_forward_pre_hook(self.refreshed(factors))

    def refreshed(self, factors: Factors) -> Callable[..., None]:
        """What writes the adapter, as it is when a forward pass begins, into the groups' matrices."""
        parts = [part for dtype in {factors.forward, factors.backward} for group in self.groups for part in group.parts(dtype)]
        places, weights = ([part[side] for part in parts] for side in (0, 1))

        @torch.no_grad()
        def refresh(*_: Any) -> None:
            if places:  # a model may have no projection of the kind that is grouped
                torch._foreach_copy_(places, weights)

        return refresh


def _siblings(model: Any) -> Iterator[list[LoraLinear]]:
    """The projections of each parent that are computed together, in the order of their names in `SIBLINGS`."""
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if _is_projection(child)}
        for names in SIBLINGS:
            if set(names) <= set(children):
                yield [children.pop(name) for name in names]
        for child in children.values():
            yield [child]


def _is_projection(module: torch.nn.Module) -> bool:
    """Whether a module is a plain linear one under a plain LoRA adapter."""
    return (
        isinstance(module, LoraLinear)
        and type(module.base_layer) is torch.nn.Linear
        and module.base_layer.weight.dtype == torch.float32
        and set(module.lora_A) == {"default"}
        and not module.lora_variant
        and module.lora_B["default"].bias is None
    )


class Group:
    """Projections of one input.

    Args:
        layers: Each [out, width], with an adapter of its own.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers, self.factors = layers, Factors()
        self.width = layers[0].in_features
        self.sizes = [layer.out_features for layer in layers]
        self.ranks = [layer.r["default"] for layer in layers]
        (self.scale,) = {float(layer.scaling["default"]) for layer in layers}
        biases = [layer.base_layer.bias for layer in layers]
        self.bias = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])
        self._matrices: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._asked: set[int] = set()
        wide, _ = self._make(torch.float32)
        for layer, rows in zip(layers, slices(self.sizes), strict=True):
            # the layer's own weight becomes a view of the widened matrix, so that float32 weights are held once
            layer.base_layer.weight.data = wide[rows, : self.width]

    def lay(self, factors: Factors | None) -> None:
        """Have the layers compute through this group, or by themselves."""
        self._forget()
        self.factors = factors or Factors()
        for place, layer in enumerate(self.layers):
            vars(layer).pop("forward", None)
            if factors is not None:
                layer.forward = self._forward_of(place)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """A and B of each layer in turn."""
        return [side["default"].weight for layer in self.layers for side in (layer.lora_A, layer.lora_B)]

    def matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[W | B] [outs, width + ranks] and A [ranks, width]."""
        return self._matrices.get(dtype) or self._make(dtype)

    def parts(self, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight of the adapter, after the place that it has in the matrices."""
        wide, low = self.matrices(dtype)
        weights = self.weights
        places = zip(slices(self.sizes), slices(self.ranks), weights[::2], weights[1::2], strict=True)
        for rows, columns, a, b in places:
            yield low[columns], a
            yield wide[rows, self.width :][:, columns], b

    def _make(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for both matrices, W filled in; the parts of [W | B] that belong to no layer's own pair stay zero."""
        device = self.layers[0].base_layer.weight.device
        wide = torch.zeros(sum(self.sizes), self.width + sum(self.ranks), dtype=dtype, device=device)
        for layer, rows in zip(self.layers, slices(self.sizes), strict=True):
            # W never changes: it is copied once for each type. Only the adapter's columns are refreshed, before every forward
            # pass.
            wide[rows, : self.width].copy_(layer.base_layer.weight.detach())
        self._matrices[dtype] = (wide, torch.zeros(sum(self.ranks), self.width, dtype=dtype, device=device))
        return self._matrices[dtype]

    @property
    def outs(self) -> int:
        """Width of the common product."""
        return sum(self.sizes)

    @property
    def bare(self) -> bool:
        """The adapter is turned off."""
        return bool(self.layers[0].disable_adapters)

    def room(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for the widened input x, [tokens, width + ranks]; the caller fills the first `width` columns."""
        return torch.empty(tokens, self.width + sum(self.ranks), dtype=dtype, device=self.layers[0].base_layer.weight.device)

    def made(self, wide: torch.Tensor) -> torch.Tensor:
        """The common product y [tokens, outs], biases added; fills the rest of `wide`."""
        matrix, low = self.matrices(wide.dtype)
        given = wide[:, : self.width]
        if self.bare:
            made = given @ matrix[:, : self.width].T
        else:
            # [x | h] in place: h goes straight into the columns behind x, and one product makes all outputs
            torch.mm(given, low.T, out=wide[:, self.width :]).mul_(self.scale)
            made = wide @ matrix.T
        return made if self.bias is None else made.add_(self.bias)

    def back(
        self, wide: torch.Tensor, slope: torch.Tensor, *, further: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of x [tokens, width], and in float32 of A and B of each layer in turn.

        Args:
            wide: As `made` left it.
            slope: Of y, of the same type.
            further: That of x is wanted.
        """
        matrix, low = self.matrices(wide.dtype)
        first = None
        if further:
            # dy [W | B] gives the part of dx that goes through W, and dh behind it
            both = slope @ matrix
            inner = both[:, self.width :].mul_(self.scale)
            first = torch.addmm(both[:, : self.width], inner, low)
        else:
            # nobody reads dx in the first layer: the product with W is left out
            inner = (slope @ matrix[:, self.width :]).mul_(self.scale)
        given, images = wide[:, : self.width], wide[:, self.width :]
        # dA of all layers in one product; dB needs one for each, since a layer's B only meets its own part of h
        lows = (inner.T @ given).float()
        made: list[torch.Tensor] = []
        for rows, columns in zip(slices(self.sizes), slices(self.ranks), strict=True):
            made += [lows[columns], (slope[:, rows].T @ images[:, columns]).float()]
        return first, made

    def _forward_of(self, place: int) -> Callable[..., torch.Tensor]:
        def forward(given: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            # The first sibling to be called computes for all of them. "Very same tensor" is tested by identity, and a layer
            # that asks twice belongs to another pass (activations that are recomputed, say): both begin a new product.
            if self._input is not given or place in self._asked:
                self._outputs, self._input = self._compute(given), given
                self._asked.clear()
            made = self._outputs[place]
            self._asked.add(place)
            # the last sibling has its part: keep neither input nor outputs alive until the next pass
            if len(self._asked) == len(self.layers):
                self._forget()
            return made

        return forward

    def _forget(self) -> None:
        self._input, self._outputs = None, ()
        self._asked.clear()

    def _compute(self, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = _Product.apply(given, self, *self.weights)  # type: ignore[no-untyped-call]
        return found


class _Product(torch.autograd.Function):
    """y = [x | s x A^T] [W | B]^T, split into the layers' outputs; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, group: Group, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = given.reshape(-1, group.width)
        wide = group.room(len(flat), group.factors.forward)
        wide[:, : group.width].copy_(flat)
        made = group.made(wide).to(given.dtype)
        ctx.group, ctx.shape = group, given.shape
        # [x | h] is all that the backward pass reads: x for dA, h for dB
        ctx.save_for_backward(wide.to(group.factors.backward))
        return torch.split(made.view(*given.shape[:-1], -1), group.sizes, -1)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group: Group = ctx.group
        (wide,) = ctx.saved_tensors
        slope = torch.cat([each.reshape(-1, each.shape[-1]) for each in slopes], 1).to(wide.dtype)
        first, made = group.back(wide, slope, further=ctx.needs_input_grad[0])
        return (None if first is None else first.view(ctx.shape), None, *made)


def slices(sizes: Sequence[int]) -> Iterator[slice]:
    """Where parts of these sizes stand one after the other."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


# -- norms ------------------------------------------------------------------------------------------------------------


def is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether a module divides by the root of the mean square, by what it computes: Gemma's is named alike and is another."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None or weight.requires_grad:
        return False
    tried = torch.linspace(-2, 3, weight.shape[0], device=weight.device)[None]
    with torch.no_grad():
        return torch.allclose(module(tried), _Norm.apply(tried, weight, epsilon), rtol=1e-5, atol=1e-6)  # type: ignore[no-untyped-call]


def _norm_forward(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _Norm.apply(given, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
        return made

    return forward


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight with a frozen weight, in float32, in a third of the passes that autograd makes."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        even, inverse = evened(given.float(), epsilon)
        ctx.save_for_backward(even, inverse, weight)
        made: torch.Tensor = even * weight
        return made

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        even, inverse, weight = ctx.saved_tensors
        return evened_back(slopes[0] * weight, even, inverse), None, None


def evened(given: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + epsilon) along the last dimension, and what x was multiplied by."""
    inverse = torch.linalg.vector_norm(given, dim=-1, keepdim=True).square_().div_(given.shape[-1]).add_(epsilon).rsqrt_()
    return given * inverse, inverse


def evened_back(slope: torch.Tensor, even: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of x from that of `evened`'s first, whose memory is used up."""
    along = (slope * even).mean(-1, keepdim=True)
    return slope.addcmul_(even, along, value=-1).mul_(inverse)
