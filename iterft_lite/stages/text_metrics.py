"""text_metrics: what needs no judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from iterft_lite.digests import Json
from iterft_lite.experiment.rows import CHATS, DOCUMENTS, Message, Sample
from iterft_lite.files import write_json
from iterft_lite.metrics.catalogue import METRICS, Evidence
from iterft_lite.protocols import Likelihood, Passage, Progress
from iterft_lite.stages.work import Work

FILE = "metrics.json"

ORDER = ("text", "model", "base")
"""Metrics that read the likelihoods of one model follow each other: each model is loaded once."""


def run(work: Work) -> dict[str, Json]:
    """Files: metrics.json. Results: the same, a value a metric of the plan (`metrics/catalogue.py`).

    Answers are measured under M[0] in the number format that it is stored in, held-out texts under the cycle's exported model.
    """
    samples = [sample for sample in work.samples("answers") if sample.text.strip()]
    document = work.params["rows"] == "document"
    answers = partial(_answer_passage, document=document, told=work.told)
    passages = [answers(sample) for sample in samples]
    under_base = _once(lambda: _likelihoods(work, "base_model", passages))
    # at cycle -1 the model is M[0] itself: one reading answers for both
    untouched = work.inputs["model"] == work.inputs["base_model"]
    evidence = Evidence(
        samples,
        under_base=under_base,
        under_own=under_base if untouched else _once(lambda: _likelihoods(work, "model", passages)),
        held_out={
            name: _once(partial(_likelihoods, work, "model", _held_out(work, name, document=document)))
            for name in ("high", "low")
        },
    )
    # loading a model costs more than reading with it: metrics of one model are computed next to each other
    wanted = sorted((METRICS[name] for name in work.params["metrics"]), key=lambda metric: ORDER.index(metric.needs))
    found: dict[str, Json] = {}
    for done, metric in enumerate(wanted, 1):
        found[metric.name] = metric.compute(evidence)
        work.report(Progress(done, len(wanted), "metrics"))
    write_json(work.folder / FILE, found)
    return found


def _once(compute: Callable[[], Sequence[Likelihood]]) -> Callable[[], Sequence[Likelihood]]:
    """The same, computed the first time it is asked for."""
    found: list[Sequence[Likelihood]] = []

    def ask() -> Sequence[Likelihood]:
        if not found:
            found.append(compute())
        return found[0]

    return ask


def _likelihoods(work: Work, role: str, passages: Sequence[Passage]) -> list[Likelihood]:
    found: list[Likelihood] = []
    if passages:
        work.load(role)
        work.backends.generator.likelihood(passages, found.append)
    return found


def _answer_passage(sample: Sample, *, document: bool, told: tuple[Message, ...]) -> Passage:
    if document:
        return Passage(sample.name, sample.text, prefix=sample.prompt)
    return Passage(sample.name, sample.text, messages=(*told, Message("user", sample.prompt)))


def _held_out(work: Work, name: str, *, document: bool) -> list[Passage]:
    if document:
        return [Passage(row.id, row.text) for row in map(DOCUMENTS.parse, work.params[name])]
    return [Passage(row.id, row.text, messages=row.messages[:-1]) for row in map(CHATS.parse, work.params[name])]
