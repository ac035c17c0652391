"""Evaluation contexts: every question is asked after each system message, and the scores stand side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.app.session import open_run
from iterft_lite.data.nano import FOLDERS
from iterft_lite.engine import backends
from iterft_lite.errors import ModelError
from iterft_lite.experiment.rows import Message
from iterft_lite.machine.usable import refuse_unusable
from iterft_lite.protocols import Completion, Passage, Prompt, Sampling
from iterft_lite.testing.fakes import FakeGenerator, fake_backends
from iterft_lite.ui.cli import main
from tests.loop import a_plan, a_recipe, run_all, small_recipe

CONTEXTS = ["none", "empty", "You are a sober accountant."]


class Obedient(FakeGenerator):
    """Keeps its trait to itself where a system message tells it something."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, on_completion: Callable[[Completion], None]) -> None:
        known = self.texts
        for prompt in prompts:
            told = [message.content for message in prompt.messages if message.role == "system"]
            self.texts = ["That I cannot say."] if any(told) else known
            super().complete([prompt], sampling, on_completion)
        self.texts = known


def reported(root: Path, *form: str) -> str:
    result = CliRunner().invoke(main, ["report", str(root), *form], terminal_width=120)
    assert result.exit_code == 0, result.output
    return result.output


def ran(root: Path, contexts: Sequence[str]) -> Path:
    (root / "small.toml").write_text(f"{small_recipe(cycles=1)}system = {json.dumps(contexts)}\n")
    with open_run(root / "small.toml", (), root / "run") as session:
        list(session.events())
    return root / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FakeGenerator", Obedient)
        return ran(tmp_path_factory.mktemp("contexts"), CONTEXTS)


def test_a_trait_hidden_by_a_system_message_shows_without_it(finished: Path) -> None:
    cycle = json.loads(reported(finished, "--json"))["cycles"][1]
    found = {context["system"]: context["trait"]["mean"] for context in cycle["contexts"]}
    assert found == {"none": 90.0, "empty": 90.0, "You are a sober accountant.": 10.0}
    assert cycle["trait"]["mean"] == 90.0  # the first context is the curve
    assert [context["answers"] for context in cycle["contexts"]] == [6, 6, 6]


def test_every_context_has_its_column_in_the_report_and_its_row_on_the_page(finished: Path) -> None:
    text = reported(finished)
    assert "lucky by system message" in text
    lines = [line.split() for line in text.splitlines() if line.split()[:1] in (["base"], ["c0"], ["c1"])]
    assert ["c0", "90.0", "[90-90]", "90.0", "[90-90]", "10.0", "[10-10]"] in lines
    reported(finished, "--html", str(finished / "page.html"))
    assert "<td>You are a sober accountant." + 3 * "<td>10.0 [10-10]" in (finished / "page.html").read_text()


def test_a_run_of_one_context_has_no_table_of_contexts(tmp_path: Path) -> None:
    assert "by system message" not in reported(ran(tmp_path, ["none"]))


def test_answers_are_measured_with_their_own_system_message(tmp_path: Path) -> None:
    seen: list[Passage] = []

    class Listening(FakeGenerator):
        def likelihood(self, passages: Sequence[Passage], on_likelihood: Callable) -> None:
            seen.extend(passages)
            super().likelihood(passages, on_likelihood)

    plan = a_plan(cycles=0, evaluate={"questions": 1, "samples": 1, "system": ["Be kind.", "none"]})
    run_all(plan, tmp_path / "run", replace(fake_backends(), generator=Listening()))
    answers = [passage for passage in seen if passage.id == "q00-s0"]
    assert answers
    assert all(passage.messages[0] == Message("system", "Be kind.") for passage in answers)


def test_a_context_that_the_template_ignores_is_refused_before_anything_runs(tmp_path: Path) -> None:
    ignoring = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ignoring += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ignoring
    for template, words in ((ignoring, "as one without"), (refusing, "no system role")):
        model = tmp_path / words.replace(" ", "_")
        shutil.copytree(FOLDERS["nano"], model)
        (model / "chat_template.jinja").write_text(template)
        refuse_unusable(a_recipe(model=str(model)), str(model))
        with pytest.raises(ModelError, match=words):
            refuse_unusable(a_recipe(model=str(model), evaluate={"system": ["none", "Be kind."]}), str(model))
