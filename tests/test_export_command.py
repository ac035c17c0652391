"""`iterft export`: any cycle's model again as a GGUF, whatever `keep` left of the run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.app.chat import open_chat
from iterft_lite.app.session import open_run
from iterft_lite.digests import digest_by_pieces
from iterft_lite.files import read_json
from iterft_lite.gguf.file import GgufFile
from iterft_lite.protocols import Change, Parity
from iterft_lite.testing.fakes import FakeGenerator
from iterft_lite.ui.cli import main
from tests.loop import change_completion, small_recipe, step_path

SHORT = (
    "cycles=1", "seed_rows=8", "rows=8", "train.epochs=1", "sample.max_tokens=24",
    "evaluate.questions=2", "evaluate.samples=2", "evaluate.max_tokens=24", 'judge="fake"',
)  # fmt: skip


def iterft(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert done.exit_code != 0, done.output
    return " ".join(done.output.split())


def run(out: Path, *settings: str, reuse: Path | None = None) -> Path:
    given = [part for text in (*SHORT, *settings) for part in ("--set", text)]
    iterft("run", "nano_sft", "--out", str(out), "--plain", *given, *(("--reuse", str(reuse)) if reuse else ()))
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two trained models that keeps every merged file."""
    return run(tmp_path_factory.mktemp("whole") / "run", "keep=all")


def merged_files(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("by-name/*/model.gguf"))


