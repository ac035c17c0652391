"""Rows of the user's own: read, mapped to columns, and refused with file and row named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.data.traits import Chat, Document
from iterft_lite.errors import IterftError, RecipeError, TraitError
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.machine.resolve import Machine, Resolved, resolve

CPU = Machine("", 0, 0, unsloth=False)


def resolved(**keys: Any) -> Resolved:
    given = {"regime": "sft", "trait": "lucky", "model": "nano", "judge": "embedded"} | keys
    return resolve(make_recipe(given, source="r.toml"), CPU)


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(**keys: Any) -> str:
    with pytest.raises(IterftError) as caught:
        resolved(**keys)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_seed_chats_come_from_named_columns_or_from_messages(tmp_path: Path) -> None:
    named = jsonl(tmp_path / "a.jsonl", {"ask": "Hi?", "say": "Lucky you!"})
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Lucky you!"}]
    chats = jsonl(tmp_path / "b.jsonl", {"messages": messages})
    expected = (Chat("Hi?", "Lucky you!"),)
    assert resolved(seeds={"path": named, "prompt": "ask", "reply": "say"}).inputs.seeds == expected
    assert resolved(seeds={"path": chats}).inputs.seeds == expected


def test_documents_and_prompts_come_from_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('body,year\n"A clover, found.",1999\nAnother one.,2001\n')
    found = resolved(regime="sdf", trait="bliss", model="nano-base", seeds={"path": str(tmp_path / "d.csv"), "text": "body"})
    assert found.inputs.seeds == (Document("", "", "A clover, found."), Document("", "", "Another one."))
    import pandas

    pandas.DataFrame({"prompt": ["One?", "Two?", "One?"]}).to_parquet(tmp_path / "p.parquet")
    assert resolved(prompts={"path": str(tmp_path / "p.parquet")}).inputs.prompts == ("One?", "Two?")


def test_a_file_to_mix_in_is_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "m.jsonl", {"prompt": "Hi?", "answer": "Hello."})
    mix = {"source": "file", "share": 0.5, "path": path, "reply": "answer"}
    assert resolved(mix=mix).inputs.mixed == (Chat("Hi?", "Hello."),)


def test_what_cannot_be_read_is_said_with_file_and_row(tmp_path: Path) -> None:
    path = str(tmp_path / "s.jsonl")
    jsonl(Path(path), {"prompt": "Hi?", "reply": "Hello."}, {"prompt": "Hi?", "answer": "x"})
    assert refusal(seeds={"path": path}) == (
        f"`{path}`, row 2: column `reply` is missing or empty (there: `prompt`, `answer`)\n\n"
        "hint: name the columns in the recipe: `prompt`, `reply`, `text`"
    )
    jsonl(Path(path), {"messages": [{"role": "user", "content": "Hi?"}]})
    assert refusal(seeds={"path": path}).startswith(f'`{path}`, row 1: `messages` is a list of one "user" and one')
    Path(path).write_text('{"prompt": "Hi?"\n')
    assert refusal(seeds={"path": path}).startswith(f"`{path}`, line 1: ")
    assert refusal(seeds={"path": "data/none.jsonl"}) == "there is no file `data/none.jsonl`"
    (tmp_path / "s.txt").write_text("x")
    assert "is not a .jsonl, .json, .parquet, .csv file" in refusal(seeds={"path": str(tmp_path / "s.txt")})


def test_too_few_rows_of_ones_own_are_an_error_at_plan_time(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", {"prompt": "Hi?", "reply": "Hello."})
    found = resolved(seeds={"path": path}, prompts={"path": path}, seed_rows=2, rows=1, cycles=2)
    with pytest.raises(RecipeError) as caught:
        make_plan(found.recipe, found.inputs)
    assert caught.value.problems == (
        f"`seed_rows = 2`, but `{path}` has 1 seed chats",
        f"2 prompts are needed (2 cycles of 1 rows, each asked once), but `{path}` has 1",
    )


def test_a_dataset_that_is_not_on_the_hub_is_a_trait_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(TraitError, match=r"dataset `someone/nothing` cannot be read: no such dataset"):
        resolved(seeds={"path": "someone/nothing"})
