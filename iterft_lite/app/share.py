"""What others need of a run or a study, in one folder: adapters, recipes, answers with their verdicts, scores.

    FOLDER/README.md                    the model card (`ui/card.py` writes it); its head tells `datasets` what is where
    FOLDER/curve.png                    its figure, or one a cell
    FOLDER/recipes/NAME.toml            what was asked
    FOLDER/adapters/NAME/cN/            PEFT adapters
    FOLDER/data/answers.jsonl           a row an answer: run, cycle, question, text, scores, reasons
    FOLDER/data/scores.jsonl            a row a cycle: run, means, intervals

Nothing of the machine goes out: no absolute path, no address of a server, no key.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iterft_lite import hub
from iterft_lite.app.repeat import as_toml
from iterft_lite.backends.judge.keys import environment
from iterft_lite.backends.judge.kinds import LOCAL
from iterft_lite.digests import Json
from iterft_lite.engine.manifest import Run
from iterft_lite.errors import FolderError, RunError, UserError
from iterft_lite.experiment.rows import JUDGED, SAMPLES, SCALES, JudgedSample
from iterft_lite.experiment.steps import cycle_name
from iterft_lite.files import ROWS, disk_errors, read_object, safe_member, user_path, write_json, write_rows, write_text
from iterft_lite.programs import is_secret
from iterft_lite.report.cells import CellReport, read_cells
from iterft_lite.report.report import Report

ANSWERS = "data/answers.jsonl"
SCORES = "data/scores.jsonl"

ADAPTER = "adapter/"
"""Beginning of an adapter's files in a training's record."""

SHORTEST_KEY = 8
"""Characters from which on a secret variable's value is looked for in what goes out."""

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

PATH = re.compile(r"~|/|[A-Za-z]:[\\/]|\.\.?/")
"""How a value that is a place on this machine begins."""

PLACE = re.compile(r"(?<![\w:/.])~?(?:/[^\s/`'\"]+){2,}")
"""A place on this machine within a sentence."""


def shared_cells(root: Path) -> list[CellReport]:
    """A run, or the cells of a study, as they are shared: those that have a score, without places of this machine.

    Raises:
        FolderError: If it is neither, or nothing in it has a score yet.
    """
    found = [replace(cell, report=_portable_report(cell.report)) for cell in read_cells([root.resolve()]) if cell.report]
    found = [cell for cell in found if any(cycle.trait for cycle in report_of(cell).cycles)]
    if not found:
        raise FolderError(f"`{root}` has no score yet", hint="there is nothing to share: issue the command that makes it again")
    return found


def report_of(cell: CellReport) -> Report:
    """The report of a cell that is shared: it has one."""
    assert cell.report is not None
    return cell.report


def asked_of(cell: CellReport) -> dict[str, Json]:
    """The recipe that was asked for."""
    report = report_of(cell)
    return dict(report.manifest.get("asked") or report.recipe)


def _portable_report(report: Report) -> Report:
    manifest = {**report.manifest, "recipe": portable(report.recipe), "asked": portable(report.manifest.get("asked"))}
    judge = {**report.judge, **{key: portable(report.judge[key]) for key in ("name", "model")}}
    notes = [without_places(str(note)) for note in report.judge["notes"]]
    return replace(report, manifest=manifest, judge={**judge, "note": "; ".join(notes), "notes": notes})


def write_shared(cells: Sequence[CellReport], to: Path) -> None:
    """Write everything but the card and its figures.

    Raises:
        FolderError: If the folder is there already and is not empty.
        UserError: If a key of this machine's environment is in a text that would go out.
    """
    with disk_errors(to):
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise FolderError(f"`{to}` is not empty", hint="choose another folder with `--to`")
        (to / "data").mkdir()
        (to / "recipes").mkdir()
    write_rows(to / ANSWERS, [row for cell in cells for row in answers_of(cell)])
    write_rows(to / SCORES, [row for cell in cells for row in scores_of(cell)])
    for cell in cells:
        asked = asked_of(cell)
        write_text(to / "recipes" / f"{cell.name}.toml", as_toml(asked))
        for cycle, paths in adapters_of(cell):
            _copy_adapter(paths, to / "adapters" / cell.name / cycle_name(cycle), str(asked["model"]))


def answers_of(cell: CellReport) -> Iterator[dict[str, Json]]:
    """A row an answer. Every row has every column, so that `datasets` finds one type a column."""
    report, folder = report_of(cell), Run(cell.folder).folder
    for cycle in sorted({step.cycle for step in report.steps}):
        steps = {step.verb: folder(step) for step in report.steps if step.cycle == cycle and not step.part}
        if "evaluate_samples" not in steps:
            continue
        judged = {row.id: row for row in JUDGED.read(steps["judge"].path / ROWS)} if "judge" in steps else {}
        for sample in sorted(SAMPLES.read(steps["evaluate_samples"].path / ROWS), key=lambda sample: sample.id):
            yield {
                "run": cell.name,
                "cycle": cycle,
                "prompt_id": sample.prompt_id,
                "sample": sample.sample,
                "prompt": sample.prompt,
                "text": sample.text,
                "tokens": sample.tokens,
                "finish": sample.finish,
                **_scored(judged.get(sample.id)),
                "judge": str(report.judge["name"]),
            }


