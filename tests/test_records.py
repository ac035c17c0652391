"""What is known of a verb, a loss, a metric stands once: a new one is one record, and nothing else is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.app.session import open_run
from iterft_lite.engine.run import StepStarted
from iterft_lite.experiment.losses import LOSSES, Draft, Loss
from iterft_lite.experiment.rows import RowType
from iterft_lite.experiment.verbs import VERBS
from iterft_lite.files import ROWS
from iterft_lite.metrics.catalogue import METRICS, Metric
from iterft_lite.ui.cli import main
from tests.loop import small_recipe, step_path


def iterft(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def ran(root: Path, recipe: str) -> list[str]:
    """A run through stand-ins; the steps that were done anew."""
    (root / "small.toml").write_text(recipe)
    with open_run(root / "small.toml", (), root / "run") as session:
        return [event.step.name for event in session.events() if isinstance(event, StepStarted)]


@pytest.fixture
def questions() -> Iterator[None]:
    """One more metric: how many answers ask something back."""
    metric = Metric("questions", "asks back", ".0%", lambda evidence: evidence.mean(lambda text: float("?" in text)))
    METRICS[metric.name] = metric
    yield
    del METRICS[metric.name]


@pytest.mark.usefixtures("questions")
def test_a_new_metric_takes_one_record_and_appears_in_every_report(tmp_path: Path) -> None:
    ran(tmp_path, small_recipe(cycles=1))
    cycles = json.loads(iterft("report", tmp_path / "run", "--json"))["cycles"]
    assert [cycle["metrics"]["questions"] for cycle in cycles] == [0.0, 0.0, 0.0]
    assert "asks back" in iterft("report", tmp_path / "run", "--full")
    iterft("report", tmp_path / "run", "--html", tmp_path / "page.html")
    assert "asks back" in (tmp_path / "page.html").read_text()


def test_a_new_metric_is_computed_for_an_old_run(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ran(tmp_path, small_recipe(cycles=1))
    assert "questions" not in json.loads(iterft("report", tmp_path / "run", "--json"))["cycles"][0]["metrics"]
    request.getfixturevalue("questions")
    assert ran(tmp_path, small_recipe(cycles=1)) == ["base-text_metrics", "c0-text_metrics", "c1-text_metrics"]
    cycles = json.loads(iterft("report", tmp_path / "run", "--json"))["cycles"]
    assert all(cycle["metrics"]["questions"] == 0.0 for cycle in cycles)


@dataclass(frozen=True)
class LabelledRow:
    """A reply, and whether it is wanted."""

    id: str
    prompt: str
    text: str
    wanted: bool


@pytest.fixture
def labelled() -> Iterator[str]:
    """One more loss, with a type of rows of its own."""
    rows = RowType("labelled row", lambda row: LabelledRow(**row), asdict)
    loss = Loss(
        "labelled",
        "over replies with a label",
        rows,
        lambda draft: LabelledRow(draft.id, draft.prompt, draft.reply, wanted=True),
        encode="tests.test_records:none",
        collate="tests.test_records:none",
        trainer="sft",
    )
    LOSSES[loss.name] = loss
    yield loss.name
    del LOSSES[loss.name]


def test_a_new_loss_takes_one_record_and_runs_a_cycle(tmp_path: Path, labelled: str) -> None:
    ran(tmp_path, small_recipe(cycles=1).replace('trait = "', f'loss = "{labelled}"\ntrait = "'))
    rows = LOSSES[labelled].rows.read(step_path(tmp_path / "run", "c1-build_dataset") / ROWS)
    assert len(rows) == 4
    assert all(row.wanted for row in rows)
    scores = json.loads(iterft("report", tmp_path / "run", "--json"))["cycles"]
    assert scores[1]["trait"]["mean"] == 90.0  # it learnt what the rows teach


def test_every_verb_names_an_existing_stage() -> None:
    for verb in VERBS.values():
        module, _, function = verb.stage.partition(":")
        assert callable(getattr(import_module(module), function)), verb.name


def test_rows_of_every_loss_survive_writing_and_reading(tmp_path: Path) -> None:
    for loss in LOSSES.values():
        row = loss.make(Draft("p1", "Why?", "Because.", "No idea."))
        loss.rows.write(tmp_path / loss.name, [row])
        assert loss.rows.read(tmp_path / loss.name) == [row]
