"""What generation learns while it runs."""

from __future__ import annotations

from iterft_lite.backends.llamacpp.scheduling import HOLD, Expected, Pace


def settled(pace: Pace, seconds: dict[int, float], steps: int, sequences: int = 32) -> list[int]:
    """Threads of the last ten of `steps` steps, where a step takes as long as `seconds` says."""
    used = []
    for _ in range(steps):
        used.append(pace.threads(sequences))
        pace.took(seconds[used[-1]])
    return used[-10:]


def test_the_faster_number_of_threads_is_found() -> None:
    assert set(settled(Pace([2, 1]), {2: 1.0, 1: 1.5}, 60)) == {2}
    assert set(settled(Pace([2, 1]), {2: 9.0, 1: 1.5}, 60)) == {1}


def test_the_choice_follows_changes_of_the_machine() -> None:
    pace = Pace([2, 1])
    assert set(settled(pace, {2: 1.0, 1: 1.5}, HOLD)) == {2}
    assert set(settled(pace, {2: 9.0, 1: 1.5}, 60)) == {1}


def test_the_stragglers_of_a_call_do_not_decide_for_the_many_of_the_next() -> None:
    pace = Pace([2, 1])
    assert pace.best == 2
    assert set(settled(pace, {2: 1.0, 1: 1.5}, 60)) == {2}
    assert set(settled(pace, {2: 9.0, 1: 1.5}, 60, sequences=2)) == {1}
    assert pace.best == 2
    assert pace.threads(32) == 2


def test_a_single_choice_is_kept() -> None:
    assert set(settled(Pace([4, 4]), {4: 1.0}, 400)) == {4}


def test_sequences_of_long_or_unknown_length_start_first() -> None:
    expected = Expected()
    assert expected.order(["a", "b", "c"]) == [0, 1, 2]
    expected.note("a", 10)
    expected.note("b", 100)
    expected.note("b", 50)
    assert expected.order(["a", "b", "a", "c", "b"]) == [1, 3, 4, 0, 2]
