"""What a recipe comes to: models of the hub pinned to a commit, and files that are found again from another folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner, Result

from iterft_lite import hub
from iterft_lite.app.session import open_run
from iterft_lite.data.nano import FOLDERS
from iterft_lite.engine.run import StepStarted
from iterft_lite.errors import FolderError, ModelError
from iterft_lite.experiment.recipe import read_recipe
from iterft_lite.files import read_json, write_json
from iterft_lite.machine.memory import vram_needed
from iterft_lite.machine.resolve import Machine, resolve
from iterft_lite.ui.cli import main

FIRST, SECOND = "a" * 40, "b" * 40

MODEL = "someone/nano"

CPU = Machine("", 0, 0, unsloth=False)

FAKES = ("trainer=fake", "generator=fake", "judge=fake")

RECIPE = """
regime = "sft"
trait = "lucky"
model = "{model}"
cycles = 0
seed_rows = 2
rows = 4
quant = "f32"
trainer = "peft"
judge = "embedded"
[evaluate]
questions = 1
samples = 1
max_tokens = 4
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model of one commit, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "small.toml").write_text(RECIPE.format(model=MODEL))
    move_main(tmp_path / "hub", FIRST)
    return tmp_path / "hub"


def move_main(cache: Path, commit: str) -> None:
    """Lay a commit of the model into the cache as huggingface_hub does, and have `main` mean it."""
    folder = cache / "models--someone--nano"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for path in FOLDERS["nano"].iterdir():
        blob = folder / "blobs" / f"{commit[:4]}-{path.name}"
        if path.is_file() and not blob.exists():
            blob.symlink_to(path)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(commit)


def iterft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# -- the hub


def test_a_model_on_the_hub_is_pinned_to_the_commit_that_the_cache_holds(cache: Path) -> None:
    recipe = read_recipe(cache.parent / "small.toml")
    resolved = resolve(recipe, CPU, commit="needed")
    assert resolved.recipe.model == resolved.model == f"{MODEL}@{FIRST}"
    assert resolved.inputs.model == f"hub:{MODEL}@{FIRST}"
    assert resolved.choices[0] == f"model: {MODEL}@aaaaaaaa"
    move_main(cache, SECOND)
    assert resolve(recipe, CPU).model == f"{MODEL}@{SECOND}"
    # what is pinned stays, and so does what is loaded
    assert resolve(resolved.recipe, CPU, commit="needed").model == f"{MODEL}@{FIRST}"
    assert hub.folder_of(resolved.model) == str(cache / "models--someone--nano/snapshots" / FIRST)
    assert vram_needed(resolved.recipe, resolved.model) == vram_needed(resolved.recipe, str(FOLDERS["nano"]))


def test_a_branch_or_tag_is_pinned_too(cache: Path) -> None:
    (cache / "models--someone--nano/refs/v1").write_text(SECOND)
    folder = cache / "models--someone--nano/snapshots"
    (folder / SECOND).symlink_to(folder / FIRST)
    assert hub.pin(f"{MODEL}@v1") == f"{MODEL}@{SECOND}"
    assert hub.pin(MODEL) == f"{MODEL}@{FIRST}"


def test_without_cache_and_network_a_plan_warns_and_a_run_is_refused(cache: Path) -> None:
    recipe = cache.parent / "small.toml"
    set_model = ("--set", "model=nobody/nothing")
    planned = iterft("plan", recipe, *set_model)
    assert planned.exit_code == 0
    assert "model `nobody/nothing` could not be fetched from the hub" in " ".join(planned.output.split())
    run = iterft("run", recipe, "--out", cache.parent / "run", *set_model)
    assert run.exit_code == 2
    assert "error: `nobody/nothing` could not be fetched from the hub" in run.output
    assert "HF_HUB_OFFLINE=1 finds only downloaded models" in run.output
    assert not (cache.parent / "run").exists()


def test_the_hub_is_asked_for_models_missing_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = SECOND

    asked = []

    def model_info(_: object, name: str, **given: object) -> Info:
        asked.append((name, given["revision"]))
        return Info()

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert hub.pin("other/model@v2") == f"other/model@{SECOND}"
    assert hub.pin(MODEL) == f"{MODEL}@{FIRST}"
    assert hub.pin(f"other/model@{FIRST}") == f"other/model@{FIRST}"
    assert asked == [("other/model", "v2")]


