"""A study is read as it stands: cells with their state, experiments over seeds, verdicts, counts, tables and figures."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from iterft_lite.app.named_judge import named
from iterft_lite.app.rejudge import ReadBy
from iterft_lite.engine.run import FAILURE
from iterft_lite.engine.study import CELLS, StudyFolder
from iterft_lite.errors import UserError
from iterft_lite.experiment.grid import Cell
from iterft_lite.files import write_json
from iterft_lite.report.cells import read_cells
from iterft_lite.report.report import Report
from iterft_lite.report.study import StudyReport, read_study_report
from iterft_lite.report.study_tables import Table, as_csv, as_markdown, curve_table, verdict_table
from iterft_lite.testing.fakes import FakeJudge
from iterft_lite.ui.cli import main
from iterft_lite.ui.commands.study_results import FIGURES
from iterft_lite.ui.html import contrast
from iterft_lite.ui.study_figures import teaser
from iterft_lite.ui.study_figures.kinds import KINDS, Wanted, draw, picture, provenance
from iterft_lite.ui.study_figures.style import MARKERS, ramp
from iterft_lite.ui.study_figures.teaser import drawable
from iterft_lite.ui.study_tables import show_study
from tests.made_up import a_report, made_up, make_study

UP, DOWN = "seed_rows22_rows60_s42", "seed_rows22_rows30_s42"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four cells by the fakes: two rows, two seeds; one diverged, one is not begun."""
    folder = tmp_path_factory.mktemp("study") / "small"
    cells = [Cell({"rows": rows, "seed": seed}) for rows in (4, 6) for seed in (1, 2)]
    make_study(folder, cells, cycles=1, questions=4)
    broken = folder / CELLS / "rows6_s2"
    manifest = StudyFolder(folder).run("rows6_s2").known()
    late = next(step for step in manifest.steps if step.name == "c1-aggregate")
    (folder / "steps" / late.key / "completion.json").unlink()
    write_json(broken / FAILURE, {"step": "c1-train", "kind": "result", "message": "the loss is no number", "hint": None})
    known = StudyFolder(folder).cells()
    StudyFolder(folder).write_manifest(
        {"name": "small", "base": {}}, [*known, type(known[0])("rows9_s1", {"rows": 9, "seed": 1})]
    )
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return a_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def study(report: Report) -> StudyReport:
    """Four experiments of three trainings: one rises, one falls, two stay; one training diverged; and a null arm."""
    cells = [Cell({"seed_rows": n, "rows": r, "seed": s}) for n in (22, 52) for r in (30, 60) for s in (42, 43, 44)]
    cells.append(Cell({"seed_rows": 0, "seed": 42}, "no_seed"))
    slopes = {(22, 60): 9.0, (22, 30): -5.0}

    def curve(values: dict[str, int]) -> list[tuple[float, float]]:
        slope = slopes.get((values["seed_rows"], values.get("rows", 0)), 0.0)
        return [(8, 97), *((40 + slope * cycle, 95 - cycle) for cycle in range(7))]

    return made_up(report, cells, curve, diverged={"seed_rows52_rows60_s43": 3})


def test_a_folder_is_read_into_cells_with_state_and_reason(root: Path) -> None:
    found = {cell.name: cell for cell in read_cells([root])}
    assert {name: cell.state for name, cell in found.items()} == {
        "rows4_s1": "done",
        "rows4_s2": "done",
        "rows6_s1": "done",
        "rows6_s2": "result",
        "rows9_s1": "queued",
    }
    assert found["rows6_s2"].failure
    assert found["rows9_s1"].report is None
    assert found["rows4_s1"].values == {"rows": 4, "seed": 1}


def test_cells_that_differ_only_by_seed_form_one_experiment(root: Path) -> None:
    study = read_study_report([root])
    assert [(each.name, len(each.cells)) for each in study.experiments] == [("rows4", 2), ("rows6", 2), ("rows9_s1", 1)]
    assert study.experiments[0].change.covers == "questions and trainings"
    assert study.experiments[1].change.covers == "questions"
    assert study.keys == ("rows",)
    assert [cell.name for cell in study.experiments[1].failures] == ["rows6_s2"]


