"""training_samples and evaluate_samples: an exported model completes prompts; rows are appended as they finish."""

from __future__ import annotations

import time

from iterft_lite.digests import Json
from iterft_lite.experiment.rows import SAMPLES, Message, Sample
from iterft_lite.experiment.steps import row_seed
from iterft_lite.files import RowLog
from iterft_lite.protocols import Completion, Progress, Prompt, Sampling
from iterft_lite.stages.work import Work


def run(work: Work) -> dict[str, Json]:
    """Complete what an earlier session has not.

    Files: rows.jsonl with a `Sample` a line. Results: rows, tokens, rows cut at `max_tokens` or at the context's end, tokens
    per second of this session.
    """
    wanted = wanted_samples(work)
    with RowLog(work.rows) as log:
        rows = [SAMPLES.read_one(row, f"`{log.path}`") for row in log.rows]
        missing = [prompt for key, prompt in wanted.items() if key not in {row.id for row in rows}]
        ids = {prompt.id: key for key, prompt in wanted.items()}
        if missing:
            work.load("model")
        started, before = time.monotonic(), sum(row.tokens for row in rows)

        def note(completion: Completion) -> None:
            prompt_id, sample = ids[completion.id]
            asked = work.params["prompts"][prompt_id]
            rows.append(Sample(prompt_id, sample, asked, completion.text, completion.tokens, completion.finish))
            log.append(SAMPLES.dump(rows[-1]))
            work.report(Progress(len(rows), len(wanted), "rows", tokens=sum(row.tokens for row in rows)))

        work.report(Progress(len(rows), len(wanted), "rows", tokens=before))
        if missing:
            work.backends.generator.complete(missing, Sampling(**work.params["sampling"]), note)
        seconds, tokens = time.monotonic() - started, sum(row.tokens for row in rows)
        return {
            "rows": len(rows),
            "tokens": tokens,
            "cut": sum(row.finish != "stop" for row in rows),
            "cut_by_context": sum(row.finish == "context" for row in rows),
            "tokens_per_second": round((tokens - before) / seconds, 1) if seconds > 0 else 0.0,
        }


def wanted_samples(work: Work) -> dict[tuple[str, int], Prompt]:
    """Every completion that the step asks for, by prompt and number."""
    chat, asked = work.params["rows"] == "chat", {}
    for prompt_id, text in work.params["prompts"].items():
        for sample in range(work.params["samples"]):
            name = f"{prompt_id}-s{sample}"
            messages = (*work.told, Message("user", text)) if chat else ()
            asked[prompt_id, sample] = Prompt(name, row_seed(work.step.key, name), messages, "" if chat else text)
    return asked
