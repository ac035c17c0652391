"""The report of a study as a page: its numbers in the page, its answers too, or beside it where they are large.

Model output is untrusted: the template escapes what it writes, and what the script reads is JSON that it shows as text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from iterft_lite import __version__
from iterft_lite.digests import Json
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.store import StepFolder
from iterft_lite.errors import UserError
from iterft_lite.experiment.rows import JUDGED, SAMPLES, SCALES, Sample
from iterft_lite.experiment.steps import cycle_title
from iterft_lite.files import ROWS, disk_errors, write_output
from iterft_lite.hub import title
from iterft_lite.metrics.across_seeds import Estimate
from iterft_lite.report.cells import CellReport
from iterft_lite.report.study import RULES, Experiment, StudyReport
from iterft_lite.report.study_tables import reason
from iterft_lite.report.study_words import (
    STATES,
    arm_sentences,
    mean_text,
    met_text,
    study_sentence,
    study_sentences,
    verdict_words,
)
from iterft_lite.ui.foreign import one_line
from iterft_lite.ui.html import TEMPLATES
from iterft_lite.ui.study_figures.heatmap import MOST, shown_rise
from iterft_lite.ui.study_figures.layout import Layout, layout, longest
from iterft_lite.ui.study_figures.style import at_contrast, colour_of, key_words, signed

INLINE = 3_000_000
"""Bytes of answers up to which they are in the page itself."""

MOST_MAPS = 200
"""Maps that a page holds; where more varies, each experiment is a map's row by name."""

STRONGEST = 62
"""Per cent of a map's colour at most, so that the number on it can be read."""

KEY = 24
"""Digits of a step's key that name its answers."""


@dataclass(frozen=True)
class Written:
    """A page that was written.

    Attributes:
        beside: The folder with the answers; None where they are in the page.
        files, bytes: How many there are in it.
    """

    beside: Path | None
    files: int = 0
    bytes: int = 0


def write_study_page(study: StudyReport, path: Path) -> Written:
    """Write the page, and where its answers are large a folder with them beside it.

    Raises:
        StoreError, FolderError: If a file cannot be written.
    """
    answers = _Answers()
    place = _layout(study)
    experiments = [_experiment(each, study, place, answers) for each in study.experiments]
    arms = [_experiment(each, study, place, answers, len(experiments)) for each in study.arms]
    for number, each in enumerate([*experiments, *arms]):
        each["number"] = number
    small = answers.size() <= INLINE
    beside = path.with_name(f"{path.stem}_answers")
    data = {
        "experiments": experiments,
        "arms": arms,
        "line": key_words(place.line) if place.line else "",
        "lines": [_plain(value) for value in study.values_of(place.line)] if place.line else [],
        "titles": [cycle_title(cycle) for cycle in range(-1, longest(study.everything) + 1)],
        "beside": "" if small else beside.name,
    }
    inline = [(key, _script(found)) for key, found in answers.read()] if small else []
    write_output(path, _page(study, place, data, inline))
    return Written(None) if small else _write_beside(beside, answers)


def _write_beside(folder: Path, answers: _Answers) -> Written:
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    files = size = 0
    for key, found in answers.read():
        text = f"iterft({json.dumps(key)}, {_json(found)});\n"
        write_output(folder / f"{key}.js", text)
        files, size = files + 1, size + len(text)
    return Written(folder, files, size)


def _json(value: Json) -> str:
    """JSON that neither ends a script nor begins a comment of HTML, wherever it stands."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _script(value: Json) -> Markup:
    return Markup(_json(value))  # every sign that HTML reads is written as JSON's \u


# -- answers


@dataclass(frozen=True)
class _Judged:
    """Where a cycle's answers, their verdicts and the scores by prompt are; None where there are no scores."""

    samples: StepFolder
    verdicts: StepFolder
    scores: StepFolder | None

    def read(self) -> dict[str, Json]:
        """The questions, and question, text, trait, coherence and finish of each answer."""
        rows = sorted(SAMPLES.read(self.samples.path / ROWS), key=lambda row: row.id)
        places = {question: place for place, question in enumerate(dict.fromkeys(row.prompt for row in rows))}
        scored = self._scores_by_prompt(rows) or self._scores_by_verdict(rows)
        answers: list[Json] = [
            [places[row.prompt], row.text, *scores, row.finish] for row, scores in zip(rows, scored, strict=True)
        ]
        return {"questions": list(places), "answers": answers}

    def _scores_by_prompt(self, rows: Sequence[Sample]) -> list[tuple[float | None, ...]]:
        """Scores of each row from the scores by prompt; none where an answer has no score.

        They stand in the order of the answers' ids. Verdicts say the same in twenty times as much JSON, and a large study has
        hundreds of thousands of them.
        """
        finished = self.scores.completion() if self.scores else None
        if finished is None:
            return []
        columns = []
        counts = Counter(row.prompt_id for row in rows)
        for scale in SCALES:
            known = (finished.results.get(scale) or {}).get("by_prompt", {})
            if {prompt: len(values) for prompt, values in known.items()} != counts:
                return []
            columns.append([score for prompt in sorted(known) for score in known[prompt]])
        return list(zip(*columns, strict=True))

    def _scores_by_verdict(self, rows: Sequence[Sample]) -> list[tuple[float | None, ...]]:
        verdicts = {row.id: row for row in JUDGED.read(self.verdicts.path / ROWS)}
        return [tuple(mine.score(scale) if (mine := verdicts.get(row.id)) else None for scale in SCALES) for row in rows]


