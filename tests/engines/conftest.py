"""Groups of ranks in the environment of an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def one() -> Iterator[Ranks]:
    """A process group with a single rank."""
    pool = Ranks(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two ranks that are shared by the whole session."""
    pool = Ranks(2)
    yield pool
    pool.close()
