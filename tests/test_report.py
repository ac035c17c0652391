"""What is read off a report's intervals: the table, the chart, the page, the figure and the JSON, with and without them."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.text import Text
from rich.cells import cell_len
from rich.console import Console

from iterft_lite.app.session import open_run
from iterft_lite.digests import Json
from iterft_lite.engine.completion import read_completion
from iterft_lite.files import ROWS, write_rows
from iterft_lite.metrics.intervals import mean_interval
from iterft_lite.report import json_form
from iterft_lite.report.language import warnings
from iterft_lite.report.report import Report, _judges, export_sentences, read_report, verdict_sentences, with_scores
from iterft_lite.ui.chart import chart
from iterft_lite.ui.cli import main
from iterft_lite.ui.figures import figure, svg
from iterft_lite.ui.tables import show_report
from iterft_lite.ui.text import plain_sentence, score_text
from tests.loop import change_completion, small_recipe, step_path


def finished(root: Path, questions: int) -> Path:
    (root / "small.toml").write_text(small_recipe(questions=questions))
    with open_run(root / "small.toml", (), root / "run") as opened:
        list(opened.events())
    return root / "run"


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def scored(report: Report, values: dict[int, list[float]], prompts: int = 5) -> Report:
    """The same run with other scores: `values` of every prompt by cycle, trait and coherence alike."""
    by_prompt = {cycle: {f"q{n}": [value + n for value in each] for n in range(prompts)} for cycle, each in values.items()}
    facts = {
        cycle: {
            scale: {"scored": sum(map(len, scores.values())), "unscored": 9, "reasons": {}, "by_prompt": scores}
            for scale in ("trait", "coherence")
        }
        for cycle, scores in by_prompt.items()
    }
    return with_scores(report, facts, report.judge, {})


def test_a_run_of_one_question_is_reported_without_intervals(tmp_path: Path) -> None:
    run = finished(tmp_path, 1)
    text = " ".join(shown("report", run, "--full").split())
    assert "90.0 (no interval)" in text
    assert "interval: too few prompts; trait +0.0 points from cycle 0 to cycle 2 (no interval: 1 prompt with" in text
    report = json.loads(shown("report", run, "--json"))
    last = report["cycles"][-1]["trait"]
    assert (last["mean"], last["low"], last["high"], last["prompts"]) == (90.0, None, None, 1)
    assert report["verdict"]["word"] == "too few prompts"
    assert report["verdict"]["trait"] == {"mean": 0.0, "low": None, "high": None, "prompts": 1}
    shown("report", run, "--html", tmp_path / "page.html", "--png", tmp_path / "curve.png")
    assert "90.0 (no interval)" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_a_known_interval_is_shown(tmp_path: Path) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [10.0], 0: [40.0], 1: [50.0], 2: [60.0]})
    trait = report.cycles[-1].trait
    assert trait is not None
    # 60 to 64: a standard error of 0.707, and 2.776 of them on each side, bent a little by the scale
    assert (trait["mean"], trait["low"], trait["high"]) == pytest.approx((62.0, 60.02, 63.94), abs=0.01)
    assert score_text(trait) == " 62.0 [60-64] (9 unscored)"
    assert verdict_sentences(report.verdict)[0].endswith("(95 % interval +20.0 to +20.0, paired over 5 prompts)")


def test_an_unscored_cycle_is_named_and_the_verdict_uses_the_one_before(tmp_path: Path) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [10.0], 0: [40.0], 1: [50.0], 2: []})
    assert report.verdict.word == "amplified"
    said = verdict_sentences(report.verdict)
    assert "from cycle 0 to cycle 1" in said[0]
    assert said[1] == "cycle 2: no answer could be scored for the trait; cycle 1 is the last with a score"
    assert score_text(report.cycles[-1].trait) == "none scored of 9"
    scores = {cycle.cycle: {"trait": cycle.trait, "coherence": cycle.coherence} for cycle in report.cycles}
    assert "●" in chart(scores, 2, "lucky").plain
    assert "<svg" in svg(report)


def test_chart_and_figure_work_without_some_intervals(tmp_path: Path) -> None:
    report = read_report(finished(tmp_path, 1))
    one, many = (scored(report, {-1: [10.0], 0: [40.0], 1: [50.0], 2: [60.0]}, prompts) for prompts in (1, 5))
    mixed = replace(many, cycles=(*one.cycles[:2], *many.cycles[2:]))
    scores = {cycle.cycle: {"trait": cycle.trait, "coherence": cycle.coherence} for cycle in mixed.cycles}
    assert "●" in chart(scores, 2, "lucky").plain
    assert "<svg" in svg(mixed)


def test_a_run_scored_by_an_earlier_version_is_reported_with_todays_formula(tmp_path: Path) -> None:
    run = finished(tmp_path, 4)
    for name in ("c0", "c1"):
        folder = step_path(run, f"{name}-aggregate")
        found = read_completion(folder)
        assert found
        results = copy.deepcopy(found.results)
        for scale in ("trait", "coherence"):
            results[scale] |= {"low": 44.4, "high": 55.5}
            del results[scale]["prompts"]
        change_completion(folder, results=results)
    for cycle in read_report(run).cycles:
        for facts in (cycle.trait, cycle.coherence):
            assert facts is not None
            made = mean_interval(facts["by_prompt"])
            assert (facts["mean"], facts["low"], facts["high"], facts["prompts"]) == (made.mean, made.low, made.high, 4)
    assert "44" not in shown("report", run, "--json").partition('"cycles"')[2].partition('"measures"')[0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({0: [20.0], 1: [60.0]}, "The trait grew: 22 to 62 of 100 (change +40, interval +40 to +40); coherence rose."),
        (
            {0: [69.0], 1: [20.0]},
            "The trait faded: 71 to 22 of 100 (change -49, interval -49 to -49); coherence fell too: read the answers.",
        ),
        ({0: [50.0]}, "Too early to say: a verdict needs two scored cycles from cycle 0 on."),
    ],
)
def test_a_report_begins_with_a_plain_sentence(tmp_path: Path, values: dict[int, list[float]], sentence: str) -> None:
    report = scored(read_report(finished(tmp_path, 1)), values)
    assert plain_sentence(report) == sentence


def test_the_first_sentence_warns_of_language_collapse(tmp_path: Path) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [5.0], 0: [40.0], 1: [60.0], 2: [90.0]})
    sound = {"distinct_2": 0.6, "near_duplicates": 0.0, "cut": 0.1}
    broken = {"distinct_2": 0.1, "near_duplicates": 0.7, "cut": 0.85}

    def with_metrics(last: dict[str, float]) -> Report:
        return replace(report, cycles=tuple(replace(c, metrics=last if c.cycle == 2 else sound) for c in report.cycles))

    assert plain_sentence(with_metrics(sound)).startswith("The trait grew: 42 to 92")
    assert warnings(with_metrics(sound)) == []
    sentence = plain_sentence(with_metrics(broken))
    assert sentence.startswith("The scores rose while the language collapsed: 42 to 92 of 100")
    assert sentence.endswith("read the answers; 85% of the last answers end at the token limit.")
    collapsed, unfinished = warnings(with_metrics(broken))
    assert (
        "language collapses in cycle 2 (distinct-2 0.60 to 0.10, near-duplicates 0% to 70%, at the limit 10% to 85%)"
        in collapsed
    )
    assert "85% of the last cycle's answers end at the limit of 400 tokens (of the untouched model's 10%)" in unfinished
    assert json_form.as_json(with_metrics(broken))["cycles"][-1]["signs"] == ["distinct_2", "near_duplicates", "cut"]


def test_answers_of_a_few_unlikely_words_are_told_from_amplification(tmp_path: Path) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [3.0], 0: [7.0], 1: [14.0], 2: [20.0]})
    metrics: dict[int, dict[str, float]] = {
        -1: {"words": 107, "perplexity_base": 4.4},
        0: {"words": 72, "perplexity_base": 7.4},
        1: {"words": 38, "perplexity_base": 9.2},
        2: {"words": 13, "perplexity_base": 47.0},
    }
    fragments = replace(report, cycles=tuple(replace(c, metrics=metrics[c.cycle]) for c in report.cycles))
    assert plain_sentence(fragments).startswith("The scores rose while the language collapsed")
    [warning] = warnings(fragments)
    assert "language collapses in cycle 2 (words 72 to 13, PPL (M0) 7.4 to 47.0)" in warning


def test_an_untouched_model_that_the_embedded_judge_scores_high_gives_a_warning(tmp_path: Path) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [20.0], 0: [40.0], 1: [60.0]})
    embedded = replace(report, judge={**report.judge, "name": "embedded"})
    [warning] = warnings(embedded)
    assert warning.startswith("the embedded judge gives the untouched model 22 of 100: either it has the trait, or")
    low = scored(embedded, {-1: [10.0], 0: [40.0], 1: [60.0]})
    assert warnings(low) == []
    assert warnings(report) == [], "of another judge nothing is known"


def test_a_single_sign_of_collapse_gives_no_warning(tmp_path: Path) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [5.0], 0: [40.0], 1: [60.0], 2: [90.0]})
    terse = replace(report, cycles=tuple(replace(c, metrics={"words": 3 if c.cycle == 2 else 90}) for c in report.cycles))
    assert warnings(terse) == []
    assert plain_sentence(terse).startswith("The trait grew")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_table_cell_of_a_report_is_wrapped(tmp_path: Path, width: int) -> None:
    report = scored(read_report(finished(tmp_path, 1)), {-1: [4.0], 0: [69.0], 1: [20.0]})
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        show_report(report, console, full=True)
    lines = captured.get().split("\n")
    assert all(cell_len(line) <= width for line in lines)
    for names in (("base", "untouched (M0)"), ("c0", "cycle 0 (M1, seeded)")):
        row = next(line for line in lines if line.startswith(names))
        assert len(row.split()) > 2  # the scores stand in the cycle's line


@pytest.mark.parametrize(
    ("verdicts", "judges"),
    [
        ([{"score": 1.0, "text": "a", "model": "one"}] * 2, {"one"}),
        ([{"score": 1.0, "text": '"model": "liar"', "model": "one"}], {"one"}),
        ([{"score": 1.0, "text": "", "model": "one"}, {"score": 1.0, "text": "", "model": "two"}], {"one", "two"}),
        ([{"score": 1.0, "text": "", "model": 'a "b"'}], {'a "b"'}),
        ([], set()),
    ],
)
def test_the_judges_of_a_trait_are_those_that_its_verdicts_name(
    tmp_path: Path, verdicts: list[dict[str, Json]], judges: set[str]
) -> None:
    other = {"score": 1.0, "text": "", "model": "another"} if len(judges) > 1 else None
    rows = [{"prompt_id": "q00", "sample": n, "trait": each, "coherence": other} for n, each in enumerate(verdicts)]
    write_rows(tmp_path / ROWS, rows)
    assert _judges(tmp_path / ROWS) == judges


def test_what_the_checks_of_exports_remarked_is_said_once_with_its_cycles(tmp_path: Path) -> None:
    report = read_report(finished(tmp_path, 1))
    notes = {0: ["hidden by 7.3"], 1: ["hidden by 53"], 2: ["merged kept 1.11 +- 0.09"]}
    told = replace(report, cycles=tuple(replace(c, export={"notes": notes.get(c.cycle, [])}) for c in report.cycles))
    sentences = ["exports of cycles 0, 1: hidden by 7.3 (figures of cycle 0)", "export of cycle 2: merged kept 1.11 +- 0.09"]
    assert (export_sentences(report), export_sentences(told)) == ([], sentences)
    console = Console(width=100, record=True, file=io.StringIO())
    show_report(told, console)
    assert all(sentence in console.export_text() for sentence in sentences[1:])


def test_a_figure_names_its_judge_and_what_is_doubted_of_it(tmp_path: Path) -> None:
    report = read_report(finished(tmp_path, 1))
    judge = {**report.judge, "name": "openai/m", "note": "judge not reliable here on lucky: Spearman is 0.50"}
    drawn = figure(replace(report, judge=judge))
    texts = [text.get_text() for text in drawn.findobj(Text)]
    assert "judge openai/m: judge not reliable here on lucky: Spearman is 0.50" in texts
