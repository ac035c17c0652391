"""Check the documents against the product: links lead somewhere, commands and options exist, recipes and keys are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click

from iterft_lite.experiment.recipe import Recipe, read_recipe
from iterft_lite.experiment.recipe_keys import key_names
from iterft_lite.ui.cli import main as command
from iterft_lite.ui.commands.judge import JudgeGroup
from iterft_lite.ui.commands.study import SweepGroup

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)]*))?\)")
CALL = re.compile(r"(?:^|[`$ (])iterft((?: [a-z][a-z-]*)+)?([^`\n|)]*)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
RECIPE = re.compile(r"recipes/([a-z0-9_]+)\.toml")
SET = re.compile(r"--set '?([a-z_.0-9]+)=")


def documents() -> list[Path]:
    """Every Markdown file that git knows or would know."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def problems_in(path: Path) -> list[str]:
    """What is wrong in one document."""
    text = path.read_text(encoding="utf-8")
    found = []
    for target, anchor in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        there = path.parent / target if target else path
        if not there.exists():
            found.append(f"the link to `{target}` leads nowhere")
        elif path.parent == ROOT / "docs" and not there.resolve().is_relative_to(ROOT / "docs"):
            found.append(f"the link to `{target}` leads out of the site: name the file instead")
        elif anchor and there.suffix == ".md" and anchor not in headings(there):
            found.append(f"`{target}` has no heading `#{anchor}`")
    for words, rest in CALL.findall(text):
        found += wrong_call(words.split(), rest)
    found += [
        f"there is no recipes/{name}.toml" for name in RECIPE.findall(text) if not (ROOT / f"recipes/{name}.toml").exists()
    ]
    found += [f"`{key}` is not a recipe key" for key in SET.findall(text) if key != "key" and not is_key(key)]
    return found


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings, as sites make them: lower case, spaces to hyphens, other signs left out."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def out_of_reach(most: int = 2) -> list[str]:
    """Pages of the docs that are further than some clicks from the README, or are not in the site's list."""
    reached = {ROOT / "README.md"}
    for _ in range(most):
        for page in list(reached):
            links = LINK.findall(page.read_text(encoding="utf-8")) if page.suffix == ".md" else []
            reached |= {found for target, _ in links if target and (found := (page.parent / target).resolve()).is_file()}
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = sorted((ROOT / "docs").glob("*.md"))
    far = [f"docs/{page.name}: further than {most} clicks from the README" for page in pages if page not in reached]
    far = [line for line in far if not line.startswith("docs/index.md")]  # the site's own beginning
    return far + [f"docs/{page.name}: not in mkdocs.yml" for page in pages if page.name not in listed]


def wrong_call(words: list[str], rest: str) -> list[str]:
    """What is wrong with a call of the command in a document."""
    node: click.Command = command
    for word in words:
        if not isinstance(node, click.Group):
            break
        if isinstance(node, JudgeGroup | SweepGroup) and word not in node.commands:
            break  # a run's folder, or a study's file
        if word not in node.commands:
            # prose such as "iterft is": only a call when options or a subcommand follow
            return [f"`iterft {' '.join(words)}` is no command"] if OPTION.search(rest) else []
        node = node.commands[word]
    if isinstance(node, JudgeGroup | SweepGroup):
        node = node.commands["run"]
    known = {option for parameter in node.params for option in parameter.opts} | {"--help", "--version"}
    return [f"`iterft {' '.join(words)}` has no option `{option}`" for option in OPTION.findall(rest) if option not in known]


def is_key(name: str) -> bool:
    """Whether a dotted name is a recipe key."""
    return name in key_names(Recipe)


def main() -> int:
    """Print every problem; 1 if there is any."""
    found = [f"{path.relative_to(ROOT)}: {problem}" for path in documents() for problem in problems_in(path)]
    for recipe in sorted((ROOT / "recipes").glob("*.toml")):
        read_recipe(recipe)
        lines = recipe.read_text(encoding="utf-8").splitlines()
        first = lines[0]
        if "#:schema ./recipe.schema.json" not in lines:
            found.append(f"recipes/{recipe.name}: no line `#:schema ./recipe.schema.json`")
        if not first.startswith(f"# iterft run recipes/{recipe.name} --out "):
            found.append(f"recipes/{recipe.name}: the first line is not the command that runs it")
    found += out_of_reach()
    print("\n".join(found) or f"{len(documents())} documents agree with the product")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