@dataclass
class _Answers:
    """The answers of judged steps by key, each once however many cells share them."""

    folders: dict[str, _Judged] = field(default_factory=dict)

    def of(self, cell: CellReport) -> list[tuple[int, str]]:
        """The cycles of a cell with the keys of their answers; they are read later."""
        if cell.report is None:
            return []
        run, found = Run(cell.folder), []
        steps = {(step.cycle, step.verb): step for step in cell.report.steps if not step.part}
        for cycle in cell.report.cycles:
            samples, judge, scores = (steps.get((cycle.cycle, verb)) for verb in ("evaluate_samples", "judge", "aggregate"))
            if samples and judge and cycle.trait:
                key = judge.key[:KEY]
                self.folders[key] = _Judged(run.folder(samples), run.folder(judge), run.folder(scores) if scores else None)
                found.append((cycle.cycle, key))
        return found

    def size(self) -> int:
        """Bytes of all, roughly."""
        files = [each.samples.path / ROWS for each in self.folders.values()]
        return sum(file.stat().st_size for file in files if file.exists())

    def read(self) -> Iterator[tuple[str, dict[str, Json]]]:
        """Key and answers, one step at a time."""
        for key, each in self.folders.items():
            yield key, each.read()


# -- numbers


def _layout(study: StudyReport) -> Layout:
    """As in figures; where that does not fit, every experiment has a panel of its own."""
    try:
        return layout(study, most_rows=MOST_MAPS)
    except UserError:
        return Layout("", "", study.keys)


def _experiment(each: Experiment, study: StudyReport, place: Layout, answers: _Answers, number: int = 0) -> dict[str, Json]:
    panel = [key for key in (*place.rest, place.panel) if key]
    return {
        "number": number,
        "name": _name(each, study),
        "line": _plain(each.values.get(place.line)) if place.line else "",
        "panel": ", ".join(f"{key_words(key)} {_plain(each.values.get(key))}" for key in panel),
        "verdict": verdict_words(each),
        "ring": "" if each.word != "amplified" or each.arm else "sure" if each.corrected == "amplified" else "alone",
        "ended": bool(each.failures),
        "cycles": longest([each]),
        "points": [_point(number, point.trait, point.coherence) for number, point in each.points.items()],
        "cells": [_cell(cell, answers) for cell in each.cells],
    }


def _point(number: int, trait: Estimate, coherence: Estimate) -> list[Json]:
    return [
        number,
        *(None if value is None else round(value, 2) for value in (trait.mean, trait.low, trait.high, coherence.mean)),
    ]


def _cell(cell: CellReport, answers: _Answers) -> dict[str, Json]:
    why = reason(cell.failure) if cell.failure else ""
    return {"name": one_line(cell.name), "state": STATES.get(cell.state, cell.state), "why": why, "answers": answers.of(cell)}


def _name(each: Experiment, study: StudyReport) -> str:
    words = ", ".join(f"{key_words(key)} {_plain(each.values[key])}" for key in study.keys if key in each.values)
    return f"null arm {each.arm.replace('_', ' ')}" if each.arm else words or one_line(each.name)


def _plain(value: Json) -> str:
    """A value on the page."""
    if isinstance(value, str):
        return one_line(title(value), 40)
    return f"{value:g}" if isinstance(value, float) else "" if value is None else one_line(json.dumps(value), 40)


# -- the page