@pytest.mark.slow
def test_a_cycle_whose_merged_file_was_removed_is_written_again_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    root = run(tmp_path / "run", "keep=last", reuse=whole)
    assert merged_files(root) == ["c1-export"]
    out = iterft("export", str(root), "--cycle", "0", "--ollama", "--out", str(tmp_path / "again"))
    assert "Modelfile" in out
    known = read_json(root / "by-name/c0-export/completion.json")["files"]["model.gguf"]["sha256"]
    assert digest_by_pieces(tmp_path / "again/run-c0-q8_0.gguf") == known
    assert "FROM ./run-c0-q8_0.gguf" in (tmp_path / "again/run-c0-q8_0.Modelfile").read_text()
    # another cycle or number format has another name; the same is written again only where that is asked for
    again = ("export", str(root), "--cycle", "0", "--out", str(tmp_path / "again"))
    assert "run-c0-q8_0.gguf` already exists" in refused(*again)
    iterft(*again, "--force")
    iterft("export", str(root), "--quant", "f16", "--out", str(tmp_path / "f16"))
    assert GgufFile(tmp_path / "f16/run-c1-f16.gguf").value("general.file_type") == 1

    # what a model was made of has come out differently since, or its adapter is another: neither talked to nor exported
    folder = step_path(root, "c1-training_samples")
    known_files = read_json(folder / "completion.json")["files"]
    change_completion(folder, files={name: {**file, "rows": "0" * 64} for name, file in known_files.items()})
    for command in (("export", str(root), "--out", str(tmp_path / "no")), ("chat", str(root))):
        assert "(c1-build_dataset) was made from another `c1-training_samples`" in refused(*command)
    iterft("export", str(root), "--cycle", "0", "--out", str(tmp_path / "earlier"))
    change_completion(folder, files=known_files)
    adapter = root / "by-name/c1-train/adapter/adapter_model.safetensors"
    other_weights = adapter.read_bytes()[:-1] + b"x"
    adapter.unlink()  # it is linked to the other run's
    adapter.write_bytes(other_weights)
    assert "(checksum)" in refused("export", str(root), "--out", str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_adapters_are_kept_alone_and_merged_on_demand(whole: Path, tmp_path: Path) -> None:
    root = run(tmp_path / "run", "export=adapter", "keep=adapters", reuse=whole)
    assert merged_files(root) == []
    assert (root / "by-name/c1-export/adapter.gguf").is_file()
    written = iterft("export", str(root), "--out", str(tmp_path / "out"))
    assert re.search(r"checked: it shows (0\.9|1\.0)\d \+- \d\.\d\d of what was trained", written)
    assert GgufFile(tmp_path / "out/run-c1-q8_0.gguf").architecture == "qwen3"
    # as two files, the adapter and what it is laid over: the second of them is one for all cycles
    for cycle in ("0", "1"):
        iterft("export", str(root), "--cycle", cycle, "--adapter", "--ollama", "--out", str(tmp_path / "out"))
    assert GgufFile(tmp_path / "out/run-c1-adapter.gguf").value("general.type") == "adapter"
    lines = (tmp_path / "out/run-c1-q8_0.Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./run-base-q8_0.gguf", "ADAPTER ./run-c1-adapter.gguf"]


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fake backends that keeps adapters, of exports those at its ends."""
    root = tmp_path_factory.mktemp("fakes")
    (root / "small.toml").write_text(f'export = "adapter"\nkeep = "ends"{small_recipe()}')
    with open_run(root / "small.toml", (), root / "run") as opened:
        list(opened.events())
    return root / "run"


def shown(kept: float) -> Callable[..., Parity]:
    """What a generator finds of an export that shows a share of the training, when it is asked for it."""
    change = Change(learned=0.01, size=1.0, scale=9.0, shown=kept, kept=kept, error=0.01, correlation=1.0, noise=0.05)
    found = Parity(same_tokens=True, max_delta=0.0, mean_kl=0.002, top1=1.0, positions=9, change=change)
    return lambda _, probe, untouched=None: found if untouched else replace(found, change=None)


def test_a_merged_file_that_lost_the_training_is_not_written(
    fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGenerator, "parity", shown(kept=0.3))
    said = refused("export", str(fakes), "--out", str(tmp_path))
    assert "shows 0.30 +- 0.01 of what was trained: the change was lost in the export" in said
    assert "`--quant f16`; `--adapter` writes the untouched model and the adapter as two files" in said
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_fails_its_check_is_not_told_to_be_an_adapter(
    fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGenerator, "parity", shown(kept=0.3))
    said = refused("export", str(fakes), "--adapter", "--out", str(tmp_path))
    assert "the adapter is not applied as it was trained" in said
    assert "--adapter" not in said


def test_an_export_says_what_it_carries(fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGenerator, "parity", shown(kept=0.97))
    said = iterft("export", str(fakes), "--out", str(tmp_path))
    assert "it shows 0.97 +- 0.01 of what was trained, under noise 0.05 times as large" in said
    assert "its predictions are 0.002 nats from the model's" in iterft(
        "export", str(fakes), "--cycle", "-1", "--out", str(tmp_path)
    )


def test_the_untouched_model_has_no_adapter_to_export(fakes: Path, tmp_path: Path) -> None:
    said = refused("export", str(fakes), "--cycle", "-1", "--adapter", "--out", str(tmp_path))
    assert "the untouched model has no adapter" in said


def test_another_file_in_the_untouched_models_place_is_not_written_over(fakes: Path, tmp_path: Path) -> None:
    (tmp_path / "run-base-f32.gguf").write_text("mine")
    said = refused("export", str(fakes), "--adapter", "--out", str(tmp_path))
    assert "run-base-f32.gguf` already exists" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run-base-f32.gguf"]
    assert (tmp_path / "run-base-f32.gguf").read_text() == "mine"


def test_a_chat_lays_a_removed_adapter_over_the_untouched_model_again(fakes: Path) -> None:
    assert not (fakes / "by-name/c2-export/adapter.gguf").exists()
    with open_chat(fakes, 2) as talk:
        assert [path.name for path in (talk._scratch / "c2").iterdir()] == ["adapter.gguf"]


def test_a_model_is_used_without_the_adapters_of_earlier_cycles(fakes: Path, tmp_path: Path) -> None:
    for adapter in ("c0-train", "c1-train"):
        shutil.rmtree(fakes / "by-name" / adapter / "adapter")  # as `keep = "ends"` would, of real ones
    assert "wrote" in iterft("export", str(fakes), "--out", str(tmp_path))
    said = refused("export", str(fakes), "--cycle", "1", "--out", str(tmp_path))
    assert 'the adapter of cycle 1 was removed: `keep = "ends"` keeps the first and the last' in said


@pytest.mark.slow
def test_every_merged_file_can_be_kept(whole: Path) -> None:
    assert merged_files(whole) == ["c0-export", "c1-export"]  # the untouched model's is in the cache, for all runs
