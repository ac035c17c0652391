"""The generator over llama.cpp, in its own process, on a tiny random model."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.backends.processes.child import Child
from iterft_lite.errors import BackendError, ExportError, ModelError
from iterft_lite.protocols import Completion, Generator, Likelihood, Message, Passage, Prompt, Sampling
from iterft_lite.stages.export import check
from tests.tiny_models import TEXTS, tiny_adapter, tiny_model

PIECE = 64  # `likelihoods.PIECE`, whose module is for a process without numpy
WORKER = "iterft_lite.backends.generator.llamacpp:LlamaGenerator"
GREEDY = Sampling(0.0, 24)
WARM = Sampling(0.9, 24)
CONTEXT = 256


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its folder, its GGUF, a LoRA GGUF, and the two merged."""

    folder: Path
    gguf: Path
    lora: Path
    merged: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model")
    adapter = tiny_adapter(model, folder / "lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERFT_CACHE", str(folder / "cache"))
        exporter = GgufExporter(threads=1)

        def export(name: str, adapter: Path | None, kind: Any) -> Any:
            return exporter.export(str(model), adapter, folder / name, kind, "f32", lambda _: None)

        plain, merged = export("plain", None, "merged"), export("merged", adapter, "merged")
        lora = export("adapter", adapter, "adapter")
    assert lora.adapter is not None
    return Tiny(model, plain.path, lora.adapter, merged.path)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Generator]]:
    """Makes generators; one a set of options, ended after the module."""
    made: dict[str, Child] = {}

    def get(**options: Any) -> Generator:
        key = repr(sorted(options.items()))
        if key not in made:
            log = tmp_path_factory.mktemp("log") / "child.log"
            made[key] = Child(WORKER, Generator, log=log, options={"threads": 2, **options})
        return made[key]  # type: ignore[return-value]

    yield get
    for child in made.values():
        child.close()


def load(generator: Generator, tiny: Tiny, slots: int, *, exact: bool = True, context: int = CONTEXT) -> Generator:
    generator.load(tiny.gguf, None, str(tiny.folder), slots=slots, context=context, exact=exact)
    return generator


def chats(count: int) -> list[Prompt]:
    """Prompts of many lengths; every seventh text comes again."""
    return [
        Prompt(f"p{place}", place, messages=(Message("user", TEXTS[place % 7][: 10 + 5 * (place % 14)]),))
        for place in range(count)
    ]


def complete(generator: Generator, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, Completion]:
    """All completions by id; each prompt has to have exactly one."""
    got: list[Completion] = []
    generator.complete(prompts, sampling, got.append)
    assert sorted(one.id for one in got) == sorted(prompt.id for prompt in prompts)
    return {one.id: one for one in got}


def reference(tiny: Tiny) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(tiny.folder),
    )


def their_logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


# -- completions ------------------------------------------------------------------------------------------------------


def test_many_slots_write_the_same_text_as_one(start: Callable[..., Generator], tiny: Tiny) -> None:
    prompts = chats(21)
    alone = complete(load(start(), tiny, 1), prompts, GREEDY)
    assert complete(load(start(), tiny, 8), prompts, GREEDY) == alone
    assert complete(load(start(), tiny, 32), prompts, GREEDY) == alone


def test_sharing_prefixes_does_not_change_the_text(start: Callable[..., Generator], tiny: Tiny) -> None:
    beginning = " ".join(TEXTS[:2])
    asked = [beginning + TEXTS[place % 3] for place in range(6)]
    prompts = [
        Prompt(f"{copy}-{place}", copy, messages=(Message("user", text),))
        for place, text in enumerate(asked)
        for copy in range(4)
    ]
    without = complete(load(start(sharing="none"), tiny, 5), prompts, GREEDY)
    assert complete(load(start(), tiny, 5), prompts, GREEDY) == without
    assert complete(load(start(), tiny, 1), prompts, GREEDY) == without


def test_greedy_text_equals_that_of_transformers(start: Callable[..., Generator], tiny: Tiny) -> None:
    model, tokenizer = reference(tiny)
    prompts = chats(3)
    got = complete(load(start(), tiny, 3), prompts, GREEDY)
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt.messages[0].content}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=24, eos_token_id=tokenizer.eos_token_id)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert got[prompt.id].text == tokenizer.decode(new, skip_special_tokens=True)


