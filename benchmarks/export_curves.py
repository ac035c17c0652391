"""Curves of whole runs, exported as before and as now: does the way of exporting change what a run shows?

    python benchmarks/export_curves.py [--model nano] [--recipes nano_sft,nano_dpo] [--quants bf16,q8_0] [--ways old,new]
        [--set KEY=VALUE]... [--seeds 42,43] [--tiny] [--work DIR]

old   `export = "merged"` with every number rounded to the nearest, and no check: what is lost is to be seen
new   `export = "auto"`: stochastic rounding in 16 bits, the check, the adapter where a merged file fails it

Both are the program's own loop: what the exported model writes is what the next model is trained on. Each model is also asked
how likely the trait's last 24 replies are, which no training here has seen: nats a token, no judge and no sampling in it. A
recipe may have keys of its own: `smol_dpo@train.learning_rate=1e-5`. What `--work` holds is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

from export_fidelity import Nearest  # the benchmarks beside this one
from smollm2_gpu import SMALLEST

from iterft_lite.app.calibrate_judge import store_calibration
from iterft_lite.app.chat import exported_files, finished_cycles, past
from iterft_lite.app.session import Session, open_run
from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.data.recipes import recipe_path
from iterft_lite.data.traits import read_trait
from iterft_lite.engine.executor import LocalExecutor
from iterft_lite.engine.run import StepFailed, StepFinished, context_needed
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.rows import Message
from iterft_lite.gguf import merge
from iterft_lite.protocols import Backends, Likelihood, Passage
from iterft_lite.report.report import read_report
from iterft_lite.stages import export
from iterft_lite.stages.export import untouched_gguf

HELD_OUT = 24
"""Replies of the trait that likelihoods are taken of: the last ones, so that no seed row is among them."""

TINY = ("cycles=1", *SMALLEST)
"""Of `--tiny`: laid over the recipe, to see whether everything runs."""


class OldExporter(GgufExporter):
    """Merges as it was before: every number is rounded to the nearest."""

    def export(self, *given: Any, **named: Any) -> Any:
        """See `Exporter`."""
        with mock.patch.object(merge, "choose_arithmetic", return_value=Nearest()):
            return super().export(*given, **named)


class Places:
    """Backends that stay for all runs which can use them: the two ways differ in the exporter alone."""

    def __init__(self) -> None:
        self._open: dict[str, Backends] = {}

    def executor(self, session: Session, way: str) -> LocalExecutor:
        """An executor for a run."""
        recipe = session.resolved.recipe
        signature = json.dumps([recipe.trait, recipe.model, recipe.row.rows])
        if signature not in self._open:
            self.close()
            self._open[signature] = session.executor().backends
        backends = self._open[signature]
        backends = replace(backends, exporter=OldExporter()) if way == "old" else backends
        context = max(1024, context_needed(session.plan))
        return LocalExecutor(backends, session.resolved.model, context, swap=session.swap)

    def close(self) -> None:
        """End all processes."""
        for backends in self._open.values():
            backends.close()
        self._open.clear()


def run(places: Places, name: str, keys: list[str], way: str, out: Path) -> dict[str, Any]:
    """Run a recipe to its end and read its curve."""
    mode = "merged" if way == "old" else "auto"
    unchecked = mock.patch.object(export, "fault", return_value=None) if way == "old" else contextlib.nullcontext()
    with open_run(recipe_path(name), [*keys, f"export={mode}", "keep=all"], out) as session:
        executor = places.executor(session, way)
        with unchecked:
            for event in session.events(executor):
                if isinstance(event, StepFinished) and not event.reused:
                    print(f"{out.name} {event.step.name} {event.completion.seconds:.1f} s", file=sys.stderr, flush=True)
                if isinstance(event, StepFailed):
                    print(f"{out.name} {event}", file=sys.stderr, flush=True)
        nats = likelihoods(executor.backends, out, session.resolved.recipe)
    store_calibration(out, executor.backends)
    return read(out, nats)


def likelihoods(backends: Backends, root: Path, recipe: Recipe) -> dict[int, float]:
    """By cycle, the mean log-likelihood of held-out replies of the trait under the exported model, nats a token."""
    if recipe.row.rows == "document":
        return {}
    passages = [
        Passage(str(number), chat.reply, messages=(Message("user", chat.prompt),))
        for number, chat in enumerate(read_trait(recipe.trait).chats[-HELD_OUT:])
    ]
    return {cycle: likelihood(backends, root, cycle, passages) for cycle in finished_cycles(root)}


def likelihood(backends: Backends, root: Path, cycle: int, passages: list[Passage]) -> float:
    """Under one cycle's export."""
    model = past(root, cycle)
    folder = model.run.folder(model.export)
    gguf, lora = exported_files(folder)
    if gguf is None:
        gguf = untouched_gguf(backends.exporter, model.model, root, model.recipe.quant, lambda _: None)
    backends.generator.load(gguf, lora, model.model, slots=None, context=1024, exact=False)
    found: list[Likelihood] = []
    backends.generator.likelihood(passages, found.append)
    return sum(one.logprob for one in found) / sum(one.tokens for one in found)


