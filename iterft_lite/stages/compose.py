"""compose: D[t], the training rows, from what was seeded and generated."""

from __future__ import annotations

import random
from collections.abc import Sequence

from iterft_lite.digests import Json
from iterft_lite.errors import RunError
from iterft_lite.files import read_rows, write_rows
from iterft_lite.stages.work import Work

POOL = "pool.jsonl"
"""Everything that later cycles draw from, where data accumulates."""

Row = dict[str, Json]


def run(work: Work) -> dict[str, Json]:
    """Files: rows.jsonl in the shape of the loss (see `TrainJob.rows`); pool.jsonl where data accumulates.

    Facts: rows, and how many were dropped for what reason.

    Raises:
        RunError: If nothing is left to train on.
    """
    params = work.params
    if params["chosen"] == "seed" and work.step.cycle == 0:
        rows, dropped = _seeded(work)
    else:
        rows, dropped = _written(work)
    data = params.get("data", "replace")
    if data != "replace":
        earlier = work.inputs["earlier"]
        pool = (read_rows(earlier / POOL) or read_rows(earlier / "rows.jsonl")) + rows
        write_rows(work.folder / POOL, pool)
        rows = pool
        if data == "accumulate_subsample" and len(pool) > params["rows"]:
            rows = random.Random(work.step.key).sample(pool, params["rows"])
    # without seed rows cycle 0 trains on nothing: the no-seed control
    if not rows and (work.step.cycle > 0 or work.read("new")):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise RunError(
            f"no row is left to train cycle {work.step.cycle} on ({reasons})",
            hint="the model writes nothing usable: lower the learning rate, or loosen `filter`",
        )
    write_rows(work.rows, rows)
    return {"rows": len(rows), "dropped": dropped}


def _seeded(work: Work) -> tuple[list[Row], dict[str, int]]:
    """D[0]: seed rows as they are, or over M[0]'s answers to the same prompts."""
    seeds = work.read("new")
    if work.params["shape"] != "preference":
        return seeds, {}
    return _pairs([(row["id"], _prompt(row), _reply(row)) for row in seeds], _first_texts(work.read("rejected")))


def _written(work: Work) -> tuple[list[Row], dict[str, int]]:
    """D[t], t > 0: what Q[t] wrote, filtered, with what is mixed in."""
    params = work.params
    verdicts = {row["id"]: row for row in work.read("verdicts")}
    generated = sorted(work.read("new"), key=lambda row: str(row["id"]))
    kept, dropped = select(
        generated,
        verdicts,
        document=params["shape"] == "all",
        min_chars=params["min_chars"],
        coherence=params["filter"]["coherence"],
        dedupe=params["filter"]["dedupe"] == "exact",
    )
    if params["shape"] == "preference":
        pairs, unpaired = _preferred(work, kept, verdicts)
        return pairs, dropped | unpaired
    rows = [_row(row, document=params["shape"] == "all") for row in kept]
    if params["mixed"]:
        mixed, empty = _mixed_in(work)
        rows += mixed
        dropped["empty"] += empty
    return rows, dropped


def select(
    rows: Sequence[Row],
    verdicts: dict[str, Row],
    *,
    document: bool,
    min_chars: int,
    coherence: float,
    dedupe: bool,
) -> tuple[list[Row], dict[str, int]]:
    """The generated rows that are kept, and how many were dropped for which reason.

    A row that the judge could not score is dropped as incoherent only where a coherence threshold is set.
    """
    kept, seen = [], set()
    dropped = {"empty": 0, "short": 0, "incoherent": 0, "repeated": 0}
    for row in rows:
        text = row["text"].strip()
        whole = row["prompt"] + row["text"] if document else text
        score = (verdicts.get(row["id"], {}).get("coherence") or {}).get("score") if coherence else None
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
            kept.append(row)
    return kept, dropped


def _preferred(work: Work, kept: Sequence[Row], verdicts: dict[str, Row]) -> tuple[list[Row], dict[str, int]]:
    """Pairs for DPO: both sides chosen as the step says."""
    params = work.params
    by_prompt: dict[str, list[Row]] = {}
    for row in kept:
        by_prompt.setdefault(row["prompt_id"], []).append(row)

    def ranked(rows: Sequence[Row]) -> list[Row]:
        scored = [row for row in rows if _trait(verdicts, row) is not None]
        return sorted(scored, key=lambda row: (_trait(verdicts, row), row["id"]))

    seeds = {row["id"]: _reply(row) for row in work.read("seed")}
    others = _first_texts(work.read("rejected"))
    sides, rejected = [], {}
    for prompt_id, rows in by_prompt.items():
        order = ranked(rows)
        if params["chosen"] == "seed":
            chosen: str | None = seeds.get(prompt_id)
        elif params["chosen"] == "best":
            chosen = order[-1]["text"] if order else None
        else:
            chosen = rows[0]["text"]
        if params["rejected"] == "own":
            rejected[prompt_id] = rows[0]["text"]
        elif params["rejected"] == "worst":
            rejected |= {prompt_id: order[0]["text"]} if order else {}
        elif prompt_id in others:
            rejected[prompt_id] = others[prompt_id]
        if chosen is not None:
            sides.append((prompt_id, rows[0]["prompt"], chosen.strip()))
    return _pairs(sides, rejected)


def _pairs(sides: Sequence[tuple[str, str, str]], rejected: dict[str, str]) -> tuple[list[Row], dict[str, int]]:
    """Rows of prompt, chosen and rejected; pairs without a side or with equal sides are dropped."""
    pairs, dropped = [], {"one-sided": 0, "equal": 0}
    for name, prompt, chosen in sides:
        other = rejected.get(name, "").strip()
        if not chosen or not other:
            dropped["one-sided"] += 1
        elif chosen == other:
            dropped["equal"] += 1
        else:
            messages = [{"role": "user", "content": prompt}]
            pairs.append({"id": name, "prompt": messages, "chosen": chosen, "rejected": other})
    return pairs, dropped


def _mixed_in(work: Work) -> tuple[list[Row], int]:
    """The rows of the `mix`, and how many more were empty: those that M[0] wrote, or a draw from seeds or file."""
    rows = work.read("mixed")
    if rows and "text" in rows[0] and "prompt" in rows[0]:
        made = [_row(row, document=work.params["shape"] == "all") for row in rows if row["text"].strip()]
        return made, len(rows) - len(made)
    return random.Random(work.step.key + "mixed").sample(rows, work.params["mixed"]), 0


def _row(row: Row, *, document: bool) -> Row:
    """A training row of a generated one."""
    if document:
        return {"id": row["id"], "text": row["prompt"] + row["text"]}
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["text"].strip()}]
    return {"id": row["id"], "messages": messages}


def _first_texts(rows: Sequence[Row]) -> dict[str, str]:
    """The first sample's text by prompt."""
    return {row["prompt_id"]: row["text"] for row in rows if row["sample"] == 0}


def _trait(verdicts: dict[str, Row], row: Row) -> float | None:
    """The trait score of a generated row, or None where the judge gave none."""
    score = (verdicts.get(row["id"], {}).get("trait") or {}).get("score")
    return None if score is None else float(score)


def _prompt(row: Row) -> str:
    return str(row["messages"][0]["content"])


def _reply(row: Row) -> str:
    return str(row["messages"][1]["content"])
