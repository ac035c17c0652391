"""judge: verdicts on samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from iterft_lite.data.traits import fill
from iterft_lite.digests import Json
from iterft_lite.errors import RunError
from iterft_lite.experiment.plan import EVERYDAY
from iterft_lite.experiment.rows import JUDGED, JudgedSample, Sample, Scale, Verdict
from iterft_lite.files import ROWS, RowLog
from iterft_lite.metrics.sanitize import fenced, is_blank
from iterft_lite.metrics.score_parsing import unasked, weigh
from iterft_lite.protocols import JudgeRequest, JudgeResponse, Progress
from iterft_lite.stages.work import Work


class NotYet(Exception):  # noqa: N818  # not an error: the step is to be taken up again
    """The judge's answers are on their way.

    Args:
        seconds: After which it is worth asking again.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass
class _Asked:
    """A sample, the requests about it, and what has come back.

    Attributes:
        requests: By scale, a request a judge's sample.
        responses: By request id.
    """

    sample: Sample
    requests: dict[str, list[JudgeRequest]]
    responses: dict[str, JudgeResponse] = field(default_factory=dict)

    def judged(self) -> JudgedSample | None:
        """The verdicts, once everything is back."""
        if len(self.responses) < sum(map(len, self.requests.values())):
            return None
        verdicts = {
            scale: weigh([self.responses[request.id] for request in requests]) for scale, requests in self.requests.items()
        }
        return JudgedSample(self.sample.prompt_id, self.sample.sample, verdicts)


def run(work: Work) -> dict[str, Json]:
    """Judge what an earlier session has not.

    Files: rows.jsonl with a `JudgedSample` a line, written once all scales and samples of an answer are in. Results: answers,
    calls, tokens, dollars.

    Raises:
        NotYet: If the judge has not answered yet; what is done meanwhile does not matter.
        RunError: If the judge ends without a verdict on each answer.
    """
    samples = work.samples("answers")
    with RowLog(work.rows) as log:
        done = [JUDGED.read_one(row, f"`{log.path}`") for row in log.rows]
        known = {row.id for row in done}

        def finish(row: JudgedSample) -> None:
            done.append(row)
            log.append(JUDGED.dump(row))
            work.report(Progress(len(done), len(samples), "answers"))

        todo = [sample for sample in samples if sample.id not in known]
        for sample in todo:
            if is_blank(sample.text):
                empty = {scale: unasked("empty") for scale in work.params["rubrics"]}
                finish(JudgedSample(sample.prompt_id, sample.sample, empty))
        asked = {sample.id: _Asked(sample, _requests(work, sample)) for sample in todo if not is_blank(sample.text)}
        owner = {request.id: each for each in asked.values() for requests in each.requests.values() for request in requests}

        def note(response: JudgeResponse) -> None:
            each = owner[response.id]
            each.responses[response.id] = response
            if row := each.judged():
                finish(row)

        if owner:
            everything = [request for each in asked.values() for request in _in_order(each)]
            if waiting := work.backends.judge.ask(everything, note):
                work.report(Progress(waiting.done, waiting.total, waiting.about))
                raise NotYet(waiting.seconds)
        if missing := len(samples) - len(done):
            raise RunError(f"the judge left {missing} answers without a verdict", hint="issue the same command again")
        return _spent([verdict for row in done for verdict in row.verdicts.values()], len(done))


def _in_order(asked: _Asked) -> Iterator[JudgeRequest]:
    for requests in asked.requests.values():
        yield from requests


def _spent(verdicts: list[Verdict], answers: int) -> dict[str, Json]:
    """What judging took."""
    sums: dict[str, float] = defaultdict(float)
    for verdict in verdicts:
        for name in ("calls", "cached", "tokens_in", "tokens_out", "usd"):
            sums[name] += getattr(verdict, name)
    counted = {name: int(sums[name]) for name in ("calls", "cached", "tokens_in", "tokens_out")}
    return {"answers": answers, **counted, "usd": sums["usd"]}


def _requests(work: Work, sample: Sample) -> dict[str, list[JudgeRequest]]:
    """Every question about one sample, by scale."""
    document = work.params["rows"] == "document"
    text = sample.document if document else sample.text
    fields = {"question": fenced(sample.prompt), "answer": fenced(text), "document": fenced(text)}
    first, count = work.params.get("first_sample", 0), work.params["judge"]["samples"]
    own = str((work.inputs[EVERYDAY] / ROWS).absolute()) if EVERYDAY in work.inputs else ""
    return {
        scale: [
            JudgeRequest(
                id=f"{sample.name}/{scale}/{number}",
                sample=number,
                scale=cast(Scale, scale),
                prompt=fill(rubric, fields),
                answer=text,
                question="" if document else sample.prompt,
                own=own,
            )
            for number in range(first, first + count)
        ]
        for scale, rubric in work.params["rubrics"].items()
    }