def _scored(judged: JudgedSample | None) -> dict[str, Json]:
    """Score and, where there is none, the reason, by scale."""
    found: dict[str, Json] = {}
    for scale in SCALES:
        verdict = judged.verdicts.get(scale) if judged else None
        found[scale] = verdict.score if verdict else None
        found[f"{scale}_reason"] = without_places(verdict.reason) if verdict else "not judged"
    return found


def scores_of(cell: CellReport) -> Iterator[dict[str, Json]]:
    """A row a cycle."""
    for cycle in report_of(cell).cycles:
        row: dict[str, Json] = {
            "run": cell.name,
            "cycle": cycle.cycle,
            "answers": cycle.answers,
            "train_rows": cycle.train_rows,
        }
        for scale, found in (("trait", cycle.trait), ("coherence", cycle.coherence)):
            row[scale] = (found or {}).get("mean")
            row |= {f"{scale}_{end}": (found or {}).get(end) for end in ("low", "high")}
        yield {**row, "rate": cycle.rate}


def adapters_of(cell: CellReport) -> Iterator[tuple[int, dict[str, Path]]]:
    """Cycle and files, by name, of each finished training's adapter: those that its record names, as it names them.

    What else lies in that folder, or is linked into it, may be anything: it is not shared.

    Raises:
        StoreError: If one was changed.
        FileError: If a link or something else is in the place of one.
    """
    for step in report_of(cell).steps:
        folder = Run(cell.folder).folder(step)
        if step.verb == "train" and folder.finished:
            named = [name for name in folder.verify(pruned=True).files if name.startswith(ADAPTER)]
            paths = {name.removeprefix(ADAPTER): safe_member(folder.path, name) for name in named}
            if found := {name: path for name, path in paths.items() if path.exists()}:
                yield step.cycle, found


def _copy_adapter(paths: Mapping[str, Path], to: Path, model: str) -> None:
    """Copy an adapter; what it rests on is named as people do, not by a folder of this machine."""
    with disk_errors(to):
        for name, path in paths.items():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / name)
    config = to / "adapter_config.json"
    if config.exists():
        name, _, commit = model.partition("@")
        write_json(config, {**read_object(config), "base_model_name_or_path": name, "revision": commit or None})


# -- nothing of this machine


def portable(value: Any) -> Any:
    """A recipe's values without places of this machine: of a path its last part, of a server's address the host's name only
    where it is not the user's own."""
    if isinstance(value, Mapping):
        return {key: _address(each) if key == "api_base" else portable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [portable(each) for each in value]
    if isinstance(value, str) and value.startswith(LOCAL):
        return LOCAL + portable(value.removeprefix(LOCAL))
    if isinstance(value, str) and PATH.match(value):
        return hub.title(str(user_path(value).absolute())).lstrip("~") or "here"
    return value


def without_places(sentence: str) -> str:
    """A sentence with the last part of each path that it names."""
    return PLACE.sub(lambda found: found[0].rpartition("/")[2], sentence)


def _address(value: Any) -> str | None:
    """A server's address is kept where it is a public name: of others nobody has a use."""
    host = urlsplit(str(value or "")).hostname or ""
    public = "." in host and not host.replace(".", "").isdigit() and not host.endswith((".local", ".internal", ".lan"))
    parts = urlsplit(str(value))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if public else None


def refuse_secrets(folder: Path) -> None:
    """Look for the values of secret variables, this process's and those of a `.env` file, in every text that would go out.

    Raises:
        UserError: If one is there; with the file and the variable.
    """
    known = {name: value for name, value in environment(Path.cwd()).items() if is_secret(name) and len(value) >= SHORTEST_KEY}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".md", ".toml", ".json", ".jsonl"):
            text = path.read_text(encoding="utf-8", errors="replace")
            for name, value in known.items():
                if value in text:
                    raise UserError(f"`{path}` holds the value of {name}", hint="remove the folder; find where it came from")


# -- the hub


def push(folder: Path, repository: str, *, public: bool) -> list[str]:
    """Send a shared folder to the Hugging Face hub: the card and adapters as a model, the card and data as a dataset.

    Args:
        repository: `owner/name` of both.
        public: Whether everybody can see them; else only the owner, until the hub's own pages say otherwise.

    Returns:
        Their addresses.

    Raises:
        UserError: If that is not a valid name.
        RunError: If the hub does not take them.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"`{repository}` is not the name of a repository on the hub", hint="`--push OWNER/NAME`")
    import huggingface_hub

    api = huggingface_hub.HfApi()
    left_out = {"model": ["data/*"], "dataset": ["adapters/*"]}
    try:
        for kind, ignored in left_out.items():
            api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repository, repo_type=kind, folder_path=folder, ignore_patterns=ignored)
    except Exception as error:  # its errors have no common class: no network, no token, no right to write
        line = (str(error).strip().splitlines() or [""])[0]
        raise RunError(
            f"the hub did not take `{repository}`: {type(error).__name__}: {line}",
            hint=f"everything is in `{folder}`; `hf auth login`, or a HF_TOKEN that may write",
        ) from error
    return [f"https://huggingface.co/{repository}", f"https://huggingface.co/datasets/{repository}"]