def _page(study: StudyReport, place: Layout, data: Mapping[str, Json], inline: Sequence[tuple[str, Markup]]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    colour = colour_of(study.experiments)
    late = any(each.late_rise is not None for each in study.experiments)
    arm_names = list(dict.fromkeys(name for each in study.experiments for name in each.beside))
    return environment.get_template("study.html").render(
        study=study,
        about=", ".join(" and ".join(study.said(of)) for of in ("trait", "regime")) + f" on {_models(study)}",
        sentence=study_sentence(study),
        sentences=study_sentences(study),
        arms=arm_sentences(study),
        rise_words="Largest rise over cycle 0 from cycle 4 on" if late else "Change from cycle 0 to the last cycle",
        maps=_maps(study, place),
        verdicts=[_verdict(number, each, study, arm_names) for number, each in enumerate(study.everything)],
        any_ended=any(each.failures for each in study.everything),
        arm_names=[name.replace("_", " ") for name in arm_names],
        on_light=at_contrast(colour, 5.0),
        on_dark=at_contrast(colour, 2.0),
        program=f"iterft_lite {__version__}",
        source=f"steps {study.mark}",
        beside=data["beside"],
        data=_script(dict(data)),
        inline=inline,
    )


def _models(study: StudyReport) -> str:
    return " and ".join(one_line(title(model)) for model in study.said("model"))


def _maps(study: StudyReport, place: Layout) -> list[dict[str, Any]]:
    """Maps of rises: a row a panel's value, a column a line's, a map for each value of what else varies."""
    numbers = {id(each): number for number, each in enumerate(study.experiments)}
    columns: list[Json] = study.values_of(place.line) if place.line else [None]
    rows: list[Json] = list(reversed(study.values_of(place.panel))) if place.panel else [None]
    found = []
    for rest in place.rows(study):
        lines = []
        for row in rows:
            at = {**rest, **({place.panel: row} if place.panel else {})}
            cells = [place.at(study, {**at, **({place.line: column} if place.line else {})}) for column in columns]
            lines.append(
                {"name": _plain(row), "cells": [_map_cell(each[0], study, numbers) if each else None for each in cells]}
            )
        heading = ", ".join(f"{key_words(key)} {_plain(value)}" for key, value in rest.items())
        heads = {"line": key_words(place.line) if place.line else "", "panel": key_words(place.panel) if place.panel else ""}
        found.append({"title": heading, "columns": [_plain(column) for column in columns], "rows": lines, **heads})
    return found


def _map_cell(each: Experiment, study: StudyReport, numbers: Mapping[int, int]) -> dict[str, Json]:
    rise = shown_rise(each)
    ended = f"ended c{max(0, each.last)}" if each.failures else ""
    waits = "" if rise is not None or ended else "..."
    return {
        "number": numbers[id(each)],
        "text": signed(rise) if rise is not None else waits,
        "more": ended,
        "share": round(min(1.0, abs(rise or 0.0) / MOST) * STRONGEST),
        "way": "rise" if (rise or 0.0) >= 0 else "fall",
        "framed": each.corrected == "amplified",
        "ended": bool(ended),
        "title": f"{_name(each, study)}: {verdict_words(each)}",
    }


def _verdict(number: int, each: Experiment, study: StudyReport, arms: Sequence[str]) -> dict[str, Json]:
    ended = len(each.failures)
    return {
        "number": number,
        "name": _name(each, study),
        "trainings": f"{len(each.cells)}" + (f" ({ended} ended)" if ended else ""),
        "start": mean_text(each, 0),
        "end": f"{mean_text(each, each.last)} (c{each.last})" if each.last > 0 else "",
        "change": _points(each.change),
        "alone": each.word,
        "among": "" if each.arm else each.corrected,
        "p": "" if each.p_value is None else f"{each.p_value:.3f}" if each.p_value >= 0.001 else "<0.001",
        "coherence": _points(each.coherence),
        "rise": "" if each.late_rise is None else f"{each.late_rise:+.1f}",
        "paper": [met_text(each, reading) for reading in RULES],
        "above": [_points(each.beside[arm]) if arm in each.beside else "" for arm in arms],
        "ended": "; ".join(f"{one_line(cell.name)}: {one_line(reason(cell.failure))}" for cell in each.failures),
    }


def _points(estimate: Estimate) -> str:
    """`+12.3 [+4 +20]`."""
    if estimate.mean is None:
        return ""
    mean = f"{round(estimate.mean, 1) or 0.0:+.1f}"
    if estimate.low is None or estimate.high is None:
        return f"{mean} (no interval)"
    return f"{mean} [{signed(estimate.low)} {signed(estimate.high)}]"
