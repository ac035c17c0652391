"""The report of a study in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterft_lite.hub import title
from iterft_lite.metrics.across_seeds import Estimate
from iterft_lite.report.study import Experiment, StudyReport
from iterft_lite.report.study_tables import reason
from iterft_lite.report.study_words import arm_sentences, mean_text, met_text, study_sentence, study_sentences, verdict_words
from iterft_lite.ui.foreign import one_line, safe
from iterft_lite.ui.tables import WARNING, first_that_fits, plain_table

STYLES = {"amplified": "bold dark_orange3", "decayed": "dodger_blue1"}
"""By verdict among all."""


@dataclass(frozen=True)
class _Form:
    """What the table of experiments shows."""

    alone: bool = True
    coherence: bool = True
    paper: bool = True
    trainings: bool = True


_FORMS = (
    _Form(),
    _Form(coherence=False),
    _Form(coherence=False, trainings=False),
    _Form(coherence=False, trainings=False, alone=False),
    _Form(coherence=False, trainings=False, alone=False, paper=False),
)


def show_study(study: StudyReport, console: Console) -> None:
    """What came of a study: its verdicts, what they are worth, and what ended early."""
    said = (f"{' and '.join(map(one_line, study.said(of)))}" for of in ("trait", "regime"))
    models = " and ".join(one_line(title(model)) for model in study.said("model"))
    console.print(f"{one_line(study.name)}: {', '.join(said)}, {models}", markup=False)
    console.print(safe(study_sentence(study)), style="bold", markup=False)
    for note in study.notes:
        console.print(safe(note), style=WARNING, markup=False)
    console.print()
    if study.experiments:
        forms = (_table(study.experiments, form) for form in _FORMS)
        console.print(first_that_fits(forms, console, console.width) or _listed(study.experiments))
        console.print()
    if study.arms:
        for sentence in arm_sentences(study):
            console.print(safe(sentence), markup=False)
        console.print()
    for sentence in study_sentences(study):
        console.print(Text(f"- {safe(sentence)}"))
    _show_failures(study, console)


def _listed(shown: Sequence[Experiment]) -> Text:
    """What the narrowest table shows, two lines for each experiment: for terminals that have no room for the table."""
    entries = []
    for each in shown:
        means = " to ".join(filter(None, (mean_text(each, 0), mean_text(each, each.last) if each.last > 0 else "")))
        numbers = ", ".join(filter(None, (means, _change(each.change))))
        verdict = Text(each.corrected, style=STYLES.get(each.corrected, ""))
        entries.append(Text.assemble((one_line(each.name), "bold"), f"\n  {numbers}\n  ", verdict))
    return Text("\n").join(entries)


def _table(shown: Sequence[Experiment], form: _Form) -> Table:
    columns = ["experiment", "verdict", "c0", "last", "change"]
    extra = {"coh.": form.coherence, "late rise": form.paper, "paper": form.paper, "runs": form.trainings}
    table = plain_table(*columns, *(name for name, there in extra.items() if there), left=2)
    for each in shown:
        cells = {
            "coh.": _points(each.coherence),
            "late rise": "" if each.late_rise is None else f"{each.late_rise:+.0f}",
            "paper": met_text(each, "any"),
            "runs": _runs(each),
        }
        words = verdict_words(each) if form.alone else each.corrected
        table.add_row(
            one_line(each.name, 44 if form.alone else 30),
            Text(words, style=STYLES.get(each.corrected, "")),
            mean_text(each, 0),
            f"{mean_text(each, each.last)} c{each.last}" if each.last > 0 else "",
            _change(each.change),
            *(cell for name, cell in cells.items() if extra[name]),
        )
    return table


def _change(estimate: Estimate) -> str:
    if estimate.mean is None:
        return ""
    mean = f"{round(estimate.mean, 1) or 0.0:+.1f}"
    return mean if estimate.low is None or estimate.high is None else f"{mean} [{estimate.low:+.0f} {estimate.high:+.0f}]"


def _points(estimate: Estimate) -> str:
    return "" if estimate.mean is None else f"{estimate.mean:+.0f}"


def _runs(experiment: Experiment) -> str:
    ended = len(experiment.failures)
    return f"{len(experiment.cells)}" + (f", {ended} ended" if ended else "")


def _show_failures(study: StudyReport, console: Console) -> None:
    ended = [cell for each in study.everything for cell in each.failures]
    if not ended:
        return
    console.print("\nended early", style="bold")
    for cell in ended:
        kind = "a result" if cell.state == "result" else cell.state
        console.print(
            Text(f"{one_line(cell.name, 60)}  ", style="bold").append(f"{kind}: {safe(reason(cell.failure))}", style="default")
        )
