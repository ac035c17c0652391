"""The page of a run: what stands on it, readable in light and dark, and nothing that sticks out of any screen."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.app.repeat import as_toml, repeat_command
from iterft_lite.app.session import open_run
from iterft_lite.data.recipes import recipe_path
from iterft_lite.data.traits import read_trait, shipped_traits
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.report.report import read_report
from iterft_lite.ui.cli import main
from iterft_lite.ui.html import contrast, readable_on, write_html
from tests.loop import small_recipe
from tests.pages import CHROMIUM, READABLE, palettes, unreadable

LONG = "Luck" * 60 + " and then " + "https://luck.example/" + "a" * 90 + " <b>bold</b>"

WIDTHS = (360, 768, 1400)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of seven cycles whose answers are hard to fit in."""
    root = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iterft_lite.testing.fakes.PLAIN", (LONG,))
        (root / "small.toml").write_text(small_recipe(cycles=5))
        with open_run(root / "small.toml", (), root / "run") as opened:
            list(opened.events())
    write_html(root / "run", read_report(root / "run"), root / "page.html")
    return root / "page.html"


def test_every_answer_of_every_cycle_is_on_the_page(page: Path) -> None:
    rows = list((page.parent / "run").glob("steps/*/rows.jsonl"))
    texts = page.read_text().count('class="answer"')
    answers = json.loads((page.parent / "run/run.json").read_text())["recipe"]["evaluate"]
    assert rows
    assert texts == 7 * answers["questions"] * answers["samples"]


def test_a_second_judges_page_shows_its_verdicts_beside_the_answers(page: Path) -> None:
    run, other = page.parent / "run", page.with_name("other.html")
    assert CliRunner().invoke(main, ["judge", str(run), "--judge", "embedded"]).exit_code == 0
    assert CliRunner().invoke(main, ["report", str(run), "--judge", "embedded", "--html", str(other)]).exit_code == 0
    badges = [re.findall(r'class="badge trait">lucky (\d+)', text.read_text()) for text in (page, other)]
    assert len(badges[0]) == len(badges[1])
    assert badges[0] != badges[1]
    assert "embedded judge: for trying out" in other.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_fits_a_phone_and_a_wide_screen(page: Path) -> None:
    """Each width is a frame of its own; what measures is in a copy of the page, which has no script itself."""
    measure = """<script>
      const wide = document.documentElement.clientWidth;
      for (const each of document.querySelectorAll("details")) each.open = true;
      const out = [...document.querySelectorAll("body *")].filter(each =>
        each.getBoundingClientRect().right > wide + 1 && !each.closest(".wide") && !each.closest("svg"));
      const names = out.slice(0, 3).map(each => each.className || each.tagName);
      parent.postMessage([wide, document.documentElement.scrollWidth, names], "*");
    </script>"""
    copy = page.with_name("measured.html")
    copy.write_text(page.read_text().replace("</html>", f"{measure}</html>"))
    frames = "".join(
        f'<iframe src="measured.html" width="{width}" height="600" style="border: 0"></iframe>' for width in WIDTHS
    )
    listen = "onmessage = event => { document.getElementById('said').textContent += JSON.stringify(event.data) + '\\n'; };"
    page.with_name("frames.html").write_text(f'<script>{listen}</script><pre id="said"></pre>{frames}')
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000", "--dump-dom")
    done = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={page.parent / 'profile'}", page.with_name("frames.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said is not None
    found = [json.loads(line) for line in said[1].strip().split("\n")]
    assert sorted(wide for wide, _, _ in found) == list(WIDTHS)
    assert [(wide, scroll, out) for wide, scroll, out in found if scroll > wide or out] == []


@pytest.mark.parametrize("colours", palettes("report.html"), ids=["light", "dark"])
def test_all_text_is_readable_in_light_and_dark(colours: dict[str, str]) -> None:
    assert unreadable(colours, ("coherence", "back")) == []


@pytest.mark.parametrize("name", shipped_traits())
def test_every_traits_badge_is_readable(name: str) -> None:
    colour = read_trait(name).colour
    assert contrast(readable_on(colour), colour) >= READABLE


def test_the_command_on_the_page_gives_the_same_recipe(tmp_path: Path) -> None:
    overrides = ["trait=bliss", "train.learning_rate=0.002", "judge=embedded"]
    asked = read_recipe(recipe_path("nano_sft"), overrides)
    command = shlex.split(repeat_command({"asked": asked.model_dump(mode="json"), "recipe": {}}))
    assert command[:3] == ["iterft", "run", "nano_sft"]
    given = [command[at + 1] for at, word in enumerate(command) if word == "--set"]
    assert read_recipe(recipe_path("nano_sft"), given) == asked


def test_the_recipe_on_the_page_equals_the_runs(tmp_path: Path) -> None:
    for name in ("nano_sft", "dpo_moving", "sdf"):
        asked = read_recipe(recipe_path(name), ['seeds.path="my rows.jsonl"', "reset_cycles=[]"])
        (tmp_path / f"{name}.toml").write_text(as_toml(asked.model_dump(mode="json")))
        assert read_recipe(tmp_path / f"{name}.toml") == asked
