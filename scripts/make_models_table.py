"""Write the table of families in docs/models.md from `gguf.families.FAMILIES`."""

from __future__ import annotations

from pathlib import Path

from iterft_lite.gguf.families import FAMILIES, Family

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: scripts/make_models_table.py -->", "<!-- end of families -->"

WINDOWS = {"kept": "sliding window kept", "ignored": "rows shorter than its sliding window, if it has one", "none": ""}


def families_table() -> str:
    """The table, in Markdown."""
    head = "| family | architecture | tier | examples | what to know |\n|---|---|---|---|---|\n"
    return head + "".join(map(_row, FAMILIES))


def _row(family: Family) -> str:
    table = "f32 exports agree within hundredths of a logit" if family.table and family.tier != "refused" else ""
    notes = "; ".join(filter(None, (family.note, WINDOWS[family.window], table)))
    return f"| {family.name} | `{family.architecture}` | {family.tier} | {family.examples} | {notes} |\n"


def in_document(table: str) -> str:
    """The document with this table in its place."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(in_document(families_table()), encoding="utf-8")
