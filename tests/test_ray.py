"""Steps on a Ray cluster: three nodes on this machine, fake backends, and what may happen to a worker."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iterft_lite import errors
from iterft_lite.app import doctor
from iterft_lite.app.study_plan import StudyPlan
from iterft_lite.app.sweep import CellEvent, open_sweep
from iterft_lite.app.sweep_places import RayPlace, local_places, places_on, ray_places
from iterft_lite.engine import ray_cluster
from iterft_lite.engine.completion import read_completion
from iterft_lite.engine.executor import LocalExecutor, Outcome, Task
from iterft_lite.engine.manifest import finished_steps
from iterft_lite.engine.ray_cluster import Site, connect, load_ray, sites
from iterft_lite.engine.ray_executor import RayExecutor
from iterft_lite.engine.store import Making, StepFolder, Working
from iterft_lite.errors import BackendError, Diverged, RecipeError, UserError
from iterft_lite.files import write_text
from iterft_lite.machine.resolve import this_machine
from iterft_lite.protocols import Progress
from iterft_lite.stages.judge import NotYet
from iterft_lite.testing.fakes import FAKE_JUDGE, fake_backends
from tests.loop import a_plan, small_recipe

INSTALLED = importlib.util.find_spec("ray") is not None

on_a_cluster = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="the extra `ray` is not installed"),
]

ROOT = Path(__file__).parent.parent


# -- without Ray


@pytest.mark.parametrize(
    "kind", [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.IterftError)]
)
def test_every_error_class_survives_pickling(kind: type[errors.IterftError]) -> None:
    made = kind(["one", "two"], source="here", hint="do this") if kind is RecipeError else kind("what is wrong", hint="do this")
    made.kind = "provider"
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is kind
    assert (again.message, again.hint, again.kind, str(again)) == (made.message, "do this", "provider", str(made))


def test_not_yet_survives_pickling_with_its_seconds() -> None:
    assert pickle.loads(pickle.dumps(NotYet(12.5))).seconds == 12.5


def test_a_step_locked_by_a_remote_worker_is_not_started(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", next(iter(a_plan())))
    first, second = Making(folder), Making(folder)
    assert first.try_acquire()
    with Working(folder):
        first.release()  # the process that had sent the worker is gone
        assert not second.try_acquire()
    assert second.try_acquire()


def test_without_ray_the_error_gives_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="needs Ray") as caught:
        load_ray()
    assert caught.value.hint == "pip install 'iterft_lite[ray]'"


@pytest.mark.parametrize("address", ["nonsense", "ray://head:10001", "head"])
def test_an_invalid_cluster_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "load_ray", lambda: type("Ray", (), {"is_initialized": staticmethod(lambda: False)}))
    with pytest.raises(UserError, match=address):
        connect(address)


def test_sweeps_run_locally_by_default_and_an_unknown_place_is_refused(tmp_path: Path) -> None:
    here = this_machine()
    assert list(places_on("local", tmp_path, here)[0]) == local_places(here)
    with pytest.raises(UserError, match="`--on slurm` is not a place"):
        places_on("slurm", tmp_path, here)


def test_a_missing_cluster_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "load_ray", lambda: type("Ray", (), {"is_initialized": staticmethod(lambda: False)}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"the Ray cluster at `{address}` cannot be reached"):
            connect(address)
    assert time.monotonic() - begun < 10


def test_a_node_that_cannot_see_the_study_is_reported(tmp_path: Path) -> None:
    nonce = ray_cluster._Nonce(tmp_path / "nonce", "what the driver wrote", ray_cluster.iterft_lite.__version__)
    assert ray_cluster._problem_here(nonce) == f"it does not see the study's folder, `{tmp_path}`"
    nonce.path.write_text("another folder of the same name")
    assert "does not see the study's folder" in ray_cluster._problem_here(nonce)


IN_ANOTHER_MOUNT = """
import sys
from pathlib import Path
from iterft_lite.engine.ray_cluster import _Nonce, _problem_here
path, text, version = sys.argv[1:]
path = Path(path)
path.with_name("written-there").touch()
print(_problem_here(_Nonce(path, text, version)))
"""


MOUNTED = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]


def can_mount() -> bool:
    """Whether this process may have mounts of its own."""
    return bool(shutil.which("unshare")) and subprocess.run(MOUNTED, capture_output=True).returncode == 0


class FakeNode:
    """A node of a cluster that is no other machine; the second has something else mounted in the place of the study."""

    def __init__(self, name: str, *, mounts_another: bool) -> None:
        self.id = self.name = name
        self.cpus, self.gpus = 1.0, 0
        self._mounts_another = mounts_another

    def start(self, function: Callable[[Any], str], nonce: Any) -> str:
        if not self._mounts_another:
            return function(nonce)
        inside = 'mount -t tmpfs none "$1" && shift && exec "$@"'
        python = [sys.executable, "-c", IN_ANOTHER_MOUNT, str(nonce.path), nonce.text, nonce.version]
        command = ["unshare", "-rm", "sh", "-c", inside, "sh", str(nonce.path.parent), *python]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


@pytest.mark.skipif(not can_mount(), reason="mounts of one's own are not allowed here")
def test_a_node_with_another_disk_at_the_studys_path_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [FakeNode("node-1", mounts_another=False), FakeNode("node-2", mounts_another=True)]
    exceptions = type("exceptions", (), {"RayError": OSError, "GetTimeoutError": TimeoutError})
    ray = type("Ray", (), {"get": staticmethod(lambda answer, timeout: answer), "exceptions": exceptions})
    monkeypatch.setattr(ray_cluster, "load_ray", lambda: ray)
    monkeypatch.setattr(ray_cluster, "nodes", lambda _: there)
    found = sites("", tmp_path)
    assert [site.name for site in found.found] == ["node-1"]
    assert found.notes == (f"node-2 is left out: it does not see the study's folder, `{tmp_path}`",)
    assert list(tmp_path.iterdir()) == []  # what the other wrote is on its own disk
    there.pop(0)
    with pytest.raises(UserError, match="no node of the Ray cluster can be used") as caught:
        sites("", tmp_path)
    assert "at the same path on a shared disk" in (caught.value.hint or "")


def test_a_node_without_shared_file_locks_is_reported(tmp_path: Path) -> None:
    nonce = ray_cluster._Nonce(tmp_path / "nonce", "text", ray_cluster.iterft_lite.__version__)
    nonce.path.write_text("text")
    assert "are not seen on other machines" in ray_cluster._problem_here(nonce)


def test_a_node_with_another_version_is_reported(tmp_path: Path) -> None:
    assert "it has iterft_lite" in ray_cluster._problem_here(ray_cluster._Nonce(tmp_path / "nonce", "text", "0.0.1"))


@pytest.mark.skipif(not INSTALLED, reason="the extra `ray` is not installed")
def test_doctor_reports_whether_a_cluster_token_is_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (found,) = doctor._ray()
    assert "no token for clusters" in found.text
    assert "ray get-auth-token" in found.remedy
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    (found,) = doctor._ray()
    assert "a token for clusters" in found.text
    assert found.remedy == ""


# -- with a cluster


def scripted(logs: Path, threads: int) -> LocalExecutor:
    """Opens an executor that does what a task's recipe is called."""
    return Scripted(threads)