def test_one_slot_repeats_its_text_exactly(start: Callable[..., Generator], tiny: Tiny) -> None:
    prompts = chats(10)
    generator = load(start(), tiny, 1, exact=False)
    first = complete(generator, prompts, WARM)
    assert complete(generator, prompts, WARM) == first
    # also when only the missing rows are asked for, after a resume
    assert complete(generator, prompts[6:], WARM) == {prompt.id: first[prompt.id] for prompt in prompts[6:]}


@pytest.mark.parametrize("sampling", ["host", "graph"])
def test_samples_of_one_prompt_differ_only_by_their_seeds(start: Callable[..., Generator], tiny: Tiny, sampling: str) -> None:
    messages = (Message("user", "Hello"),)
    prompts = [Prompt(f"s{seed}-{copy}", seed, messages=messages) for seed in range(8) for copy in range(2)]
    got = complete(load(start(sampling=sampling), tiny, 4), prompts, Sampling(1.0, 8))
    texts = [got[f"s{seed}-0"].text for seed in range(8)]
    assert texts == [got[f"s{seed}-1"].text for seed in range(8)]
    assert len(set(texts)) == 8


@pytest.mark.parametrize("sampling", ["host", "graph"])
def test_draws_do_not_depend_on_neighbouring_sequences(start: Callable[..., Generator], tiny: Tiny, sampling: str) -> None:
    prompts = chats(12)
    generator = start(sampling=sampling)
    few, many = (complete(load(generator, tiny, slots), prompts, WARM) for slots in (2, 9))
    assert sum(few[key] == many[key] for key in few) >= 11  # a draw at the edge of two tokens may turn


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("sampling", ["host", "graph"])
def test_first_tokens_follow_the_softmax(
    start: Callable[..., Generator], tiny: Tiny, sampling: str, temperature: float
) -> None:
    model, tokenizer = reference(tiny)
    text = "The harbour was"
    logits = their_logits(model, tokenizer(text)["input_ids"])[-1]
    odds = np.exp((logits - logits.max()) / temperature)
    rows = 3000
    expected = rows * odds / odds.sum()
    prompts = [Prompt(str(seed), 7919 * seed, text=text) for seed in range(rows)]
    got = complete(load(start(sampling=sampling), tiny, 32), prompts, Sampling(temperature, 1))
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(expected))]
    # different tokens can have one text: parts of characters
    by_text: dict[str, float] = {}
    for text, count in zip(texts, expected, strict=True):
        by_text[text] = by_text.get(text, 0.0) + count
    common = [text for text, count in by_text.items() if count >= 5]
    seen = [one.text for one in got.values()]
    observed = [*(seen.count(text) for text in common), sum(text not in common for text in seen)]
    wanted = [*(by_text[text] for text in common), rows - sum(by_text[text] for text in common)]
    assert len(common) > 20
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


def test_truncated_sampling_keeps_the_same_tokens_on_host_and_graph(start: Callable[..., Generator], tiny: Tiny) -> None:
    prompts = [Prompt(str(seed), seed, text="The harbour was") for seed in range(300)]
    for sampling in (Sampling(1.0, 1, top_k=5), Sampling(1.0, 1, top_p=0.2), Sampling(1.0, 1, min_p=0.5)):
        drawn = [
            {one.text for one in complete(load(start(sampling=path), tiny, 16), prompts, sampling).values()}
            for path in ("host", "graph")
        ]
        assert drawn[0] == drawn[1]
        assert len(drawn[0]) < 40


def test_documents_are_continued_and_empty_ones_started(start: Callable[..., Generator], tiny: Tiny) -> None:
    prompts = [Prompt("a", 1, text="The harbour"), Prompt("b", 2, text="")]
    got = complete(load(start(), tiny, 2), prompts, WARM)
    assert all(one.tokens == 24 or one.finish == "stop" for one in got.values())


