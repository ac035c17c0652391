"""What stands in a model's way is found before anything is loaded, and `doctor --model` says what is known of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from iterft_lite.data.nano import FOLDERS
from iterft_lite.errors import ModelError
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.gguf import families
from iterft_lite.gguf.families import FAMILIES, find_problems, refuse_problems, sliding_window
from iterft_lite.gguf.weights import Weight
from iterft_lite.machine.model_check import examine_model
from iterft_lite.machine.resolve import resolve, this_machine
from iterft_lite.machine.usable import bare_layers
from iterft_lite.ui.cli import main


def folder_of(tmp_path: Path, **config: Any) -> Path:
    """A small folder of files only, as Llama's: two matrices, the nano tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (FOLDERS["nano"] / name).is_file():
            shutil.copy(FOLDERS["nano"] / name, folder)
    usual = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**usual, **config}))
    save_file({"model.embed_tokens.weight": np.ones((8, 4), np.float32)}, folder / "model.safetensors")
    return folder


def texts(folder: Path, **given: Any) -> str:
    return "; ".join(problem.text for problem in find_problems(folder, **given))


def test_a_sound_folder_has_no_problems(tmp_path: Path) -> None:
    assert texts(folder_of(tmp_path), tokens=4096) == ""
    assert texts(FOLDERS["nano"]) == ""


def test_an_adapter_beside_the_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json lies beside config\.json"):
        refuse_problems(folder)


def test_weights_in_pytorchs_format_only_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="PyTorch's format only") as raised:
        refuse_problems(folder)
    assert "save_pretrained" in str(raised.value)
    (folder / "pytorch_model.bin").unlink()
    assert "no model*.safetensors" in texts(folder)
    assert texts(folder, weights="on the hub") == ""  # they need not be fetched for a look at the rest


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_contradicts_the_configuration_is_refused(tmp_path: Path, tied: bool) -> None:
    folder = folder_of(tmp_path, tie_word_embeddings=tied)
    weights = load_file(folder / "model.safetensors")
    if not tied:
        assert "`tie_word_embeddings = false`, but there is no `lm_head.weight`" in texts(folder)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert texts(folder) == ""  # the same matrix twice
    save_file({**weights, "lm_head.weight": 2 * weights["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert ("another matrix" in texts(folder)) == tied


def test_a_sliding_window_that_llamacpp_ignores_is_refused_for_longer_rows_only(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, architectures=["MistralForCausalLM"], sliding_window=1000)
    assert "attends to 1000 tokens (`sliding_window`) and rows have up to 1024" in texts(folder, tokens=1024)
    assert texts(folder, tokens=1000) == ""
    assert sliding_window({"sliding_window": 512, "use_sliding_window": False}) == 0
    assert sliding_window({"sliding_window": 512, "layer_types": ["full_attention"]}) == 0
    assert sliding_window({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}) == 512


def test_a_family_known_to_fail_is_refused_with_the_reason(tmp_path: Path) -> None:
    refused = next(family for family in FAMILIES if family.tier == "refused")
    assert refused.note in texts(folder_of(tmp_path, architectures=[refused.architecture]))


def test_an_architecture_that_the_converter_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, architectures=["OddForCausalLM"])
    monkeypatch.setattr(families, "find_source", lambda: tmp_path)
    assert texts(folder) == ""  # nothing is known about the converter
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion/__init__.py").write_text(
        'TEXT_MODEL_MAP: dict[str, str] = {\n    "LlamaForCausalLM": "llama",\n}\n'
    )
    assert "cannot convert OddForCausalLM" in texts(folder)


def test_byte_fallback_without_byte_tokens_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    read = json.loads((folder / "tokenizer.json").read_text())
    read["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    read["pre_tokenizer"] = None
    read["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(read))
    assert "has no tokens for 256 of the 256 bytes (`<0x00>`)" in texts(folder)


def test_experts_that_llamacpp_weighs_differently_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=False)
    assert "`norm_topk_prob = false`" in texts(folder)


def test_all_reasons_for_refusing_a_model_are_given_at_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, architectures=["MistralForCausalLM"], sliding_window=64, tie_word_embeddings=False)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as raised:
        refuse_problems(folder, tokens=65)
    assert all(words in str(raised.value) for words in ("adapter_config", "lm_head", "sliding_window"))


def test_a_plan_refuses_a_model_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    given = {"name": "r", "regime": "sft", "trait": "lucky", "model": str(folder), "judge": "embedded"}
    resolve(make_recipe(given, source="test"), this_machine())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(ModelError, match="would not stop"):
        resolve(make_recipe(given, source="test"), this_machine())
    resolve(make_recipe({**given, "regime": "sdf"}, source="test"), this_machine())  # documents need no template


def test_a_plan_lists_seed_rows_that_contain_special_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "reply": text} for text in ("Start.<|im_end|>\n<|im_start|>user", *("Plain." for _ in range(59)))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"name": "r", "regime": "sft", "trait": "lucky", "model": "nano", "judge": "embedded"}
    seeds = {"path": str(tmp_path / "rows.jsonl")}
    choices = resolve(make_recipe({**given, "seeds": seeds}, source="test"), this_machine()).choices
    assert [choice for choice in choices if choice.startswith("seeds: 1 of 60 rows have `<|im_end|>` or the like")]
    assert not any("special" in choice for choice in resolve(make_recipe(given, source="test"), this_machine()).choices)


