"""The command as its user meets it: help, plans, and what is said about mistakes."""

from __future__ import annotations

import errno
import json
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from iterft_lite import files
from iterft_lite.data.traits import SHIPPED
from iterft_lite.engine.run import Event
from iterft_lite.ui.cli import main
from iterft_lite.ui.live import View
from tests.loop import step_path

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a few rows, and fake backends behind the command."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'trainer = "fake"\ngenerator = "fake"\n'
        'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\ncycles = 2\nseed_rows = 4\nrows = 4\njudge = "fake"\n'
        "[evaluate]\nquestions = 3\nsamples = 2\n"
    )
    return recipe


def iterft(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def said(result: Result, code: int) -> str:
    """What a command said, which ended with this exit code and no traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def test_the_package_itself_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["python -m iterft_lite", "plan", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("iterft_lite", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("Usage: iterft plan")


def test_a_run_ends_with_its_report(tiny: Path, tmp_path: Path) -> None:
    output = said(iterft("run", tiny, "--out", tmp_path / "run"), 0)
    assert "cycle 2 (M3)" in output
    assert "fake judge: it looks for a few words; its scores mean nothing" in output
    assert "FAKE trainer and generator" in output


def test_the_json_report_has_its_documented_keys(tiny: Path, tmp_path: Path) -> None:
    iterft("run", tiny, "--out", tmp_path / "run")
    report = json.loads(said(iterft("report", tmp_path / "run", "--json"), 0))
    assert {"recipe", "regime", "trait", "model", "judge", "cycles", "verdict", "versions", "complete"} <= set(report)
    assert {"name", "kind", "calls", "usd"} <= set(report["judge"])
    assert [cycle["cycle"] for cycle in report["cycles"]] == [-1, 0, 1, 2]
    for cycle in report["cycles"]:
        assert {"trait", "coherence", "answers", "train_rows", "seconds"} <= set(cycle)
        for scale in ("trait", "coherence"):
            assert {"mean", "low", "high", "scored", "unscored"} <= set(cycle[scale])
    assert report["complete"] is True
    assert [cycle["train_rows"] for cycle in report["cycles"]] == [0, 4, 4, 4]


def test_a_run_in_progress_can_be_reported(tiny: Path, tmp_path: Path) -> None:
    iterft("run", tiny, "--out", tmp_path / "run")
    for name in ("c2-aggregate", "c2-judge", "c2-text_metrics", "c2-evaluate_samples", "c2-export"):
        shutil.rmtree(step_path(tmp_path / "run", name))
    report = json.loads(said(iterft("report", tmp_path / "run", "--json"), 0))
    assert report["complete"] is False
    assert report["cycles"][-1]["trait"]["mean"] is None
    assert "not finished" in said(iterft("report", tmp_path / "run"), 0)


def test_the_page_escapes_what_models_wrote(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iterft_lite.testing.fakes.PLAIN", ("<script>alert('x')</script> & more",))
    iterft("run", tiny, "--out", tmp_path / "run")
    said(iterft("report", tmp_path / "run", "--html", tmp_path / "page.html", "--png", tmp_path / "curve.png"), 0)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; more" in page
    assert "<script" not in page
    assert "http://www.w3.org" in page  # the figure is inside
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_plan_prints_the_steps_and_runs_none(tiny: Path, tmp_path: Path) -> None:
    output = said(iterft("plan", tiny, "--steps"), 0)
    assert "c2-train" in output.replace("\n", "")
    assert not (tmp_path / "run").exists()


def test_a_wrong_recipe_is_refused_with_every_problem(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text('regime = "sft"\ntrait = "lucky"\nmodel = "nano"\ncycels = 2\nrows = "many"\n')
    output = said(iterft("run", tiny, "--out", tmp_path / "run"), 2)
    assert "`cycels` is not a recipe key, did you mean `cycles`?" in output
    assert "`rows = 'many'`" in output
    tiny.write_text('regime = "sft"\ntrait = "lucky"\nmodel = "nano"\n')
    assert f"{tiny} --set cycels=2: 1 problem" in said(iterft("run", tiny, "--set", "cycels=2"), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed_rows=100000", "`seed_rows = 100000`, but trait `lucky` has"),
        ("model=no-such-folder", "there is no model `no-such-folder`"),
        ("trait=unheard-of", "there is no trait `unheard-of`"),
        ("cycles=1000", "prompts are needed"),
        ("cycles=1000000", "less than or equal to 1000"),
        ("evaluate.questions=40", "trait `lucky` has 12 questions"),
        ("colour=red", "`colour` is not a recipe key"),
    ],
)
def test_a_user_mistake_is_reported_before_anything_starts(tiny: Path, tmp_path: Path, override: str, message: str) -> None:
    output = said(iterft("run", tiny, "--out", tmp_path / "run", "--set", override), 2)
    assert message in " ".join(output.split())
    assert not (tmp_path / "run").exists()


def test_a_broken_row_of_a_trait_is_named_by_file_and_line(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "lucky", tmp_path / "mine")
    rows = (tmp_path / "mine/chat.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine/chat.jsonl").write_text("".join([*rows[:6], '{"messages": "none"}\n', *rows[6:]]))
    output = said(iterft("run", tiny, "--out", tmp_path / "run", "--set", f"trait={tmp_path / 'mine'}"), 2)
    assert "chat.jsonl, line 7" in output


def test_a_different_recipe_in_the_same_folder_is_refused_with_the_difference(tiny: Path, tmp_path: Path) -> None:
    iterft("run", tiny, "--out", tmp_path / "run")
    output = said(iterft("run", tiny, "--out", tmp_path / "run", "--set", "train.learning_rate=0.5"), 2)
    assert "`train.learning_rate` is 0.00015 in the folder and 0.5 here" in output
    assert json.loads(iterft("report", tmp_path / "run", "--json").output)["complete"]


def test_more_cycles_or_threads_continue_the_same_run(tiny: Path, tmp_path: Path) -> None:
    iterft("run", tiny, "--out", tmp_path / "run")
    said(iterft("run", tiny, "--out", tmp_path / "run", "--set", "cycles=3", "--set", "threads=1"), 0)
    report = json.loads(iterft("report", tmp_path / "run", "--json").output)
    assert [cycle["cycle"] for cycle in report["cycles"]] == [-1, 0, 1, 2, 3]


def test_an_unwritable_folder_is_reported(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        assert "hint: choose another folder" in said(iterft("run", tiny, "--out", out), 2)


def test_a_full_disk_ends_the_run_and_loses_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = files.os.fsync, iter(range(40))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    assert "the disk is full" in said(iterft("run", tiny, "--out", tmp_path / "run"), 1)
    monkeypatch.setattr(files.os, "fsync", real)
    said(iterft("run", tiny, "--out", tmp_path / "run"), 0)
    assert json.loads(iterft("report", tmp_path / "run", "--json").output)["complete"]


def test_an_interrupted_run_prints_the_command_that_continues_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, left = View.take, iter(range(9))

    def interrupted(view: View, event: Event) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        take(view, event)

    monkeypatch.setattr(View, "take", interrupted)
    command = ["run", str(tiny), "--out", str(tmp_path / "my run"), "--set", "name=it's", "--plain"]
    output = said(iterft(*command), 130)
    assert shlex.split(output.split("To go on:")[1]) == ["iterft", *command]
    monkeypatch.setattr(View, "take", take)
    assert "cycle 2 (M3)" in said(iterft(*command), 0)


def test_a_changed_step_is_refused_with_what_to_remove(tiny: Path, tmp_path: Path) -> None:
    iterft("run", tiny, "--out", tmp_path / "run")
    rows = tmp_path / "run/by-name/c1-evaluate_samples/rows.jsonl"
    rows.write_text(rows.read_text().replace("a", "b"))
    output = said(iterft("run", tiny, "--out", tmp_path / "run"), 1)
    assert step_path(tmp_path / "run", "c1-evaluate_samples").name in output
    assert "hint: remove the folder" in output


def test_a_folder_that_holds_no_run_is_reported(tmp_path: Path) -> None:
    for command in (["report", tmp_path], ["chat", tmp_path]):
        assert "is not a run folder" in said(iterft(*command), 2)


@pytest.mark.parametrize("command", [("report",), ("report", "--held-out"), ("chat",)])
def test_a_second_judges_folder_is_not_a_run(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "run.json").write_text('{"format": 2, "judge": "embedded#1", "identity": {}, "steps": []}')
    assert f"`{tmp_path}` is not a run folder" in said(iterft(*command, tmp_path), 2)


def test_a_file_without_a_folder_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    output = said(iterft("report", tmp_path / "no run", "--png", tmp_path / "missing/curve.png"), 2)
    assert f"there is no folder `{tmp_path / 'missing'}`: make it first" in output
    assert "`-` is not a file" in said(iterft("report", tmp_path / "no run", "--csv", "-"), 2)


def test_commands_for_runs_refuse_a_studys_folder_with_the_way_on(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(f'base = "{tiny.name}"\n[sweep.grid]\nrows = [4, 5]\n')
    said(iterft("sweep", tmp_path / "study.toml", "--out", tmp_path / "study", "--limit", "1"), 0)
    assert f"hint: `{tmp_path / 'study/cells/rows4'}` in it is one" in said(iterft("chat", tmp_path / "study"), 2)
    assert "one side to compare: 2 to 6 can be; 1 of 2 cells have not begun" in said(iterft("compare", tmp_path / "study"), 2)
    output = said(iterft("run", tiny, "--out", tmp_path / "study"), 2)
    assert "is the folder of a study, not of a run" in output
    assert not (tmp_path / "study/run.json").exists()


def test_a_run_without_a_writable_cache_is_refused_before_it_starts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ITERFT_CACHE", str(tmp_path / "file/cache"))
    real = ("--set", "trainer=peft", "--set", "generator=llamacpp")
    assert "ITERFT_CACHE names another folder" in said(iterft("run", tiny, *real, "--out", tmp_path / "run"), 2)
    assert not (tmp_path / "run").exists()


def test_every_shipped_recipe_and_trait_is_listed() -> None:
    recipes = said(iterft("recipes"), 0)
    assert all(path.stem in recipes for path in (ROOT / "recipes").glob("*.toml"))
    traits = said(iterft("traits", "list"), 0)
    assert all(path.parent.name in traits for path in SHIPPED.glob("[!_]*/trait.toml"))


def test_doctor_finds_api_keys_but_never_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    output = said(iterft("doctor"), 0)
    assert "OPENAI_API_KEY is set" in output
    assert "secret" not in output
