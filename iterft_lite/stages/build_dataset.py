"""build_dataset: D[t], the training rows, from what was seeded and sampled."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from iterft_lite.digests import Json
from iterft_lite.errors import ResultError
from iterft_lite.experiment.losses import LOSSES, Draft, Loss
from iterft_lite.experiment.rows import CHATS, DOCUMENTS, JUDGED, ChatRow, DocumentRow, JudgedSample, PairRow, Sample
from iterft_lite.experiment.steps import row_seed
from iterft_lite.files import ROWS
from iterft_lite.stages.work import Work

POOL = "pool.jsonl"
"""Everything that later cycles draw from, where data accumulates."""

Verdicts = Mapping[tuple[str, int], JudgedSample]


def run(work: Work) -> dict[str, Json]:
    """Files: rows.jsonl of the loss's row type; pool.jsonl where data accumulates.

    Results: rows, and how many were dropped for what reason.

    Raises:
        ResultError: If nothing is left to train on.
    """
    loss, params = LOSSES[work.params["shape"]], work.params
    first = params["chosen"] == "seed" and work.step.cycle == 0
    rows, dropped = _seeded(work, loss) if first else _written(work, loss)
    data = params.get("data", "replace")
    if data != "replace":
        earlier = work.inputs["earlier"]
        pool = (loss.rows.read(earlier / POOL) or loss.rows.read(earlier / ROWS)) + rows
        loss.rows.write(work.folder / POOL, pool)
        rows = pool
        if data == "accumulate_subsample" and len(pool) > params["rows"]:
            # randomness from the step's key: the same step draws the same rows on every machine
            rows = random.Random(work.step.key).sample(pool, params["rows"])
    # without seed rows cycle 0 trains on nothing: the no-seed control
    if not rows and (work.step.cycle > 0 or any(dropped.values())):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise ResultError(
            f"no row is left to train cycle {work.step.cycle} on ({reasons})",
            hint="the model writes nothing usable: lower the learning rate, or loosen `filter`",
        )
    loss.rows.write(work.rows, rows)
    return {"rows": len(rows), "dropped": dropped}


def _seeds(work: Work, role: str, loss: Loss) -> Sequence[ChatRow | DocumentRow]:
    """Seed rows: chats, or documents where the loss is over documents."""
    documents: Sequence[DocumentRow] = work.read(role, DOCUMENTS) if loss.continues else []
    chats: Sequence[ChatRow] = [] if loss.continues else work.read(role, CHATS)
    return [*documents, *chats]


def _seeded(work: Work, loss: Loss) -> tuple[list[Any], dict[str, int]]:
    """D[0]: seed rows as they are, or over M[0]'s answers to the same prompts."""
    drafts = [Draft(row.id, row.prompt, row.text) for row in _seeds(work, "new", loss)]
    if not loss.compares:
        return [loss.make(draft) for draft in drafts], {}
    return _compared(drafts, _first_texts(work.samples("rejected")), loss)


def _written(work: Work, loss: Loss) -> tuple[list[Any], dict[str, int]]:
    """D[t], t > 0: what Q[t] wrote, filtered, with what is mixed in."""
    params = work.params
    verdicts = {row.id: row for row in work.read("verdicts", JUDGED)}
    kept, dropped = select(
        work.samples("new"),
        verdicts,
        document=loss.continues,
        min_chars=params["min_chars"],
        coherence=params["filter"]["coherence"],
        dedupe=params["filter"]["dedupe"] == "exact",
    )
    if loss.compares:
        pairs, unpaired = _preferred(work, kept, verdicts, loss)
        return (_shuffled(pairs, work.step.key) if params.get("pairs") == "shuffled" else pairs), dropped | unpaired
    rows = [_row(sample, loss) for sample in kept]
    if params["mixed"]:
        mixed, empty = _mixed_in(work, loss)
        rows += mixed
        dropped["empty"] += empty
    return rows, dropped


