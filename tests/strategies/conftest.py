"""Strategies that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from small_runs import make
from stratagem.strategies import BaseStrategy


@pytest.fixture
def single(tmp_path: Path) -> Iterator[Callable[..., BaseStrategy]]:
    """Make a SingleDeviceStrategy with seed 0 and ``tmp_path`` as its work_dir, unless told otherwise."""
    made: list[BaseStrategy] = []

    def build(work_dir: Path = tmp_path, **kwargs: object) -> BaseStrategy:
        made.append(make("single", work_dir, **kwargs))
        return made[-1]

    yield build
    for strategy in made:
        strategy.close()
