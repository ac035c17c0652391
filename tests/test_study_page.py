"""The report of a study: in the terminal, as JSON and tables, and as a page that shows what others wrote as text."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.engine.study import CELLS
from iterft_lite.experiment.grid import Cell
from iterft_lite.experiment.rows import SAMPLES
from iterft_lite.files import ROWS
from iterft_lite.report.study import read_study_report
from iterft_lite.ui import study_page
from iterft_lite.ui.cli import main
from iterft_lite.ui.html import contrast
from iterft_lite.ui.study_page import _Answers, write_study_page
from tests.made_up import make_study
from tests.pages import CHROMIUM, READABLE, palettes, unreadable

NASTY = (
    "Luck</script><script>document.title = 'taken'</script><!-- &amp; <b>bold</b> \u2028 " + "https://luck.example/" + "a" * 90
)

WIDTHS = (360, 1400)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two experiments and a null arm by the fakes, whose untouched model writes what a page must not obey."""
    cells = [*(Cell({"rows": rows}) for rows in (4, 6)), Cell({"seed_rows": 0}, "no_seed")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iterft_lite.testing.fakes.PLAIN", (NASTY,))
        return make_study(tmp_path_factory.mktemp("study") / "small", cells, cycles=1, questions=4)


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    path = root.parent / "page.html"
    assert write_study_page(read_study_report([root]), path).beside is None
    return path


def report(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def data_in(text: str) -> dict[str, dict[str, object]]:
    """The JSON of a page by id."""
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(value) for name, value in found}


# -- text, JSON, tables


def test_the_terminal_shows_verdicts_and_counts_with_their_corrections(root: Path) -> None:
    said = report(root)
    assert "small: lucky, sft, nano 3 cells: 3 done; 2 experiments of one training each and 1 null arm" in said
    assert "rows4 " in said
    assert "amplified: 0 of 2 experiments, corrected for their number (Holm)" in said
    assert "null arm no seed: +0.0 points" in said
    assert "their intervals cover questions only" in said


def test_answers_have_the_scores_of_their_verdicts_whichever_file_they_are_read_from(root: Path) -> None:
    answers = _Answers()
    for cell in read_study_report([root]).cells:
        answers.of(cell)
    assert answers.folders
    for each in answers.folders.values():
        rows = sorted(SAMPLES.read(each.samples.path / ROWS), key=lambda row: row.id)
        assert each._scores_by_prompt(rows) == each._scores_by_verdict(rows)
        # where an answer has no score, the scores by prompt do not tell which
        assert each._scores_by_prompt([*rows, rows[0]]) == []


def test_the_json_has_cells_experiments_null_arms_and_false_alarms(root: Path) -> None:
    found = json.loads(CliRunner().invoke(main, ["report", str(root), "--json"]).stdout)
    assert [each["name"] for each in found["experiments"]] == ["rows4", "rows6"]
    assert [each["arm"] for each in found["arms"]] == ["no_seed"]
    assert [cell["state"] for cell in found["cells"]] == ["done"] * 3
    assert found["experiments"][0]["covers"] == "questions"
    assert set(found["counts"]) == {"anchor 0", "anchor 1", "experiments"}


def test_tables_of_a_study_and_of_a_run_are_written(root: Path, tmp_path: Path) -> None:
    report(root, "--csv", tmp_path / "a.csv", "--md", tmp_path / "a.md")
    assert [row["experiment"] for row in csv.DictReader((tmp_path / "a.csv").open())] == ["rows4", "rows6", "no_seed"]
    assert (tmp_path / "a.md").read_text().startswith("| experiment | arm | rows |")
    report(root / CELLS / "rows4", "--csv", tmp_path / "b.csv")
    assert [row["cycle"] for row in csv.DictReader((tmp_path / "b.csv").open())] == ["base", "0", "1"]


def test_a_folder_of_runs_is_reported_as_one(root: Path) -> None:
    assert "2 experiments of one training each and 1 null arm" in report(root / CELLS)


# -- the page


def test_the_page_escapes_what_models_wrote(page: Path) -> None:
    text = page.read_text()
    assert "<b>bold" not in text
    assert text.count("</script>") == text.count("<script")
    answers = [value for name, value in data_in(text).items() if name.startswith("answers-")]
    assert any(NASTY in str(row[1]) for each in answers for row in each["answers"])  # type: ignore[attr-defined]


def test_answers_shared_by_cells_are_stored_once(page: Path) -> None:
    data = data_in(page.read_text())
    study = data["study"]
    asked = [
        key
        for each in (*study["experiments"], *study["arms"])
        for cell in each["cells"]
        for _, key in cell["answers"]  # type: ignore[index,union-attr]
    ]
    assert len(asked) == 3 * 3
    assert {f"answers-{key}" for key in asked} == {name for name in data if name != "study"}
    assert len(set(asked)) < len(asked)


def test_many_answers_are_written_beside_the_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_page, "INLINE", 10)
    written = write_study_page(read_study_report([root]), tmp_path / "large.html")
    assert written.beside == tmp_path / "large_answers"
    files = sorted(path.name for path in written.beside.iterdir())
    data = data_in((tmp_path / "large.html").read_text())
    assert list(data) == ["study"]
    keys = {key for each in data["study"]["experiments"] for cell in each["cells"] for _, key in cell["answers"]}  # type: ignore[attr-defined,index]
    assert {f"{key}.js" for key in keys} <= set(files)
    assert len(files) == written.files
    assert all("</script" not in (written.beside / name).read_text() for name in files)


