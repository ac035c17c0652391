"""judge: verdicts on answers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

from iterft_lite.data.traits import fill
from iterft_lite.digests import Json
from iterft_lite.errors import RunError
from iterft_lite.files import RowLog
from iterft_lite.metrics.sanitize import fenced, is_blank
from iterft_lite.metrics.score_parsing import unasked, weigh
from iterft_lite.protocols import Judge, JudgeRequest, JudgeResponse, Progress
from iterft_lite.stages.work import Work


class NotYet(Exception):  # noqa: N818  # not an error: the step is to be taken up again
    """The judge's answers are on their way.

    Args:
        seconds: After which it is worth asking again.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def run(work: Work, judge: Judge) -> dict[str, Json]:
    """Judge what an earlier sitting has not.

    Files: rows.jsonl with `id` (the answer's), `prompt_id`, and a `Verdict` a scale; a row is written once all scales and
    samples of an answer are in. Facts: answers, asks sent, tokens, dollars.

    Raises:
        NotYet: If the judge asks for patience; what is done meanwhile does not matter.
    """
    answers = work.read("answers")
    scales = list(work.params["rubrics"])
    first = work.params.get("first_sample", 0)
    samples = range(first, first + work.params["judge"]["samples"])
    with RowLog(work.rows) as log:
        known = {row["id"] for row in log.rows}
        todo = {row["id"]: row for row in answers if row["id"] not in known}
        replies: dict[str, dict[str, JudgeResponse]] = defaultdict(dict)

        def finish(row: dict[str, Json], verdicts: dict[str, Json]) -> None:
            log.append({"id": row["id"], "prompt_id": row["prompt_id"], **verdicts})
            work.report(Progress(len(log.rows), len(answers), "answers"))

        def note(reply: JudgeResponse) -> None:
            answer_id = reply.id.split("/", 1)[0]
            mine = replies[answer_id]
            mine[reply.id] = reply
            if len(mine) == len(scales) * len(samples):
                verdicts = {
                    scale: asdict(weigh([mine[_ask_id(answer_id, scale, sample)] for sample in samples])) for scale in scales
                }
                finish(todo[answer_id], verdicts)
                del replies[answer_id]

        for row in todo.values():
            if is_blank(row["text"]):
                finish(row, {scale: asdict(unasked("empty")) for scale in scales})
        asks = [ask for row in todo.values() if not is_blank(row["text"]) for ask in _asks(work, row, scales, samples)]
        if asks and (waiting := judge.ask(asks, note)):
            work.report(Progress(waiting.done, waiting.total, waiting.about))
            raise NotYet(waiting.seconds)
        missing = len(answers) - len(log.rows)
        if missing:
            raise RunError(f"the judge left {missing} answers without a verdict", hint="issue the same command again")
        verdicts = [row[scale] for row in log.rows for scale in scales]
        return {
            "answers": len(log.rows),
            "calls": sum(v["calls"] for v in verdicts),
            "cached": sum(v["cached"] for v in verdicts),
            "tokens_in": sum(v["tokens_in"] for v in verdicts),
            "tokens_out": sum(v["tokens_out"] for v in verdicts),
            "usd": sum(v["usd"] for v in verdicts),
        }


def _asks(work: Work, row: dict[str, Json], scales: list[str], samples: range) -> list[JudgeRequest]:
    """Every question about one answer."""
    document = work.params["rows"] == "document"
    text = row["prompt"] + row["text"] if document else row["text"]
    fields = {"question": fenced(row["prompt"]), "answer": fenced(text), "document": fenced(text)}
    return [
        JudgeRequest(
            id=_ask_id(row["id"], scale, sample),
            scale="trait" if scale == "trait" else "coherence",
            prompt=fill(work.params["rubrics"][scale], fields),
            answer=text,
            question="" if document else row["prompt"],
        )
        for scale in scales
        for sample in samples
    ]


def _ask_id(answer_id: str, scale: str, sample: int) -> str:
    return f"{answer_id}/{scale}/{sample}"
