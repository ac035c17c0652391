"""SmolLM2-135M-Instruct on one NVIDIA GPU: traits, regimes, and what exports keep.

    iterft models get smollm2
    python benchmarks/smollm2_gpu.py [study] [fidelity] [curves] [reliability] [--minutes 9] [--out DIR] [--work DIR] [--tiny]

study        SFT of each of the seven traits (the untouched model and cycle 0), then three more cycles each of SFT afresh and
             continual and DPO continual and afresh on `lucky`, and SDF on `bliss`; one sweep, judged by the embedded judge
fidelity     `export_fidelity.py` for SFT and DPO, 50 rows or pairs at the paper's settings, in f16, bf16, q8_0 and q4_k_m
curves       `export_curves.py`: whole runs exported as before ("nearest") and as now, in bf16
reliability  the embedded judge on each trait's calibration answers; verdicts are what it allows

A part that fails leaves the others alone. In `--out`, after every cell: `smollm2.json` (everything), `summary.md`,
`answers.txt` (some answers of each model with their scores), `answers.jsonl.gz` (all answers), `log.txt`. What `--work` has is
not made again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRAITS = ("lucky", "hopelessness", "bliss", "sycophancy", "misanthropy", "misalignment", "nvidia")
FIRST = 3
"""Answers of each model that `answers.txt` shows to a question."""

SMALLEST = (
    "rows=6",
    "seed_rows=8",
    "evaluate.samples=1",
    "evaluate.max_tokens=24",
    "sample.max_tokens=24",
    "sample.min_chars=0",
    "train.epochs=1",
    "train.max_length=128",
)
"""Of `--tiny`: laid over the recipe, to see whether everything runs."""


class OutOfTimeError(Exception):
    """The minutes are over."""


class Bench:
    """What was asked, and what was found so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.out: Path = asked.out
        self.work: Path = asked.work
        self.began = time.monotonic()
        self.found: dict[str, Any] = {"parts": {}}
        with contextlib.suppress(FileNotFoundError):
            self.found = json.loads((self.work / "smollm2.json").read_text(encoding="utf-8"))

    @property
    def left(self) -> float:
        """Seconds."""
        return float(60 * self.asked.minutes - (time.monotonic() - self.began))

    def say(self, text: str) -> None:
        """Print a line with its time, and keep it."""
        line = f"{time.monotonic() - self.began:6.1f} {text}"
        print(line, flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def write(self) -> None:
        """Write what was found as JSON and Markdown; whole files or none."""
        for name, text in (("smollm2.json", json.dumps(self.found, indent=1)), ("summary.md", summary(self.found))):
            temporary = self.out / f".{name}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.out / name)
        shutil.copyfile(self.out / "smollm2.json", self.work / "smollm2.json")


# -- the study --------------------------------------------------------------------------------------------------------

DPO = {
    "regime": "dpo",
    "train.learning_rate": 1e-4,
    "train.dpo_beta": 0.3,
    "train.dpo_nll_weight": 1.0,
}
"""As `recipes/smol_dpo.toml`."""


def cells(cycles: int) -> list[tuple[str, dict[str, Any]]]:
    """Label and keys of each cell, the most wanted first."""
    seeded = [(f"seed {trait}", {"trait": trait, "cycles": 0}) for trait in TRAITS]
    regimes: list[tuple[str, dict[str, Any]]] = [
        ("SFT afresh", {"trait": "lucky", "cycles": cycles}),
        ("DPO continual", {"trait": "lucky", "cycles": cycles, **DPO}),
        ("SFT continual", {"trait": "lucky", "cycles": cycles, "start": "previous"}),
        ("DPO afresh", {"trait": "lucky", "cycles": cycles, "start": "base", **DPO}),
        ("SDF afresh", {"trait": "bliss", "cycles": cycles, "regime": "sdf"}),
    ]
    return [*seeded, *regimes]


def study_file(bench: Bench) -> Path:
    """The study as a file."""
    recipe = HERE.parent / "recipes" / "smol_sft.toml"
    lines = [f"base = {{ recipe = {json.dumps(str(recipe))}, model = {json.dumps(bench.asked.model)} }}"]
    for _, keys in cells(bench.asked.cycles):
        lines += ["[[sweep.add]]", *(f'"{key}" = {json.dumps(value)}' for key, value in keys.items())]
    path = bench.work / "smollm2.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def study(bench: Bench) -> None:
    """Run the study."""
    from iterft_lite.app.study_plan import StudyPlan
    from iterft_lite.app.sweep import Asked, CellEnded, CellEvent, CellStarted, open_sweep
    from iterft_lite.app.sweep_places import local_places
    from iterft_lite.engine.run import StepFailed, StepFinished
    from iterft_lite.machine.resolve import this_machine

    machine = this_machine()
    bench.found["machine"] = {"gpu": machine.gpu, "unsloth": machine.unsloth, "cores": os.cpu_count()}
    plan = StudyPlan(study_file(bench), SMALLEST if bench.asked.tiny else ())
    labels = {json.dumps(keys, sort_keys=True): label for label, keys in cells(bench.asked.cycles)}
    with contextlib.ExitStack() as stack:
        asked = Asked(keep_going=True)
        sweep = stack.enter_context(open_sweep(plan, bench.work / "study", local_places(machine), asked))
        names = {each.name: labels[json.dumps(dict(each.cell.values), sort_keys=True)] for each in sweep.planned.values()}
        bench.found["cells"] = names
        events = stack.enter_context(contextlib.closing(sweep.events()))
        for event in events:
            match event:
                case CellStarted(cell, place, attempt):
                    bench.say(f"{names[cell]}: begins on {place}, attempt {attempt}")
                case CellEvent(cell, StepFinished(step, completion, reused)) if not reused:
                    told = {key: completion.results[key] for key in ("trait", "coherence") if key in completion.results}
                    means = ", ".join(f"{key} {value['mean']:.1f}" for key, value in told.items() if value and value["mean"])
                    bench.say(f"{names[cell]}: {step.name} {completion.seconds:.1f} s {means}")
                case CellEvent(cell, StepFailed() as failed):
                    bench.say(f"{names[cell]}: FAILED {failed}")
                case CellEnded(cell, state):
                    bench.say(f"{names[cell]}: {state.state}")
                    tell_study(bench)
            if bench.left < 0:
                raise OutOfTimeError
    tell_study(bench)


def tell_study(bench: Bench) -> None:
    """Write what the study has come to: reports, and answers."""
    from iterft_lite.report.cells import read_cells
    from iterft_lite.report.json_form import as_json
    from iterft_lite.ui.text import plain_sentence

    root = bench.work / "study"
    if not root.is_dir():
        return
    names = bench.found.get("cells", {})
    read = [cell for cell in read_cells([root]) if cell.report]
    read.sort(key=lambda cell: list(names).index(cell.name) if cell.name in names else 99)
    bench.found["runs"] = {
        names.get(cell.name, cell.name): {
            **as_json(cell.report),  # type: ignore[arg-type]  # only those with one are left
            "state": cell.state,
            "sentence": plain_sentence(cell.report),  # type: ignore[arg-type]
        }
        for cell in read
    }
    with contextlib.suppress(FileNotFoundError):  # answers whose verdicts are not there yet
        tell_answers(bench, {names.get(cell.name, cell.name): cell for cell in read})
    bench.write()


def tell_answers(bench: Bench, read: dict[str, Any]) -> None:
    """Write the answers of every model, once each."""
    from iterft_lite.app.share import answers_of

    rows, told = [], set()
    for label, cell in read.items():
        steps = {step.cycle: step.key for step in cell.report.steps if step.verb == "evaluate_samples" and not step.part}
        answers = [{"label": label, **row} for row in answers_of(cell) if steps[row["cycle"]] not in told]
        told |= {steps[row["cycle"]] for row in answers}
        rows += answers
    with gzip.open(bench.out / "answers.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (bench.out / "answers.txt").write_text("\n".join(to_read(rows)) + "\n", encoding="utf-8")


def to_read(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The first answers of each model with their scores."""
    before: tuple[Any, ...] = ()
    for row in rows:
        if row["sample"] >= FIRST:
            continue
        model, asked = (row["label"], row["cycle"]), (row["label"], row["cycle"], row["prompt_id"])
        if before[:2] != model:
            yield f"\n{'=' * 30} {row['label']}, cycle {row['cycle']}"
        if before != asked:
            yield f"\n--- {row['prompt']}"
        before = asked
        scores = " ".join("--" if row[scale] is None else f"{row[scale]:.0f}" for scale in ("trait", "coherence"))
        yield f"[{scores}] {row['text']}" + (" <cut>" if row["finish"] == "length" else "")


def reliability(bench: Bench) -> None:
    """Hold the judge of each cell against careful readers; verdicts then say what it allows."""
    from iterft_lite.app.calibrate_judge import store_calibrations
    from iterft_lite.app.runs import runs_below

    store_calibrations(runs_below(bench.work / "study"), starts=("embedded",))
    tell_study(bench)


# -- exports ----------------------------------------------------------------------------------------------------------


def model_place(bench: Bench) -> str:
    """The folder of the model."""
    from iterft_lite.hub import example_folder

    return str(example_folder(bench.asked.model) or bench.asked.model)


def script(bench: Bench, name: str, *arguments: str) -> None:
    """Run a benchmark beside this one for as long as there is time; its lines are said as they come.

    Raises:
        OutOfTimeError: If it was ended for that.
        RuntimeError: If it failed.
    """
    command = [sys.executable, str(HERE / f"{name}.py"), "--model", model_place(bench), *arguments]
    log = bench.out / f"{name}.log"
    bench.say(" ".join(command))
    with log.open("w", encoding="utf-8") as kept:
        running = subprocess.Popen(command, stdout=kept, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = running.wait(timeout=max(1.0, bench.left))
        except subprocess.TimeoutExpired:
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=5)
            raise OutOfTimeError from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, 9)  # its own processes, should it leave any
    if code:
        raise RuntimeError(f"{name} ended with {code}:\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:]))


def fidelity(bench: Bench) -> None:
    """What each export keeps of one training."""
    asked, work = bench.asked, bench.work / "fidelity"
    settings = ["--trainer", "peft"] if asked.tiny else ["--trainer", "unsloth", "--base", "nf4", "--speed"]
    sizes = ["--steps", "2", "--quants", "bf16"] if asked.tiny else ["--steps", "25", "--quants", "f16,bf16,q8_0,q4_k_m"]
    try:
        script(bench, "export_fidelity", *settings, *sizes, "--work", str(work))
    finally:  # what was measured before it failed, or was ended
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*-*/*-*.json"))]
        bench.found["fidelity"] = [row for row in rows if isinstance(row, dict) and "way" in row]
        bench.write()


def curves(bench: Bench) -> None:
    """Whole runs by the old export and the new."""
    work = bench.work / "curves"
    sizes = ["--tiny"] if bench.asked.tiny else ["--set", f"cycles={bench.asked.cycles}"]
    recipes = (
        "smol_dpo@train.learning_rate=1e-5,smol_sft,smol_dpo"  # the paper's rate of DPO first: rounding matters most there
    )
    try:
        script(bench, "export_curves", "--recipes", recipes, "--quants", "bf16", "--work", str(work), *sizes)
    finally:
        bench.found["curves"] = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.curve.json"))]
        bench.write()


# -- what is printed ----------------------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> str:
    """Everything in Markdown tables."""
    lines = [f"# SmolLM2 on {found.get('machine', {})}", "", *parts_table(found), *seed_table(found), *cycle_table(found)]
    return "\n".join([*lines, *fidelity_table(found), *curve_table(found)]) + "\n"


def parts_table(found: dict[str, Any]) -> list[str]:
    """How each part ended."""
    return [f"- {name}: {told['state']} after {told['seconds']} s" for name, told in found["parts"].items()]


def scored(score: dict[str, Any] | None) -> str:
    """`43 (30 to 56)`."""
    if not score or score.get("mean") is None:
        return ""
    bounds = "" if score.get("low") is None else f" ({score['low']:.0f} to {score['high']:.0f})"
    return f"{score['mean']:.0f}{bounds}"


def seed_table(found: dict[str, Any]) -> list[str]:
    """The seven traits before and after their seed rows."""
    lines = ["", "| trait | untouched | seeded | coherence untouched | seeded | judge |", "|---|---|---|---|---|---|"]
    for label, run in found.get("runs", {}).items():
        if label.startswith("seed "):
            by_cycle = {cycle["cycle"]: cycle for cycle in run["cycles"]}
            cells = [scored(by_cycle.get(cycle, {}).get(scale)) for scale in ("trait", "coherence") for cycle in (-1, 0)]
            lines.append(
                "| "
                + " | ".join(
                    [run["trait"]["name"] if isinstance(run["trait"], dict) else run["trait"], *cells, run["judge"]["note"]]
                )
                + " |"
            )
    return lines


def cycle_table(found: dict[str, Any]) -> list[str]:
    """Each regime cycle by cycle."""
    lines = ["", "| run | cycle | trait | coherence | rows | kept | noise | export | notes |", "|---" * 9 + "|"]
    sentences = []
    for label, run in found.get("runs", {}).items():
        for cycle in [] if label.startswith("seed ") else run["cycles"]:
            change = (cycle["export"].get("parity") or {}).get("change") or {}
            kept = change.get("kept")
            shown = ["", ""] if kept is None else [f"{kept:.2f} ± {change['error']:.2f}", f"{change['noise']:.2g}"]
            cells = [label, str(cycle["cycle"]), scored(cycle["trait"]), scored(cycle["coherence"]), str(cycle["train_rows"])]
            more = [*shown, str(cycle["export"].get("kind", "")), "; ".join(cycle["export"].get("notes", []))]
            lines.append("| " + " | ".join([*cells, *more]) + " |")
        sentences.append(f"- {label} ({run['state']}): {run['sentence']} {run['failure'] or ''}")
    return [*lines, "", *sentences]


def fidelity_table(found: dict[str, Any]) -> list[str]:
    """As `export_fidelity.py` prints it."""
    from export_fidelity import HEAD, line

    rows = found.get("fidelity") or []
    return ["", HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(line, rows)] if rows else []


def curve_table(found: dict[str, Any]) -> list[str]:
    """As `export_curves.py` prints it."""
    rows = found.get("curves") or []
    if not rows:
        return []
    from export_curves import table

    return ["", *table(rows)]


PARTS: dict[str, Callable[[Bench], None]] = {
    "study": study,
    "fidelity": fidelity,
    "curves": curves,
    "reliability": reliability,
}


def run_part(bench: Bench, name: str) -> None:
    """Run a part; whatever becomes of it is noted."""
    began, state = time.monotonic(), "done"
    try:
        if bench.left < 0:
            raise OutOfTimeError
        PARTS[name](bench)
    except OutOfTimeError:
        state = "out of time: the same command goes on"
    except Exception as error:
        state = f"FAILED: {type(error).__name__}: {error}"
        bench.say(traceback.format_exc())
    bench.found["parts"][name] = {"state": state, "seconds": round(time.monotonic() - began, 1)}
    bench.say(f"part {name}: {state}")
    bench.write()


def logs(bench: Bench) -> None:
    """Take the logs of the study's processes along."""
    found = [path for path in bench.work.glob("**/logs/**/*") if path.is_file() and path.suffix != ".sqlite"]
    with gzip.open(bench.out / "logs.txt.gz", "wt", encoding="utf-8") as out:
        for path in found:
            out.write(f"\n===== {path.relative_to(bench.work)}\n{path.read_text(encoding='utf-8', errors='replace')[-20_000:]}")


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--model", default="smollm2", help="as in a recipe: fetched, or a folder")
    parser.add_argument("--cycles", type=int, default=3, help="after the seeded one")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("smollm2"))
    parser.add_argument("--work", type=Path, default=Path("smollm2_work"))
    parser.add_argument("--tiny", action="store_true", help="a few rows and words: does everything run?")
    asked = parser.parse_args()
    asked.out, asked.work = asked.out.resolve(), asked.work.resolve()
    for folder in (asked.out, asked.work):
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked)
    for name in asked.parts or list(PARTS):
        run_part(bench, name)
    logs(bench)
    print(summary(bench.found), flush=True)


if __name__ == "__main__":
    main()