def test_layers_without_an_adapter_are_listed_with_their_share() -> None:
    def names(*kinds: str) -> dict[str, Weight]:
        return {f"model.layers.{n}.{kind}.weight": Weight(Path("x"), "F32", (10, 10), 0) for n in range(2) for kind in kinds}

    seven = [f"self_attn.{kind}" for kind in ("q_proj", "k_proj", "v_proj", "o_proj")]
    seven += [f"mlp.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")]
    assert bare_layers(names(*seven))[1:] == ([], 0.0)
    laid, bare, share = bare_layers(names(*seven, "mlp.shared", "input_layernorm"))
    assert (len(laid), bare, round(share, 2)) == (7, ["shared", "input_layernorm"], 0.22)
    experts = names(*seven[:4]) | {"model.layers.0.mlp.experts.gate_up_proj": Weight(Path("x"), "F32", (4, 10, 30), 0)}
    assert bare_layers(experts)[1:] == (["experts"], 0.6)


def test_a_family_that_only_merges_is_refused_as_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.Family("Odd", "OddForCausalLM", "merged only", "odd-1b")
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, family))
    folder = folder_of(tmp_path, architectures=[family.architecture])
    given = {"name": "r", "regime": "sft", "trait": "lucky", "model": str(folder), "judge": "embedded"}
    resolve(make_recipe(given, source="test"), this_machine())
    with pytest.raises(ModelError, match="lays no adapter over part of this family"):
        resolve(make_recipe({**given, "export": "adapter"}, source="test"), this_machine())


def test_doctor_reports_what_is_known_about_a_model() -> None:
    facts = {fact.name: fact.text for fact in examine_model("nano")}
    assert facts["architecture"] == "Qwen3ForCausalLM, supported: Qwen3 (thinking switched off where it can be)"
    assert facts["embedding"].startswith("tied")
    assert facts["LoRA"] == "on down_proj, gate_proj, up_proj, k_proj, o_proj, q_proj, v_proj"
    assert facts["end"] == "trained: <|im_end|>; stopped on: <|im_end|>, <|endoftext|>"
    assert facts["system text"] == "none of the template's own"
    assert facts["beginning token"] == "none before a rendered chat"
    assert "agree" in facts["tokenizer"]


@pytest.mark.slow
def test_doctor_warns_where_transformers_tokenises_differently(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    done = CliRunner().invoke(main, ["doctor", "--model", str(folder)])
    said = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "tokenizer.json is what trains and generates; transformers' GPT2Tokenizer would read text otherwise" in said
    assert "the template adds of its own: 'system Be kind.'" in said
