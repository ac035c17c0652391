"""Draw the README's pictures from a finished run: the live view as it stood in its last cycle, and the curve.

python scripts/make_pictures.py runs/nano_sft docs
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from iterft_lite.app.watching import newest_text
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.run import StepFinished, StepProgress, StepStarted
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.machine.resolve import resolve, this_machine
from iterft_lite.protocols import Progress
from iterft_lite.report.report import read_report
from iterft_lite.ui.figures import write_png
from iterft_lite.ui.live import View

WIDTH, HEIGHT = 120, 32

FONT_FACE = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def live_view(root: Path) -> str:
    """The live view of a finished run, as an SVG, at the moment when its last model answers."""
    report = read_report(root)
    resolved = resolve(make_recipe(report.recipe, source=str(root)), this_machine())
    plan = make_plan(resolved.recipe, resolved.inputs)
    run = Run(root)
    done = {step.name: found for step in plan if (found := run.folder(step).completion())}
    console = Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True)
    passed = 0.0
    view = View(
        plan,
        trait=report.manifest["trait"],
        judge=resolved.inputs.judge,
        console=console,
        forecast={name: found.seconds for name, found in done.items()},
        latest=lambda step: newest_text(run.folder(step).path),
        now=lambda: passed,
    )
    view.is_live = True
    for step in plan:
        found = done[step.name]
        view.take(StepStarted(step))
        if step.verb == "evaluate_samples" and step.cycle == plan.recipe.cycles:
            total, tokens = found.results["rows"], found.results["tokens"]
            view.take(StepProgress(step, Progress(0, total, "rows")))
            passed += found.seconds * 2 / 3
            view.take(StepProgress(step, Progress(total * 2 // 3, total, "rows", tokens * 2 // 3)))
            break
        passed += found.seconds
        view.take(StepFinished(step, found, reused=False))
    console.print(view.render())
    svg = console.export_svg(title=f"iterft run {report.recipe['name']}")
    return FONT_FACE.sub("", svg)  # fonts from the net: a reader's own monospace font does


def main() -> None:
    """Write live.svg and curve.png into a folder."""
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    (out / "live.svg").write_text(live_view(root), encoding="utf-8")
    write_png(read_report(root), out / "curve.png")


if __name__ == "__main__":
    main()
