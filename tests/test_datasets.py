"""Rows of the user's own: read, mapped to columns, and refused with file and row named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.data.traits import Chat, Document, read_trait
from iterft_lite.errors import IterftError, RecipeError, TraitError
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.machine.resolve import Machine, Resolved, resolve

CPU = Machine("", 0, 0, unsloth=False)


def resolved(**keys: Any) -> Resolved:
    given = {"regime": "sft", "trait": "lucky", "model": "nano", "judge": "fake"} | keys
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


def test_unreadable_rows_are_reported_with_file_and_row(tmp_path: Path) -> None:
    path = str(tmp_path / "s.jsonl")
    jsonl(Path(path), {"prompt": "Hi?", "reply": "Hello."}, {"prompt": "Hi?", "answer": "x"})
    assert refusal(seeds={"path": path}) == (
        f"`{path}`, row 2: column `reply` is missing or empty (there: `prompt`, `answer`)\n\n"
        'hint: name the columns in the recipe\'s table: `prompt`, `reply`, `text`, such as `reply = "answer"`'
    )
    jsonl(Path(path), *({"prompt": f"{number}?", "answer": "x"} for number in range(3)))
    assert "all 3 rows: column `reply` is missing or empty (there:" in refusal(seeds={"path": path})
    jsonl(Path(path), {"messages": [{"role": "user", "content": "Hi?"}]})
    assert refusal(seeds={"path": path}).startswith(f'`{path}`, row 1: `messages` is a list of one "user" and one')
    Path(path).write_text('{"prompt": "Hi?"\n')
    assert refusal(seeds={"path": path}) == f"`{path}`, line 1: it is not JSON: Expecting ',' delimiter: column 17"
    assert refusal(seeds={"path": "data/none.jsonl"}) == (
        f"there is no file `data/none.jsonl`\n\nhint: it was looked for in `{Path.cwd()}`, where the command runs"
    )
    (tmp_path / "s.txt").write_text("x")
    assert "is not a .jsonl, .json, .parquet, .csv, .tsv file" in refusal(seeds={"path": str(tmp_path / "s.txt")})


def chats_of(path: Path, data: bytes | str, **columns: str) -> tuple[Chat, ...]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    found = resolved(seeds={"path": str(path), **columns}).inputs.seeds
    assert all(isinstance(chat, Chat) for chat in found)
    return found  # type: ignore[return-value]


CAFE = [Chat("Café?", "Naïve – „ja“.")]

CAFE_ROW = '{"prompt": "Café?", "reply": "Naïve – „ja“."}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_rows_are_read_in_all_common_encodings(tmp_path: Path, encoding: str) -> None:
    assert chats_of(tmp_path / "s.jsonl", CAFE_ROW.encode(encoding)) == tuple(CAFE)


def test_a_guessed_encoding_is_reported(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(CAFE_ROW.encode("cp1252"))
    path = str(tmp_path / "s.jsonl")
    assert f"note: `{path}` is not UTF-8 and is read as Windows-1252 (Latin-1)" in resolved(seeds={"path": path}).choices


def test_every_csv_value_stays_text(tmp_path: Path) -> None:
    words = ["None", "NA", "42", "True", "1984-01-02", "nan", "null", "07", "=1+1", "-5", "'+x"]
    csv = "prompt,reply\n" + "".join(f"{word},{word}\n" for word in words)
    assert chats_of(tmp_path / "s.csv", csv) == tuple(Chat(word, word) for word in words)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_detected(tmp_path: Path, separator: str) -> None:
    csv = f'prompt{separator}reply\r\n"a{separator} b"{separator}"c\n""d"""\r\n'
    assert chats_of(tmp_path / "s.csv", csv) == (Chat(f"a{separator} b", 'c\n"d"'),)


def test_a_changed_file_is_read_again_and_its_name_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "seeds[1].csv"
    (tmp_path / "seeds1.csv").write_text("prompt,reply\nother,other\n")
    assert chats_of(path, "prompt,reply\nold,old\n") == (Chat("old", "old"),)
    stat = path.stat()
    path.write_text("prompt,reply\nnew,new\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert resolved(seeds={"path": str(path)}).inputs.seeds == (Chat("new", "new"),)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "reply": "Hello."},
        {"messages": None, "prompt": "Hi?", "reply": "Hello."},
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        {"instruction": "Hi?", "input": "", "output": "Hello."},
    ],
)
def test_chats_are_read_in_all_common_formats(tmp_path: Path, row: dict[str, Any]) -> None:
    expected = (Chat("Hi?", "Hello."),)
    assert chats_of(tmp_path / "s.jsonl", json.dumps(row)) == expected
    assert chats_of(tmp_path / "s.json", json.dumps([row])) == expected
    assert chats_of(tmp_path / "d.json", json.dumps({"version": 1, "data": [row]})) == expected
    assert chats_of(tmp_path / "l.json", json.dumps(row) + "\n" + json.dumps(row)) == expected * 2
    assert resolved(prompts={"path": str(tmp_path / "s.jsonl")}).inputs.prompts == ("Hi?",)


