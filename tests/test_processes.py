"""Child processes: what they see, how they end, and what is said of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from iterft_lite.backends.processes import child as children
from iterft_lite.backends.processes.child import Child, Silence
from iterft_lite.engine.backends import hidden_from_trainer
from iterft_lite.errors import BackendError, StoreError
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.programs import Secrets, environment, is_secret
from iterft_lite.protocols import Progress, Trainer, TrainJob
from tests.loop import a_recipe

SETTINGS = TrainSettings(learning_rate=1e-4, schedule="constant", batch_size=1, weight_decay=0.0, max_grad_norm=1.0)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Makes children that are closed in the end."""
    made: list[Child] = []

    def make(worker: str, log: Path = tmp_path / "trainer.log", secrets: Secrets = "none", hidden: Sequence[str] = ()) -> Child:
        made.append(Child(f"tests.workers:{worker}", Trainer, log=log, secrets=secrets, hidden=hidden))
        return made[-1]

    yield make
    for each in made:
        each.close()


def job(tmp_path: Path) -> TrainJob:
    return TrainJob(tmp_path / "rows.jsonl", tmp_path, "reply", SETTINGS, 1)


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# -- what a child sees ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("OPENAI_API_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("HF_TOKEN", True),
        ("MY_PASSWORD", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("PATH", False),
        ("KEYBOARD_LAYOUT", False),
        ("ITERFT_CACHE", False),
    ],
)
def test_secret_variables_are_recognised_by_name(name: str, secret: bool) -> None:
    assert is_secret(name) == secret


def test_only_judge_processes_get_judge_keys_and_none_gets_the_hubs(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "sk-secret")
    plain, judge = start("Teller"), start("Teller", secrets="judges")
    assert plain.load("OPENAI_API_KEY", SETTINGS).architecture == "unset"
    assert plain.load("HF_TOKEN", SETTINGS).architecture == "unset"
    assert judge.load("OPENAI_API_KEY", SETTINGS).architecture == "sk-secret"
    assert judge.load("HF_TOKEN", SETTINGS).architecture == "unset"


def test_a_child_imports_nothing_from_the_working_folder(
    start: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('from the working folder')")
    (tmp_path / "queue.py").write_text("raise SystemExit('from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{ROOT}")  # an empty entry is the working folder
    teller = start("Teller")
    assert teller.load("path", SETTINGS).architecture == "[]"
    assert str(tmp_path) not in teller.load("import", SETTINGS).architecture


def test_a_child_does_not_find_the_packages_that_are_hidden_from_it(start: Callable[..., Child]) -> None:
    assert start("Teller", hidden=["colorsys"]).load("missing", SETTINGS).architecture == "colorsys"


@pytest.mark.parametrize(
    ("keys", "hidden"),
    [
        ({"base": "f32", "optimizer": "adamw"}, ("scipy", "sklearn", "bitsandbytes")),
        ({"base": "nf4", "optimizer": "adamw"}, ("scipy", "sklearn")),
        ({"base": "f32", "optimizer": "adamw_8bit"}, ("scipy", "sklearn")),
    ],
)
def test_a_trainer_starts_without_what_its_recipe_does_not_need(keys: dict[str, str], hidden: tuple[str, ...]) -> None:
    assert hidden_from_trainer(a_recipe(train=keys)) == hidden
    assert hidden_from_trainer(a_recipe(train=keys, trainer="trl")) == ()


def test_standard_input_of_a_child_is_empty(start: Callable[..., Child]) -> None:
    assert start("Teller").load("stdin", SETTINGS).architecture == "''"


def test_a_childs_environment_is_clean_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"/a{os.pathsep}{os.pathsep}/b{os.pathsep}")
    made = environment(more={"OMP_NUM_THREADS": "1"})
    assert made["PYTHONPATH"] == f"/a{os.pathsep}/b"
    assert (made["PYTHONSAFEPATH"], made["OMP_NUM_THREADS"]) == ("1", "1")


def test_a_prepared_child_creates_its_worker_before_the_first_call(start: Callable[..., Child], tmp_path: Path) -> None:
    made = start("Announcing", log=tmp_path / "slow.log")
    made.prepare()
    wait_until(lambda: "made" in (tmp_path / "slow.log").read_text())
    pid = made.pid
    made.prepare()
    assert made.load("model", SETTINGS).architecture == "ready"
    assert made.pid == pid


