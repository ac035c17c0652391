"""Terminals that hold less than a report prints, and names that steer them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.ui.cli import main
from iterft_lite.ui.foreign import markup, mathtext, one_line, safe
from tests.attacks.faults import finished_run, forked

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


def test_an_output_that_takes_no_more_is_said(finished: Path) -> None:
    done = iterft("report", finished, "--json", out="/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full: `standard output`")
    assert "Traceback" not in done.stderr


def test_a_page_is_written_into_a_device_and_a_link_stays_one(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("page.html")
    for place in ("/dev/null", str(tmp_path / "link.html")):
        assert CliRunner().invoke(main, ["report", str(finished), "--html", place]).exit_code == 0
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "link.html").is_symlink()
    assert "lucky" in (tmp_path / "page.html").read_text()


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
def test_what_a_terminal_would_obey_is_taken_out(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_names_with_brackets_and_dollars_are_shown_as_they_are() -> None:
    from matplotlib.figure import Figure
    from rich.text import Text

    for name in ("[/b]", "[red]x", "\\[b]", "$\\frac{$", "a$b$c", "[link=http://x]y[/link]"):
        assert Text.from_markup(f"[bold]{markup(name)}[/bold]").plain == name
        drawn = Figure()
        drawn.suptitle(mathtext(name))
        drawn.canvas.draw()  # type: ignore[attr-defined]
    assert one_line("a\n\n  b" + "c" * 300, 10) == "a bcccc..."