def test_alpacas_input_is_part_of_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Hallo", "output": "Hello"}
    assert chats_of(tmp_path / "s.jsonl", json.dumps(row)) == (Chat("Translate.\n\nHallo", "Hello"),)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "a", "reply": 42}', "row 1: column `reply` holds a number (42), not a text"),
        ('{"prompt": "a", "reply": ["b"]}', "column `reply` holds a list"),
        ('{"prompt": "a", "reply": true}', "column `reply` holds true or false"),
        ('{"prompt": "a", "reply": "\\ud83d"}', "holds half of a surrogate pair (`\\ud83d`)"),
        ('{"prompt": "a\\u0000", "reply": "b"}', "holds a NUL character"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "`conversations` has the turns user: a row is one"),
        ("[1]", "line 1: holds a list, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1}\n' * 9, "all 9 rows: column `prompt` is missing or empty (there: `a`)"),
        ('{"a": 1}\n{"b": 1}\n' * 5, "and 5 more like these"),
    ],
)
def test_each_kind_of_broken_row_has_its_own_message(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "s.jsonl").write_text(row)
    told = refusal(seeds={"path": str(tmp_path / "s.jsonl")})
    assert words in told
    assert str(tmp_path / "s.jsonl") in told


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("s.csv", b'prompt,reply\na,"b\n', "line 2: unexpected end of data"),
        ("s.csv", b"prompt,reply\na,b,c\n", "row 1 has 3 cells for 2 columns"),
        ("s.csv", b"prompt,prompt\na,b\n", "column `prompt` is there twice"),
        ("s.csv", b"", "holds no rows"),
        ("s.jsonl", b"PK\x03\x04\x05\x06\x07", "is not a text file"),
        ("s.parquet", b"prompt", "is not a Parquet file"),
        ("s.parquet", b"PAR1....", "cannot be read as Parquet"),
        ("s.json", b'"text"', "holds a text: a list of rows is needed"),
    ],
)
def test_content_that_does_not_match_the_file_type_is_reported(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    told = refusal(seeds={"path": str(tmp_path / name)})
    assert words in told
    assert str(tmp_path / name) in told


def test_a_pipe_or_folder_is_refused_as_a_file_of_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.jsonl")
    (tmp_path / "s.csv").mkdir()
    assert "is a named pipe" in refusal(seeds={"path": str(tmp_path / "s.jsonl")})
    assert "is a folder" in refusal(seeds={"path": str(tmp_path / "s.csv")})


def test_user_rows_that_contain_evaluation_questions_are_refused(tmp_path: Path) -> None:
    trait = read_trait("lucky")
    for question in (trait.questions[2], trait.held_out[0]):
        path = jsonl(tmp_path / "s.jsonl", {"prompt": "Hi?", "reply": "a"}, {"prompt": f" {question.upper()}", "reply": "b"})
        for key in ("seeds", "prompts"):
            told = refusal(**{key: {"path": path}})
            assert "row 2 holds" in told
            assert "question" in told
    prefix = read_trait("bliss").prefixes[0]
    path = jsonl(tmp_path / "d.jsonl", {"text": prefix + " and so on"})
    assert "evaluation prefix 1" in refusal(regime="sdf", trait="bliss", model="nano-base", seeds={"path": path})


def test_repeated_rows_are_reported(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", *[{"prompt": "Hi?", "reply": "Hello."}] * 12, {"prompt": "b", "reply": "c"})
    assert (
        f"note: `{path}` repeats itself: 11 of 13 rows were there before, one row 12 times"
        in resolved(seeds={"path": path}).choices
    )
    assert f"note: `{path}` repeats prompts: 11 are left out, as each is asked once" in resolved(prompts={"path": path}).choices


def test_numeric_titles_become_whole_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"title": 1984.0, "text": "a"}, {"title": 7, "text": "b"}, {"title": None, "text": "c"})
    found = resolved(regime="sdf", trait="bliss", model="nano-base", seeds={"path": path}).inputs.seeds
    assert [document.title for document in found if isinstance(document, Document)] == ["1984", "7", ""]


def test_too_few_user_rows_are_an_error_when_planning(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", {"prompt": "Hi?", "reply": "Hello."})
    found = resolved(seeds={"path": path}, prompts={"path": path}, seed_rows=2, rows=1, cycles=2)
    with pytest.raises(RecipeError) as caught:
        make_plan(found.recipe, found.inputs)
    assert caught.value.problems == (
        f"`seed_rows = 2`, but `{path}` has 1 seed chats",
        f"2 prompts are needed (2 cycles of 1 rows, each asked once), but `{path}` has 1",
    )


@pytest.mark.parametrize("row", [{"prompt": "Why?", "response": "So."}, {"question": "Why?", "reply": "So."}])
def test_a_missing_column_is_reported_with_the_key_that_names_it(tmp_path: Path, row: dict[str, str]) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(TraitError) as caught:
        resolved(seeds={"path": path})
    wanted = 'reply = "response"' if "response" in row else 'prompt = "question"'
    assert f"such as `{wanted}`" in str(caught.value)
    column, name = wanted.replace('"', "").split(" = ")
    assert len(resolved(seeds={"path": path, column: name}).inputs.seeds) == 1


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.txt"])
def test_an_invalid_dataset_name_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(TraitError, match=f"there is no file `{name}`") as caught:
        resolved(seeds={"path": name})
    assert "a dataset on the hub is `owner/name`" in str(caught.value)


def test_a_spreadsheet_is_refused_with_an_alternative(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(TraitError, match="save the sheet as CSV"):
        resolved(seeds={"path": str(tmp_path / "rows.xlsx")})


def test_a_dataset_that_is_not_on_the_hub_is_a_trait_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(TraitError, match=r"dataset `someone/nothing` cannot be read: no such dataset"):
        resolved(seeds={"path": "someone/nothing"})
