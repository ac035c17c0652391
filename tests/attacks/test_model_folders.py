"""Model folders of strangers: their code never runs, and what needs it is refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterft_lite import model_code
from iterft_lite.backends.processes.child import Child
from iterft_lite.data.nano import FOLDERS
from iterft_lite.errors import ExportError, ModelError
from iterft_lite.experiment.recipe import make_recipe
from iterft_lite.gguf.base import run_llamacpp_script
from iterft_lite.gguf.llamacpp_source import find_source
from iterft_lite.programs import run_module
from iterft_lite.protocols import Trainer

EVIL = """
from pathlib import Path
Path({mark!r}).write_text("it ran")
from transformers import PreTrainedTokenizerFast, PretrainedConfig, PreTrainedModel
class EvilTok(PreTrainedTokenizerFast): pass
class EvilConfig(PretrainedConfig): model_type = "never_heard_of"
class EvilModel(PreTrainedModel): config_class = EvilConfig
"""

MARK = "it_ran"

SETTINGS = {"regime": "sft", "trait": "lucky", "model": "nano", "train": {"base": "f32"}}

pytestmark = pytest.mark.slow


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.mark, "it ran"))


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def tokenizer_class(folder: Path) -> None:
    edit(folder / "config.json", architectures=["DreamModel"], model_type="never_heard_of")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTok", None]}, tokenizer_class="EvilTok")


def model_class(folder: Path) -> None:
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": "evil.EvilTok"}
    edit(folder / "config.json", model_type="never_heard_of", auto_map=auto_map)


def known_model_with_code(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"})


def class_of_another_repository(folder: Path) -> None:
    edit(folder / "config.json", model_type="never_heard_of", auto_map={"AutoConfig": "someone/else--evil.EvilConfig"})


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / MARK)))


HOSTILE: tuple[Callable[[Path], None], ...] = (
    tokenizer_class,
    model_class,
    known_model_with_code,
    class_of_another_repository,
    pickled_weights,
)


def hostile(folder: Path, make: Callable[[Path], None]) -> Path:
    shutil.copytree(FOLDERS["nano"], folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(folder / MARK)))
    make(folder)
    return folder


@pytest.fixture(scope="module")
def came_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By hostile folder, what came of loading it in every way that transformers has: all in one process."""
    root = tmp_path_factory.mktemp("models")
    folders = {make.__name__: hostile(root / make.__name__, make) for make in HOSTILE}
    folders["trusted"] = hostile(root / "trusted", tokenizer_class)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_code, "_trusted", set())
        patch.setenv("HF_MODULES_CACHE", str(root / "modules"))
        model_code.trust(str(folders["trusted"]))
        done = run_module("tests.attacks.load_models", [str(folder) for folder in folders.values()])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    made = {name: {key: came for key, came in told.items() if key.startswith(f"{folder} ")} for name, folder in folders.items()}
    return made | {"ran": {name: "it ran" for name, folder in folders.items() if (folder / MARK).exists()}}


def test_no_way_of_loading_runs_code_of_a_model_folder(came_of: dict[str, dict[str, str]]) -> None:
    assert came_of["ran"].keys() - {"trusted"} == set()


def test_a_model_named_on_the_command_line_may_run_its_code(came_of: dict[str, dict[str, str]]) -> None:
    assert "trusted" in came_of["ran"]


@pytest.mark.parametrize("name", ["tokenizer_class", "model_class", "class_of_another_repository"])
def test_a_model_that_needs_its_own_code_is_refused_with_a_reason(came_of: dict[str, dict[str, str]], name: str) -> None:
    refused = [came for came in came_of[name].values() if came.startswith("ModelError: ")]
    assert refused
    assert all("such code is not run" in came and "--trust-remote-code" in came for came in refused)
    assert not any("trust_remote_code=True" in came for came in came_of[name].values())


def test_a_known_model_is_loaded_with_the_librarys_own_classes(came_of: dict[str, dict[str, str]]) -> None:
    assert set(came_of["known_model_with_code"].values()) == {"loaded"}


def test_pickled_weights_are_not_loaded(came_of: dict[str, dict[str, str]]) -> None:
    models = [came for key, came in came_of["pickled_weights"].items() if "AutoModel" in key]
    assert not any(came == "loaded" for came in models)


def test_llamacpps_scripts_run_no_code_of_a_model_folder(tmp_path: Path) -> None:
    source = find_source()
    if source is None:
        pytest.skip("llama.cpp's scripts are not on this machine")
    folder = hostile(tmp_path / "model", tokenizer_class)
    edit(folder / "config.json", architectures=["Qwen3ForCausalLM"])  # whose tensors these are
    for file in ("nothing", "tokenizer.json"):  # with it, the class that the folder names is not asked for
        (folder / file).unlink(missing_ok=True)
        with contextlib.suppress(ModelError, ExportError):
            run_llamacpp_script(source, "convert_hf_to_gguf.py", folder, [str(folder), "--outfile", str(tmp_path / "out.gguf")])
        assert not (folder / MARK).exists()


def test_training_such_a_model_is_refused_without_a_prompt(tmp_path: Path) -> None:
    trainer = Child("iterft_lite.backends.trainer.peft:PeftTrainer", Trainer, log=tmp_path / "trainer.log")
    try:
        with pytest.raises(ModelError, match="such code is not run"):
            trainer.load(str(hostile(tmp_path / "model", model_class)), make_recipe(SETTINGS, source="a test").train)
    finally:
        trainer.close()
    assert not (tmp_path / "model" / MARK).exists()


# -- what is trusted ------------------------------------------------------------------------------------------------------


def test_a_hub_name_means_its_files_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_code, "_trusted", set())
    commit, other = "a" * 40, "b" * 40
    folders = {each: tmp_path / f"models--owner--name/snapshots/{each}" for each in (commit, other)}
    model_code.trust(f"owner/name@{commit}")
    assert model_code.is_trusted(str(folders[commit]))
    assert not model_code.is_trusted(str(folders[other]))
    assert not model_code.is_trusted("owner/name")
    model_code.trust("owner/name")
    assert model_code.is_trusted(str(folders[other]))
    assert not model_code.is_trusted(str(tmp_path / "models--owner--other/snapshots" / commit))
