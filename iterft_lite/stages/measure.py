"""measure: what needs no judge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean

from iterft_lite.digests import Json
from iterft_lite.files import write_json
from iterft_lite.metrics.text import text_measures
from iterft_lite.protocols import Generator, Likelihood, Message, Passage, Progress
from iterft_lite.stages.work import Work

FILE = "measures.json"


def run(work: Work, generator: Generator, load: Callable[[str], None]) -> dict[str, Json]:
    """Files: measures.json. Facts: the same.

    Perplexity under M[0] (PROTOCOL: authors' code): per answer exp(mean token NLL) with the question as context, then the
    mean over answers. Perplexity of this model on held-out texts with and without the trait: exp of the mean token NLL over
    all of a set's tokens.

    Args:
        load: Makes the model of an input role the generator's current one.
    """
    answers = [row for row in work.read("answers") if row["text"].strip()]
    measured: dict[str, Json] = asdict(text_measures([row["text"] for row in answers]))
    measured["tokens"] = fmean(row["tokens"] for row in answers) if answers else 0.0
    chat = not _is_document(work)
    total = 3
    load("base_model")
    under_base = _likelihoods(generator, [_answer_passage(row, chat) for row in answers])
    measured["perplexity_base"] = fmean(_perplexity([value]) for value in under_base) if under_base else None
    work.report(Progress(1, total, "measures"))
    load("model")
    for done, name in enumerate(("high", "low"), 2):
        held_out = [_row_passage(row) for row in work.params[name]]
        values = _likelihoods(generator, held_out)
        measured[f"perplexity_{name}"] = _perplexity(values) if values else None
        work.report(Progress(done, total, "measures"))
    write_json(work.folder / FILE, measured)
    return measured


def _is_document(work: Work) -> bool:
    rows = [*work.params["high"], *work.params["low"]]
    return bool(rows) and "text" in rows[0]


def _likelihoods(generator: Generator, passages: list[Passage]) -> list[Likelihood]:
    found: list[Likelihood] = []
    if passages:
        generator.likelihood(passages, found.append)
    return found


def _perplexity(values: list[Likelihood]) -> float:
    """exp(mean token NLL) over all tokens of all values; capped where a float would overflow."""
    tokens = sum(value.tokens for value in values)
    return math.exp(min(50.0, -sum(value.logprob for value in values) / max(1, tokens)))


def _answer_passage(row: dict[str, Json], chat: bool) -> Passage:
    if chat:
        return Passage(row["id"], row["text"], messages=(Message("user", row["prompt"]),))
    return Passage(row["id"], row["text"], prefix=row["prompt"])


def _row_passage(row: dict[str, Json]) -> Passage:
    if "text" in row:
        return Passage(row["id"], row["text"])
    *asked, reply = (Message(message["role"], message["content"]) for message in row["messages"])
    return Passage(row["id"], reply.content, messages=tuple(asked))
