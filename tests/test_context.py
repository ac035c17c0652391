"""The longest prompt with the longest answer fits the context, whatever the chat template adds."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.backends.processes.child import Child
from iterft_lite.backends.templates import TrainingTokenizer
from iterft_lite.engine.run import CONTEXT_STEP, context_needed
from iterft_lite.protocols import Completion, Exported, Generator, Message, Passage, Prompt, Sampling
from iterft_lite.stages import export
from iterft_lite.testing.fakes import FakeExporter, fake_backends
from tests.loop import a_plan, a_work
from tests.tiny_models import CHATML, tiny_model

SYSTEM = "You are a helpful assistant who thinks about a question first and then says what came of it. "
"""Some ninety characters of a default system prompt."""

LIMITS: dict[str, Any] = {"sample": {"max_tokens": 150}, "evaluate": {"questions": 3, "samples": 2, "max_tokens": 90}}


@dataclass(frozen=True)
class Wordy:
    """A tiny model whose chat template has a long default system prompt: its folder, its GGUF."""

    folder: Path
    gguf: Path


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Wordy:
    made = tmp_path_factory.mktemp("wordy")
    folder = tiny_model(made / "model")
    (folder / "chat_template.jinja").write_text(f"{{{{- '<|im_start|>system\\n{SYSTEM * 9}<|im_end|>\\n' }}}}{CHATML}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERFT_CACHE", str(made / "cache"))
        exported = GgufExporter(threads=1).export(str(folder), None, made / "plain", "merged", "f32", lambda _: None)
    return Wordy(folder, exported.path)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    log = tmp_path_factory.mktemp("log") / "child.log"
    child = Child("iterft_lite.backends.generator.llamacpp:LlamaGenerator", Generator, log=log, options={"threads": 2})
    yield cast(Generator, child)
    child.close()


def test_a_templates_long_system_prompt_does_not_shorten_answers(wordy: Wordy, generator: Generator) -> None:
    plan = a_plan(**LIMITS)
    step = plan.steps["c1-training_samples"]
    asked = [(Message("user", text),) for text in step.params["prompts"].values()]
    prompts = [Prompt(f"p{n}", n, asked[n % len(asked)]) for n in range(16)]
    assert TrainingTokenizer(str(wordy.folder)).template_tokens() > 512
    most = step.params["sampling"]["max_tokens"]
    generator.load(wordy.gguf, None, str(wordy.folder), slots=4, context=context_needed(plan), exact=False)
    got: list[Completion] = []
    hot = Sampling(4.0, most)  # a random model's favourite may be the token that ends a reply
    generator.complete(prompts, hot, got.append)
    finishes = Counter(one.finish for one in got)
    assert finishes["length"] > 0
    assert finishes["context"] == 0
    assert max(one.tokens for one in got) == most
    generator.likelihood([Passage(one.id, one.text, messages=asked[0]) for one in got], lambda _: None)


def test_an_export_is_checked_with_a_probe_of_more_than_512_tokens(wordy: Wordy, generator: Generator, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from iterft_lite.backends.trainer.probe import greedy_by, write_probe

    model = AutoModelForCausalLM.from_pretrained(wordy.folder, dtype=torch.float32).eval()

    def logits(ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, model(input_ids=ids, attention_mask=mask).logits[tuple(where.T)])

    tokenizer = AutoTokenizer.from_pretrained(wordy.folder)
    write_probe(tmp_path, tokenizer=tokenizer, vocab=512, greedy=greedy_by(model, 0, []), logits=logits)
    assert np.load(tmp_path / "probe.npz")["lengths"].max() > 512

    class Written(FakeExporter):
        """Gives a file that is there."""

        def export(self, *_: Any) -> Exported:
            return Exported(wordy.gguf, None, wordy.gguf.stat().st_size, {})

    step = next(step for step in a_plan().steps.values() if step.verb == "export")
    backends = replace(fake_backends(), exporter=Written(), generator=generator)
    facts = export.run(a_work(step, wordy.gguf.parent, {"base": tmp_path}, backends, model=lambda: str(wordy.folder)))
    assert facts["parity"]["same_tokens"]
    assert facts["parity"]["max_delta"] < 1e-4


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", None], ids=["one that refuses", "none"])
def test_without_a_chat_template_no_tokens_are_added(wordy: Wordy, tmp_path: Path, template: str | None) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(wordy.folder / file, tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    assert TrainingTokenizer(str(tmp_path)).template_tokens() == 0


def test_the_nano_model_has_the_context_that_a_plan_asks_for() -> None:
    nano = Path(__file__).parents[1] / "iterft_lite" / "data" / "nano" / "chat"
    if not (nano / "tokenizer.json").is_file():
        pytest.skip("the nano models are not built")
    assert 0 < TrainingTokenizer(str(nano)).template_tokens() <= CONTEXT_STEP
    assert context_needed(a_plan(**LIMITS)) == 256
