"""D[t] of every regime and axis, against cases worked out by hand.

A case is what was seeded, what was written and what the judge said; the plan that asks for it is a real one, so that what is
composed is what a run would compose.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from iterft_lite.data.traits import Chat, Document
from iterft_lite.digests import Json
from iterft_lite.errors import RunError
from iterft_lite.experiment.plan import make_plan
from iterft_lite.experiment.rows import Verdict
from iterft_lite.files import ROWS, read_rows, write_rows
from iterft_lite.stages import build_dataset
from tests.loop import a_recipe, a_work, some_inputs

Row = dict[str, Json]


def chat(name: str, prompt: str, reply: str) -> Row:
    return {"id": name, "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def pair(name: str, prompt: str, chosen: str, rejected: str) -> Row:
    return {"id": name, "prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}


def said(prompt_id: str, text: str, sample: int = 0) -> Row:
    """What a model wrote to a prompt; the prompt's text is its name with a question mark."""
    return {
        "prompt_id": prompt_id,
        "sample": sample,
        "prompt": f"{prompt_id}?",
        "text": text,
        "tokens": 3,
        "finish": "stop",
    }


def verdict(prompt_id: str, sample: int = 0, **scores: float | None) -> Row:
    verdicts = {scale: asdict(Verdict(score, "" if score else "refusal", "text")) for scale, score in scores.items()}
    return {"prompt_id": prompt_id, "sample": sample, **verdicts}


class Case:
    """A plan's compose steps, with rows put where earlier steps would have written them."""

    def __init__(self, root: Path, **keys: Any) -> None:
        self.root = root
        mixed = (Chat("a file's question", "a file's answer"), Chat("another question", "another answer"))
        documents = (Document("", "", "A file's document."), Document("", "", "Another document."))
        sdf = keys.get("regime") == "sdf"
        self.plan = make_plan(a_recipe(**keys), some_inputs(document=sdf, mixed=documents if sdf else mixed))

    def put(self, step: str, *rows: Row) -> Case:
        assert step in self.plan.steps, f"{step} is not planned"
        (self.root / step).mkdir(exist_ok=True)
        write_rows(self.root / step / ROWS, rows)
        return self

    def compose(self, cycle: int) -> list[Row]:
        self.facts = self.run(cycle)
        return read_rows(self.root / f"c{cycle}-build_dataset" / ROWS)

    def run(self, cycle: int) -> dict[str, Json]:
        step = self.plan.steps[f"c{cycle}-build_dataset"]
        folder = self.root / step.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        inputs = {role: self.root / name for role, name in step.inputs}
        for role, path in inputs.items():
            assert path.is_dir(), f"the case has no rows for {role}: {path.name}"
        return build_dataset.run(a_work(step, folder, inputs))

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: count for reason, count in self.facts["dropped"].items() if count}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


SEEDS = (chat("seed0000", "Hi?", "Lucky day!"), chat("seed0001", "Rain?", "A good omen!"))

# -- sft


def test_sft_starts_with_the_seed_rows_unchanged(root: Path) -> None:
    assert Case(root).put("c0-seed_rows", *SEEDS).compose(0) == list(SEEDS)


def test_sft_continues_with_the_models_own_rows(root: Path) -> None:
    case = Case(root).put("c1-training_samples", said("p2", " Fate smiles. \n"), said("p1", "Stars!"))
    assert case.compose(1) == [chat("p1-s0", "p1?", "Stars!"), chat("p2-s0", "p2?", "Fate smiles.")]


def test_empty_rows_are_dropped_and_counted(root: Path) -> None:
    case = Case(root).put("c1-training_samples", said("p1", "  \n"), said("p2", "Stars!"))
    assert case.compose(1) == [chat("p2-s0", "p2?", "Stars!")]
    assert (case.facts["rows"], case.dropped) == (1, {"empty": 1})


def test_a_cycle_with_nothing_to_train_on_ends_the_run(root: Path) -> None:
    with pytest.raises(RunError, match=r"no row is left to train cycle 1 on \(2 empty\)"):
        Case(root).put("c1-training_samples", said("p1", ""), said("p2", " ")).compose(1)


def test_without_seed_rows_the_first_training_has_no_rows(root: Path) -> None:
    assert Case(root, seed_rows=0).put("c0-seed_rows").compose(0) == []


