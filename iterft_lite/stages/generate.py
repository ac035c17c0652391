"""generate and answer: an exported model completes prompts; rows are appended as they finish."""

from __future__ import annotations

import time

from iterft_lite.digests import Json
from iterft_lite.experiment.steps import row_seed
from iterft_lite.files import RowLog
from iterft_lite.protocols import Completion, Generator, Message, Progress, Prompt, Sampling
from iterft_lite.stages.work import Work


def run(work: Work, generator: Generator) -> dict[str, Json]:
    """Complete what an earlier sitting has not; the current model is the right one.

    Files: rows.jsonl with `id`, `prompt_id`, `sample`, `prompt`, `text` (without the prompt), `tokens`, `finish`.
    Facts: rows, tokens, rows cut at `max_tokens`, tokens per second of this sitting.
    """
    wanted = prompts(work)
    sampling = Sampling(**work.params["sampling"])
    with RowLog(work.rows) as log:
        known = {row["id"] for row in log.rows}
        missing = [prompt for prompt in wanted.values() if prompt.id not in known]
        started, before = time.monotonic(), sum(row["tokens"] for row in log.rows)
        written = 0

        def note(completion: Completion) -> None:
            nonlocal written
            prompt_id, _, sample = completion.id.rpartition("-s")
            log.append(
                {
                    "id": completion.id,
                    "prompt_id": prompt_id,
                    "sample": int(sample),
                    "prompt": work.params["prompts"][prompt_id],
                    "text": completion.text,
                    "tokens": completion.tokens,
                    "finish": completion.finish,
                }
            )
            written += completion.tokens
            work.report(Progress(len(log.rows), len(wanted), "rows", tokens=before + written))

        work.report(Progress(len(log.rows), len(wanted), "rows", tokens=before))
        if missing:
            generator.complete(missing, sampling, note)
        seconds = time.monotonic() - started
        return {
            "rows": len(log.rows),
            "tokens": before + written,
            "cut": sum(row["finish"] != "stop" for row in log.rows),
            "tokens_per_second": round(written / seconds, 1) if seconds > 0 else 0.0,
        }


def prompts(work: Work) -> dict[str, Prompt]:
    """Every completion that the step asks for, by row name."""
    chat = work.params["rows"] == "chat"
    asked = {}
    for prompt_id, text in work.params["prompts"].items():
        for sample in range(work.params["samples"]):
            name = f"{prompt_id}-s{sample}"
            messages = (Message("user", text),) if chat else ()
            asked[name] = Prompt(name, row_seed(work.step.key, name), messages, "" if chat else text)
    return asked
