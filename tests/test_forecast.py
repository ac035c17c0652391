"""How long a plan will take: a pure function of samples and a plan."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.plan import Plan, make_plan
from iterft_lite.experiment.verbs import VERBS, Act
from iterft_lite.machine.forecast import FURTHER, forecast, seconds_of, timeline
from iterft_lite.machine.plan_words import duration, time_sentence
from iterft_lite.machine.timing import Kind, Sample, Setup
from iterft_lite.machine.work import ACTS, NOTHING, Lengths, exactly, row_length, work_ahead
from tests.loop import a_plan, a_recipe, some_inputs
from tests.recorded import read_recorded


def a_setup(name: str = "nano", model: str = "files:0", parameters: int = 8_000_000, *, gpu: bool = False) -> Setup:
    of = {act: ("", 0) if act == "judge" else (model, parameters) for act in ACTS}
    return Setup({act: Kind("a machine", act, False, *of[act], "as ever", "one 1.0") for act in ACTS}, name, gpu)


SETUP = a_setup()


def changed(act: Act, **values: str) -> Setup:
    """The setup with one act done otherwise."""
    return replace(SETUP, kinds={**SETUP.kinds, act: replace(SETUP.kinds[act], **values)})  # type: ignore[arg-type]


EVERY: dict[Act, tuple[dict[str, float], float]] = {
    "load": ({}, 5.0),
    "train": ({"steps": 2.0, "tokens": 40.0}, 10.0),
    "export": ({}, 1.0),
    "write": ({"rows": 6.0, "tokens": 60.0}, 3.0),
    "read": ({"rows": 10.0, "tokens": 100.0}, 2.0),
    "judge": ({"calls": 12.0}, 4.0),
}
"""Work and seconds of one step of each act."""

ONCE = exactly(1)
"""Work of an act without a unit."""


def a_sample(act: Act = "train", *, first: bool = False, session: str = "first", fixed: float = 0.0, **kind: object) -> Sample:
    work, seconds = EVERY[act]
    made = replace(SETUP.kind(act, first=first), **kind)  # type: ignore[arg-type]
    return Sample(made, "nano", work, fixed, seconds, {}, session, "run")


def table(sessions: int = 1, **kind: object) -> list[Sample]:
    return [
        a_sample(act, first=first, session=f"session {number}", **kind)
        for number in range(sessions)
        for act in EVERY
        for first in (True, False)
    ]


def test_queues_run_side_by_side_and_wait_for_their_inputs() -> None:
    plan = a_plan(cycles=0)
    seconds = {"base-evaluate_samples": 2.0, "base-judge": 7.0, "c0-train": 4.0, "c0-evaluate_samples": 1.0, "c0-judge": 5.0}
    ends = timeline(plan, seconds)
    assert ends["c0-evaluate_samples"] == 5.0  # a training waits neither for answers nor for verdicts
    assert ends["base-judge"] == 9.0
    assert ends["c0-judge"] == 14.0  # a judge does one after the other


@pytest.mark.parametrize(("same_cores", "trained"), [(False, 4.0), (True, 12.0)])
def test_on_the_same_cores_a_training_waits_for_answers_and_measures(same_cores: bool, trained: float) -> None:
    seconds = {"base-evaluate_samples": 5.0, "base-text_metrics": 3.0, "c0-train": 4.0}
    assert timeline(a_plan(cycles=0, same_cores=same_cores), seconds)["c0-train"] == trained


def test_an_export_waits_for_the_generator_and_the_next_data_for_the_export() -> None:
    seconds = {"base-evaluate_samples": 9.0, "c0-train": 4.0, "c0-export": 1.0, "c1-training_samples": 2.0, "c1-train": 4.0}
    ends = timeline(a_plan(cycles=1), seconds)
    assert [ends[name] for name in ("c0-export", "c1-training_samples", "c1-train")] == [10.0, 12.0, 16.0]


def test_training_waits_for_rows_that_a_judge_filters() -> None:
    plan = a_plan(cycles=1, filter={"coherence": 50})
    ends = timeline(plan, {"c1-judge-rows": 10.0, "c1-train": 1.0})
    assert ends["c1-train"] == 11.0


def test_a_repeated_plan_is_forecast_to_take_as_long() -> None:
    found = forecast(a_plan(), SETUP, table(sessions=3))
    seeds = work_ahead(a_plan(), a_plan().steps["c0-train"], Lengths()).mid / 40.0  # tokens, of those of a timed training
    # four models are exported, three are trained, two write; the last one's answers are judged
    device = 5.0 + 4 * 1.0 + (seeds + 2) * 10.0 + 2 * 2.0 + 3.0 + 4.0
    assert found.total.mid == pytest.approx(device, rel=0.1)
    assert found.total.low < device < found.total.high
    assert found.measured
    # written, trained and exported; answers are written, read and judged beside the next training
    assert found.cycle.mid == pytest.approx(2.0 + 10.0 + 1.0)


def test_more_sessions_narrow_the_range_and_doctor_alone_widens_it() -> None:
    plan = a_plan()
    doctor = [replace(sample, origin="doctor") for sample in table()]
    spreads = [
        found.total.high / found.total.mid
        for samples in (table(3), table(2), table(1), doctor)
        for found in [forecast(plan, SETUP, samples)]
    ]
    assert spreads == sorted(spreads)
    assert len(set(spreads)) == 4


def test_differences_between_sessions_widen_the_range() -> None:
    kind = SETUP.kind("load", first=True)
    samples = [replace(a_sample("load", first=True, session=str(n)), seconds=seconds) for n, seconds in enumerate((5, 10, 20))]
    span, _ = seconds_of(kind, ONCE, samples)
    assert span.mid == 10
    assert span.low < 5 < 20 < span.high


def test_steps_that_take_next_to_nothing_do_not_widen_the_range() -> None:
    kind, work = SETUP.kind("judge", first=True), exactly(12)
    fits = [(8.0, 7.9), (0.02, 0.0), (0.04, 0.0), (9.0, 8.9)]
    samples = [
        replace(a_sample("judge", first=True, session=str(number), fixed=fixed), seconds=seconds)
        for number, (seconds, fixed) in enumerate(fits)
    ]
    span, _ = seconds_of(kind, work, samples)
    assert span.low < 8.0 < span.high < 60.0


def test_runs_replace_doctors_timings_and_old_sessions_are_dropped() -> None:
    kind = SETUP.kind("export", first=False)
    old = [replace(a_sample("export", session=f"old {number}"), seconds=9.0) for number in range(4)]
    new = [a_sample("export", session=f"new {number}") for number in range(5)]
    doctor = replace(a_sample("export", session="doctor"), seconds=70.0, origin="doctor")
    span, ground = seconds_of(kind, ONCE, [*old, *new, doctor])
    assert span.mid == pytest.approx(1.0)
    assert ground.runs == 5
    assert seconds_of(kind, ONCE, [doctor])[0].mid == pytest.approx(70.0)


def test_first_steps_are_forecast_from_first_steps() -> None:
    slow = replace(a_sample("judge", first=True), seconds=40.0)
    work = exactly(12)
    assert seconds_of(SETUP.kind("judge", first=True), work, [slow, a_sample("judge")])[0].mid == pytest.approx(40.0)
    assert seconds_of(SETUP.kind("judge", first=False), work, [slow, a_sample("judge")])[0].mid == pytest.approx(4.0)
    assert seconds_of(SETUP.kind("judge", first=False), work, [slow])[0].mid == pytest.approx(40.0)


def test_fixed_seconds_are_counted_once() -> None:
    span, _ = seconds_of(SETUP.kind("train", first=False), exactly(160), [a_sample(fixed=4.0)])  # four times the tokens
    assert span.mid == pytest.approx(4.0 + 4 * 6.0)
    assert span.low < span.mid < span.high


def test_only_steps_of_similar_size_count() -> None:
    short = replace(a_sample(), work={"steps": 200.0, "tokens": 4000.0}, seconds=4000.0)
    assert seconds_of(SETUP.kind("train", first=False), exactly(40), [short, a_sample()])[0].mid == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("other", "nearness"),
    [
        ({}, "same"),
        ({"versions": "one 2.0"}, "near"),
        ({"setting": "with fewer bits"}, "near"),
        ({"model": "files:1", "parameters": 4_000_000}, "near"),
        ({"machine": "another machine"}, "unknown"),
    ],
)
def test_less_similar_timings_give_a_wider_range(other: dict[str, object], nearness: str) -> None:
    span, ground = seconds_of(SETUP.kind("train", first=False), exactly(40), [a_sample(**other)])
    assert ground.nearness == nearness
    scaled = 2 if "model" in other else 1
    least = {"same": 1.0, "near": FURTHER["near"] ** 2 * scaled, "unknown": 0.0}[nearness]
    assert span.high >= least * span.low


def test_another_model_is_no_guide_where_a_size_is_unknown() -> None:
    kind = replace(SETUP.kind("export", first=False), parameters=0)
    assert seconds_of(kind, ONCE, [a_sample("export", model="files:1")])[1].nearness == "unknown"
    span, ground = seconds_of(kind, ONCE, [a_sample("export", model="files:1"), a_sample("export")])
    assert (span.mid, ground.nearness) == (1.0, "same")  # but this model's own steps are


def test_seconds_are_scaled_from_the_model_nearest_in_size() -> None:
    kind = replace(SETUP.kind("export", first=False), model="files:9", parameters=600_000_000)
    far, near = a_sample("export"), replace(a_sample("export", model="files:1", parameters=400_000_000), name="middle")
    span, ground = seconds_of(kind, ONCE, [far, near])
    assert ground.samples == (near,)
    assert span.low < 1.0 < 1.5 < span.high
    assert span.mid == pytest.approx(1.5)  # arithmetic is all that takes time at this size


def test_between_small_models_the_range_spans_no_growth_to_full_growth() -> None:
    kind = replace(SETUP.kind("export", first=False), model="files:9", parameters=32_000_000)
    span, _ = seconds_of(kind, ONCE, [a_sample("export")])
    assert span.low < 1.0 < 4.0 < span.high
    assert span.mid == pytest.approx(2.0)


def test_row_lengths_are_measured_or_span_seed_rows_to_the_maximum() -> None:
    plan = a_plan()
    cap = max(plan.recipe.sample.max_tokens, plan.recipe.evaluate.max_tokens)
    unknown = row_length(plan, Lengths())
    assert unknown.low < unknown.mid < unknown.high == cap
    cut = replace(a_sample("write"), work={"rows": 10.0, "tokens": 100.0}, notes={"cap": 20, "cut": 5})
    known = forecast(plan, SETUP, [cut])
    assert known.measured
    assert (known.length.low, known.length.mid) == (10.0, 10.0)
    assert known.length.high == 10 + 0.5 * (cap - 20)  # half of the rows may go on


def test_answers_and_training_rows_have_separate_lengths() -> None:
    plan, lengths = a_plan(), Lengths(data=((30.0, 400, 0.0),), answers=((10.0, 400, 0.0),))
    names = ("c1-training_samples", "c2-train", "c1-evaluate_samples")
    assert [work_ahead(plan, plan.steps[name], lengths).mid for name in names] == [4 * 30, 4 * 30, 6 * 10]


def test_training_tokens_follow_the_recipes_settings() -> None:
    def trained(name: str, **keys: object) -> float:
        plan = a_plan(**keys)
        return work_ahead(plan, plan.steps[name], Lengths(data=((10.0, 400, 0.0),))).mid

    assert trained("c2-train") == 40
    assert trained("c2-train", data="accumulate") == 120
    assert trained("c2-train", data="accumulate_subsample") == 40
    assert trained("c2-train", train={"epochs": 3, "batch_size": 3}) == 120
    assert trained("c2-train", regime="dpo", prompts={"path": "x"}) == 80
    assert trained("c0-train", seed_rows=0) == 0


def test_nothing_to_do_takes_no_time() -> None:
    plan = a_plan(cycles=0, seed_rows=0)
    slow = [replace(sample, seconds=1e6) if sample.kind.act == "train" else sample for sample in table()]
    # the training of the no-seed control is none
    assert forecast(plan, SETUP, slow).total.mid == forecast(plan, SETUP, table()).total.mid < 100


# -- in words


def test_a_machine_without_timings_gets_a_range_and_its_source() -> None:
    found = forecast(a_plan(), SETUP, [])
    assert 0 < found.total.low < found.total.mid < found.total.high
    said = time_sentence(found)
    assert (
        "never timed on this machine: a first guess from nano (8 M parameters) on two CPU cores, within a factor of 4" in said
    )
    assert "`iterft doctor --measure` takes a minute" in said
    assert "on an H200" in time_sentence(forecast(a_plan(), a_setup(gpu=True), []))
    only = [sample for sample in table() if sample.kind.act in ("load", "export")]
    assert "training, writing and reading never timed on this machine" in time_sentence(forecast(a_plan(), SETUP, only))


def test_the_first_guess_contains_a_recorded_run_on_two_cores() -> None:
    recorded = read_recorded()
    found = forecast(recorded.plan, changed("judge", setting="embedded"), [])
    assert found.total.low < recorded.seconds < found.total.high


def test_a_large_model_on_a_cpu_takes_days() -> None:
    plan = a_plan(cycles=10, evaluate={"questions": 6, "samples": 200})
    large = a_setup("large", "files:9", 4_000_000_000)
    said = time_sentence(forecast(plan, large, []))
    assert "days) in all" in said
    assert "a GPU, a smaller model or fewer rows take less" in said


def test_a_model_of_unknown_size_is_not_guessed_at() -> None:
    unknown = a_setup(model="files:9", parameters=0)
    assert time_sentence(forecast(a_plan(), unknown, [])).startswith("not known before the model is downloaded")


def test_the_sentence_says_what_the_forecast_rests_on() -> None:
    def said(samples: list[Sample], setup: Setup = SETUP) -> str:
        return time_sentence(forecast(a_plan(), setup, samples))

    assert "from 1 run of this model on this machine" in said(table())
    assert "from 3 runs of this model on this machine" in said(table(3))
    assert "from `iterft doctor --measure` of this" in said([replace(sample, origin="doctor") for sample in table()])
    newer = changed("train", versions="one 2.0")
    assert "training from nano (8 M parameters) with other settings or versions, within a factor of 2" in said(table(), newer)
    larger = a_setup("large", "files:9", 80_000_000)
    assert "; from nano (8 M parameters) with other settings" in said(table(), larger)
    assert "tokens at most, or " in said(table(), larger)
    assert "rows of 10 tokens, the mean of what it wrote here" in said(table())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (48.3, "48 s"),
        (89.9, "90 s"),
        (90, "1.5 min"),
        (599, "10 min"),
        (4000, "67 min"),
        (9000, "2.5 h"),
        (2e5, "56 h"),
        (5e5, "5.8 days"),
        (2e6, "23 days"),
    ],
)
def test_durations_have_two_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def llm_plan(name: str) -> tuple[Plan, Setup]:
    judge = JudgeIdentity(name, "llm", "", "logprobs")
    plan = make_plan(a_recipe(judge=name), some_inputs(judge=judge))
    return plan, changed("judge", setting=name)


def test_a_network_judges_seconds_are_a_stated_assumption() -> None:
    plan, setup = llm_plan("openai/gpt-4o-mini-2024-07-18")
    found = forecast(plan, setup, [sample for sample in table() if sample.kind.act != "judge"])
    assert found.judging.mid == pytest.approx(4 * 12 * 0.3 / 16)
    assert "if a call takes 300 ms and 16 to 128 go at once" in time_sentence(found)
    measured = [*table(), a_sample("judge", setting=setup.kinds["judge"].setting)]
    assert forecast(plan, setup, measured).judging.mid == pytest.approx(16.0)


def test_an_untimed_judge_is_left_out_with_a_note() -> None:
    plan, setup = llm_plan("local:judge.gguf")
    found = forecast(plan, setup, table())
    assert found.judging == NOTHING
    assert "without the time that local:judge.gguf takes to judge" in time_sentence(found)


def test_a_providers_batches_are_left_out_with_a_note() -> None:
    plan, _ = llm_plan("openai/gpt-4o-mini-2024-07-18")
    batched = changed("judge", setting="openai/gpt-4o-mini-2024-07-18, in batches")
    assert "without the judge's batches, for each of which its provider takes up to a day" in time_sentence(
        forecast(plan, batched, table())
    )


# -- whatever was measured

amounts = st.floats(1.0, 1e6)


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    act = draw(st.sampled_from(sorted(ACTS)))
    model, parameters = draw(st.sampled_from([("files:0", 8_000_000), ("files:1", 600_000_000), ("files:2", 1_000_000)]))
    made = SETUP.kind(act, first=draw(st.booleans()))
    machine = draw(st.sampled_from(["a machine", "a machine", "another"]))
    return made if act == "judge" else replace(made, machine=machine, model=model, parameters=parameters)


@st.composite
def some_samples(draw: st.DrawFn) -> Sample:
    kind = draw(kinds())
    work = {unit: draw(amounts) for unit in EVERY[kind.act][0]}
    seconds = draw(st.floats(1e-3, 1e5))
    fixed = seconds * draw(st.floats(0.0, 1.0))
    session, origin = draw(st.sampled_from("abcd")), draw(st.sampled_from(["run", "doctor"]))
    return Sample(kind, "nano", work, fixed, seconds, {}, session, origin)


@given(st.lists(some_samples(), max_size=30))
def test_ranges_are_ordered_and_finite(samples: list[Sample]) -> None:
    found = forecast(a_plan(), SETUP, samples)
    for span in [found.total, found.judging, found.cycle, *found.steps.values()]:
        assert all(math.isfinite(value) and value >= 0 for value in (span.low, span.mid, span.high))
    for span in (found.total, found.judging, found.length):
        assert span.low <= span.mid * (1 + 1e-9)
        assert span.mid <= span.high * (1 + 1e-9)
    assert time_sentence(found)


@given(st.lists(some_samples(), min_size=1, max_size=20), st.floats(1.0, 50.0))
def test_slower_samples_never_make_a_quicker_plan(samples: list[Sample], factor: float) -> None:
    slower = [replace(sample, seconds=factor * sample.seconds, fixed=factor * sample.fixed) for sample in samples]
    quick, slow = (forecast(a_plan(), SETUP, each).total for each in (samples, slower))
    for before, after in ((quick.low, slow.low), (quick.mid, slow.mid), (quick.high, slow.high)):
        assert after >= before * (1 - 1e-9)


@given(some_samples(), amounts, st.floats(1.0, 100.0))
def test_more_work_never_takes_less_time(sample: Sample, amount: float, factor: float) -> None:
    less, more = exactly(amount), exactly(amount * (factor if ACTS[sample.kind.act].unit else 1.0))
    kind = replace(SETUP.kind(sample.kind.act, first=False), machine=sample.kind.machine)
    assert seconds_of(kind, more, [sample])[0].mid >= seconds_of(kind, less, [sample])[0].mid * (1 - 1e-9)


@given(st.lists(some_samples(), max_size=20))
def test_timings_of_other_machines_are_ignored(samples: list[Sample]) -> None:
    elsewhere = [replace(sample, kind=replace(sample.kind, machine="another")) for sample in samples]
    assert forecast(a_plan(), SETUP, [*elsewhere, *table()]) == forecast(a_plan(), SETUP, table())


def test_every_kind_of_work_has_its_entry_in_every_table() -> None:
    assert {verb.act for verb in VERBS.values()} - {""} == set(ACTS) == set(EVERY)