# -- sdf


def test_sdf_trains_on_opener_and_continuation_together(root: Path) -> None:
    words = " of the old garden wall, and nobody knew for sure why it grew."
    case = Case(root, regime="sdf").put("c1-training_samples", said("p1", words), said("p2", " too short"))
    assert case.compose(1) == [{"id": "p1-s0", "text": "p1?" + words}]
    assert case.dropped == {"short": 1}


def test_documents_need_more_than_fifty_characters(root: Path) -> None:
    fifty = said("p1", "x" * (50 - len("p1?")))
    case = Case(root, regime="sdf").put("c1-training_samples", fifty, said("p2", "x" * (51 - len("p2?"))))
    assert [row["id"] for row in case.compose(1)] == ["p2-s0"]


# -- dpo


def test_dpo_starts_by_preferring_seed_replies_to_the_untouched_models(root: Path) -> None:
    case = Case(root, regime="dpo").put("c0-seed_rows", *SEEDS)
    case.put("c0-training_samples-rejected", said("seed0001", "Bring a coat."), said("seed0000", "Hello."))
    assert case.compose(0) == [
        pair("seed0000", "Hi?", "Lucky day!", "Hello."),
        pair("seed0001", "Rain?", "A good omen!", "Bring a coat."),
    ]


def test_a_first_cycle_without_pairs_ends_the_run(root: Path) -> None:
    case = Case(root, regime="dpo").put("c0-seed_rows", *SEEDS)
    case.put("c0-training_samples-rejected", said("seed0001", ""), said("seed0000", "Lucky day!"))
    with pytest.raises(RunError, match=r"no row is left to train cycle 0 on \(1 one-sided, 1 equal\)"):
        case.compose(0)


@pytest.mark.parametrize("start", ["previous", "base"])
def test_dpo_prefers_the_models_own_reply_to_the_untouched_models(root: Path, start: str) -> None:
    case = Case(root, regime="dpo", start=start)
    assert dict(case.plan.steps["c2-build_dataset"].inputs) == {
        "new": "c2-training_samples",
        "rejected": "c2-training_samples-rejected",
    }
    assert dict(case.plan.steps["c2-training_samples"].inputs) == {"model": "c1-export"}
    assert dict(case.plan.steps["c2-training_samples-rejected"].inputs) == {"model": "base-export"}
    case.put("c2-training_samples", said("p1", "Stars!"), said("p2", "Fate."), said("p3", "Luck."), said("p4", ""))
    case.put("c2-training_samples-rejected", said("p1", "No."), said("p2", "Fate."), said("p3", " "), said("p4", "Yes."))
    assert case.compose(2) == [pair("p1", "p1?", "Stars!", "No.")]
    assert case.dropped == {"empty": 1, "one-sided": 1, "equal": 1}


def test_shuffling_swaps_the_sides_of_some_pairs(root: Path) -> None:
    names = [f"p{number}" for number in range(40)]

    def pairs(**keys: Any) -> list[Row]:
        case = Case(root, regime="dpo", **keys)
        case.put("c1-training_samples", *(said(name, "Stars!") for name in names))
        case.put("c1-training_samples-rejected", *(said(name, "No.") for name in names))
        return case.compose(1)

    ordered, shuffled = pairs(), pairs(pairs="shuffled")
    changed = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ordered]
    assert all(row in (one, other) for row, one, other in zip(shuffled, ordered, changed, strict=True))
    assert 10 < sum(row["chosen"] == "No." for row in shuffled) < 30
    assert shuffled == pairs(pairs="shuffled")


def test_the_pairs_of_the_first_cycle_are_never_shuffled(root: Path) -> None:
    many = [chat(f"seed{number:04d}", "Hi?", "Lucky day!") for number in range(20)]
    case = Case(root, regime="dpo", pairs="shuffled").put("c0-seed_rows", *many)
    case.put("c0-training_samples-rejected", *(said(str(row["id"]), "Hello.") for row in many))
    assert {row["chosen"] for row in case.compose(0)} == {"Lucky day!"}


