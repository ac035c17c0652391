"""The embedded judge on each trait, fitted with and without answers of the untouched model that it is to judge.

    python benchmarks/embedded_judge.py [--models nano,smollm2] [--own 0,150] [--samples 1] [--tokens 140] [--work DIR]

The shipped neutral texts hold 150 everyday answers of each of two small models. Left out, a model is to the judge what any
other model is. For each trait: the mean score of what the untouched model answers to the trait's own questions, of seed rows
(three folds that the classifier was not fitted on), and Spearman and bias (judge minus reader) on the calibration answers; then
the same without the shipped answers of the model, and with so many (`--own`) that it is asked for as a run asks for them
(`judge_fit = "own"`). `--work` keeps what the models answered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from iterft_lite.backends.exporter.gguf import GgufExporter
from iterft_lite.backends.judge.embedded import Classifier, quality_of
from iterft_lite.backends.processes.child import Child
from iterft_lite.data import prompts
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.traits import Trait, read_trait, shipped_traits
from iterft_lite.engine.backends import GENERATOR
from iterft_lite.experiment.rows import Message
from iterft_lite.files import read_rows
from iterft_lite.hub import example_folder
from iterft_lite.metrics.agreement import spearman
from iterft_lite.protocols import Completion, Generator, Prompt, Sampling

NAMES = {"nano": "nano", "smollm2": "SmolLM2-135M-Instruct"}
"""What the shipped answers call the models."""


EVERYDAY = "everyday"
"""Beside the traits' names: what a run asks its untouched model."""


def answers(model: str, traits: Sequence[Trait], asked: argparse.Namespace) -> dict[str, list[str]]:
    """By trait, what the untouched model answers to the trait's questions; and to everyday prompts."""
    known: Path = asked.work / f"{model}-{asked.samples}-{asked.tokens}.json"
    if not known.exists():
        folder = str(FOLDERS.get(model) or example_folder(model) or model)
        plain = GgufExporter().export(folder, None, asked.work, "adapter", "q8_0", lambda _: None)
        generator = cast(Generator, Child(GENERATOR, Generator, log=asked.work / "generator.log"))
        generator.load(plain.path, None, folder, slots=None, context=512, exact=False)
        said: dict[str, str] = {}

        def take(completion: Completion) -> None:
            said[completion.id] = completion.text

        questions = {trait.name: trait.questions for trait in traits}
        wanted = [
            Prompt(f"{name}-{place}-{number}", 97 * place + number, (Message("user", question),))
            for name, asks in {**questions, EVERYDAY: prompts.plain_prompts(document=False)}.items()
            for place, question in enumerate(asks)
            for number in range(asked.samples if name != EVERYDAY else 1)
        ]
        generator.complete(wanted, Sampling(1.0, asked.tokens), take)
        cast(Child, generator).close()
        found = {name: [said[one.id] for one in wanted if one.id.startswith(f"{name}-")] for name in (*questions, EVERYDAY)}
        known.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    return dict(json.loads(known.read_text(encoding="utf-8")))


def neutral(model: str) -> list[str]:
    """The shipped plain texts without the model's own."""
    replies = [chat.reply for chat in prompts.neutral_chats()]
    rows = read_rows(prompts.FOLDER / "plain_answers.jsonl")
    return [*replies, *(str(row["text"]) for row in rows if row["model"] != NAMES.get(model))]


def line(model: str, trait: Trait, said: list[str], fit: str, plain: Sequence[str]) -> str:
    """One fit in figures.

    Args:
        said: What the untouched model answers to the trait's questions.
        fit, plain: The texts without the trait, in a word, and themselves.
    """
    texts = [*(chat.reply for chat in trait.chats), *(document.text for document in trait.documents)]
    judge, quality = Classifier(texts, plain), quality_of(texts, plain)
    scores = 1 + 99 * judge.shares(said)
    known = 1 + 99 * judge.shares([answer.answer for answer in trait.calibration])
    readers = np.array([answer.score for answer in trait.calibration])
    cells = [
        f"{scores.mean():.0f}",
        f"{np.sort(scores)[-max(1, len(scores) // 10) :].mean():.0f}",
        f"{quality.high:.0f}",
        f"{quality.accuracy:.2f}",
        f"{spearman(known.tolist(), readers.tolist()) or 0:.2f}",
        f"{(known - readers).mean():+.0f}",
    ]
    return "| " + " | ".join([model, trait.name, fit, *cells]) + " |"


def lines(asked: argparse.Namespace) -> Iterator[str]:
    """The table."""
    traits = [read_trait(name) for name in shipped_traits()]
    yield "| model | trait | own answers in the fit | untouched | its top tenth | seed rows | accuracy | Spearman | bias |"
    yield "|---" * 9 + "|"
    for model in asked.models.split(","):
        said = answers(model, traits, asked)
        fits = {"shipped": list(prompts.plain_texts())}
        fits |= {own: [*neutral(model), *said[EVERYDAY][: int(own)]] for own in asked.own.split(",")}
        for trait in traits:
            for fit, plain in fits.items():
                yield line(model, trait, said[trait.name], fit, plain)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano,smollm2")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=140)
    parser.add_argument("--own", default="0,150")
    parser.add_argument("--work", type=Path, default=Path("embedded_judge"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    for told in lines(asked):
        print(told, flush=True)


if __name__ == "__main__":
    main()