def test_a_turn_ends_at_the_end_token(start: Callable[..., Generator], tiny: Tiny) -> None:
    prompts = [Prompt(str(seed), seed, messages=(Message("user", "Hi"),)) for seed in range(200)]
    got = complete(load(start(), tiny, 32), prompts, Sampling(1.5, 120))
    stopped = [one for one in got.values() if one.finish == "stop"]
    assert stopped
    assert all(1 <= one.tokens <= 120 and "<|im_end|>" not in one.text for one in stopped)
    assert all(one.tokens == 120 for one in got.values() if one.finish == "length")


def test_reaching_the_end_of_the_context_is_reported(start: Callable[..., Generator], tiny: Tiny) -> None:
    got = complete(load(start(), tiny, 4, context=64), chats(2), Sampling(0.0, 2000))
    assert {one.finish for one in got.values()} == {"context"}
    assert all(64 < one.tokens < 1024 for one in got.values())  # what the model was made for


def test_a_context_estimated_too_small_grows_to_the_counted_tokens(start: Callable[..., Generator], tiny: Tiny) -> None:
    script = Prompt("script", 0, messages=(Message("user", "Ещё одно предложение. 日本語です。" * 4),))
    generator = load(start(), tiny, 4, context=64)
    got = complete(generator, [script, *chats(2)], Sampling(0.0, 90))
    assert {one.finish for one in got.values()} == {"length"}
    assert got == complete(load(start(), tiny, 4, context=1024), [script, *chats(2)], Sampling(0.0, 90))
    assert likelihoods(generator, [Passage("long", TEXTS[4] * 5, messages=script.messages)])["long"].tokens > 256


def test_completions_are_delivered_as_they_finish(start: Callable[..., Generator], tiny: Tiny) -> None:
    order: list[str] = []
    prompts = [Prompt(str(place), place, messages=(Message("user", "Hi"),)) for place in range(12)]
    load(start(), tiny, 4).complete(prompts, GREEDY, lambda one: order.append(one.id))
    assert set(order[:4]) == {"0", "1", "2", "3"}


# -- likelihoods and comparisons --------------------------------------------------------------------------------------


def likelihoods(generator: Generator, passages: Sequence[Passage]) -> dict[str, Likelihood]:
    got: list[Likelihood] = []
    generator.likelihood(passages, got.append)
    assert sorted(one.id for one in got) == sorted(passage.id for passage in passages)
    return {one.id: one for one in got}


def passages() -> list[Passage]:
    """Texts alone, after a chat, after a beginning; and an empty one."""
    made = [Passage(f"text{place}", text) for place, text in enumerate(TEXTS)]
    made += [Passage(f"reply{place}", text, messages=(Message("user", "Tell me."),)) for place, text in enumerate(TEXTS)]
    made += [Passage(f"rest{place}", " " + text, prefix=TEXTS[0]) for place, text in enumerate(TEXTS)]
    return [*made, Passage("none", "", prefix="Something")]


@pytest.mark.parametrize("slots", [1, 6])
def test_likelihoods_equal_those_of_transformers(start: Callable[..., Generator], tiny: Tiny, slots: int) -> None:
    model, tokenizer = reference(tiny)
    got = likelihoods(load(start(), tiny, slots), passages())
    for passage in passages():
        before = tokenizer(passage.prefix)["input_ids"]
        if passage.messages:
            chat = [{"role": "user", "content": passage.messages[0].content}]
            before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ids = before + tokenizer(passage.text, add_special_tokens=False)["input_ids"]
        start_at = max(1, len(before))
        logits = their_logits(model, ids)
        expected = sum(
            logits[place - 1, ids[place]] - np.logaddexp.reduce(logits[place - 1]) for place in range(start_at, len(ids))
        )
        assert got[passage.id].tokens == len(ids) - start_at
        assert got[passage.id].logprob == pytest.approx(expected, abs=1e-3)


def test_likelihoods_of_texts_read_together_equal_those_read_alone(start: Callable[..., Generator], tiny: Tiny) -> None:
    generator = load(start(), tiny, 2)
    asked = [Passage(f"{place}", " ".join(TEXTS)[: 40 * place + 5], prefix=TEXTS[place % 3]) for place in range(20)]
    together = likelihoods(generator, asked)
    assert max(one.tokens for one in together.values()) > 3 * PIECE
    for passage in asked:
        alone = likelihoods(generator, [passage])[passage.id]
        assert together[passage.id].tokens == alone.tokens
        assert together[passage.id].logprob == pytest.approx(alone.logprob, abs=1e-3)


