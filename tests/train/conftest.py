from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stratagem import BaseStrategy, Runner
from tests.train.toys import settings


@pytest.fixture
def make_runner(tmp_path: Path) -> Iterator[Callable[..., Runner]]:
    """Return a function that builds runners of the small run with some arguments changed; all are closed at the end."""
    made: list[Runner] = []

    def make(**changes: Any) -> Runner:
        if not isinstance(changes.get("strategy"), BaseStrategy):
            changes.setdefault("work_dir", tmp_path / "run")
        made.append(Runner(**settings(**changes)))
        return made[-1]

    yield make
    for runner in made:
        runner.close()
