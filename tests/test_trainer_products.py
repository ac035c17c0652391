"""Products in bf16, fused projections and packed rows: the same losses and gradients as PEFT's layers on padded rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from iterft_lite.backends.trainer import packing
from iterft_lite.backends.trainer.decoder import EVEN, Decoder
from iterft_lite.backends.trainer.lora import lora_settings
from iterft_lite.backends.trainer.packing import Rows, attend, attend_back
from iterft_lite.backends.trainer.peft import PeftTrainer, ends_plainly
from iterft_lite.backends.trainer.products import Factors, Group, Products
from iterft_lite.hardware import cpu_precision
from tests.test_trainer_peft import CHATS, DOCUMENTS, PAIRS, check_probe, job, log, plain, run, settings
from tests.tiny_models import tiny_model

MIXED = Factors(torch.bfloat16, torch.bfloat16)


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama", "gemma3"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A PEFT model whose adapter is not zero."""
    folder = tiny_model(tmp_path_factory.mktemp(request.param), request.param, hidden=128)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert ends_plainly(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora_settings(base, 4, 8.0)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.05)
    return model


IDS = torch.arange(3 * 17).reshape(3, 17) * 7 % 450
LENGTHS = (9, 17, 1)


def gradients(
    model: Any, decoder: Decoder | None = None, factors: Factors | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Last hidden states of the rows, and the gradients of some function of them."""
    if decoder is None or factors is None:
        states = model.get_base_model().get_decoder()(input_ids=IDS, use_cache=False)[0]
        states = torch.cat([row[:length] for row, length in zip(states, LENGTHS, strict=True)])
    else:
        states = decoder.states(IDS, LENGTHS, factors)
    model.zero_grad()
    (states * torch.sin(torch.arange(states.numel())).view_as(states)).sum().backward()
    return states.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("factors", "bound"), [(Factors(), 1e-5), (MIXED, 0.04), (Factors(backward=torch.bfloat16), 0.04)])
def test_fused_products_of_packed_rows_give_the_gradients_of_padded_ones(adapted: Any, factors: Factors, bound: float) -> None:
    expected, slopes = gradients(adapted)
    products = Products(adapted)
    decoder = Decoder.of(adapted, products)
    assert (decoder is None) == (adapted.config.model_type == "gemma3_text")
    if decoder is None:
        products.lay(factors)
    made, found = gradients(adapted, decoder, factors)
    assert far(made, expected) < (1e-5 if factors.forward == torch.float32 else bound)
    assert found.keys() == slopes.keys()
    assert max(far(found[name], slope) for name, slope in slopes.items()) < bound
    assert all(slope.any() for slope in found.values())
    products.lay(None)
    again, _ = gradients(adapted)
    assert far(again, expected) < 1e-5


@pytest.mark.parametrize("kind", ["MistralConfig", "Qwen3Config"])
def test_a_layer_with_a_window_attends_within_it_only(kind: str) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    more = {"use_sliding_window": True, "max_window_layers": 1} if kind == "Qwen3Config" else {}
    config = getattr(transformers, kind)(**small, num_key_value_heads=2, head_dim=16, sliding_window=3, **more)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora_settings(base, 4, 8.0)))
    decoder = Decoder.of(model, Products(model))
    assert decoder is not None
    assert {layer.window for layer in decoder.layers} == ({3} if kind == "MistralConfig" else {None, 3})
    decoder.layers = [replace(layer, window=None) for layer in decoder.layers]
    assert not decoder._agrees(model)


def test_rows_are_shared_out_among_cores_by_their_tokens(adapted: Any) -> None:
    decoder = Decoder.of(adapted, Products(adapted), cores=2)
    if decoder is None:
        return
    assert decoder.shared_out((9, 17, 1, 30)) == [[3], [1, 0, 2]]
    assert decoder.shared_out((5,)) == [[0]]
    expected, slopes = gradients(adapted, Decoder.of(adapted, Products(adapted)), Factors())
    made, found = gradients(adapted, decoder, Factors())
    assert far(made, expected) < 1e-6
    assert max(far(found[name], slope) for name, slope in slopes.items()) < 1e-5


def test_rows_of_any_length_are_products_of_few_shapes(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.of(adapted, Products(adapted))
    if decoder is None:
        pytest.skip("computed by transformers' own layers")
    made, tokens = Group.made, set[int]()
    monkeypatch.setattr(Group, "made", lambda group, wide: (tokens.add(len(wide)), made(group, wide))[1])
    for length in range(1, 17):
        states = decoder.states(IDS, (length, 1, 1), Factors())
        assert states.shape == (length + 2, 128)
    assert tokens == {3 * EVEN}


def test_layers_with_one_input_share_a_product_and_one_copy_of_the_base(adapted: Any) -> None:
    products = Products(adapted)
    assert sorted(len(group.layers) for group in products.groups) == [1, 1, 1, 1, 2, 2, 3, 3]
    for group in products.groups:
        stored = group.matrices(torch.float32)[0].untyped_storage().data_ptr()
        assert {layer.base_layer.weight.untyped_storage().data_ptr() for layer in group.layers} == {stored}


def test_products_without_the_adapter_compute_the_base_model(adapted: Any) -> None:
    products = Products(adapted)
    with torch.no_grad(), adapted.disable_adapter():
        expected = adapted(input_ids=IDS, use_cache=False).logits
        products.lay(Factors())
        made = adapted(input_ids=IDS, use_cache=False).logits
    products.lay(None)
    assert far(made, expected) < 1e-5


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("longest", [packing.LONG, 0])
def test_packed_attention_sees_earlier_tokens_of_its_own_row_only(
    window: int | None, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LONG", longest)
    rows, generator = (5, 1, 7), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(rows), heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    place = torch.arange(sum(rows))
    row = torch.tensor([number for number, length in enumerate(rows) for _ in range(length)])
    seen = (row[:, None] == row) & (place[:, None] >= place) & (place[:, None] - place < (window or 99))
    asked, keys, values = (each.transpose(0, 1) for each in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
    expected = ((asked @ keys.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)
    slope = torch.randn(expected.shape, generator=generator)
    slopes = torch.autograd.grad(expected, (query, key, value), slope)
    made, found = torch.empty_like(expected), [torch.empty_like(each) for each in (query, key, value)]
    with torch.no_grad():
        kept = attend(query, key, value, Rows(rows, window), Factors(), made)
        attend_back(slope, Rows(rows, window), kept, *found)
    assert torch.allclose(made, expected, atol=1e-6)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, slopes, strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {
        chat: tiny_model(tmp_path_factory.mktemp("mixed") / "tiny", hidden=128, chat=chat, dtype="bfloat16")
        for chat in (True, False)
    }


@pytest.mark.parametrize(("rows", "loss"), [(CHATS, "reply"), (DOCUMENTS, "all"), (PAIRS, "preference")])
def test_products_in_bf16_keep_losses_within_1_percent(folders: dict[bool, Path], tmp_path: Path, rows: Any, loss: Any) -> None:
    given = {"epochs": 6, "batch_size": 4, "learning_rate": 1e-3 if loss == "preference" else 3e-3}
    for base in ("f32", "bf16-mixed"):
        trainer = PeftTrainer(device="cpu", threads=2)
        facts = trainer.load(str(folders[loss != "all"]), settings(base=base))
        assert facts.precision == base
        run(trainer, job(tmp_path / base, rows, loss, base=base, **given))
    pairs = list(zip(log(tmp_path / "bf16-mixed"), log(tmp_path / "f32"), strict=True))
    assert pairs[-1][1]["loss"] < 0.9 * pairs[0][1]["loss"]
    assert max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs) < 0.01
    assert pairs[0][0]["loss"] == pytest.approx(pairs[0][1]["loss"], rel=1e-6 if loss == "preference" else 0.01)
    assert (tmp_path / "bf16-mixed/log.jsonl").read_bytes() != (tmp_path / "f32/log.jsonl").read_bytes()
    if loss == "reply":  # what the export is held against is not rounded
        adapter = tmp_path / "bf16-mixed" / "adapter"
        check_probe(tmp_path / "bf16-mixed", plain(folders[True], adapter), trainer._tokenizer)


def test_cpu_flags_decide_whether_products_run_in_bf16(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    for flags, expected in (("avx2 avx512f", "f32"), ("avx512f avx512_bf16", "bf16-mixed"), ("amx_bf16 avx2", "bf16-mixed")):
        listed.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: fpu {flags}\n")
        assert cpu_precision(listed) == expected
    assert cpu_precision(tmp_path / "none") == "f32"
