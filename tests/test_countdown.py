"""The time that is left of a run, held against a run that was recorded."""

from __future__ import annotations

import itertools

import pytest

from iterft_lite.engine.run import StepFinished, StepProgress, StepStarted
from iterft_lite.machine.countdown import Countdown
from iterft_lite.machine.forecast import forecast
from iterft_lite.machine.timing import ACTS, Kind, Setup
from tests.recorded import Recorded, read_recorded


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return read_recorded()


def left_at(recorded: Recorded, share: float, countdown: Countdown) -> float | None:
    """What a countdown says when a share of the run is over."""
    for when, event in recorded.until(share):
        match event:
            case StepStarted(step):
                countdown.began(step, when)
            case StepProgress(step, progress):
                countdown.moved(step, progress.done, progress.total, when)
            case StepFinished(step, completion, reused):
                countdown.done(step, completion.seconds, reused=reused)
    return countdown.left(share * recorded.seconds)


@pytest.mark.parametrize("off", [1.0, 1.3, 1 / 1.3], ids=["as forecast", "forecast too slow", "forecast too fast"])
@pytest.mark.parametrize("tenth", range(10))
def test_the_time_left_is_within_half_at_first_and_a_quarter_later(recorded: Recorded, tenth: int, off: float) -> None:
    forecast = {name: seconds * off for name, seconds in recorded.forecast.items()}
    left, true = left_at(recorded, tenth / 10, Countdown(recorded.plan, forecast)), recorded.seconds * (1 - tenth / 10)
    factor = 1.25 if tenth > 2 else 1.5
    assert left is not None
    assert true / factor <= left <= true * factor


def test_the_time_left_counts_down_within_steps(recorded: Recorded) -> None:
    shares = [share / 100 for share in range(100)]
    lefts = [left_at(recorded, share, Countdown(recorded.plan, recorded.forecast)) for share in shares]
    told = [left for left in lefts if left is not None]
    assert len(told) == len(shares)
    # it may be put right upwards when a step turns out longer, by a few seconds, and never stands still for long
    assert all(later <= earlier + 0.05 * recorded.seconds for earlier, later in itertools.pairwise(told))
    assert all(later < earlier for earlier, later in zip(told, told[10:], strict=False))


def test_a_steps_time_left_never_exceeds_the_runs(recorded: Recorded) -> None:
    for share in (0.05, 0.3, 0.55, 0.8):
        countdown = Countdown(recorded.plan, recorded.forecast)
        whole = left_at(recorded, share, countdown)
        now = share * recorded.seconds
        steps = [countdown.left_of(step, now) for step in recorded.plan if step.name in countdown.going]
        assert whole is not None
        assert steps
        assert all(left is not None and left <= whole + 1e-6 for left in steps)


def test_a_machine_without_timings_counts_down_from_a_first_guess(recorded: Recorded) -> None:
    kinds = {act: Kind("a new machine", act, False, "files:0", 8_395_264, "", "") for act in ACTS}
    kinds["judge"] = Kind("a new machine", "judge", False, "", 0, "embedded", "")
    here = Setup(kinds, "nano")
    guess = {name: span.mid for name, span in forecast(recorded.plan, here, []).steps.items()}
    for tenth in range(10):
        left, true = left_at(recorded, tenth / 10, Countdown(recorded.plan, guess)), recorded.seconds * (1 - tenth / 10)
        assert left is not None
        assert true / 1.5 <= left <= true * 1.5


def test_without_a_forecast_the_first_cycle_gives_the_time_left(recorded: Recorded) -> None:
    assert left_at(recorded, 0.1, Countdown(recorded.plan)) is None
    left = left_at(recorded, 0.5, Countdown(recorded.plan))
    assert left is not None
    assert recorded.seconds / 2 / 1.25 <= left <= recorded.seconds / 2 * 1.25


def test_a_finished_run_has_no_time_left(recorded: Recorded) -> None:
    assert left_at(recorded, 2.0, Countdown(recorded.plan, recorded.forecast)) == 0.0
