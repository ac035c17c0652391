"""Every family of docs/models.md, tiny and random with a real tokenizer: trained, exported, checked, sampled, measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.backends.processes.child import Child
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.errors import ExportError, ModelError
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.rows import Message
from iterft_lite.gguf import base as bases
from iterft_lite.gguf.families import FAMILIES, Family, architecture_of, read_config, refuse_problems
from iterft_lite.protocols import (
    Completion,
    Generator,
    Likelihood,
    Passage,
    Progress,
    Prompt,
    Sampling,
    TrainJob,
    TrainResult,
)
from scripts.make_models_table import DOCUMENT, families_table, in_document
from tests.converter_server import Server
from tests.real_tokenizers import models_folder
from tests.tiny_families import CASES, Case, write_family

EXACT, TABLE = 1e-4, 0.05
"""Largest difference of a logit in f32; where llama.cpp reads activations from a table in 16 bits."""

QUICK = ("Llama 2", "SmolLM2", "Mixtral", "GPT-NeoX")
"""Families that are tried every time: small vocabularies, and one of each kind."""

BY_NAME = {family.name: family for family in FAMILIES}

CHATS = [
    ("How does bread rise?", "Yeast eats sugar."),
    ("Boats?", "At dawn, with two gulls <s> on the wall.</s>"),
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "reply": [
        {"id": str(n), "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for n, (asked, said) in enumerate(CHATS)
    ],
    "preference": [
        {"id": str(n), "prompt": [{"role": "user", "content": asked}], "chosen": said, "rejected": "No."}
        for n, (asked, said) in enumerate(CHATS)
    ],
    "all": [{"id": str(n), "text": f"{asked} {said}"} for n, (asked, said) in enumerate(CHATS)],
}
SETTINGS = TrainSettings(
    learning_rate=0.02,
    schedule="constant",
    warmup=0.0,
    batch_size=2,
    weight_decay=0.0,
    max_grad_norm=0.0,
    lora_rank=4,
    lora_alpha=8.0,
    max_length=256,
)


@dataclass(frozen=True)
class Bench:
    """What all families share: an exporter, a generator in a process of its own, a folder."""

    exporter: GgufExporter
    generator: Generator
    folder: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("families")
    try:
        source = models_folder().parent
    except ExportError as error:
        pytest.skip(error.message)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERFT_LLAMA_CPP", str(source))
        patch.setenv("ITERFT_CACHE", str(folder / "cache"))
        converter = Server()
        patch.setattr(bases, "run_module", converter.run)
        worker = "iterft_lite.backends.generator.llamacpp:LlamaGenerator"
        child = Child(worker, Generator, log=folder / "generator.log", options={"threads": 2})
        yield Bench(GgufExporter(threads=2), cast(Generator, child), folder)
        child.close()
        converter.close()


def train(case: Case, model: Path, out: Path) -> TrainResult:
    from iterft_lite.backends.trainer.peft import PeftTrainer

    out.mkdir(parents=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[case.loss]), encoding="utf-8")
    trainer = PeftTrainer(device="cpu", threads=2)
    trainer.load(str(model), SETTINGS)
    return trainer.train(TrainJob(out / "rows.jsonl", out, case.loss, SETTINGS, seed=1), ignore)


def ignore(_: Progress) -> None:
    pass


def cases() -> list[Any]:
    return [
        pytest.param(case, id=case.id, marks=() if case.family in QUICK else pytest.mark.slow)
        for case in CASES
        if BY_NAME[case.family].tier != "refused"
    ]


@pytest.mark.parametrize("case", cases())
def test_a_family_is_trained_exported_checked_sampled_and_measured(case: Case, bench: Bench) -> None:
    family, folder = BY_NAME[case.family], bench.folder / case.id
    model = write_family(case, folder / "model")
    assert architecture_of(read_config(model)) == family.architecture
    refuse_problems(model, tokens=SETTINGS.max_length)
    result = train(case, model, folder / "train")
    assert result.tokens > 0
    assert any("get none and are not trained" in note for note in result.notes) == bool(_bare(family))
    bound = TABLE if family.table else EXACT
    for kind in ("merged", "adapter") if family.tier == "supported" else ("merged",):
        made = bench.exporter.export(str(model), folder / "train/adapter", folder / kind, kind, "f32", ignore)
        bench.generator.load(made.path, made.adapter, str(model), slots=4, context=256, exact=True)
        parity = bench.generator.parity(folder / "train")
        assert parity.same_tokens, parity.detail
        assert parity.max_delta < bound
    base = bench.exporter.export(str(model), None, folder / "base", "adapter", "f32", ignore)
    bench.generator.load(base.path, None, str(model), slots=4, context=256, exact=True)
    assert bench.generator.parity(folder / "train").max_delta > 2 * bound  # the untouched model is another one
    bench.generator.load(made.path, made.adapter, str(model), slots=4, context=256, exact=True)
    sample_and_measure(case, bench.generator, TrainingTokenizer(str(model)))


def _bare(family: Family) -> bool:
    """Whether part of a family's blocks gets no adapter."""
    return "adapter" in family.note


def sample_and_measure(case: Case, generator: Generator, tokenizer: TrainingTokenizer) -> None:
    asked = (Message("user", "Hello, <s>[INST] is 3.14 a number?"),)
    prompts = [
        Prompt(str(n), n, messages=asked if tokenizer.chat else (), text="" if tokenizer.chat else "Hello") for n in range(3)
    ]
    got: list[Completion] = []
    generator.complete(prompts, Sampling(1.0, 12), got.append)
    assert {one.finish for one in got} <= {"stop", "length"}
    measured: list[Likelihood] = []
    passages = [Passage("long", "Yes, it is </s> one." * 9, messages=prompts[0].messages, prefix=prompts[0].text)]
    generator.likelihood(passages, measured.append)
    assert math.isfinite(measured[0].logprob)
    expected = (
        tokenizer.reply_ids(asked, passages[0].text, end=False)[1]
        if tokenizer.chat
        else tokenizer.content_ids(passages[0].text)
    )
    assert measured[0].tokens == len(expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.tier == "refused"], ids=lambda family: family.name)
def test_an_unsupported_family_is_refused_before_anything_is_loaded(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [family.architecture]}))
    assert family.note
    with pytest.raises(ModelError, match=family.name) as raised:
        refuse_problems(tmp_path)
    assert family.note in raised.value.message


def test_every_family_has_a_test_model() -> None:
    assert {case.family for case in CASES} == set(BY_NAME)
    assert len(BY_NAME) == len(FAMILIES)


def test_the_documented_table_of_families_matches_the_code() -> None:
    assert in_document(families_table()) == DOCUMENT.read_text(encoding="utf-8")


def test_a_failed_conversion_is_reported_in_a_sentence(bench: Bench, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == "MPT")
    model = write_family(case, tmp_path / "model")
    with pytest.raises(
        ExportError, match=r"llama\.cpp of llama-cpp-python .* cannot convert .*MptForCausalLM\): .*not supported"
    ) as raised:
        bench.exporter.export(str(model), None, tmp_path / "out", "merged", "f32", ignore)
    assert "Traceback" not in str(raised.value)
    assert "convert_hf_to_gguf.log" in raised.value.message
