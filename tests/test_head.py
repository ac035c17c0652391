"""Log-probabilities without whole logits, and batches of even lengths."""

from __future__ import annotations

import pytest
import torch

from iterft_lite.backends.trainer import logprobs as module
from iterft_lite.backends.trainer.cuda_graphs import stretched
from iterft_lite.backends.trainer.logprobs import Head, next_logprobs, token_logprobs
from iterft_lite.backends.trainer.loop import join

WIDTH, VOCAB, POSITIONS = 12, 50, 23


def drawn(**given: float) -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    bias = torch.randn(VOCAB, dtype=torch.float32)
    head = Head(torch.randn(VOCAB, WIDTH), bias, **given)
    return head, torch.randn(POSITIONS, WIDTH, requires_grad=True), torch.randint(VOCAB, (POSITIONS,)), torch.randn(POSITIONS)


def plainly(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    assert head.bias is not None
    logits = (hidden @ head.weight.T + head.bias) * head.scale
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


@pytest.mark.parametrize("given", [{}, {"scale": 0.25}, {"cap": 5.0}, {"scale": 3.0, "cap": 4.0}])
@pytest.mark.parametrize("at_once", [VOCAB, 7 * VOCAB, 10**9])
def test_values_and_gradients_equal_those_of_full_logits(
    given: dict[str, float], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    head, hidden, targets, slopes = drawn(**given)
    (expected := plainly(head, hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]).backward(slopes)
    assert hidden.grad is not None
    wanted, hidden.grad = hidden.grad, None
    (found := token_logprobs(hidden, targets, head)).backward(slopes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hidden.grad, wanted)


def test_half_precision_products_are_summed_in_single_precision() -> None:
    head, hidden, targets, _ = drawn()
    halves = Head(head.weight.bfloat16() * 8, None)
    exact = (hidden.bfloat16().double() @ halves.weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = token_logprobs(hidden.bfloat16(), targets, halves)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4
    rounded = (hidden.bfloat16() @ halves.weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (rounded - exact).abs().max() > 0.01


def test_hidden_states_and_logits_give_the_same_log_probabilities() -> None:
    head, _, _, _ = drawn()
    head = Head(head.weight)
    states, ids = torch.randn(3, 9, WIDTH), torch.randint(VOCAB, (3, 9))
    by_states = next_logprobs(states, ids, head)
    assert by_states.shape == (3, 8)
    torch.testing.assert_close(by_states, next_logprobs(states @ head.weight.T, ids, head))


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_rows_are_padded_to_even_lengths_and_never_beyond_the_longest(tokens: int, expected: int) -> None:
    whole = {
        "input_ids": torch.ones(2, tokens, dtype=torch.int64),
        "labels": torch.ones(2, tokens, dtype=torch.int64),
        "ref_chosen_logps": torch.ones(2),
    }
    made = stretched(whole, 8, 20)
    assert made["input_ids"].shape == made["labels"].shape == (2, expected)
    assert (made["labels"][:, tokens:] == -100).all()
    assert (made["input_ids"][:, :tokens] == 1).all()
    assert made["ref_chosen_logps"].shape == (2,)


def test_joining_weights_again_does_not_move_them() -> None:
    weights = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    before = [weight.detach().clone() for weight in weights]
    join(torch.optim.AdamW(weights))
    places = [(weight.data_ptr(), weight.grad.data_ptr()) for weight in weights if weight.grad is not None]
    again = torch.optim.AdamW(weights)
    join(again)
    assert [(weight.data_ptr(), weight.grad.data_ptr()) for weight in weights if weight.grad is not None] == places
    (whole,) = again.param_groups[0]["params"]
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    weights[1].sum().backward()
    assert whole.grad.sum() == 64 * 64
    whole.data.zero_()
    assert not weights[2].any()