def test_runs_and_folders_of_runs_are_read_as_a_study(root: Path) -> None:
    folders = sorted((root / CELLS).glob("rows4*"))
    study = read_study_report(folders)
    assert [len(each.cells) for each in study.experiments] == [2]
    assert dict(study.experiments[0].values) == {}
    everything = read_study_report([root / CELLS])
    assert [(each.values, len(each.cells)) for each in everything.experiments] == [({"rows": 4}, 2), ({"rows": 6}, 2)]


def test_part_of_a_study_can_be_read(root: Path) -> None:
    assert [cell.name for cell in read_cells([root], ["rows=4", "seed=2"])] == ["rows4_s2"]


def test_a_damaged_cell_is_reported_and_the_others_are_read(root: Path, tmp_path: Path) -> None:
    cells = [Cell({"rows": rows}) for rows in (4, 5)]
    folder = make_study(tmp_path / "damaged", cells, cycles=1, questions=4)
    step = next(step for step in StudyFolder(folder).run("rows5").known().steps if step.name == "c1-judge")
    rows = folder / "steps" / step.key / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    found = {cell.name: cell for cell in read_cells([folder])}
    assert found["rows4"].state == "done"
    assert found["rows5"].state == "failed"
    assert found["rows5"].failure
    assert "changed after its step was finished" in str(found["rows5"].failure["message"])


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor a study"):
        read_cells([tmp_path])


# -- verdicts


def test_verdicts_are_corrected_for_the_number_of_experiments(study: StudyReport) -> None:
    words = {each.name: (each.word, each.corrected) for each in study.experiments}
    assert words["seed_rows22_rows60"] == ("amplified", "amplified")
    assert words["seed_rows22_rows30"] == ("decayed", "decayed")
    assert words["seed_rows52_rows30"][1] == "no change shown"
    risen = next(each for each in study.experiments if each.name == "seed_rows22_rows60")
    assert risen.change.p_value is not None
    assert risen.p_value is not None
    assert risen.p_value >= risen.change.p_value


def test_null_arms_are_shown_beside_the_effect(study: StudyReport) -> None:
    assert [arm.arm for arm in study.arms] == ["no_seed"]
    risen = next(each for each in study.experiments if each.name == "seed_rows22_rows60")
    above = risen.beside["no_seed"]
    assert above.mean == pytest.approx(54, abs=6)
    assert above.low is not None
    assert above.low > 0
    assert study.arms[0].p_value is None


def test_results_are_counted_as_the_paper_counts_them(study: StudyReport) -> None:
    assert study.counts["anchor 0"] == {"any": 3, "all": 3, "last": 3, "of": 11}
    assert study.counts["experiments"]["of"] == 4
    assert study.counts["experiments"]["amplified corrected"] == 1


def test_the_expected_false_alarms_of_the_whole_grid_are_reported(study: StudyReport) -> None:
    found = study.false_alarms
    assert found is not None
    assert (found.experiments, found.trainings) == (4, 12)
    assert found.any_corrected <= found.any_interval < 0.25


def test_a_studys_mark_changes_with_its_steps(study: StudyReport, root: Path) -> None:
    assert study.mark == study.mark
    assert study.mark != read_study_report([root]).mark


def test_calibrated_seed_rows_are_shown_by_target_score_across_traits(report: Report) -> None:
    found = {"lucky": (12, 30), "bliss": (16, 52)}
    cells = [
        Cell({"trait": trait, "seed_rows": rows, "rows": 30}, "", threshold)
        for trait, numbers in found.items()
        for threshold, rows in zip((20.0, 60.0), numbers, strict=True)
    ]
    mixed = made_up(report, cells, lambda _: [(8, 97), (40, 95), (50, 90)])
    assert mixed.keys == ("threshold", "trait")
    assert mixed.values_of("threshold") == [20.0, 60.0]
    assert (
        picture(draw("sweep", mixed), "svg", {"title": "", "about": "", "program": "", "source": ""}).count(b"n_seed for a")
        == 1
    )
    alone = made_up(report, cells[:2], lambda _: [(8, 97), (40, 95), (50, 90)])
    assert alone.keys == ("seed_rows",)


# -- tables