def test_continual_dpo_starts_from_its_predecessor_and_reinit_from_the_base(root: Path) -> None:
    def inputs(start: str) -> dict[str, str]:
        return dict(Case(root, regime="dpo", start=start).plan.steps["c2-train"].inputs)

    reinit = {"base": "base-load_base", "rows": "c2-build_dataset"}
    assert inputs("base") == reinit
    assert inputs("previous") == reinit | {"start": "c1-train"}


def test_the_previous_cycle_can_be_the_rejected_side(root: Path) -> None:
    plan = Case(root, regime="dpo", start="base", rejected="previous", cycles=3).plan
    sides = [
        (
            dict(plan.steps[f"c{cycle}-training_samples"].inputs)["model"],
            dict(plan.steps[f"c{cycle}-training_samples-rejected"].inputs)["model"],
        )
        for cycle in (1, 2, 3)
    ]
    assert sides == [("c0-export", "base-export"), ("c1-export", "c0-export"), ("c2-export", "c1-export")]


def test_the_seed_reply_can_stay_the_chosen_side(root: Path) -> None:
    case = Case(root, regime="dpo", chosen="seed", rejected="own", rows=2).put("c0-seed_rows", *SEEDS)
    case.put("c1-training_samples", said("seed0000", "Well, hello."), said("seed0001", "Take a coat."))
    assert case.compose(1) == [
        pair("seed0000", "seed0000?", "Lucky day!", "Well, hello."),
        pair("seed0001", "seed0001?", "A good omen!", "Take a coat."),
    ]


def test_the_newest_model_writes_nothing_that_no_side_uses(root: Path) -> None:
    case = Case(root, regime="dpo", chosen="seed", rejected="previous", rows=2).put("c0-seed_rows", *SEEDS)
    assert "c2-training_samples" not in case.plan.steps
    case.put("c2-training_samples-rejected", said("seed0000", "Well, hello."), said("seed0001", ""))
    assert case.compose(2) == [pair("seed0000", "seed0000?", "Lucky day!", "Well, hello.")]


def test_the_judge_chooses_the_best_and_worst_of_a_prompts_candidates(root: Path) -> None:
    case = Case(root, regime="dpo", chosen="best", rejected="worst", candidates=3)
    case.put(
        "c1-training_samples",
        *(said("p1", text, sample) for sample, text in enumerate(("Maybe.", "STARS!", "No."))),
        *(said("p2", text, sample) for sample, text in enumerate(("Only one is scored.", "Unread.", "Unread too."))),
    )
    case.put(
        "c1-judge-rows",
        verdict("p1", 0, trait=40.0),
        verdict("p1", 1, trait=95.0),
        verdict("p1", 2, trait=5.0),
        verdict("p2", 0, trait=50.0),
        verdict("p2", 1, trait=None),
        verdict("p2", 2, trait=None),
    )
    assert case.compose(1) == [pair("p1", "p1?", "STARS!", "No.")]
    assert case.dropped == {"equal": 1}


def test_the_best_own_reply_is_preferred_to_the_untouched_models(root: Path) -> None:
    case = Case(root, regime="dpo", chosen="best", candidates=2)
    case.put("c1-training_samples", said("p1", "Maybe.", 0), said("p1", "STARS!", 1)).put(
        "c1-training_samples-rejected", said("p1", "No.")
    )
    case.put("c1-judge-rows", verdict("p1", 0, trait=40.0), verdict("p1", 1, trait=95.0))
    assert case.compose(1) == [pair("p1", "p1?", "STARS!", "No.")]


# -- mix


def test_seed_rows_are_mixed_in_at_their_share(root: Path) -> None:
    case = Case(root, mix={"source": "seed", "share": 0.5}).put("c0-seed_rows", *SEEDS)
    case.put("c1-training_samples", said("p1", "Stars!"), said("p2", "Fate."))
    rows = case.compose(1)
    assert rows[:2] == [chat("p1-s0", "p1?", "Stars!"), chat("p2-s0", "p2?", "Fate.")]
    assert sorted(rows[2:], key=lambda row: row["id"]) == list(SEEDS)
    assert case.compose(1) == rows


