"""Strategies that are closed at the end of their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratagem.strategies import BaseStrategy
from tests.support.small_runs import make


@pytest.fixture
def single(tmp_path: Path) -> Iterator[Callable[..., BaseStrategy]]:
    """Return a function that builds a SingleDeviceStrategy, by default with seed 0 and ``tmp_path`` as work_dir."""
    made: list[BaseStrategy] = []

    def build(work_dir: Path = tmp_path, **kwargs: object) -> BaseStrategy:
        made.append(make("single", work_dir, **kwargs))
        return made[-1]

    yield build
    for strategy in made:
        strategy.close()