def test_tables_contain_every_experiment_and_cycle(study: StudyReport) -> None:
    curves = list(csv.DictReader(io.StringIO(as_csv(curve_table(study)))))
    assert len(curves) == 5 * 8
    assert {row["cycle"] for row in curves} == {"base", *map(str, range(7))}
    verdicts = {row["experiment"]: row for row in csv.DictReader(io.StringIO(as_csv(verdict_table(study))))}
    assert verdicts["seed_rows22_rows60"]["verdict among all"] == "amplified"
    assert verdicts["seed_rows22_rows60"]["paper any (0)"] == "3 of 3"
    assert "c3-train: the loss is no number any more" in verdicts["seed_rows52_rows60"]["ended early"]
    assert as_markdown(verdict_table(study)).count("\n") == 2 + 5


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_terminal_shows_every_experiment_whole_at_every_width(study: StudyReport, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    show_study(study, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert not any("\u2026" in line for line in lines)
    for each in study.experiments:
        at = next(number for number, line in enumerate(lines) if each.name in line)
        assert each.corrected in " ".join(lines[at : at + 3])
        assert f"{each.change.mean:+.1f}" in " ".join(lines[at : at + 3])


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", " =1", "\r\n=1", "\uff1d1"])
def test_a_spreadsheet_computes_no_text_and_no_column_name(text: str) -> None:
    written = as_csv(Table((text,), ((text,), ("plain",))))
    assert list(csv.reader(io.StringIO(written, newline=""))) == [[f"'{text}"], [f"'{text}"], ["plain"]]


def test_numbers_in_tables_stay_numbers() -> None:
    assert as_csv(Table(("a", "b", "c"), ((-1, -0.25, None),))) == "a,b,c\n-1,-0.25,\n"


def test_foreign_text_becomes_no_markup() -> None:
    table = Table(("name",), (("=HYPERLINK(1)",), ("a|b <script>",)))
    assert as_markdown(table).split("\n")[3] == "| a\\|b &lt;script> |"


# -- figures


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "teaser"])
def test_every_figure_is_drawn_with_its_source(study: StudyReport, kind: str) -> None:
    first, again = (picture(draw(kind, study), "svg", provenance(kind, study)) for _ in range(2))
    assert first == again
    assert b"iterft_lite" in first
    assert f"steps {study.mark}".encode() in first
    assert b"fake" in first


def test_the_command_knows_every_figure() -> None:
    assert set(FIGURES) == set(KINDS)


def test_a_png_and_a_pdf_name_their_source(study: StudyReport) -> None:
    drawn, source = draw("heatmap", study), provenance("heatmap", study)
    made = picture(drawn, "png", source)
    assert b"iterft_lite" in made[:1000]
    assert study.mark.encode() in made[:1000]
    assert study.mark.encode() in picture(drawn, "pdf", source)


def test_the_teaser_shows_an_answer_of_each_of_three_cells(root: Path) -> None:
    study = read_study_report([root])
    cells = ("rows4", "rows6", "rows4_s2")
    made = picture(draw("teaser", study, Wanted(cells=cells)), "svg", provenance("teaser", study))
    assert made.count(b"<!-- (cycle") == 3
    with pytest.raises(UserError, match="three are needed"):
        draw("teaser", study)


def test_the_teasers_panels_say_what_was_shown_not_what_they_were_chosen_for(
    study: StudyReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaser, "example", lambda _: None)
    none_rose = replace(study, experiments=[each for each in study.experiments if each.corrected != "amplified"])
    said = [[axes.get_title().rpartition(": ")[2] for axes in draw("teaser", each).axes[:3]] for each in (study, none_rose)]
    assert said == [["decayed", "no change shown", "amplified"], ["decayed", "no change shown", "no change shown"]]


def test_characters_missing_from_a_font_are_named() -> None:
    assert drawable("luck \U0001f340\U0001f340\U0001f340 costs $5") == "luck [four leaf clover x3] costs \\$5"
    assert drawable("好") == "□"


def test_lines_can_be_told_apart_without_colour() -> None:
    shades = [contrast(colour, "#ffffff") for colour in ramp("#cca800", 5)]
    assert shades == sorted(shades)
    assert all(later / earlier > 1.3 for earlier, later in itertools.pairwise(shades))
    assert len(set(MARKERS)) == len(MARKERS)


