"""Whether a training has diverged: told at the step where it happens, by its loss, its gradient, and the weights it leaves.

A training that diverges is a result, not a damaged file: it is found here, before anything is exported. The bounds are far
beyond what trainings that work were seen to reach. In one step: a token's loss two uniform guesses above the first step's, 20
nats a pair. In three steps running: a token's loss a nat worse than a uniform guess, or gradients of 1,000 (sound ones stay
below 100). At the end: adapter weights of 10 (sound ones stay below 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from iterft_lite.errors import Diverged

PAIR_LOSS = 20.0
"""Nats a pair above the first step's loss."""

GRADIENT, RUNNING = 1000.0, 3
"""Norm of a gradient, and in how many steps running."""

WORSE = 1.0
"""Nats a token above a uniform guess, in as many steps running: a model that has learnt anything guesses better."""

WEIGHT = 10.0
"""Largest adapter weight."""


def check_step(log: Sequence[Mapping[str, float]], loss: str, vocab: int, *, more: str = "") -> None:
    """Look at the last step of a training.

    Args:
        log: Its steps so far: `loss` in nats, `grad_norm`.
        loss: Which kind it is.
        vocab: Tokens that a token is chosen from.
        more: Added to the remedy.

    Raises:
        Diverged: With the step, its loss, and what to lower.
    """
    last, step = log[-1], len(log)
    for name, words in (("loss", "loss"), ("grad_norm", "gradient")):
        if not math.isfinite(last[name]):
            raise _diverged(loss, f"the {words} of step {step} is {last[name]}", log, more)
    bound = log[0]["loss"] + (PAIR_LOSS if loss == "preference" else 2 * math.log(vocab))
    if last["loss"] > bound:
        raise _diverged(loss, f"the loss of step {step} is {last['loss']:.4g}", log, more)
    recent = log[-RUNNING:] if step >= RUNNING else []
    steps = f"of steps {step - RUNNING + 1} to {step}"
    if recent and all(each["grad_norm"] > GRADIENT for each in recent):
        raise _diverged(loss, f"the gradients {steps} have norms of {_listed(recent, 'grad_norm')}", log, more)
    guess = max(math.log(vocab), log[0]["loss"]) + WORSE
    if recent and loss != "preference" and all(each["loss"] > guess for each in recent):
        raise _diverged(loss, f"the losses {steps} are {_listed(recent, 'loss')}, worse than guesses", log, more)


def _listed(log: Sequence[Mapping[str, float]], name: str) -> str:
    return ", ".join(f"{each[name]:.3g}" for each in log)


def check_weights(weights: Mapping[str, torch.Tensor], log: Sequence[Mapping[str, float]], loss: str) -> None:
    """Look at the adapter that a training has left.

    Raises:
        Diverged: If a weight is not a finite number, or far beyond any that a sound training gives.
    """
    for name, weight in weights.items():
        largest = float(weight.detach().abs().max())
        if not largest <= WEIGHT:  # NaN is not
            raise _diverged(loss, f"after step {len(log)} the adapter's `{name}` holds {largest:.3g}", log, "")


def _diverged(loss: str, what: str, log: Sequence[Mapping[str, float]], more: str) -> Diverged:
    losses = f"; the loss began at {log[0]['loss']:.4g} and was {log[-1]['loss']:.4g} last" if len(log) > 1 else ""
    beta = " or `train.dpo_beta`" if loss == "preference" else ""
    return Diverged(
        f"the training has diverged: {what}{losses}",
        hint=f"lower `train.learning_rate`{beta}, or clip with `train.max_grad_norm = 1.0`{more}",
    )