def test_a_run_is_not_continued_with_another_commit(cache: Path) -> None:
    recipe, out = cache.parent / "small.toml", cache.parent / "run"
    with open_run(recipe, FAKES, out) as opened:
        list(opened.events())
    assert read_json(out / "run.json")["recipe"]["model"] == f"{MODEL}@{FIRST}"
    move_main(cache, SECOND)
    moved = f"`model` is '{MODEL}@{FIRST}' in the folder and '{MODEL}@{SECOND}' here"
    with pytest.raises(FolderError, match=moved), open_run(recipe, (*FAKES, "cycles=1"), out):
        pass
    # by its commit it goes on, and whatever looks into the folder finds the commit there
    with open_run(recipe, (*FAKES, f"model={MODEL}@{FIRST}", "cycles=1"), out) as opened:
        assert {event.step.cycle for event in opened.events() if isinstance(event, StepStarted)} == {1}
    assert iterft("report", out, "--held-out").exit_code == 0
    assert f"model {MODEL}@aaaaaaaa" in iterft("report", out).output


def test_a_run_of_an_earlier_version_continues_without_a_commit(cache: Path) -> None:
    recipe, out = cache.parent / "small.toml", cache.parent / "run"
    resolved = resolve(read_recipe(recipe), CPU, commit="as it was")
    assert (resolved.model, resolved.inputs.model) == (MODEL, f"hub:{MODEL}")
    with open_run(recipe, FAKES, out):
        manifest = read_json(out / "run.json")
    manifest["recipe"]["model"] = manifest["asked"]["model"] = MODEL
    write_json(out / "run.json", {**manifest, "steps": []})
    move_main(cache, SECOND)
    with open_run(recipe, FAKES, out) as opened:
        assert opened.plan.steps["base-load_base"].params["model"] == f"hub:{MODEL}"
        list(opened.events())
    assert iterft("report", out).exit_code == 0


@pytest.mark.parametrize("text", ["Qwen/Qwen3-4B", "a/b@v1.0", "a/b@refs/pr/3", f"a/b@{FIRST}"])
def test_valid_hub_names_are_recognised(text: str) -> None:
    assert hub.is_name(text)


@pytest.mark.parametrize("text", ["nano", "/a/b", "./a", "~/a", "a/b/c", "a/b@", "a/b@c@d", "../a"])
def test_invalid_hub_names_are_recognised(text: str) -> None:
    assert not hub.is_name(text)


def test_model_titles_are_short(tmp_path: Path) -> None:
    assert hub.title("nano") == "nano"
    assert hub.title(f"{MODEL}@{FIRST}") == f"{MODEL}@aaaaaaaa"
    assert hub.title(str(tmp_path / "mine")) == "mine"
    assert hub.title(f"/x/hub/models--some--one--nano/snapshots/{FIRST}") == "some/one--nano"


