"""`iterft export`: any cycle's model again as a GGUF, whatever `keep` left of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from iterft_lite.digests import file_digest
from iterft_lite.files import read_json
from iterft_lite.gguf.file import GgufFile
from iterft_lite.ui.cli import main
from tests.loop import change_completion, step_path

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
    assert file_digest(tmp_path / "again/run-c0-q8_0.gguf") == known
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
    iterft("export", str(root), "--out", str(tmp_path / "merged"))
    assert GgufFile(tmp_path / "merged/run-c1-q8_0.gguf").architecture == "qwen3"


@pytest.mark.slow
def test_every_merged_file_can_be_kept(whole: Path) -> None:
    assert merged_files(whole) == ["c0-export", "c1-export"]  # the untouched model's is in the cache, for all runs