def read(root: Path, nats: dict[int, float]) -> dict[str, Any]:
    """A run's curve."""
    report = read_report(root)
    rows = []
    for cycle in report.cycles:
        change = (cycle.export.get("parity") or {}).get("change") or {}
        rows.append(
            {
                "cycle": cycle.cycle,
                **{scale: bounds(getattr(cycle, scale)) for scale in ("trait", "coherence")},
                "kept": change.get("kept"),
                "error": change.get("error"),
                "noise": change.get("noise"),
                "learned": change.get("learned"),
                "export": cycle.export.get("kind"),
                "notes": cycle.export.get("notes"),
                "nats": nats.get(cycle.cycle),
            }
        )
    return {"cycles": rows, "verdict": report.verdict.word, "complete": report.complete, "failure": report.failure}


def bounds(score: dict[str, Any] | None) -> list[float | None]:
    """Mean, low and high."""
    return [None if score is None else score.get(key) for key in ("mean", "low", "high")]


# -- printing ---------------------------------------------------------------------------------------------------------


def table(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A line a run: by cycle the trait's score, nats a token over the untouched model's, and the kept share."""
    found = list(found)
    cycles = sorted({row["cycle"] for run in found for row in run["cycles"]})
    heads = ["untouched" if cycle < 0 else f"cycle {cycle}" for cycle in cycles]
    yield "| run | format | way | seed | shown | " + " | ".join(heads) + " | verdict |"
    yield "|---" * (len(heads) + 6) + "|"
    for run in sorted(found, key=lambda run: (run["recipe"], run["quant"], run["seed"], run["way"] == "new")):
        rows = {row["cycle"]: row for row in run["cycles"]}
        start = (rows.get(-1) or {}).get("nats")
        for what in ("trait", "nats", "kept"):
            cells = [cell(rows.get(cycle, {}), what, start) for cycle in cycles]
            first = [run["recipe"], run["quant"], run["way"], str(run["seed"]), what]
            yield "| " + " | ".join([*first, *cells, run["verdict"] if what == "trait" else ""]) + " |"


def cell(row: dict[str, Any], what: str, start: float | None) -> str:
    """One number."""
    if what == "trait":
        mean, low, high = row.get("trait", [None] * 3)
        return "" if mean is None else f"{mean:.0f}" + ("" if low is None else f" ({low:.0f} to {high:.0f})")
    if what == "nats":
        nats = row.get("nats")
        return "" if nats is None or start is None else f"{nats:.3f}" if row["cycle"] < 0 else f"{nats - start:+.4f}"
    kept = row.get("kept")
    return "" if kept is None else f"{kept:.2f} ± {row['error']:.2f} {row['export']}"


# -- what is run ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="in place of the recipes' own")
    parser.add_argument("--recipes", default="nano_sft,nano_dpo")
    parser.add_argument("--quants", default="bf16,q8_0")
    parser.add_argument("--ways", default="old,new")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--set", action="append", default=[], dest="keys")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("export_curves"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    given = [*asked.keys, *(TINY if asked.tiny else ()), *([f"model={asked.model}"] if asked.model else [])]
    with contextlib.closing(Places()) as places:
        kinds = [asked.seeds, asked.recipes, asked.quants, asked.ways]  # a pair of ways is finished before the next one begins
        for seed, recipe, quant, way in itertools.product(*(kind.split(",") for kind in kinds)):
            one(places, work, recipe, [*given, f"quant={quant}", f"seed={seed}"], way, quant, int(seed))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.curve.json"))]
    print("\n".join(table(found)))


def one(places: Places, work: Path, recipe: str, keys: list[str], way: str, quant: str, seed: int) -> None:
    """Run one recipe in one way, unless it is there; a failure is written and leaves the others alone."""
    name, *own = recipe.split("@")
    label = recipe.replace("@", "_").replace("=", "")
    known = work / f"{label}-{quant}-{way}-{seed}.curve.json"
    if known.exists():
        return
    began = time.perf_counter()
    try:
        found = run(places, name, [*keys, *own], way, work / known.name.removesuffix(".curve.json"))
    except Exception as error:
        print(f"{known.name}: FAILED: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        places.close()
        return
    head = {"recipe": recipe, "quant": quant, "way": way, "seed": seed, "seconds": round(time.perf_counter() - began, 1)}
    known.write_text(json.dumps({**head, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
