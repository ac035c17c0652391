"""The lock file agrees with pyproject.toml, and has a digest and a public address for all that it names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

PUBLIC = {"pypi.org", "files.pythonhosted.org", "download.pytorch.org"}

MALICIOUS = {("litellm", "1.82.7"), ("litellm", "1.82.8")}

SOURCE_ALONE = {"llama-cpp-python"}
"""Compiled for the processor that it is installed on."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def packages() -> list[dict[str, Any]]:
    return tomllib.loads((ROOT / "uv.lock").read_text())["package"]


def wanted(project: dict[str, Any]) -> set[tuple[str, str, str]]:
    """What pyproject.toml asks for: extra, name, versions."""
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    found = [(extra, Requirement(line)) for extra, lines in extras.items() for line in lines]
    return {(extra, canonicalize_name(each.name), str(each.specifier)) for extra, each in found}


def locked_for(packages: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """What the lock was made for, likewise."""
    own = next(each for each in packages if each["source"] == {"editable": "."})
    return {
        (
            each.get("marker", "").rpartition("extra == ")[2].strip("'"),
            each["name"],
            str(SpecifierSet(each.get("specifier", ""))),
        )
        for each in own["metadata"]["requires-dist"]
    }


def test_the_lock_file_matches_pyproject(project: dict[str, Any], packages: list[dict[str, Any]]) -> None:
    assert locked_for(packages) == wanted(project), "pyproject.toml was changed: run `uv lock`"


def test_every_locked_version_satisfies_its_requirement(project: dict[str, Any], packages: list[dict[str, Any]]) -> None:
    versions = {name: {each["version"] for each in packages if each["name"] == name} for _, name, _ in wanted(project)}
    outside = [
        (name, version, asked)
        for _, name, asked in wanted(project)
        for version in versions[name]
        if version not in SpecifierSet(asked)
    ]
    assert not outside
    assert all(versions.values())
    assert not MALICIOUS & {(each["name"], each.get("version")) for each in packages}


def test_every_locked_package_has_a_digest_and_a_public_address(packages: list[dict[str, Any]]) -> None:
    files = [file for each in packages for file in [*each.get("wheels", []), *([each["sdist"]] if "sdist" in each else [])]]
    assert {urlsplit(file["url"]).hostname for file in files} <= PUBLIC
    assert {urlsplit(each["source"]["registry"]).hostname for each in packages if "registry" in each["source"]} <= PUBLIC
    assert all(file["hash"].startswith("sha256:") and len(file["hash"]) == 71 for file in files)
    assert {each["name"] for each in packages if not each.get("wheels") and "registry" in each["source"]} <= SOURCE_ALONE


def test_without_a_gpu_torch_has_no_cuda(packages: list[dict[str, Any]]) -> None:
    plain = next(each for each in packages if each["name"] == "torch" and each["version"].endswith("+cpu"))
    assert plain["source"]["registry"].startswith("https://download.pytorch.org/whl/cpu")
    assert not [each["name"] for each in plain["dependencies"] if each["name"].startswith(("nvidia", "cuda", "triton"))]