def test_a_failed_worker_raises_its_error_in_every_call(start: Callable[..., Child]) -> None:
    refusing = start("Refusing")
    refusing.prepare()
    for _ in range(2):
        with pytest.raises(StoreError, match="not like this"):
            refusing.load("model", SETTINGS)
    assert refusing.running


# -- how it ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGKILL", "was killed"), ("SIGABRT", "given up by a library"), ("SIGSEGV", "crashed"), ("SIGTERM", "end")],
)
def test_a_child_ended_by_a_signal_is_reported_with_what_it_did(start: Callable[..., Child], name: str, words: str) -> None:
    with pytest.raises(BackendError, match=words) as caught:
        start("Dying").load(name, SETTINGS)
    error = caught.value
    assert "the trainer" in error.message
    assert "while loading a model" in error.message
    assert "no byte tokens" in error.message
    assert "ggml_print_backtrace" not in error.message
    assert "#5" not in error.message
    assert error.hint
    assert (error.exception, error.kind) == ("died", "machine")


def test_a_full_disk_inside_a_child_is_reported(start: Callable[..., Child]) -> None:
    with pytest.raises(StoreError, match="the disk is full"):
        start("Full").load("model", SETTINGS)


def test_closing_a_child_ends_the_processes_it_started(start: Callable[..., Child], tmp_path: Path) -> None:
    hanging, seen = start("Hanging"), []

    def close(progress: Progress) -> None:
        seen.append(progress.done)
        hanging.close()

    with pytest.raises(BackendError):
        hanging.train(job(tmp_path), close)
    wait_until(lambda: gone(seen[0]))
    assert not hanging.running


def test_closing_a_child_from_another_thread_frees_the_waiting_one(start: Callable[..., Child], tmp_path: Path) -> None:
    hanging = start("Hanging")
    threading.Thread(target=lambda: (wait_until(lambda: hanging.running), hanging.close())).start()
    with pytest.raises(BackendError, match="while writing the check of an export"):
        hanging.probe(tmp_path)


PARENT = """
import signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
from pathlib import Path
from iterft_lite.backends.processes.child import Child
from iterft_lite.protocols import Trainer
from tests.test_processes import SETTINGS
child = Child("tests.workers:Grandparent", Trainer, log=Path(sys.argv[1]) / "trainer.log")
threading.Thread(target=lambda: child.load(str(Path(sys.argv[1]) / "pid"), SETTINGS), daemon=True).start()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_a_killed_parent(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text() != "", 30)
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: gone(int(pid.read_text())))


def test_a_child_outlives_the_thread_that_started_it(start: Callable[..., Child]) -> None:
    teller = start("Teller")
    thread = threading.Thread(target=lambda: teller.load("PATH", SETTINGS))
    thread.start()
    thread.join()
    time.sleep(0.2)
    pid = teller.pid
    assert pid is not None
    teller.load("PATH", SETTINGS)
    assert teller.pid == pid


# -- what is said while it lasts ------------------------------------------------------------------------------------------


def test_a_paused_child_is_noticed_and_continues(
    start: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "SILENT", 0.3)
    hanging, seen = start("Hanging"), []

    def noticed(silence: Silence) -> None:
        seen.append(silence)
        if silence.state:
            hanging.close()

    def stop(_: Progress) -> None:
        os.kill(hanging.pid or 0, signal.SIGSTOP)

    hanging.on_silence = noticed
    with pytest.raises(BackendError):
        hanging.train(job(tmp_path), stop)
    assert "the trainer has given no sign of life for" in seen[-1].sentence
    assert "is stopped: `kill -CONT" in seen[-1].sentence


def test_a_working_child_reports_twice_before_it_counts_as_silent(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert children.BEAT < children.SILENT / 2


def test_a_linked_or_unwritable_log_is_replaced_by_another_file(start: Callable[..., Child], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link.log").symlink_to("precious")
    assert start("Teller", log=tmp_path / "link.log").load("PATH", SETTINGS).architecture
    assert start("Teller", log=Path("/proc/none/trainer.log")).load("PATH", SETTINGS).architecture
    assert (tmp_path / "precious").read_text() == "mine"
