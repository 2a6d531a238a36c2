"""What all tests share: seeds, order, and the pool of rank processes."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from ranks import Ranks, seed_generators
from stratagem.utils.secrets import values as secret_values

# The same examples in every run, without a database in the working directory.
hypothesis.settings.register_profile("stratagem", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("stratagem")
torch.set_num_threads(1)
# What is collected only by name: real launchers, and engines in environments of their own.
ELSEWHERE = ("launchers", "deepspeed", "colossalai")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use rank processes as slow, and put slow tests last; what needs more runs where asked for."""
    for marker in ELSEWHERE:
        if marker not in config.option.markexpr:
            apart = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if item not in apart]
            config.hook.pytest_deselected(items=apart)
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random numbers."""
    seed_generators()


@pytest.fixture(autouse=True)
def no_known_secrets() -> None:
    """Begin every test in a process that has come upon no secret, which texts would be searched for."""
    for memory in (secret_values._secrets, secret_values._placeholders, secret_values._allowed, secret_values._cache):
        memory.clear()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two rank processes with a gloo group, for ``ranks.run(function, *args, **kwargs)``; see :class:`Ranks`."""
    pool = Ranks()
    yield pool
    pool.close()
