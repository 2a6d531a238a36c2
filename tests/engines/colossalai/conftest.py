"""Groups of two and four ranks with ColossalAI, and what a single process computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boosted_runs
import pytest

from ranks import Ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two ranks that live as long as the session."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four ranks that live as long as the session."""
    pool = Ranks(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes in an epoch of the small language model."""
    return boosted_runs.trained("single", str(tmp_path_factory.mktemp("single")))