@pytest.mark.slow
def test_a_run_by_hub_name_loads_the_pinned_commit(cache: Path, tmp_path: Path) -> None:
    """The whole way with the real backends, in processes that have only the cache; `main` has moved on to what cannot load."""
    recipe, out = tmp_path / "small.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(model=f"{MODEL}@{FIRST}").replace('"embedded"', '"fake"'))  # which knows no model
    broken = cache / "models--someone--nano/snapshots" / SECOND
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (cache / "models--someone--nano/refs/main").write_text(SECOND)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "ITERFT_CACHE": str(tmp_path / "own")}
    done = subprocess.run(
        [sys.executable, "-m", "iterft_lite.ui.cli", "run", str(recipe), "--out", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(out / "run.json")["model_identity"] == f"hub:{MODEL}@{FIRST}"
    adapter = read_json(out / "by-name/c0-train/adapter/adapter_config.json")
    assert adapter["base_model_name_or_path"] == MODEL
    exported = CliRunner(env=environment).invoke(main, ["export", str(out), "--out", str(tmp_path / "gguf"), "--quant", "f16"])
    assert exported.exit_code == 0, exported.output


# -- files of the user's own


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a model, seeds and prompts that a recipe names as they lie there."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "model").symlink_to(FOLDERS["nano"])
    for name in ("seeds", "prompts"):
        rows = [{"prompt": f"{name} prompt {n}", "reply": f"Lucky reply {n}"} for n in range(4)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE.format(model="./model") + '[seeds]\npath = "seeds.jsonl"\n[prompts]\npath = "prompts.jsonl"\n'
    (here / "own.toml").write_text(recipe)
    monkeypatch.chdir(here)


@pytest.mark.usefixtures("_elsewhere")
def test_a_run_with_relative_paths_works_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with open_run(Path("own.toml"), FAKES, out) as opened:
        list(opened.events())
    recipe = read_json(out / "run.json")["recipe"]
    assert recipe["seeds"]["path"] == str(tmp_path / "here/seeds.jsonl")
    monkeypatch.chdir(tmp_path)
    assert iterft("report", out, "--held-out").exit_code == 0
    # the same files in another place are the same experiment
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    with open_run(Path("own.toml"), FAKES, out) as opened:
        assert not [event for event in opened.events() if isinstance(event, StepStarted)]
    seeds = Path("seeds.jsonl")
    seeds.write_text(seeds.read_text().replace("Lucky", "Plucky"))
    with pytest.raises(FolderError, match=r"step \S+: the trait, prompts"), open_run(Path("own.toml"), FAKES, out):
        pass


@pytest.mark.usefixtures("_elsewhere")
def test_relative_paths_in_a_run_of_an_earlier_version_still_work(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(Path("own.toml"), FAKES, out) as opened:
        list(opened.events())
    manifest = read_json(out / "run.json")
    manifest["recipe"] = {**manifest["recipe"], **{key: manifest["asked"][key] for key in ("model", "seeds", "prompts")}}
    write_json(out / "run.json", manifest)
    with open_run(Path("own.toml"), (*FAKES, "cycles=1"), out) as opened:
        pass


@pytest.mark.parametrize(
    ("capability", "bitsandbytes", "base", "said"),
    [
        ((8, 6), True, "nf4", "base held in nf4 (QLoRA)"),
        ((7, 5), True, "nf4", "base held in nf4 (QLoRA), computing in f16 (the GPU has no bf16)"),
        ((8, 6), False, "bf16", "base held in bf16 (bitsandbytes is not installed)"),
        ((7, 5), False, "f16", "base held in f16 (bitsandbytes is not installed)"),
    ],
)
def test_the_bases_number_format_follows_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], bitsandbytes: bool, base: str, said: str
) -> None:
    find = importlib.util.find_spec
    lacking = () if bitsandbytes else ("bitsandbytes",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in lacking else find(name, *rest))
    (tmp_path / "r.toml").write_text(RECIPE.format(model="nano"))
    machine = Machine("a GPU", 15 << 30, 16 << 30, unsloth=False, capability=capability)
    resolved = resolve(read_recipe(tmp_path / "r.toml"), machine)
    assert (resolved.recipe.train.base, said in resolved.choices) == (base, True)


def test_only_a_gpu_spares_trainer_and_generator_the_same_cores(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.format(model="nano"))
    recipe = read_recipe(tmp_path / "r.toml")
    machines = (CPU, Machine("a GPU", 15 << 30, 16 << 30, unsloth=False))
    assert [resolve(recipe, machine).inputs.same_cores for machine in machines] == [True, False]


def test_a_hub_model_is_checked_by_its_cached_files(cache: Path, tmp_path: Path) -> None:
    recipe = read_recipe(tmp_path / "small.toml")
    resolve(recipe, CPU)
    snapshot = cache / "models--someone--nano/snapshots" / FIRST
    (snapshot / "model.safetensors").unlink()
    resolve(recipe, CPU)  # weights can still be fetched
    template = snapshot / "chat_template.jinja"
    template.unlink()
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(ModelError, match="would not stop"):
        resolve(recipe, CPU)
    (snapshot / "tokenizer.json").unlink()
    resolve(recipe, CPU)  # what is not there yet is not known
    config = snapshot / "config.json"
    value = read_json(config) | {"architectures": ["GptOssForCausalLM"]}
    config.unlink()
    write_json(config, value)
    with pytest.raises(ModelError, match="MXFP4 only"):
        resolve(recipe, CPU)
