"""Tests that need a GPU are left out, and said to be, where there is none."""

from __future__ import annotations

import pytest

from iterft_lite.resolve import this_machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if this_machine().gpu:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