class Scripted(LocalExecutor):
    """Fails, tells of its environment, or works until it is told to end."""

    def __init__(self, threads: int) -> None:
        super().__init__(fake_backends(), "nano", 64)
        self.threads = threads

    def run(self, task: Task) -> Outcome:
        match task.recipe.name:
            case "diverges":
                raise Diverged("the loss is no number", hint="lower `learning_rate`")
            case "is asked wrongly":
                raise RecipeError(["one", "two"], source="the recipe")
            case "has a bug":
                raise KeyError("nobody")
            case "has a full disk":
                raise OSError(28, "No space left on device", str(task.folder.path))
            case "works on":
                self._work_on(task)
        sys.stdout.write("the worker prints\n")
        sys.stdout.flush()
        found = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        return Outcome({"pid": os.getpid(), "threads": self.threads, **found})

    def prepare(self, task: Task) -> None:
        if task.recipe.name == "dies while it gets ready":
            os.kill(os.getpid(), signal.SIGKILL)
        task.report(task.folder, Progress(0, 0, "", note=f"process {os.getpid()} gets ready"))

    def _work_on(self, task: Task) -> None:
        for number in range(100_000):
            write_text(task.folder.path / "beat", f"{os.getpid()} {number}")
            time.sleep(0.02)
            task.report(task.folder, Progress(number, 0, "beats"))

    def interrupt(self, tasks: Collection[Task]) -> None:
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of a core each, which notice within seconds that one is gone."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
        small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
        made = Cluster(initialize_head=True, head_node_args={**small, "_system_config": quick})
        for _ in range(2):
            made.add_node(wait=False, **small)
        made.wait_for_nodes()
        connect(made.address)
        yield made
        load_ray().shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def found(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, ...]:
    return sites(cluster.address, tmp_path_factory.mktemp("study")).found


