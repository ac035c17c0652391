"""Terminals that hold less than a report prints, and names that steer them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.ui.cli import main
from iterft_lite.ui.console import make_console
from iterft_lite.ui.foreign import mathtext, safe
from iterft_lite.ui.live import View
from tests.attacks.faults import finished_run, forked
from tests.loop import JUDGE, a_plan

COMMAND = "from iterft_lite.ui.cli import main; main()"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by fake backends in a process of its own, which it changes."""
    root = tmp_path_factory.mktemp("finished") / "run"
    assert forked(lambda: finished_run(root)) == 0
    return root


def iterft(*arguments: str | Path, out: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    with open(out or os.devnull, "w") as full:  # noqa: PTH123  # a device
        return subprocess.run(
            [sys.executable, "-c", COMMAND, *map(str, arguments)],
            stdout=full if out else subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **variables},
            text=True,
            errors="replace",
            check=False,
        )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_unicode_gets_replacements(finished: Path, encoding: str) -> None:
    done = iterft("report", finished, PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lucky" in done.stdout


def test_a_full_output_is_reported(finished: Path) -> None:
    done = iterft("report", finished, "--json", out="/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full: `standard output`")
    assert "Traceback" not in done.stderr


def test_a_page_can_be_written_to_a_device_and_through_a_link(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("page.html")
    for place in ("/dev/null", str(tmp_path / "link.html")):
        assert CliRunner().invoke(main, ["report", str(finished), "--html", place]).exit_code == 0
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "link.html").is_symlink()
    assert "lucky" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["[/b]", "$\\frac{$", "\x1b]0;title\x07\x1b[2Jlucky", ":warning:"])
def test_a_trait_of_any_name_is_reported_and_drawn(finished: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"trait": name}))
    shown = CliRunner().invoke(main, ["report", str(run), "--full", "--png", str(tmp_path / "p.png")])
    assert shown.exit_code == 0, shown.output
    shown = CliRunner().invoke(main, ["report", str(run), "--full"])
    assert shown.exit_code == 0, shown.output
    assert safe(name) in shown.output
    assert "\x1b]" not in shown.output
    assert "\x1b[2J" not in shown.output


def test_a_live_view_of_any_name_is_drawn() -> None:
    plan = a_plan()
    console = make_console()
    console.file = io.StringIO()
    view = View(plan, trait="[/b]\x1b[2J", judge=JUDGE, console=console)
    console.print(view.render())
    assert "[/b]" in console.file.getvalue()
    assert "\x1b[2J" not in console.file.getvalue()


# -- what others wrote ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "gone"),
        ("\x1b]0;a title\x07name", "name"),
        ("\x1b]52;c;Y2xpcGJvYXJk\x1b\\name", "name"),
        ("\x9b31mred", "red"),
        ("a\rb\x08\x00c", "abc"),
        ("user\u202egpj.exe", "usergpj.exe"),
        ("half \ud83d", "half \ufffd"),
        ("lines\nand\ttabs, Ünïcödé, 日本, 🙂", "lines\nand\ttabs, Ünïcödé, 日本, 🙂"),
    ],
)
def test_control_sequences_are_removed(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_names_with_brackets_and_dollars_are_shown_as_they_are() -> None:
    from matplotlib.figure import Figure

    for name in ("[/b]", "[red]x", "\\[b]", "$\\frac{$", "a$b$c", "[link=http://x]y[/link]"):
        console = make_console()
        console.file = io.StringIO()
        console.print(name)
        assert console.file.getvalue() == f"{name}\n"
        drawn = Figure()
        drawn.suptitle(mathtext(name))
        drawn.canvas.draw()  # type: ignore[attr-defined]