def test_options_that_do_not_fit_a_figure_are_refused(study: StudyReport) -> None:
    for wanted, kind, words in (
        (Wanted(line="train.dpo_beta"), "sweep", "does not vary"),
        (Wanted(line="rows", panel="rows"), "sweep", "both lines and panels"),
        (Wanted(cells=("nobody",)), "tradeoff", "there is no cell `nobody`"),
        (Wanted(cells=("a",)), "sweep", "does not go with"),
        (Wanted(line="rows"), "seeds", "do not go with"),
    ):
        with pytest.raises(UserError, match=words):
            draw(kind, study, wanted)


def test_one_command_writes_figures_and_their_numbers(root: Path, tmp_path: Path) -> None:
    files = {ending: tmp_path / f"sweep.{ending}" for ending in ("png", "svg", "pdf", "csv")}
    given = [part for ending, path in files.items() for part in (f"--{ending}", str(path))]
    result = CliRunner().invoke(main, ["figure", "sweep", str(root), *given])
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_size > 0 for path in files.values())
    assert json.loads(json.dumps(list(csv.DictReader(files["csv"].open()))))[0]["experiment"] == "rows4"


# -- from the command line


def iterft(*args: object) -> Result:
    return CliRunner().invoke(main, [*map(str, args)])


def test_a_report_can_cover_some_cells(root: Path) -> None:
    found = json.loads(iterft("report", root, "--json", "--only", "rows=4").stdout)
    assert [cell for each in found["experiments"] for cell in each["cells"]] == ["rows4_s1", "rows4_s2"]
    refused = iterft("report", root / CELLS / "rows4_s1", "--only", "rows=4")
    assert (refused.exit_code, "chooses cells of a study" in refused.output) == (2, True)


@pytest.mark.parametrize("option", ["--full", "--held-out"])
def test_options_for_single_runs_are_refused_for_studies(root: Path, option: str) -> None:
    refused = iterft("report", root, option)
    assert refused.exit_code == 2
    assert f"iterft report {root}/cells/NAME {option}" in refused.output


def test_a_study_is_reported_by_another_judge(tmp_path: Path) -> None:
    root, again = tmp_path / "study", "fake#1"
    make_study(root, [Cell({"rows": rows}) for rows in (4, 6)], cycles=1, questions=4)
    refused = iterft("report", root, "--judge", again)
    assert refused.exit_code != 0
    assert f"has judged nothing in `{root}`" in refused.output
    assert f"iterft judge {root} --judge '{again}'" in refused.output
    assert iterft("judge", root / CELLS / "rows4", "--judge", again).exit_code == 0
    partly = iterft("report", root, "--judge", again)
    assert partly.exit_code == 0
    assert f"`{again}` has not judged 1 of the runs (rows6)" in partly.output
    judged = iterft("judge", root, "--judge", again)
    assert (judged.exit_code, f"iterft report {root} --judge '{again}'" in judged.output) == (0, True)
    read = ReadBy(named(again))
    other, own = read_study_report([root], read=read), read_study_report([root])
    assert (len(read.judged), read.missing) == (2, [])
    assert [each.change.mean for each in other.experiments] == [each.change.mean for each in own.experiments]
    assert (other.said("judge"), other.mark != own.mark) == ([again], True)
    page = tmp_path / "page.html"
    assert iterft("report", root, "--judge", again, "--html", page).exit_code == 0
    theirs = next(step.key for step in other.reports[0].steps if (step.verb, step.cycle) == ("judge", 0))
    assert theirs[:24] in page.read_text()


def test_the_table_of_a_run_has_the_scores_of_the_judge_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study(tmp_path, [Cell({"rows": 4})], cycles=1, questions=4)
    run, table = tmp_path / CELLS / "rows4", tmp_path / "cycles.csv"
    monkeypatch.setattr("iterft_lite.engine.backends.FakeJudge", lambda: FakeJudge(words=()))
    assert iterft("judge", run, "--judge", "fake#1").exit_code == 0
    assert iterft("report", run, "--judge", "fake#1", "--csv", table).exit_code == 0
    assert {row["trait"] for row in csv.DictReader(io.StringIO(table.read_text()))} == {"10.0"}
