"""Collect the tests of this folder only with ``-m openmmlab``, because they need the packages of a separate environment."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import test files whose packages are not installed."""
    return True if collection_path.suffix == ".py" and "openmmlab" not in config.option.markexpr else None