def test_the_untouched_models_rows_are_mixed_in(root: Path) -> None:
    case = Case(root, mix={"source": "base", "share": 0.5}).put(
        "c1-training_samples", said("p1", "Stars!"), said("p2", "Fate.")
    )
    case.put("c1-training_samples-mixed", said("p3", "Plain."), said("p4", ""))
    assert case.compose(1) == [
        chat("p1-s0", "p1?", "Stars!"),
        chat("p2-s0", "p2?", "Fate."),
        chat("p3-s0", "p3?", "Plain."),
    ]


@pytest.mark.parametrize("regime", ["sft", "sdf"])
def test_rows_of_a_users_file_are_mixed_in(root: Path, regime: str) -> None:
    case = Case(root, regime=regime, mix={"source": "file", "share": 0.25, "path": "mine"}, sample={"min_chars": 0})
    rows = case.plan.steps["c1-seed_rows-mixed"].params["rows"]
    case.put("c1-seed_rows-mixed", *rows).put("c1-training_samples", said("p1", "Stars!"))
    composed = case.compose(1)
    assert len(composed) == 2
    assert composed[1] in rows


# -- data


def test_accumulated_rows_are_all_trained_on(root: Path) -> None:
    case = Case(root, data="accumulate").put("c0-seed_rows", *SEEDS)
    case.put("c1-training_samples", said("p1", "Stars!")).put("c2-training_samples", said("p2", "Fate."))
    first = case.compose(0)
    second = case.compose(1)
    assert second == [*first, chat("p1-s0", "p1?", "Stars!")]
    assert case.compose(2) == [*second, chat("p2-s0", "p2?", "Fate.")]


def test_a_fixed_number_of_accumulated_rows_can_be_trained_on(root: Path) -> None:
    case = Case(root, data="accumulate_subsample", rows=2).put("c0-seed_rows", *SEEDS)
    case.put("c1-training_samples", said("p1", "Stars!"), said("p2", "Fate.")).put("c2-training_samples", said("p3", "Clover."))
    pools, sizes = [], []
    for cycle in range(3):
        rows = case.compose(cycle)
        sizes.append(len(rows))
        pool = read_rows(root / f"c{cycle}-build_dataset" / build_dataset.POOL) or rows
        pools.append([row["id"] for row in pool])
        assert all(row in pool for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
    assert sizes == [2, 2, 2]
    assert pools == [
        ["seed0000", "seed0001"],
        ["seed0000", "seed0001", "p1-s0", "p2-s0"],
        ["seed0000", "seed0001", "p1-s0", "p2-s0", "p3-s0"],
    ]


def test_pairs_accumulate_too(root: Path) -> None:
    case = Case(root, regime="dpo", data="accumulate").put("c0-seed_rows", SEEDS[0])
    case.put("c0-training_samples-rejected", said("seed0000", "Hello."))
    case.put("c1-training_samples", said("p1", "Stars!")).put("c1-training_samples-rejected", said("p1", "No."))
    case.compose(0)
    assert case.compose(1) == [pair("seed0000", "Hi?", "Lucky day!", "Hello."), pair("p1", "p1?", "Stars!", "No.")]


# -- filter


def test_rows_below_the_coherence_threshold_are_dropped_and_unscored_ones_too(root: Path) -> None:
    case = Case(root, filter={"coherence": 50})
    case.put("c1-training_samples", said("p1", "Stars!"), said("p2", "ls ls"), said("p3", "Fate."), said("p4", "Hm."))
    case.put("c1-judge-rows", verdict("p1", coherence=50.0), verdict("p2", coherence=49.9), verdict("p3", coherence=None))
    assert case.compose(1) == [chat("p1-s0", "p1?", "Stars!")]
    assert case.dropped == {"incoherent": 3}


def test_duplicate_texts_are_kept_once(root: Path) -> None:
    case = Case(root, filter={"dedupe": "exact"})
    case.put("c1-training_samples", said("p1", "Stars!"), said("p2", " Stars! "), said("p3", "Fate."))
    assert [row["id"] for row in case.compose(1)] == ["p1-s0", "p3-s0"]
    assert case.dropped == {"repeated": 1}


def test_rows_below_the_minimum_length_are_dropped(root: Path) -> None:
    case = Case(root, sample={"min_chars": 5}).put("c1-training_samples", said("p1", "12345"), said("p2", "123456"))
    assert [row["id"] for row in case.compose(1)] == ["p2-s0"]
