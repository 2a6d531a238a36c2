"""The reference run in a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.deepspeed.engine_runs import go, placed


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process; ``at`` is its checkpoint after 6 iterations, and ``end`` is the last one."""
    folder = tmp_path_factory.mktemp("single")
    first = go(placed("single"), folder, stop=6, save=folder / "at")
    rest = go(placed("single"), folder, start=6, resume=folder / "at", save=folder / "end")
    seen = {key: first[key] + rest[key] for key in ("losses", "rates", "norms")}
    return {**seen, "at": folder / "at", "end": folder / "end"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The directory of the test."""
    return tmp_path
