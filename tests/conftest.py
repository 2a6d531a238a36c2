"""Configuration shared by all tests: seeds, order, and the pool of rank processes."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from stratagem.utils.secrets import values as secret_values
from tests.support.ranks import Ranks, seed_generators

# Generate the same examples in every run, without a database in the working directory.
hypothesis.settings.register_profile("full", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("fast", hypothesis.settings.get_profile("full"), max_examples=5)
hypothesis.settings.load_profile("full")
torch.set_num_threads(1)
# Collected only if selected by marker: real launchers, engines that need separate environments, and tests that need a GPU.
ELSEWHERE = ("launchers", "deepspeed", "colossalai", "foreign", "trackers", "gpu")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept the setting ``timeout`` without pytest-timeout: ``make test-gpu`` runs with the packages that it finds."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "ignored, because pytest-timeout is not installed")


def pytest_configure(config: pytest.Config) -> None:
    """Generate fewer examples if slow tests are deselected (``make test-fast``)."""
    if not config.pluginmanager.has_plugin("timeout"):
        config.addinivalue_line("markers", "timeout: ignored, because pytest-timeout is not installed")
    if "not slow" in config.option.markexpr:
        hypothesis.settings.load_profile("fast")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that use rank processes as slow, run slow tests last, and deselect tests whose marker was not requested."""
    excluded = {marker for marker in ELSEWHERE if marker not in config.option.markexpr}
    elsewhere = [item for item in items if any(marker.name in excluded for marker in item.iter_markers())]
    config.hook.pytest_deselected(items=elsewhere)
    deselected = set(elsewhere)
    items[:] = [item for item in items if item not in deselected]
    for item in items:
        if not {"ranks", "four"}.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed all generators before every test."""
    seed_generators()


@pytest.fixture(autouse=True)
def no_known_secrets() -> None:
    """Clear the secrets that earlier tests registered for masking."""
    for memory in (secret_values._secrets, secret_values._placeholders, secret_values._allowed, secret_values._cache):
        memory.clear()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two rank processes with a Gloo group, for ``ranks.run(function, *args, **kwargs)``; see :class:`Ranks`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four rank processes like those of ``ranks``, for meshes of two dimensions."""
    pool = Ranks(4)
    yield pool
    pool.close()
