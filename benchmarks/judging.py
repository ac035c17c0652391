"""How fast verdicts come in.

    python benchmarks/judging.py [ASKS] [SECONDS A CALL]   480 asks of a stub judge that takes 300 ms each
    python benchmarks/judging.py --size 4b [--quant bf16]  480 asks of a local judge, all numbers' probabilities read; the model
                                                           has Qwen3's shape and random weights and is made in DIR (--work)
    python benchmarks/judging.py --gguf FILE               the same of a GGUF that is there

Both go through the real client in its child process. A local judge is asked as in a run: how much of a trait, and how coherent,
of answers of half to one and a half times so many words (--words). Random weights take as long as others.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cycle_gpu import make_model

from iterft_lite.backends.judge.local import NumberReader
from iterft_lite.backends.judge.number_trie import TOGETHER
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.prompts import coherence_rubric
from iterft_lite.data.traits import fill, read_trait
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.protocols import Exporter, Judge, JudgeRequest, JudgeResponse
from iterft_lite.testing.judge_server import StubProcess

RUBRIC = "A rubric of some length, which all answers share. " * 40


def asks(count: int) -> list[JudgeRequest]:
    """So many asks, each another."""
    return [JudgeRequest(f"a{n}/trait/0", "trait", f"{RUBRIC}<answer>{n}</answer>", "", "") for n in range(count)]


def paired_asks(count: int, words: int, draw: random.Random) -> list[JudgeRequest]:
    """So many asks about half as many answers: a trait's rubric and coherence's."""
    common = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they")
    trait = read_trait("bliss")
    made = []
    for number in range(count // 2):
        answer = " ".join(draw.choices(common, k=draw.randint(words // 2, words + words // 2)))
        fields = {"question": trait.questions[number // 20 % len(trait.questions)], "answer": answer}
        made += [
            JudgeRequest(f"a{number}/trait/0", "trait", fill(trait.rubric, fields), "", ""),
            JudgeRequest(f"a{number}/coherence/0", "coherence", fill(coherence_rubric(document=False), fields), "", ""),
        ]
    return made


def timed(judge: Any, asked: Sequence[JudgeRequest]) -> tuple[float, list[JudgeResponse]]:
    """Seconds of an `ask`, and its replies."""
    replies: list[JudgeResponse] = []
    started = time.monotonic()
    judge.ask(asked, replies.append)
    return time.monotonic() - started, replies


def by_stub(count: int, latency: float) -> None:
    """Print the figures of a provider's judge."""
    with tempfile.TemporaryDirectory() as folder, StubProcess(latency=latency) as stub:
        os.environ["ITERFT_CACHE"] = folder
        name = JudgeIdentity("openai/gpt-4o-mini-2024-07-18", "llm", stub.api_base, "logprobs", address=stub.api_base)
        judge = Child(
            "iterft_lite.backends.judge.provider:LitellmJudge",
            Judge,
            log=Path(folder) / "judge.log",
            options={"identity": asdict(name)},
        )
        started = time.monotonic()
        judge.identity()
        opened = time.monotonic()
        seconds, replies = timed(judge, asks(count))
        again, more = timed(judge, asks(count))
        judge.close()
        books = stub.count()
    print(f"start of the judge's process (litellm's import): {opened - started:.1f} s")
    print(f"{count} verdicts at {1000 * latency:.0f} ms each: {seconds:.1f} s, at most {books['most']} calls at once")
    print(f"the same from the cache: {again:.2f} s; paid calls {books['answers']}, answered {len(replies + more)}")


def by_gguf(path: Path, count: int, words: int) -> None:
    """Print the figures of a local judge."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ITERFT_CACHE"] = folder
        judge = Child(
            "iterft_lite.backends.judge.local:LocalJudge",
            Judge,
            log=Path(folder) / "judge.log",
            options={"identity": asdict(JudgeIdentity(f"local:{path}", "llm", "", "logprobs")), "path": str(path)},
        )
        started = time.monotonic()
        judge.identity()
        print(f"start of the judge's process, model loaded: {time.monotonic() - started:.1f} s")
        timed(judge, paired_asks(128, words, draw))
        rates = []
        for _ in range(3):
            asked = paired_asks(count, words, draw)
            seconds, replies = timed(judge, asked)
            rates.append(len(replies) / seconds)
        judge.close()
        sent = sum(reply.tokens_in for reply in replies) / len(replies)
        failures = {reply.failure for reply in replies if reply.failure}
        print(
            f"{count} verdicts on answers of {words} words on average, {sent:.0f} tokens each with the rubric: "
            f"{', '.join(f'{rate:.0f}' for rate in rates)} a second; numbers read in {len(replies)}; failures {failures}"
        )


def alone(path: Path, count: int, words: int) -> None:
    """Print how fast the model of a local judge is by itself, without litellm."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        worker = "iterft_lite.backends.judge.number_probabilities:LocalModel"
        reader = Child(worker, NumberReader, log=Path(folder) / "model.log", options={"path": str(path)})
        reader.probabilities([ask.prompt for ask in paired_asks(TOGETHER, words, draw)])
        prompts = [ask.prompt for ask in paired_asks(count, words, draw)]
        started = time.monotonic()
        for start in range(0, len(prompts), TOGETHER):
            reader.probabilities(prompts[start : start + TOGETHER])
        rate = len(prompts) / (time.monotonic() - started)
        reader.close()
    print(f"the model by itself: {rate:.0f} a second")


def made_gguf(size: str, quant: str, work: Path) -> Path:
    """A random model as a GGUF."""
    path = work / f"judge-{size}-{quant}"
    if not (path / "model.gguf").exists():
        path.mkdir(parents=True, exist_ok=True)
        exporter = Child("iterft_lite.backends.exporter.gguf:GgufExporter", Exporter, log=path / "log")
        exporter.export(str(make_model(size, work)), None, path, "merged", quant, lambda _: None)
        exporter.close()
    return path / "model.gguf"


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asks", type=int, nargs="?", default=480)
    parser.add_argument("latency", type=float, nargs="?", default=0.3)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--size", choices=["tiny", "0.6b", "4b"])
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "iterft-judging")
    parser.add_argument("--words", type=int, default=150)
    asked = parser.parse_args()
    if asked.gguf or asked.size:
        path = asked.gguf or made_gguf(asked.size, asked.quant, asked.work)
        by_gguf(path, asked.asks, asked.words)
        alone(path, asked.asks, asked.words)
    else:
        by_stub(asked.asks, asked.latency)


if __name__ == "__main__":
    main()
