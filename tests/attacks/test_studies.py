"""Study folders and study files of strangers: nothing outside is written, nothing is waited for, no key goes elsewhere."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import ask_to_stop, mean_of
from iterft_lite.engine.study import CELLS, NAME, STATE, STOP, STUDY, StudyFolder, SweepState
from iterft_lite.errors import FolderError, RecipeError
from iterft_lite.experiment.grid import cells, make_study
from iterft_lite.files import FolderLock
from iterft_lite.ui.cli import main
from iterft_lite.ui.live_sweep import show_state
from tests.attacks import faults
from tests.attacks.strangers import PRECIOUS, SPECIAL, change, finished_by, use


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_by(faults.finished_study, tmp_path_factory.mktemp("finished") / "study")


@pytest.fixture
def stranger(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished study with its file beside it, and a file that nobody may touch."""
    (tmp_path / PRECIOUS).write_text("mine")
    for name in ("study.toml", "base.toml"):
        shutil.copy(finished.parent / name, tmp_path / name)
    return shutil.copytree(finished, tmp_path / "study", symlinks=True)


def looked_at(root: Path) -> str:
    """What `iterft sweep status` prints."""
    console = Console(file=io.StringIO(), width=80)
    show_state(StudyFolder(root), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# -- folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../../precious", "/tmp", "x\0y", "a\x1b[2J", "x" * 300, "\ud800", 7, None, ["a"], {}]
)
def test_no_cell_name_leads_out_of_its_study(stranger: Path, name: Any) -> None:
    change(stranger / STUDY, lambda value: value["cells"][0].update(name=name))
    before = sorted(stranger.parent.iterdir())
    with pytest.raises(FolderError, match="not the folder of a study"):
        looked_at(stranger)
    use(faults.uses_of_a_study(), stranger)
    assert sorted(stranger.parent.iterdir()) == before


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [STUDY, STATE, STOP, "lock", f"{CELLS}/rows4/run.json"])
def test_special_files_are_reported_without_blocking(stranger: Path, name: str, kind: str) -> None:
    path = stranger / name
    path.unlink(missing_ok=True)
    SPECIAL[kind](path)
    use(faults.uses_of_a_study(), stranger)


def test_a_link_in_place_of_a_cell_or_stop_file_is_not_followed(stranger: Path, tmp_path: Path) -> None:
    (stranger / STOP).symlink_to(tmp_path / "new")
    change(stranger / STATE, lambda value: value.update(ended=False, written=4e9))
    for sweep_is_on in (True, False):
        change(stranger / STATE, lambda value, on=sweep_is_on: value.update(ended=not on))
        use(faults.uses_of_a_study(), stranger)
    shutil.rmtree(stranger / CELLS / "rows4")
    (tmp_path / "elsewhere").mkdir()
    (stranger / CELLS / "rows4").symlink_to(tmp_path / "elsewhere")
    use(faults.uses_of_a_study(), stranger)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_state_from_the_future_counts_as_ended(stranger: Path) -> None:
    change(stranger / STATE, lambda value: value.update(ended=False, written=5e9))
    assert StudyFolder(stranger).state().ended
    assert not ask_to_stop(StudyFolder(stranger))


@pytest.mark.parametrize("value", [1e999, float("nan"), "soon", -1, [], {}, True, 10**400, "\x1b[2J", "\ud800"])
@pytest.mark.parametrize("field", [*SweepState.__dataclass_fields__, "score", "state", "cycle", "failure", "step"])
def test_an_invalid_state_is_shown_or_skipped(stranger: Path, field: str, value: Any) -> None:
    change(stranger / STATE, lambda state: (state if field in state else state["cells"]["rows4"]).update({field: value}))
    shown = looked_at(stranger)
    assert "of 2 cells" in shown
    assert "\x1b[2J" not in shown
    printed = CliRunner().invoke(main, ["sweep", "status", str(stranger), "--json"])
    assert printed.exit_code == 0, printed.output
    assert set(json.loads(printed.stdout)["cells"]) == {"rows4", "rows5"}


def test_random_damage_gives_only_iterft_errors(finished: Path) -> None:
    uses = faults.uses_of_a_study()
    beside = [finished.parent / name for name in ("study.toml", "base.toml")]
    assert faults.damages(6, random.Random(3), uses, finished, beside).keys() == {"good"}


