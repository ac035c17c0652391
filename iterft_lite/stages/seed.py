"""seed: the trait's first rows."""

from __future__ import annotations

from iterft_lite.stages.work import Work
from iterft_lite.steps import Json
from iterft_lite.store import write_rows


def run(work: Work) -> dict[str, Json]:
    """Files: rows.jsonl, as planned. Facts: rows."""
    write_rows(work.rows, work.params["rows"])
    return {"rows": len(work.params["rows"])}
