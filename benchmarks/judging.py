"""How fast verdicts come in: 480 asks of a stub judge that takes 300 ms each, through the real client in its child process.

python benchmarks/judging.py [ASKS] [SECONDS A CALL]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from iterft_lite.backends import Ask, Judge, JudgeIdentity, Reply
from iterft_lite.backends.child import Child
from iterft_lite.backends.judge_stub import StubProcess


def main(asks: int, latency: float) -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder, StubProcess(latency=latency) as stub:
        os.environ["ITERFT_CACHE"] = folder
        name = JudgeIdentity("openai/gpt-4o-mini-2024-07-18", "llm", stub.api_base, "odds")
        judge = Child(
            "iterft_lite.backends.judge_litellm:LitellmJudge",
            Judge,
            log=Path(folder) / "judge.log",
            environment={"OPENAI_API_KEY": "none"},
            options={"identity": asdict(name), "api_base": stub.api_base},
        )
        started = time.monotonic()
        judge.identity()
        opened = time.monotonic()
        replies: list[Reply] = []
        judge.ask(
            [Ask(f"a{n}/trait/0", "trait", f"{'A rubric. ' * 250}<answer>{n}</answer>", "", "") for n in range(asks)],
            replies.append,
        )
        ended = time.monotonic()
        judge.ask(
            [Ask(f"a{n}/trait/0", "trait", f"{'A rubric. ' * 250}<answer>{n}</answer>", "", "") for n in range(asks)],
            replies.append,
        )
        again = time.monotonic()
        judge.close()
        count = stub.count()
    print(f"start of the judge's process (litellm's import): {opened - started:.1f} s")
    print(f"{asks} verdicts at {1000 * latency:.0f} ms each: {ended - opened:.1f} s, at most {count['most']} calls at once")
    print(f"the same from the cache: {again - ended:.2f} s; paid calls {count['answers']}, answered {len(replies)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 480, float(sys.argv[2]) if len(sys.argv) > 2 else 0.3)