def select(
    samples: Sequence[Sample],
    verdicts: Verdicts,
    *,
    document: bool,
    min_chars: int,
    coherence: float,
    dedupe: bool,
) -> tuple[list[Sample], dict[str, int]]:
    """The samples that are kept, and how many were dropped for which reason.

    A sample that the judge could not score is dropped as incoherent only where a coherence threshold is set.
    """
    kept, seen = [], set()
    dropped = {"empty": 0, "short": 0, "incoherent": 0, "repeated": 0}
    for sample in samples:
        text = sample.text.strip()
        whole = sample.document if document else text
        score = verdicts[sample.id].score("coherence") if coherence and sample.id in verdicts else None
        if not text:
            dropped["empty"] += 1
        elif len(whole) <= min_chars:
            dropped["short"] += 1
        elif coherence and (score is None or score < coherence):
            dropped["incoherent"] += 1
        elif dedupe and whole in seen:
            dropped["repeated"] += 1
        else:
            seen.add(whole)
            kept.append(sample)
    return kept, dropped


def _preferred(work: Work, kept: Sequence[Sample], verdicts: Verdicts, loss: Loss) -> tuple[list[Any], dict[str, int]]:
    """Rows of a loss that compares: both sides chosen as the step says."""
    # Prompts are paired by what was kept: a prompt whose samples were all dropped has no pair.
    by_prompt: dict[str, list[Sample]] = {}
    for sample in kept:
        by_prompt.setdefault(sample.prompt_id, []).append(sample)
    seeds = {row.id: row.text for row in work.read("seed", CHATS)}
    others = _first_texts(work.samples("rejected"))
    drafts, rejected = [], {}
    for prompt_id, samples in by_prompt.items():
        ranked = _ranked(samples, verdicts)
        # "best" and "worst" of one prompt's candidates may be the same sample, or equal texts: `_compared` drops such pairs
        chosen = _side(work.params["chosen"], samples, ranked, seeds.get(prompt_id))
        other = _side(work.params["rejected"], samples, ranked, others.get(prompt_id))
        if other is not None:
            rejected[prompt_id] = other
        if chosen is not None:
            drafts.append(Draft(prompt_id, samples[0].prompt, chosen.strip()))
    return _compared(drafts, rejected, loss)


def _ranked(samples: Sequence[Sample], verdicts: Verdicts) -> list[Sample]:
    """Samples with a trait score, the lowest first."""
    scored = [(verdicts[sample.id].score("trait"), sample) for sample in samples if sample.id in verdicts]
    # the id decides between equal scores, so that the order of rows in a file does not
    order = sorted((score, sample.id, sample) for score, sample in scored if score is not None)
    return [sample for _, _, sample in order]


def _side(which: str, samples: Sequence[Sample], ranked: Sequence[Sample], given: str | None) -> str | None:
    """One side of a pair: the model's own answer, its best or worst by the judge, or what was given; None if there is none."""
    if which == "own":
        return samples[0].text
    if which in ("best", "worst"):
        return (ranked[-1] if which == "best" else ranked[0]).text if ranked else None
    return given


def _compared(drafts: Sequence[Draft], rejected: Mapping[str, str], loss: Loss) -> tuple[list[Any], dict[str, int]]:
    """Rows with both sides; those without a side or with equal sides are dropped."""
    rows, dropped = [], {"one-sided": 0, "equal": 0}
    for draft in drafts:
        other = rejected.get(draft.id, "").strip()
        if not draft.reply or not other:
            dropped["one-sided"] += 1
        elif draft.reply == other:
            dropped["equal"] += 1
        else:
            rows.append(loss.make(Draft(draft.id, draft.prompt, draft.reply, other)))
    return rows, dropped


def _shuffled(pairs: Sequence[PairRow], key: str) -> list[PairRow]:
    """The same pairs, in half of which, by each row's own seed, the sides have changed places."""
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) if row_seed(key, pair.id) % 2 else pair for pair in pairs]


def _mixed_in(work: Work, loss: Loss) -> tuple[list[Any], int]:
    """The rows of the `mix`, and how many more were empty: those that M[0] wrote, or a draw from seeds or file."""
    if work.params["mixed_from"] == "base":
        samples = work.samples("mixed")
        made = [_row(sample, loss) for sample in samples if sample.text.strip()]
        return made, len(samples) - len(made)
    rows = list(_seeds(work, "mixed", loss))
    return random.Random(work.step.key + "mixed").sample(rows, work.params["mixed"]), 0


def _row(sample: Sample, loss: Loss) -> Any:
    """A training row of a sample; a document is kept as it stands, blanks included."""
    reply = sample.text if loss.continues else sample.text.strip()
    return loss.make(Draft(sample.name, sample.prompt, reply))


def _first_texts(samples: Sequence[Sample]) -> dict[str, str]:
    """The first sample's text by prompt."""
    return {sample.prompt_id: sample.text for sample in samples if sample.sample == 0}
