"""The reference run in a single process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.colossalai import boosted_runs


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process after an epoch of the small language model."""
    return boosted_runs.trained("single", str(tmp_path_factory.mktemp("single")))
