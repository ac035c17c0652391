"""Log-probabilities of tokens from last hidden states, some positions at a time: whole logits never exist.

A vocabulary of 150,000 makes logits the largest thing of a forward pass: in 32 bits 0.6 MB a token, twice over with gradients.
Here a part of them exists at a time, forwards and again backwards; the output matrix is frozen, so that only the hidden states
get a gradient. Products are summed and kept in 32 bits: logits that are rounded to bfloat16 (to 1/16 at values of 8 to 16)
would make the log-probability of a reply of some hundred tokens uncertain by tenths of a nat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LOGITS_AT_ONCE = 2**25
"""Numbers of a part of the logits: 128 MiB."""


@dataclass(frozen=True)
class Head:
    """The frozen end of a causal language model: hidden states to logits.

    Attributes:
        weight: [vocab, width], of any precision.
        bias: [vocab], or None.
        scale: Factor of the logits (Cohere's `logit_scale`, Granite's `1 / logits_scaling`).
        cap: Logits are squeezed into +-cap by tanh (Gemma's `final_logit_softcapping`); 0: they are not.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers or PEFT model."""
        end, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        bias = getattr(end, "bias", None)
        return cls(end.weight.detach(), None if bias is None else bias.detach(), scale, cap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [n, vocab], of hidden states [n, width]."""
        # A GPU multiplies 16-bit factors and hands over the 32-bit sums. A CPU cannot be asked for that: its factors are
        # widened.
        hidden = hidden.to(self.weight.dtype)
        if self.weight.dtype == torch.float32 or not hidden.is_cuda:
            made = hidden.float() @ self.weight.float().T
        else:
            made = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        if self.bias is not None:
            made += self.bias
        if self.scale != 1:
            made *= self.scale
        return made.div_(self.cap).tanh_().mul_(self.cap) if self.cap else made

    def back(self, slope: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Gradient of hidden states from that of the logits, `slope`, whose memory is used up; `logits` are read if capped."""
        if self.cap and logits is not None:
            # the derivative of cap * tanh(x / cap), from its value
            slope *= 1 - (logits / self.cap) ** 2
        if self.scale != 1:
            slope *= self.scale
        return slope.to(self.weight.dtype) @ self.weight


def token_logprobs(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """Log-probability of each position's target, nats, float32 [n].

    Args:
        hidden: Last hidden states [n, width].
        targets: Tokens, int64 [n].
        head: What makes logits of them.
    """
    made: torch.Tensor = _TokenLogprobs.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
    return made


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
        found, norms, whole = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part, wanted in zip(_parts(hidden, head), _parts(targets, head), strict=True):
                logits = head.logits(part)
                if len(part) == len(hidden) and not hidden.is_cuda and not head.cap:
                    # a CPU has the memory for a part, and no product to spare
                    whole = [logits.log_softmax(-1)]
                    found.append(whole[0].gather(1, wanted[:, None])[:, 0])
                    norms.append(torch.zeros_like(found[0]))
                    continue
                norms.append(logits.logsumexp(-1))
                found.append(logits.gather(1, wanted[:, None])[:, 0] - norms[-1])
        # Otherwise only the logarithms of the sums are kept: the backward pass makes the logits again and needs no second
        # softmax.
        ctx.save_for_backward(hidden, targets, torch.cat(norms), *whole)
        ctx.head = head
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        hidden, targets, norms, *whole = ctx.saved_tensors
        head: Head = ctx.head
        made = []
        with torch.autocast(hidden.device.type, enabled=False):
            for part, wanted, norm, slope in zip(*(_parts(of, head) for of in (hidden, targets, norms, *slopes)), strict=True):
                logits = whole[0] if whole else head.logits(part)
                kept = logits.clone() if head.cap else None
                # the slope of a target's log-probability in the logits is 1 at the target less the probabilities
                logits = (logits if whole else logits.sub_(norm[:, None])).exp_().neg_()
                logits.scatter_add_(1, wanted[:, None], torch.ones_like(norm)[:, None])
                made.append(head.back(logits.mul_(slope[:, None]), kept).to(hidden.dtype))
        return torch.cat(made), None, None


def _parts(rows: torch.Tensor, head: Head) -> tuple[torch.Tensor, ...]:
    return torch.split(rows, max(1, LOGITS_AT_ONCE // len(head.weight)))


def next_logprobs(states: torch.Tensor, ids: torch.Tensor, head: Head) -> torch.Tensor:
    """Log-probability of every token after a row's first, nats, float32 [rows, tokens - 1].

    Args:
        states: Last hidden states [rows, tokens, width], or logits [rows, tokens, vocab] of a model that gives only those.
        ids: int64 [rows, tokens].
        head: The model's.
    """
    rows, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    if states.shape[-1] == len(head.weight):
        return -torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none").view(len(ids), -1)
    return token_logprobs(rows, targets, head).view(len(ids), -1)
