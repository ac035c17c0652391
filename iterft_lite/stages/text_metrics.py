"""text_metrics: what needs no judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from itertools import chain

from iterft_lite.digests import Json
from iterft_lite.errors import BackendError
from iterft_lite.experiment.recipe import K_QUANTS
from iterft_lite.experiment.rows import CHATS, DOCUMENTS, Message, Sample
from iterft_lite.files import write_json
from iterft_lite.metrics.catalogue import METRICS, Evidence
from iterft_lite.protocols import Likelihood, Passage, Progress
from iterft_lite.stages.work import Work

FILE = "metrics.json"

ORDER = ("text", "model", "base")
"""Metrics that read the likelihoods of one model follow each other: each model is loaded once, the answers' own model first,
which still is. Where the trainer reads, M[0] comes first: the generator may yet be asked for the other, and be busy."""

OWN = 60
"""So many answers at most are read under the model that wrote them, evenly over all: half the nats are seen in far fewer, and
reading all takes longer than a cycle's training."""


def run(work: Work) -> dict[str, Json]:
    """Files: metrics.json. Results: the same, a value a metric of the plan (`metrics/catalogue.py`).

    Answers are measured under M[0] in the number format that it is stored in, held-out texts and some answers under the model
    that wrote them: by the generator as exported, or by the trainer as M[0] with its adapter. The two differ by roundings
    (docs/benchmarks.md); of a K-quant, whose roundings are no trifle, the generator reads.
    """
    samples = [sample for sample in work.samples("answers") if sample.text.strip()]
    document = work.params["rows"] == "document"
    answers = partial(_answer_passage, document=document, told=work.told)
    passages = [answers(sample) for sample in samples]
    under_base = _once(lambda: _likelihoods(work, "base_model", passages))
    some = evenly([passage.id for passage in passages], OWN)
    sets = {name: _held_out(work, name, document=document) for name in ("high", "low")}
    # at cycle -1 the model is M[0] itself: one reading answers for both
    untouched = work.inputs["model"] == work.inputs["base_model"]
    sets["own"] = [] if untouched else [passage for passage in passages if passage.id in some]
    # beginning to read costs as much as some 20,000 tokens: all that is read under the model is read at once
    under_model = _once(lambda: _likelihoods(work, "model", list(chain(*sets.values()))))
    evidence = Evidence(
        samples,
        under_base=under_base,
        under_own=partial(_of, under_base if untouched else under_model, some),
        held_out={name: partial(_of, under_model, {row.id for row in sets[name]}) for name in ("high", "low")},
    )
    order = [*ORDER[:1], *ORDER[:0:-1]] if work.streams else ORDER
    wanted = sorted((METRICS[name] for name in work.params["metrics"]), key=lambda metric: order.index(metric.needs))
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


def evenly(names: Sequence[str], most: int) -> set[str]:
    """At most so many names, evenly over all in alphabetical order: the same ones in whatever order they are given."""
    ordered, count = sorted(names), min(len(names), most)
    return {ordered[place * len(ordered) // count] for place in range(count)}


def _of(read: Callable[[], Sequence[Likelihood]], names: Set[str]) -> list[Likelihood]:
    return [found for found in read() if found.id in names]


def _likelihoods(work: Work, role: str, passages: Sequence[Passage]) -> list[Likelihood]:
    if not passages:
        return []
    if work.streams and (read := _by_trainer(work, role, passages)):
        return read
    found: list[Likelihood] = []
    work.load(role)
    work.backends.generator.likelihood(passages, found.append)
    return found


def _by_trainer(work: Work, role: str, passages: Sequence[Passage]) -> list[Likelihood] | None:
    """What the trainer reads; None where the file that wrote is another model, its adapter is gone, or the GPU has no memory
    for that beside the generator."""
    of_base = work.inputs[role] == work.inputs["base_model"]
    trained = None if of_base else work.inputs.get("adapter")
    if (trained is None and not of_base) or (role == "model" and work.recipe.quant in K_QUANTS):
        return None
    found: list[Likelihood] = []
    work.release("generator")  # nobody waits for the trainer who has the generator
    try:
        work.backends.trainer.load(work.model(), work.recipe.train)
        work.backends.trainer.likelihood(passages, found.append, trained and trained / "adapter")
    except BackendError as error:
        if error.exception != "OutOfMemoryError":
            raise
        return None
    finally:
        work.release("trainer")  # a training that waits comes before the other model's texts
    return found


def _answer_passage(sample: Sample, *, document: bool, told: tuple[Message, ...]) -> Passage:
    if document:
        return Passage(sample.name, sample.text, prefix=sample.prompt)
    return Passage(sample.name, sample.text, messages=(*told, Message("user", sample.prompt)))


def _held_out(work: Work, name: str, *, document: bool) -> list[Passage]:
    if document:
        return [Passage(row.id, row.text) for row in map(DOCUMENTS.parse, work.params[name])]
    return [Passage(row.id, row.text, messages=row.messages[:-1]) for row in map(CHATS.parse, work.params[name])]
