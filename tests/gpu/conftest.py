"""Tests that require a GPU, or several: each is skipped with its reason where one is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.devices import ON_CPU, require_cuda, require_gpus
from tests.support.ranks import Ranks


def pytest_configure() -> None:
    """Stop with one line if a package is missing without which no test can be imported, because nothing can be installed."""
    missing = [name for name in ("blake3", "safetensors", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        # Without a GPU, no test would have run.
        pytest.exit(
            f"make test-gpu requires the package {missing[0]}: unpack its wheel (python -m zipfile -e {missing[0]}-*.whl FOLDER) "
            "and add the folder to PYTHONPATH, or select another interpreter with PYTHON=.",
            returncode=int(ON_CPU or torch.cuda.is_available()),
        )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of this folder as ``gpu``. Warnings of other versions of torch and of the driver are not errors."""
    item.add_marker("gpu")
    item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _restored_settings() -> Iterator[None]:
    """Restore torch's settings after every test, and release its GPU memory."""
    matmul = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = cudnn
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.fixture
def cuda() -> torch.device:
    """The first GPU, for tests whose subject does not exist on the CPU."""
    require_cuda()
    return torch.device("cuda", 0)


@pytest.fixture
def device() -> torch.device:
    """The first GPU; the CPU with ``STRATAGEM_GPU_TESTS_ON=cpu``, which checks the tests themselves without a GPU."""
    if ON_CPU:
        return torch.device("cpu")
    require_cuda()
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def _gpu_ranks() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture
def two_gpus(request: pytest.FixtureRequest) -> Ranks:
    """Two ranks with a GPU each and an NCCL group; on the CPU with Gloo with ``STRATAGEM_GPU_TESTS_ON=cpu``."""
    if not ON_CPU:
        require_gpus(2)
    pool: Ranks = request.getfixturevalue("_gpu_ranks")
    return pool