@pytest.fixture(scope="module")
def executor(found: tuple[Site, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    made = RayExecutor(found[0], scripted, tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


def a_task(folder: Path, what: str, report: Any = lambda *_: None) -> Task:
    plan = a_plan(name=what)
    made = StepFolder(folder / "step", next(iter(plan)))
    made.path.mkdir(parents=True, exist_ok=True)
    return Task(made, plan.recipe, {}, frozenset(), report)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def until(true: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


def worker_of(task: Task) -> int:
    """The process that works, or worked, on a task."""
    return int(beat(task).split()[0])


def beat(task: Task) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (task.folder.path / "beat").read_text()
    return ""


class TestOnACluster:
    pytestmark = on_a_cluster

    def test_probing_finds_every_node_and_leaves_no_file(self, cluster: Any, tmp_path: Path) -> None:
        found = sites(cluster.address, tmp_path)
        assert len({site.name for site in found.found}) == 3
        assert [(site.cpus, site.gpu) for site in found.found] == [(1.0, False)] * 3
        assert (found.notes, list(tmp_path.iterdir())) == ((), [])

    def test_a_worker_gets_its_cores_no_gpu_and_logs_beside_the_study(self, executor: RayExecutor, tmp_path: Path) -> None:
        told = executor.run(a_task(tmp_path, "tells")).results
        assert (told["CUDA_VISIBLE_DEVICES"], told["OMP_NUM_THREADS"], told["threads"]) == ("", "1", 1)
        assert told["pid"] != os.getpid()
        assert "the worker prints" in (executor.logs / "worker.log").read_text()

    @pytest.mark.parametrize(
        ("what", "kind", "message"),
        [
            ("diverges", "result", "the loss is no number"),
            ("is asked wrongly", "user", "the recipe: 2 problems"),
            ("has a bug", "bug", "KeyError"),
            ("has a full disk", "machine", "the disk is full"),
        ],
    )
    def test_a_failure_on_a_worker_keeps_its_kind_and_message(
        self, executor: RayExecutor, tmp_path: Path, what: str, kind: str, message: str
    ) -> None:
        with pytest.raises(errors.IterftError) as caught:
            executor.run(a_task(tmp_path, what))
        assert caught.value.kind == kind
        assert message in caught.value.message

    def test_a_cancelled_task_ends_and_its_worker_stays(self, executor: RayExecutor, tmp_path: Path) -> None:
        def enough(of: StepFolder, progress: Progress) -> None:
            if progress.done > 3:
                raise InterruptedError("enough")

        task = a_task(tmp_path, "works on", enough)
        with pytest.raises(InterruptedError, match="enough"):
            executor.run(task)
        last = beat(task)
        time.sleep(0.2)
        assert beat(task) == last
        assert not Working(task.folder).busy()
        assert executor.run(a_task(tmp_path, "tells")).results["pid"] == worker_of(task)

    def test_closing_a_lease_ends_only_its_own_tasks(self, executor: RayExecutor, tmp_path: Path) -> None:
        ended: dict[str, BaseException] = {}
        tasks = {name: a_task(tmp_path / name, "works on") for name in ("one", "other")}
        leases = {name: executor.lease() for name in tasks}

        def work(name: str) -> None:
            try:
                leases[name].run(tasks[name])
            except BaseException as error:
                ended[name] = error

        threads = [threading.Thread(target=work, args=(name,)) for name in tasks]
        for thread in threads:
            thread.start()
        assert until(lambda: all(beat(task) for task in tasks.values()))
        leases["one"].close()
        threads[0].join(10)
        last = beat(tasks["other"])
        assert until(lambda: beat(tasks["other"]) != last)
        assert list(ended) == ["one"]
        executor.close()
        threads[1].join(10)
        assert isinstance(ended["other"], BackendError)

    def test_a_worker_prepares_while_another_process_does_the_step(self, executor: RayExecutor, tmp_path: Path) -> None:
        told: list[str] = []
        task = a_task(tmp_path, "tells", lambda of, progress: told.append(progress.note))
        making = Making(task.folder)
        assert making.try_acquire()
        with Working(task.folder):
            before = sorted(task.folder.path.iterdir())
            executor.prepare(task)
            assert sorted(task.folder.path.iterdir()) == before
        making.release()
        assert told == [f"process {executor.run(task).results['pid']} gets ready"]

    def test_a_worker_that_dies_while_preparing_is_started_again(self, executor: RayExecutor, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match="was lost"):
            executor.prepare(a_task(tmp_path, "dies while it gets ready"))
        assert executor.run(a_task(tmp_path / "next", "tells")).results["pid"]

    def test_a_killed_worker_is_a_machine_failure_and_is_replaced(self, executor: RayExecutor, tmp_path: Path) -> None:
        def kill(of: StepFolder, progress: Progress) -> None:
            os.kill(worker_of(task), signal.SIGKILL)

        task = a_task(tmp_path, "works on", kill)
        with pytest.raises(BackendError, match="was lost during `base-load_base`") as caught:
            executor.run(task)
        assert caught.value.kind == "machine"
        assert not Working(task.folder).busy()
        assert executor.run(a_task(tmp_path, "tells")).results["pid"] != worker_of(task)
        executor.close()  # the node has one core, and others need it

    def test_a_worker_dies_with_its_driver_and_only_then_frees_its_step(self, cluster: Any, tmp_path: Path) -> None:
        script = (
            "from tests.test_ray import *\n"
            f"place = Path({str(tmp_path)!r})\n"
            f"site = sites({cluster.address!r}, place).found[0]\n"
            "RayExecutor(site, scripted, place).run(a_task(place, 'works on'))\n"
        )
        driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        task = a_task(tmp_path, "works on")
        try:
            assert until(lambda: beat(task), 40)
        finally:
            driver.kill()
            driver.wait()
        assert until(Making(task.folder).try_acquire)
        last = beat(task)
        assert until(lambda: gone(worker_of(task)))
        assert beat(task) == last

    def test_a_study_that_loses_a_node_ends_with_equal_results(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last test: it takes a node away. Its judge is one that is fitted on what workers wrote."""
        monkeypatch.setattr("iterft_lite.backends.judge.kinds.FAKE_JUDGE", replace(FAKE_JUDGE, own=True))
        recipe = tmp_path / "base.toml"
        recipe.write_text(small_recipe(cycles=1))
        study = tmp_path / "study.toml"
        study.write_text(f'base = "{recipe}"\n[sweep.grid]\nrows = [4, 5]\nseed = [1, 2, 3]\n')
        alone, together = tmp_path / "alone", tmp_path / "together"
        with open_sweep(StudyPlan(study), alone, local_places(this_machine())) as sweep:
            list(sweep.events())
        together.mkdir()
        places, notes = ray_places(cluster.address, together, this_machine())
        assert (len(places), notes) == (3, ())
        apart = next(place for place in places if _may_go(cluster, place))
        lost = False
        with open_sweep(StudyPlan(study), together, places) as sweep:
            sweep._pause = 0.5
            for event in sweep.events():
                if isinstance(event, CellEvent) and not lost and sweep.cells[event.cell].worker == apart.name:
                    lost = True
                    cluster.remove_node(_node(cluster, apart), allow_graceful=False)
            assert {state.state for state in sweep.cells.values()} == {"done"}
            assert max(state.attempts for state in sweep.cells.values()) > 1
            fitted_on = {cell.plan.steps["base-evaluate_samples-everyday"].key for cell in sweep.planned.values()}
        assert lost
        assert results(together) == results(alone)
        assert fitted_on <= results(together).keys()
        assert len(fitted_on) == 1


def _may_go(cluster: Any, place: RayPlace) -> bool:
    """Whether it is neither the node that holds the cluster together nor the one this process is connected to."""
    here = load_ray().get_runtime_context().get_node_id()
    return place.site.node.id not in (cluster.head_node.node_id, here)


def _node(cluster: Any, place: RayPlace) -> Any:
    return next(node for node in cluster.list_all_nodes() if node.node_id == place.site.node.id)


def results(study: Path) -> dict[str, str]:
    """By key of each step, what it came to."""
    found = {key: read_completion(path) for key, path in finished_steps(study).items()}
    return {key: completion.result for key, completion in found.items() if completion}