def dom(page: Path, name: str, *options: str) -> str:
    """The page as Chromium has it after its scripts have run, with a cell chosen."""
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000", "--dump-dom")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *fixed, profile, *options, f"{page.as_uri()}#{name}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("limit", [10, 10_000_000], ids=["beside", "inline"])
def test_choosing_a_cell_shows_its_answers_beside_the_untouched_models(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(study_page, "INLINE", limit)
    write_study_page(read_study_report([root]), tmp_path / "page.html")
    found = dom(tmp_path / "page.html", "n_sampled%204")
    reading = found[found.index('id="reading"') :]
    assert "<title>taken" not in found
    assert "Answers: n_sampled 4" in reading
    assert re.findall(r"<h3>(.*?)</h3>", reading) == [
        "untouched (M0)",
        "cycle 0 (M1, seeded)",
        "cycle 1 (M2)",
    ]
    assert "Luck&lt;/script&gt;&lt;script&gt;" in reading
    assert found.count('class="curve') == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_fits_a_phone_and_a_wide_screen(page: Path) -> None:
    """Each width is a frame; they are measured once all have loaded, with a cell chosen."""
    measure = """<script>onload = () => {
      const found = [...document.querySelectorAll("iframe")].map(frame => {
        const inside = frame.contentDocument, wide = inside.documentElement.clientWidth;
        const out = [...inside.querySelectorAll("body *")].filter(each =>
          each.getBoundingClientRect().right > wide + 1 && !each.closest(".wide, svg, option"));
        const names = out.slice(0, 3).map(each => each.className || each.tagName);
        return [wide, inside.documentElement.scrollWidth, inside.querySelectorAll(".answer").length > 0, names];
      });
      document.getElementById("said").textContent = JSON.stringify(found);
    }</script><pre id="said"></pre>"""
    frame = f'<iframe src="{page.name}#n_sampled%204" width="{{}}" height="600" style="border: 0"></iframe>'
    page.with_name("frames.html").write_text(measure + "".join(map(frame.format, WIDTHS)))
    shown = dom(page.with_name("frames.html"), "", "--allow-file-access-from-files")
    said = re.search(r'<pre id="said">(.+?)</pre>', shown, re.DOTALL)
    assert said is not None, shown[-500:]
    found = json.loads(said[1])
    assert [(wide, read) for wide, _, read, _ in found] == [(wide, True) for wide in WIDTHS]
    assert [(wide, scroll, out) for wide, scroll, _, out in found if scroll > wide or out] == []


def mixed(colour: str, share: float, other: str) -> str:
    parts = [[int(each[at : at + 2], 16) for at in (1, 3, 5)] for each in (colour, other)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(*parts, strict=True))


@pytest.mark.parametrize("colours", palettes("study.html"), ids=["light", "dark"])
def test_all_text_is_readable_in_light_and_dark(colours: dict[str, str]) -> None:
    assert unreadable(colours) == []
    for way in ("rise", "fall"):
        darkest = mixed(colours[way], study_page.STRONGEST / 100, colours["back"])
        assert contrast(colours["ink"], darkest) >= READABLE
