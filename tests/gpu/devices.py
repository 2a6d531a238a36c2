"""What a test of this folder requires, and the reasons for skipping it."""

from __future__ import annotations

import importlib.util
import os
from typing import Final

import pytest
import torch
import torch.distributed as torch_dist

_VARIABLE: Final = "STRATAGEM_GPU_TESTS_ON"
# Run the tests that are not specific to CUDA on the CPU, so that mistakes in them are found without a GPU.
ON_CPU: Final = os.environ.get(_VARIABLE) == "cpu"


def require_cuda() -> None:
    """Skip the test without a GPU."""
    if not torch.cuda.is_available():
        build = "a build without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        pytest.skip(f"requires a GPU: torch {torch.__version__} ({build}) finds none")


def require_gpus(count: int) -> None:
    """Skip the test with fewer GPUs than ``count``, or without NCCL."""
    require_cuda()
    found = torch.cuda.device_count()
    if found < count:
        pytest.skip(f"requires {count} GPUs: this machine has {found}")
    if not torch_dist.is_nccl_available():
        pytest.skip(f"requires NCCL: torch {torch.__version__} was built without it")


def require_package(name: str) -> None:
    """Skip the test if a package is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"requires the package {name}, which is not installed")


def require_torch(*version: int) -> None:
    """Skip the test with an older torch."""
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < version:
        pytest.skip(f"requires torch {'.'.join(map(str, version))} or later: this is torch {torch.__version__}")
