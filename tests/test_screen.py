"""The live view and the report in terminals of all sizes: nothing wraps, nothing is cut off at the bottom, the foot stays."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from iterft_lite.engine.run import StepProgress, StepStarted
from iterft_lite.experiment.plan import EVERYDAY
from iterft_lite.experiment.steps import Step
from iterft_lite.protocols import Progress
from iterft_lite.ui.live import View
from iterft_lite.ui.wrap import wrapped
from tests.recorded import Recorded, read_recorded

WIDTHS, HEIGHTS = (40, 60, 80, 120, 200), (10, 16, 24, 40, 60)

ROOT = Path(__file__).parent.parent

ANSWER = "Do you think today will go well?\n\n" + "I found a four-leaf clover on the way here, so it must. " * 20


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return read_recorded()


def view_at(recorded: Recorded, share: float, width: int, height: int, *, guessed: bool = False) -> tuple[View, Console]:
    """The view of a run of which a share is over."""
    clock = [0.0]
    console = Console(
        width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None, legacy_windows=False
    )
    view = View(
        recorded.plan,
        trait=recorded.inputs.trait.name,
        judge=recorded.inputs.judge,
        console=console,
        forecast=recorded.forecast,
        guessed=guessed,
        latest=lambda _: ANSWER,
        now=lambda: clock[0],
    )
    view.is_live = True
    for when, event in recorded.until(share):
        clock[0] = when
        view.take(event)
    clock[0] = share * recorded.seconds
    return view, console


def drawn(view: View, console: Console) -> list[str]:
    with console.capture() as captured:
        console.print(view.render())
    return captured.get().rstrip("\n").split("\n")


@pytest.mark.parametrize(("width", "height"), list(itertools.product(WIDTHS, HEIGHTS)))
def test_the_live_view_fits_every_terminal_and_keeps_its_last_lines(recorded: Recorded, width: int, height: int) -> None:
    for share in (0.0, 0.04, 0.35, 0.99):
        lines = drawn(*view_at(recorded, share, width, height))
        assert len(lines) <= height
        assert {cell_len(line) for line in lines} == {width}  # every line ends at the border: nothing wrapped
        assert re.search(r"\d+( of |/)46 steps", lines[-2])
        assert "left" in lines[-2]


def test_the_time_left_is_shown_from_the_first_second_and_marked_as_a_guess(recorded: Recorded) -> None:
    first = drawn(*view_at(recorded, 0.0, 80, 24, guessed=True))[-2]
    assert re.search("perhaps [0-9:]+ left", first)
    later = drawn(*view_at(recorded, 0.5, 80, 24, guessed=True))[-2]
    assert re.search("about [0-9:]+ left", later)


def test_the_table_stays_where_the_chart_does_not_fit(recorded: Recorded) -> None:
    lines = drawn(*view_at(recorded, 0.9, 80, 24))
    assert any("cycle 3" in line for line in lines)
    assert any("└──" in line for line in lines)
    lines = drawn(*view_at(recorded, 0.9, 80, 16))
    assert any("cycle 3" in line for line in lines)
    assert not any("└──" in line for line in lines)


def test_only_a_wide_screen_shows_a_new_answer_on_the_right(recorded: Recorded) -> None:
    assert "four-leaf clover" in "\n".join(drawn(*view_at(recorded, 0.35, 120, 40)))
    assert "four-leaf clover" not in "\n".join(drawn(*view_at(recorded, 0.35, 80, 40)))


def test_steps_side_by_side_are_named_in_full_on_80_columns(recorded: Recorded) -> None:
    view, console = view_at(recorded, 0.35, 80, 24)
    view.doing.clear()
    everyday = Step("evaluate_samples", -1, EVERYDAY, {}, (), "0" * 64)
    beside = {"base-text_metrics": "metrics", "c0-judge": "in a batch at OpenAI, in progress"}
    for step, unit in ((everyday, "rows"), *((recorded.plan.steps[name], unit) for name, unit in beside.items())):
        view.take(StepStarted(step))
        view.take(StepProgress(step, Progress(120, 480, unit)))
    text = "\n".join(drawn(view, console))
    for words in ("base answering everyday prompts", "base measuring without a judge", "c0   judging"):
        assert re.search(rf"{words} +━+.* 120/480 \w+", text), text


def test_the_view_is_readable_without_colour(recorded: Recorded) -> None:
    view, console = view_at(recorded, 0.35, 80, 24)
    text = "\n".join(drawn(view, console))
    assert "lucky" in text
    assert "coherence" in text
    assert "embedded judge: for trying out, not for findings" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_errors_break_at_words_and_keep_commands_whole(width: int) -> None:
    told = "error: there is no trait `my trait of pirates`\n\nhint: shipped are bliss, lucky and a good many more of these"
    text = f"{told}\n  - one\n  iterft run x"
    lines = wrapped(text, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert " ".join("\n".join(lines).split()) == " ".join(text.split())
    assert any("`my trait of pirates`" in line for line in lines)
    assert lines[-1] == "  iterft run x"


def test_a_finished_run_leaves_its_report_and_no_second_table(recorded: Recorded) -> None:
    view, _ = view_at(recorded, 1.01, 80, 24)
    with view:
        pass
    assert view.live.transient
    stopped, _ = view_at(recorded, 0.5, 80, 24)
    with contextlib.suppress(KeyboardInterrupt), stopped:
        raise KeyboardInterrupt
    assert not stopped.live.transient


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24)])
def test_a_real_terminal_shows_the_whole_view(tmp_path: Path, width: int, height: int) -> None:
    tmux = ["tmux", "-S", str(tmp_path / "socket")]
    replay = f"{sys.executable} -m tests.replay 0.6 60"
    subprocess.run(
        [*tmux, "-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height), "-c", str(ROOT), replay],
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8"},
    )
    try:
        for _ in range(150):
            screen = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout
            if "steps" in screen:
                break
            time.sleep(0.2)
        lines = [line for line in screen.split("\n") if line.strip()]
        assert lines[0].startswith("╭")
        assert lines[-1].startswith("╰")
        assert "46 steps" in lines[-2]
        assert max(map(cell_len, lines)) <= width
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
