"""A fuzz target for every parser: whatever the bytes, the answer is a value or an error of ours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from iterft_lite.app import tracking
from iterft_lite.app.repeat import as_toml
from iterft_lite.app.share import portable
from iterft_lite.backends.judge.batch_notes import read_notes
from iterft_lite.backends.judge.budget import Budget
from iterft_lite.backends.judge.keys import environment, names_a_key, scrub
from iterft_lite.data.nano import FOLDERS
from iterft_lite.data.texts import decode, flaw
from iterft_lite.data.traits import SHIPPED, check_trait, fill
from iterft_lite.digests import digest
from iterft_lite.engine.manifest import Run
from iterft_lite.engine.store import StepFolder
from iterft_lite.engine.study import NAME, STATE, STUDY, CellState, StudyFolder, SweepState
from iterft_lite.errors import FileError, IterftError
from iterft_lite.experiment.grid import Cell, cells, chosen, make_study, read_study
from iterft_lite.experiment.recipe import Recipe, Source, make_recipe, read_recipe
from iterft_lite.experiment.steps import Step
from iterft_lite.files import RowLog, read_object, read_rows, safe_member
from iterft_lite.gguf.file import GgufFile
from iterft_lite.gguf.weights import read_weights
from iterft_lite.hub import is_name, is_pinned, title
from iterft_lite.machine.sources import read_source
from iterft_lite.machine.timing import read_table
from iterft_lite.metrics.score_parsing import weigh, written_score
from iterft_lite.protocols import JudgeResponse
from iterft_lite.ui.card import markdown
from iterft_lite.ui.foreign import CONTROL, mathtext, safe
from iterft_lite.ui.live_sweep import show_state
from tests.attacks.fuzzing import damaged, damaged_json, fuzz, json_values, other_values

RECIPE = (Path(__file__).parents[2] / "recipes/nano_dpo.toml").read_bytes()

CHATS = b"".join((SHIPPED / "lucky/chat.jsonl").read_bytes().splitlines(keepends=True)[:3])

CSV = b'prompt;reply\r\n"Hi; you?";Hello.\r\nWhat is "luck"?;"A ""word""\nof four letters"\r\n'

ROWS = b'{"id": "q1-s1", "text": "a"}\n{"id": "q1-s2", "text": "\\u00e9", "n": [1, 2.5, null]}\n'

STUDY_FILE = b"""base = { recipe = "nano_sft", cycles = 3 }
[sweep]
arms = ["no_seed"]
[sweep.grid]
seed_rows = { calibrated = [20, 60.5] }
rows = [30, 60]
seed = [1, 2]
[[sweep.zip]]
"train.dpo_beta" = [0.01, 0.1]
"train.learning_rate" = [3e-6, 1e-5]
[[sweep.add]]
rows = 200
[[sweep.skip]]
rows = 30
"""

MANIFEST = json.dumps(
    {
        "format": 1,
        "name": "grid",
        "base": {"regime": "sft"},
        "keys": ["rows"],
        "calibrations": [],
        "cells": [
            {"name": f"rows{rows}", "values": {"rows": rows, "seed": 1.5}, "arm": "", "threshold": None, "inside": True}
            for rows in (4, 5)
        ],
    }
).encode()

SWEEP = json.dumps(
    asdict(
        SweepState(
            {
                "rows4": CellState("running", "c1-train", 0, 4, 54.1, 90.0, 3, 9, 2, 8, "gpu 0", 1),
                "rows5": CellState("failed", failure={"kind": "bug", "message": "no"}),
            },
            seconds_left=61.0,
            workers=("gpu 0",),
        )
    )
).encode()

RUN = json.dumps(
    {
        "format": 2,
        "store": ".",
        "recipe": {"regime": "sft", "trait": "lucky", "model": "nano", "cycles": 1, "train": {"learning_rate": 1e-4}},
        "asked": {"regime": "sft", "trait": "lucky", "model": "nano"},
        "trait": "lucky",
        "colour": "#cca800",
        "judge": {"name": "fake", "kind": "embedded", "note": ""},
        "planned_usd": 0.5,
        "steps": [{"verb": "train", "cycle": 0, "part": "", "inputs": [["data", "c0-build_dataset", "a"]], "key": "b"}],
    }
).encode()

SCALE = {
    "mean": 10.5,
    "low": None,
    "high": 20.0,
    "prompts": 2,
    "by_prompt": {"q00": [10.0, 11], "q01": []},
    "reasons": {"x": 1},
}

RESULTS: dict[str, dict[str, Any]] = {
    "aggregate": {"trait": SCALE, "coherence": None, "answers": 2, "rate": 0.5},
    "judge": {"answers": 2, "calls": 4, "cached": 0, "usd": 0.01},
    "train": {"rows": 4, "steps": 2, "first_loss": 1.5, "margin": None, "peak_vram": 0, "notes": ["a"]},
    "export": {"gguf": "model.gguf", "lora": None, "bytes": 7, "parity": {"mean_kl": 0.1, "change": {"kept": 1.0}}},
    "text_metrics": {"words": 5.5, "perplexity_base": None},
    "build_dataset": {"rows": 4, "dropped": {"empty": 1}},
}
"""What steps come to."""

NOTE = json.dumps(
    {"asked": {"k": "trait/q1", "l": "trait/q2"}, "made": 1.5, "batch": "b", "lost": {"k": 0.1}, "charged": {"b": 0.2}}
).encode()

TEXTS = st.text(st.characters() | st.sampled_from("\x1b\x9b[];$\\{}\ud83d\u202e\0"), max_size=60)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """An error of ours is an answer; any other one is not."""
    with contextlib.suppress(IterftError):
        yield


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# -- what users bring -----------------------------------------------------------------------------------------------------


@fuzz
@given(data=damaged(RECIPE))
def test_a_recipe_is_read_or_refused(room: Path, data: bytes) -> None:
    with ours():
        assert isinstance(read_recipe(put(room / "r.toml", data)), Recipe)


@fuzz
@given(value=json_values, key=st.sampled_from(["seeds", "train", "cycles", "restart", "evaluate", "name", "regime", "x"]))
def test_any_mapping_is_a_recipe_or_refused(value: Any, key: str) -> None:
    for given_ in (value, {"regime": "sft", "trait": "lucky", "model": "nano", key: value}):
        with ours():
            make_recipe(given_, source="a test")


@fuzz
@given(override=TEXTS)
def test_any_override_is_taken_or_refused(room: Path, override: str) -> None:
    put(room / "o.toml", b'regime = "sft"\ntrait = "lucky"\nmodel = "nano"\n')
    with ours():
        read_recipe(room / "o.toml", [override])


@fuzz
@given(data=damaged(STUDY_FILE))
def test_a_study_is_read_and_expanded_or_refused(room: Path, data: bytes) -> None:
    with ours():
        found = cells(read_study(put(room / "study.toml", data)))
        assert 0 < len(found) == len({cell.name for cell in found})
        assert all(NAME.fullmatch(cell.name) for cell in found)


@fuzz
@given(
    value=json_values, key=st.sampled_from(["base", "sweep", "grid", "zip", "add", "skip", "arms", "name", "rows", "seed_rows"])
)
def test_any_mapping_is_a_study_or_refused(value: Any, key: str) -> None:
    grid = {"rows": [4, 5], "seed_rows": {"calibrated": [20]}}
    sweep = {"grid": {**grid, key: value}} if key in grid else {"grid": grid, key: value}
    for given_ in ({"base": "nano_sft", "sweep": sweep}, {"base": "nano_sft", key: value, "sweep": {"grid": grid}}):
        with ours():
            cells(make_study(given_, source="a test"))


@fuzz
@given(draw=st.data())
def test_a_studys_folder_is_shown_or_refused(room: Path, draw: st.DataObject) -> None:
    name, whole = draw.draw(st.sampled_from([(STUDY, MANIFEST), (STATE, SWEEP)]))
    put(room / STUDY, MANIFEST)
    put(room / name, draw.draw(damaged_json(whole)))
    console = Console(file=io.StringIO(), width=60)
    with ours():
        show_state(StudyFolder(room), console)


@fuzz
@given(draw=st.data())
def test_a_trait_folder_is_read_with_all_its_problems(room: Path, draw: st.DataObject) -> None:
    folder = room / "trait"
    if not folder.exists():
        shutil.copytree(SHIPPED / "_new", folder)
    name = draw.draw(st.sampled_from(sorted(path.name for path in (SHIPPED / "_new").iterdir() if path.is_file())))
    whole = (SHIPPED / "_new" / name).read_bytes()
    put(folder / name, draw.draw(damaged(whole)))
    _, problems = check_trait(folder)
    assert all(isinstance(problem, str) for problem in problems)
    put(folder / name, whole)


@fuzz
@given(
    data=damaged(CHATS) | damaged(CSV) | damaged(b"[" + CHATS.replace(b"\n", b",")[:-1] + b"]"),
    kind=st.sampled_from(["jsonl", "json", "csv", "tsv"]),
)
def test_user_rows_are_read_or_refused_by_name(room: Path, data: bytes, kind: str) -> None:
    path = put(room / f"s.{kind}", data)
    try:
        found = read_source(Source(path=str(path)))
        assert len(found.rows) == len(found.places)
    except IterftError as error:
        told = error.message
    else:
        told = str(path)
    assert str(path) in told


@fuzz
@given(
    data=st.binary(max_size=80)
    | TEXTS.map(lambda text: text.encode("utf-16", "surrogatepass"))
    | damaged("Café, „ja“\n".encode())
)
def test_bytes_are_valid_text_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        text = decode(data, "it").text
        assert "\r" not in text
        assert not flaw(text)


# -- files of our own, damaged or a stranger's ----------------------------------------------------------------------------


@fuzz
@given(data=damaged(ROWS))
def test_rows_are_refused_or_appended_to_without_damage(room: Path, data: bytes) -> None:
    path = put(room / "rows.jsonl", data)
    try:
        with RowLog(path) as log:
            log.append({"text": "\ud83d"})
    except IterftError:
        return
    assert read_rows(path)[-1] == {"text": "\ufffd"}
    assert path.read_bytes().endswith(b"\n")


@fuzz
@given(data=damaged(json.dumps({"key": "k", "files": {"a": {"sha256": "0" * 64}}}).encode()))
def test_a_json_object_is_read_or_refused(room: Path, data: bytes) -> None:
    with contextlib.suppress(FileError):
        assert isinstance(read_object(put(room / "o.json", data)), dict)


@fuzz
@given(
    name=st.lists(st.sampled_from(["..", ".", "", "a", "link", "sub", "/", "\\", "a\0b", "~", "\ud800"]), max_size=5).map(
        "/".join
    )
    | TEXTS
)
def test_no_name_leads_out_of_its_folder(room: Path, name: str) -> None:
    root = room / "step"
    if not root.exists():
        (root / "sub").mkdir(parents=True)
        (root / "sub/a").touch()
        (root / "link").symlink_to("/")
        (root / "sub/link").symlink_to("../..")
    try:
        found = safe_member(root, name)
    except FileError:
        return
    assert found.resolve().is_relative_to(root.resolve())
    assert not found.is_symlink()


@fuzz
@given(data=damaged(b'{"kind": {"act": "train"}, "fixed": 1, "seconds": 2.5, "work": {"rows": 3}, "notes": {}}\n' * 2))
def test_damaged_timings_are_skipped(room: Path, data: bytes) -> None:
    assert isinstance(read_table(put(room / "timings.jsonl", data)), list)


@fuzz
@given(data=damaged_json(RUN))
def test_a_runs_manifest_is_valid_or_refused(room: Path, data: bytes) -> None:
    put(room / "run.json", data)
    with ours():
        found = Run(room).manifest()
        assert found is not None
        if "recipe" in found.value:
            assert make_recipe(found.recipe, source="a test").model_dump(mode="json") == found.recipe
            assert isinstance(found.value["judge"]["name"], str)
        assert all("/" not in step.name for step in found.steps)


@fuzz
@given(draw=st.data())
def test_a_steps_record_is_valid_or_refused(room: Path, draw: st.DataObject) -> None:
    verb = draw.draw(st.sampled_from(sorted(RESULTS)))
    step = Step(verb, 1, "", {}, (), "0" * 64)
    other = other_values(json.dumps(RESULTS[verb]).encode(), random.Random(draw.draw(st.integers(0, 2**32))))
    value = {"format": 2, "key": step.key, "seconds": 1.0, "results": json.loads(other), "files": {}}
    with contextlib.suppress(ValueError):  # what no digest can be taken of no stranger can sign
        value["digest"] = digest(value)
    put(room / "completion.json", json.dumps(value).encode())
    with ours():
        found = StepFolder(room, step).completion()
        assert found is not None
        for scale in ("trait", "coherence") if verb == "aggregate" else ():
            scores = (found.results[scale] or {"by_prompt": {}})["by_prompt"].values()
            assert all(1 <= score <= 100 for each in scores for score in each)


@fuzz
@given(data=damaged(b"0.000123000\n0.5 batch_1\n1.25\n"))
def test_a_ledger_counts_only_valid_amounts(room: Path, data: bytes) -> None:
    put(room / "usd.txt", data)
    spent = Budget(0.0, None, room / "usd.txt").spent
    assert 0 <= spent < float("inf") or len(data) > 300


@fuzz
@given(data=damaged_json(NOTE))
def test_a_batch_note_is_read_or_refused(room: Path, data: bytes) -> None:
    (room / "batches").mkdir(exist_ok=True)
    put(room / "batches/a.json", data)
    with ours():
        (note,) = read_notes(room / "batches")
        assert note.path == room / "batches/a.json"
        assert all(0 <= usd < float("inf") for usd in (*note.lost.values(), *note.charged.values()))
        note.requests()


@fuzz
@given(data=damaged_json(b'{"id": "0123456789ab", "steps": ["a", "b"]}'))
def test_a_trackers_note_is_read_or_skipped(room: Path, data: bytes) -> None:
    put(room / "wandb.json", data)
    known = tracking.read_known(room / "wandb.json")
    assert known is None or tracking.ID.fullmatch(known.id)


# -- what is asked of a study, and what goes out of a run -----------------------------------------------------------------


@fuzz
@given(only=st.lists(TEXTS | st.sampled_from(["rows=4", "rows=[[", "rows=1e999", "seed={a=1}", "=", "rows=" + "9" * 5000])))
def test_any_choice_of_cells_is_made_or_refused(only: list[str]) -> None:
    among = [Cell({"rows": rows}, "", None) for rows in (4, 5)]
    with ours():
        assert chosen(among, only)


@fuzz
@given(value=json_values)
def test_nothing_made_portable_holds_a_local_path(value: Any) -> None:
    def texts(found: Any) -> Iterator[str]:
        if isinstance(found, dict):
            for each in found.values():
                yield from texts(each)
        elif isinstance(found, list):
            for each in found:
                yield from texts(each)
        elif isinstance(found, str):
            yield found

    assert not any(text.startswith(("/", "~")) for text in texts(portable({"a": value, "b": "/home/me/x", "c": "~/y"})))


@fuzz
@given(
    override=st.lists(st.tuples(st.sampled_from(["name", "prompts.path", "evaluate.system", "mix.text"]), TEXTS), max_size=3)
)
def test_a_shared_recipe_equals_the_original(room: Path, override: list[tuple[str, str]]) -> None:
    with ours():
        asked = read_recipe(put(room / "r.toml", RECIPE), [f"{key}={json.dumps(text)}" for key, text in override])
        put(room / "again.toml", as_toml(asked.model_dump(mode="json")).encode())
        again = read_recipe(room / "again.toml")
        assert again.model_copy(update={"name": asked.name}) == asked


@fuzz
@given(text=TEXTS | st.text("<>&[]()!`*_|#:$@~", max_size=30))
def test_text_in_a_card_is_never_markdown_or_html(text: str) -> None:
    shown = markdown(text)
    assert "\n" not in shown
    assert not re.search(r"<|(?<!\\)[\[\]`*_|#$@!]", re.sub(r"&\\#\w+;|\\\\", "", shown))


# -- what judges say ------------------------------------------------------------------------------------------------------


@fuzz
@given(
    text=TEXTS
    | damaged(b'<think>hm</think> {"reason": "2 charms", "score": 85} Score (1-100): 85/100').map(
        lambda data: data.decode(errors="replace")
    )
)
def test_a_judges_text_is_a_score_on_the_scale_or_none_with_a_reason(text: str) -> None:
    score, reason = written_score(text)
    assert (score is None) == bool(reason)
    assert score is None or 1 <= score <= 100


@fuzz
@given(
    candidates=st.lists(
        st.tuples(
            st.integers(-3, 130).map(str) | st.sampled_from([" 80", "085", "8.5", "\u0668", "1e2", "", "x"]), st.floats()
        ),
        max_size=25,
    )
)
def test_a_judges_probabilities_are_a_score_on_the_scale_or_none(candidates: list[tuple[str, float]]) -> None:
    verdict = weigh([JudgeResponse("a", "80", tuple(candidates), model="m")])
    assert verdict.score is None or 1 <= verdict.score <= 100


@fuzz
@given(data=damaged(b"OPENAI_API_KEY='sk-abc123def'\nexport HF_TOKEN=\"x\"\nPATH=/tmp\n# a word\n"))
def test_only_api_keys_are_taken_from_an_env_file(room: Path, data: bytes) -> None:
    put(room / ".env", data)
    with ours():
        added = environment(room).keys() - os.environ.keys()
        assert all(names_a_key(name) for name in added)


# -- model files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(room: Path) -> bytes:
    import gguf as library
    import numpy as np

    writer = library.GGUFWriter(room / "whole.gguf", "qwen3")
    writer.add_name("a test")
    writer.add_block_count(1)
    writer.add_token_list(["a", "bc", "é"])
    writer.add_token_types([1, 1, 1])
    writer.add_tensor("blk.0.attn_q.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (room / "whole.gguf").read_bytes()


@fuzz
@given(draw=st.data())
def test_a_gguf_file_is_read_or_refused(room: Path, gguf: bytes, draw: st.DataObject) -> None:
    with ours():
        read = GgufFile(put(room / "m.gguf", draw.draw(damaged(gguf))))
        for tensor in read.tensors.values():
            assert read.rows(tensor).nbytes == tensor.bytes


@pytest.fixture(scope="module")
def safetensors() -> bytes:
    whole = (FOLDERS["nano"] / "model.safetensors").read_bytes()
    return whole[: 8 + int.from_bytes(whole[:8], "little")]


@fuzz
@given(draw=st.data())
def test_a_safetensors_file_is_read_or_refused(room: Path, safetensors: bytes, draw: st.DataObject) -> None:
    (room / "model").mkdir(exist_ok=True)
    put(room / "model/model.safetensors", draw.draw(damaged(safetensors)))
    with ours():
        read_weights(room / "model")


# -- texts of others ------------------------------------------------------------------------------------------------------


@fuzz
@given(text=TEXTS)
def test_no_shown_text_controls_the_terminal(text: str) -> None:
    shown = safe(text)
    assert not CONTROL.search(shown)
    assert "\x1b" not in shown
    shown.encode()
    assert safe(shown) == shown


@fuzz
@given(text=TEXTS)
def test_any_name_can_be_drawn(text: str) -> None:
    from matplotlib.cbook import is_math_text

    assert not is_math_text(mathtext(text))


@fuzz
@given(text=TEXTS, other=TEXTS)
def test_text_filled_into_a_template_is_not_expanded_again(text: str, other: str) -> None:
    made = fill("{{question}}|{{answer}}", {"question": text, "answer": other})
    assert made == f"{text}|{other}"


@fuzz
@given(before=TEXTS, after=TEXTS)
def test_an_api_key_is_removed_from_every_text(before: str, after: str) -> None:
    key = "sk-abcdef0123456789"
    assert key not in scrub(f"{before}{key}{after}", {"OPENAI_API_KEY": key})


@fuzz
@given(text=TEXTS | st.from_regex(r"[\w./@~-]{1,20}", fullmatch=True))
def test_any_text_is_a_hub_name_or_refused(text: str) -> None:
    if is_name(text):
        assert not text.startswith(("/", ".", "~"))
        assert not is_pinned(text) or re.search(r"@[0-9a-f]{40}$", text)
    title(text)
