"""Tests that need a GPU are left out, and said to be, where there is none; caches are the tests' own; no disk is waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from iterft_lite.machine.resolve import this_machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if this_machine().gpu:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the session's own, unless one is named: what a test does is no experience of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        if "ITERFT_CACHE" not in os.environ:
            patch.setenv("ITERFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """A run syncs its files two hundred times, which only a power cut could tell. What counts syncs still does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