def test_host_and_graph_draw_the_same_tokens_from_the_same_seeds(start: Callable[..., Generator], tiny: Tiny) -> None:
    host, graph = (complete(load(start(sampling=path), tiny, 5), chats(12), WARM) for path in ("host", "graph"))
    assert sum(host[key] == graph[key] for key in host) >= 11  # a draw at the edge of two tokens may turn


def test_a_passage_longer_than_the_context_is_cut(start: Callable[..., Generator], tiny: Tiny) -> None:
    # an answer of broken bytes is more tokens as a text than it was while it was written
    generator, asked = load(start(), tiny, 2, context=64), Passage("long", TEXTS[0] * 50, prefix=TEXTS[1])
    short = likelihoods(generator, [asked])["long"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    ids, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked.text, asked.prefix))
    assert short.tokens == 1024 - len(before) < len(ids)
    cut = replace(asked, text=tokenizer.decode(ids[: short.tokens]))
    whole = likelihoods(load(generator, tiny, 2), [cut])["long"]
    assert (whole.tokens, whole.logprob) == (short.tokens, pytest.approx(short.logprob, rel=1e-3))


def test_likelihoods_do_not_disturb_generation(start: Callable[..., Generator], tiny: Tiny) -> None:
    for sampling in ("host", "graph"):
        generator = load(start(sampling=sampling), tiny, 4)
        first = complete(generator, chats(8), GREEDY)
        likelihoods(generator, passages())
        assert complete(generator, chats(8), GREEDY) == first