def test_a_study_in_use_by_another_sweep_is_left_alone(stranger: Path) -> None:
    lock = FolderLock(stranger / "lock", "a test")
    lock.acquire()
    before = (stranger / STUDY).read_bytes()
    with pytest.raises(FolderError, match="another sweep is going on"):
        faults.uses_of_a_study()["go on"](stranger)
    assert (stranger / STUDY).read_bytes() == before
    lock.release()


def test_a_strangers_study_cannot_redirect_the_judge(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine-0123456789")
    elsewhere = "http://127.0.0.1:9/v1"
    for cell in ("rows4", "rows5"):
        path = stranger / CELLS / cell / "run.json"
        change(path, lambda value: value["recipe"].update(judge="openai/gpt-4o-mini", api_base=elsewhere))
        change(path, lambda value: value["judge"].update(name="openai/gpt-4o-mini", method="samples", address=elsewhere))
    study = StudyPlan(tmp_path / "study.toml", ["judge=openai/gpt-4o-mini"])
    planned = study.planned(study.cells, StudyFolder(stranger))
    assert {each.prepared.resolved.inputs.judge.address for each in planned} == {"https://api.openai.com/v1"}
    said = [choice for each in planned for choice in each.prepared.resolved.choices]
    assert not any(elsewhere in choice for choice in said)
    own = StudyPlan(tmp_path / "study.toml", ["judge=openai/gpt-4o-mini", f"api_base={elsewhere}"])
    chosen = {choice for each in own.planned(own.cells) for choice in each.prepared.resolved.choices}
    assert any(f"is asked at {elsewhere}" in choice for choice in chosen), "an address of one's own is said"


# -- files ----------------------------------------------------------------------------------------------------------------


BASE: dict[str, Any] = {"base": "nano_sft"}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"grid": {"rows": [float("nan")]}}, "has a value that no recipe has"),
        ({"grid": {"rows": list(range(2000)), "seed": list(range(2000))}}, "4,000,000 cells"),
        ({"grid": {f"key{n}": [1] for n in range(30_000)}}, "problems"),
        ({"grid": {"rows": list(range(40_000))}}, "40,000 cells"),
        ({"add": [{"rows": n} for n in range(20_000)]}, "at most 10,000"),
        ({"grid": {"rows": [1, 2]}, "skip": [{"rows": 3}] * 5000}, "at most 1,000"),
        ({"grid": {"rows": [1]}, "arms": [["no_seed"], {}, 7]}, "there is no null arm"),
        ({"grid": {"rows": {"calibrated": [1e999]}}}, "only `seed_rows"),
        ({"grid": {"seed_rows": {"calibrated": [float("nan")]}}}, "not a score from 1 to 100"),
        ({"grid": {"trait": ["a/pirate", "b/pirate"]}}, "would be called `trait-pirate`"),
        ({"grid": {"rows": [60, 60.0]}}, "would be called `rows60`"),
    ],
)
def test_a_study_that_asks_for_too_much_or_nonsense_is_refused_at_once(sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        cells(make_study({**BASE, "sweep": sweep}, source="a test"))


def test_numbers_that_differ_in_late_digits_get_different_names() -> None:
    found = cells(make_study({**BASE, "sweep": {"grid": {"train.learning_rate": [1.00000001e-4, 1e-4]}}}, source="a test"))
    assert [cell.name for cell in found] == ["learning_rate0.000100000001", "learning_rate0.0001"]


def test_a_cell_with_a_large_number_has_a_name_that_its_own_study_reads() -> None:
    (cell,) = cells(make_study({**BASE, "sweep": {"grid": {"train.learning_rate": [3e6]}}}, source="a test"))
    assert NAME.fullmatch(cell.name)
    assert cell.name == "learning_rate3e06"


@pytest.mark.parametrize("results", [{}, {"trait": None}, {"trait": []}, {"trait": {"mean": "9"}}, {"trait": {"mean": 1e999}}])
def test_invalid_scores_count_as_missing(results: dict[str, Any]) -> None:
    assert mean_of(results, "trait") is None
