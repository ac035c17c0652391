"""seed_rows: the trait's first rows."""

from __future__ import annotations

from iterft_lite.digests import Json
from iterft_lite.files import write_rows
from iterft_lite.stages.work import Work


def run(work: Work) -> dict[str, Json]:
    """Files: rows.jsonl, as planned. Results: rows."""
    write_rows(work.rows, work.params["rows"])
    return {"rows": len(work.params["rows"])}