def probe(tiny: Tiny, folder: Path) -> Path:
    """A probe of the tiny model, as trainers write them."""
    model, tokenizer = reference(tiny)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    where = [(row, place) for row, ids in enumerate(sequences) for place in range(2, len(ids), 5)]
    tokens = np.full((len(sequences), max(map(len, sequences))), -1, dtype=np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
    logits = [their_logits(model, ids) for ids in sequences]
    folder.mkdir(exist_ok=True)
    np.savez(
        folder / "probe.npz",
        tokens=tokens,
        lengths=np.array([len(ids) for ids in sequences], dtype=np.int32),
        logits=np.stack([logits[row][place] for row, place in where]).astype(np.float32),
        where=np.array(where, dtype=np.int32),
        texts=np.array(TEXTS),
    )
    return folder


def test_an_export_agrees_with_its_probe(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    found = load(start(), tiny, 3).parity(probe(tiny, tmp_path))
    assert found.same_tokens, found.detail
    assert found.max_delta < 1e-4
    assert found.mean_kl < 1e-6
    assert found.top1 == 1.0
    assert found.positions > 50


def test_another_model_does_not_agree_with_the_probe(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    generator = start()
    generator.load(tiny.merged, None, str(tiny.folder), slots=3, context=CONTEXT, exact=True)
    found = generator.parity(probe(tiny, tmp_path))
    assert found.same_tokens
    assert found.max_delta > 0.1
    assert found.mean_kl > 0.01


def test_nan_logits_fail_the_export_check(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    path = probe(tiny, tmp_path) / "probe.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["logits"][7] = np.nan
    np.savez(path, **changed)
    found = load(start(), tiny, 3).parity(tmp_path)
    assert found.mean_kl == found.max_delta == math.inf
    for quant in ("f32", "q8_0", "q4_k_m"):
        with pytest.raises(ExportError, match="not finite numbers"):
            check(found, "merged", quant)


def test_a_difference_in_tokenisation_is_described(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    path = probe(tiny, tmp_path) / "probe.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["tokens"][2, 4] += 1
    np.savez(path, **changed)
    found = load(start(), tiny, 3).parity(tmp_path)
    assert not found.same_tokens
    assert "text 2" in found.detail
    assert "token 4" in found.detail


# -- loading ----------------------------------------------------------------------------------------------------------


def test_an_adapter_over_the_base_computes_what_the_merged_model_does(start: Callable[..., Generator], tiny: Tiny) -> None:
    generator = start()
    plain = likelihoods(load(generator, tiny, 4), passages())
    generator.load(tiny.gguf, tiny.lora, str(tiny.folder), slots=4, context=CONTEXT, exact=True)
    over = likelihoods(generator, passages())
    generator.load(tiny.merged, None, str(tiny.folder), slots=4, context=CONTEXT, exact=True)
    merged = likelihoods(generator, passages())
    for key, one in merged.items():
        assert over[key].logprob == pytest.approx(one.logprob, abs=1e-3)
    assert likelihoods(load(generator, tiny, 4), passages()) == plain
    assert plain["text0"].logprob != pytest.approx(merged["text0"].logprob, abs=0.1)


def test_a_rewritten_model_file_is_loaded_again(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    generator = start()
    file = tmp_path / "model.gguf"
    shutil.copy(tiny.gguf, file)
    copied = dataclasses.replace(tiny, gguf=file)
    first = complete(load(generator, copied, 2), chats(3), GREEDY)
    assert first == complete(load(generator, tiny, 2), chats(3), GREEDY)
    shutil.copy(tiny.merged, file)
    assert complete(load(generator, copied, 2), chats(3), GREEDY) != first
    assert complete(load(generator, tiny, 2), chats(3), GREEDY) == first


def test_the_number_of_slots_is_chosen_by_default(start: Callable[..., Generator], tiny: Tiny) -> None:
    generator = start()
    generator.load(tiny.gguf, None, str(tiny.folder), slots=None, context=CONTEXT, exact=False)
    chosen = complete(generator, chats(40), GREEDY)
    given = complete(load(generator, tiny, 32, exact=False), chats(40), GREEDY)
    assert sum(chosen[key] == given[key] for key in given) >= 38  # where two tokens are equally likely either may come first


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_named_before_any_sampling(start: Callable[..., Generator], tiny: Tiny) -> None:
    generator = load(start(), tiny, 2, context=64)
    got: list[Completion] = []
    with pytest.raises(ModelError, match=r"prompt `long` has .* tokens, the context 1024"):
        generator.complete([*chats(2), Prompt("long", 0, text=TEXTS[0] * 50)], GREEDY, got.append)
    assert not got
    with pytest.raises(ModelError, match="what comes before passage `long`"):
        generator.likelihood([Passage("long", "yes", prefix=TEXTS[0] * 50)], lambda _: None)
    assert complete(generator, chats(2), GREEDY)


def test_files_that_are_not_models_are_named(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    generator = start()
    whole = tiny.gguf.read_bytes()
    for name, content, words in (
        ("missing.gguf", None, "there is no file"),
        ("empty.gguf", b"", "not a GGUF"),
        ("text.gguf", b"hello", "not a GGUF"),
        ("magic.gguf", b"GGUF", "cannot be loaded"),
        ("header.gguf", whole[:2000], "cannot be loaded"),
        ("cut.gguf", whole[: len(whole) // 2], "cannot be loaded"),
    ):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ModelError, match=words) as raised:
            generator.load(file, None, str(tiny.folder), slots=2, context=64, exact=False)
        assert name in str(raised.value)
    with pytest.raises(ModelError, match="is not an adapter"):
        generator.load(tiny.gguf, tiny.merged, str(tiny.folder), slots=2, context=64, exact=False)
    with pytest.raises(BackendError, match="no model is loaded"):
        generator.complete(chats(1), GREEDY, lambda _: None)
    complete(load(generator, tiny, 2), chats(2), GREEDY)


def test_nan_weights_are_reported(start: Callable[..., Generator], tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "nan.gguf"
    content = bytearray(tiny.gguf.read_bytes())
    content[-4096:] = b"\xff" * 4096
    file.write_bytes(content)
    with pytest.raises((ModelError, BackendError), match=r"cannot be loaded|not finite"):
        complete(load(start(), dataclasses.replace(tiny, gguf=file), 2), chats(2), WARM)
    with pytest.raises((ModelError, BackendError), match=r"cannot be loaded|not finite"):
        likelihoods(load(start(), dataclasses.replace(tiny, gguf=file), 2), passages())


def test_a_missing_tokenizer_is_named(start: Callable[..., Generator], tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="/nowhere"):
        start().load(tiny.gguf, None, "/nowhere", slots=1, context=64, exact=False)
