"""A run held against published scores: what agrees, what differs, and what cannot be told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.app.session import open_run
from iterft_lite.data.published import published_names, read_published
from iterft_lite.data.recipes import recipe_path, study_names
from iterft_lite.errors import UserError
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.report.replication import Replication, replicate
from iterft_lite.report.report import Report, read_report, with_scores
from iterft_lite.ui.cli import main
from tests.loop import small_recipe

PUBLISHED = read_published("bliss_4b")

THEIRS = {-1: 2.3, 0: 50.6, 1: 42.1, 2: 39.4, 3: 45.1, 4: 45.0}
"""What the authors found with 50 seed rows and 50 of each model's own."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("replicate")
    (root / "small.toml").write_text(small_recipe(trait="bliss", cycles=4, questions=2))
    with open_run(root / "small.toml", (), root / "run") as session:
        list(session.events())
    return root / "run"


def scored(run: Path, means: Mapping[int, float], *, spread: float = 1.0, rows: int = 50) -> Report:
    """The run as if these had been its scores, in eight prompts that lie `spread` apart, after training on so many rows."""
    report = read_report(run)
    report.manifest["recipe"]["rows"] = rows

    def of(mean: float) -> dict[str, list[float]]:
        return {f"q{n}": [min(100.0, max(1.0, mean + spread * (n - 3.5)))] for n in range(8)}

    facts = {
        cycle: {
            "trait": {"by_prompt": of(mean), "scored": 8, "unscored": 0, "reasons": {}},
            "coherence": {"by_prompt": of(98.0), "scored": 8, "unscored": 0, "reasons": {}},
        }
        for cycle, mean in means.items()
    }
    return with_scores(report, facts, report.judge, {})


def held(run: Path, means: Mapping[int, float], **keys: float) -> Replication:
    return replicate(scored(run, means, **keys), PUBLISHED)


def test_a_run_with_the_published_scores_agrees_in_every_number(run: Path) -> None:
    found = held(run, THEIRS, spread=0.5)
    assert (found.word, {check.word for check in found.checks}) == ("agrees", {"agrees"})
    assert [check.what for check in found.checks[:3]] == [
        "untouched trait",
        "untouched coherence",
        "cycle 0 (50 seed rows there)",
    ]
    assert found.checks[-1].what == "change to cycle 4"


def test_a_run_that_grows_where_the_papers_stayed_level_differs(run: Path) -> None:
    found = held(run, THEIRS | {3: 80.0, 4: 90.0}, spread=0.5)
    words = {check.what.partition(" (")[0]: check.word for check in found.checks}
    assert found.word == "differs"
    assert (words["cycle 1"], words["cycle 3"], words["change to cycle 4"]) == ("agrees", "differs", "differs")


def test_an_interval_wider_than_the_margin_is_inconclusive(run: Path) -> None:
    found = held(run, THEIRS | {-1: 8.0}, spread=9.0)
    assert found.word == "cannot be told"
    assert "cannot be told" in {check.word for check in found.checks}


@pytest.mark.parametrize(("begin", "rows"), [(70.0, 50), (50.6, 60)])
def test_a_run_with_another_start_or_other_rows_has_no_published_curve(run: Path, begin: float, rows: int) -> None:
    found = held(run, THEIRS | {0: begin}, spread=0.5, rows=rows)
    assert found.word == "nothing to compare"
    assert [check.what for check in found.checks][-1] == "curve"


def test_a_run_is_compared_with_the_curve_that_starts_nearest(run: Path) -> None:
    found = held(run, THEIRS | {0: 85.0}, spread=0.5)
    assert found.checks[2].what == "cycle 0 (100 seed rows there)"


def test_differences_from_the_published_settings_are_listed(run: Path) -> None:
    found = held(run, THEIRS)
    assert "`model` is 'nano', published 'Qwen/Qwen3-4B-Instruct-2507'" in found.deviations
    assert "`train.schedule` is 'constant', published 'linear'" in found.deviations
    pinned = scored(run, THEIRS)
    pinned.manifest["recipe"]["model"] = "Qwen/Qwen3-4B-Instruct-2507@" + "a" * 40
    assert not any("`model`" in text for text in replicate(pinned, PUBLISHED).deviations)


@pytest.mark.parametrize("name", published_names())
def test_the_shipped_recipe_has_the_published_settings(name: str, run: Path) -> None:
    published = read_published(name)
    recipe = read_recipe(recipe_path(published.recipe))
    as_asked = replace(read_report(run), manifest={"recipe": recipe.model_dump(mode="json")})
    assert [text for text in replicate(as_asked, published).deviations if text.startswith("`")] == []
    assert published.recipe in study_names()


def test_replicate_shows_every_number_and_the_conclusion(run: Path) -> None:
    shown = CliRunner().invoke(main, ["replicate", str(run)])
    assert shown.exit_code == 0, shown.output
    text = shown.output
    assert f"{run}: differs" in text
    assert "untouched coherence" in text
    assert "begins at 10.0" in " ".join(text.split())
    value = json.loads(CliRunner().invoke(main, ["replicate", str(run), "--json"]).output)
    assert value["runs"][str(run)]["checks"][0]["what"] == "untouched trait"


def test_a_run_of_another_trait_is_refused(run: Path) -> None:
    report = read_report(run)
    report.manifest["recipe"]["trait"] = "lucky"
    with pytest.raises(UserError, match="are of the trait bliss, this run's is lucky"):
        replicate(report, PUBLISHED)


def test_traits_without_published_scores_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="there are no published scores `bliss_9b`"):
        read_published("bliss_9b")
