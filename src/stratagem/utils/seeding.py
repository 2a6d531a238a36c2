"""Seed the random number generators of Python, NumPy and torch, and save and restore their states."""

from __future__ import annotations

import os
import random
import secrets
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError

__all__ = [
    "CUBLAS_VARIABLE",
    "check_seed",
    "generator_state",
    "make_cublas_deterministic",
    "restore_generator_state",
    "set_random_seed",
]

_SEED_LIMIT = 2**32  # The range that numpy.random.seed accepts.
# The size and number of the workspaces of cuBLAS. cuBLAS reads it when it is first used; with other values than these two, torch
# raises an error in matrix multiplications if deterministic algorithms are required.
CUBLAS_VARIABLE: Final = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_CUBLAS: Final = (":4096:8", ":16:8")


def set_random_seed(
    seed: int | None = None, *, deterministic: bool = False, diff_rank_seed: bool = False, rank: int | None = None
) -> int:
    """Seed the random number generators of Python, NumPy and torch (all devices), and return the seed that was used.

    Args:
        seed: An integer from 0 to 2**32 - 1. If None, the seed is drawn from the operating system.
        deterministic: Make PyTorch raise an error for operations without a deterministic implementation, disable the
            cuDNN autotuner, and make cuBLAS deterministic; see :func:`make_cublas_deterministic`.
        diff_rank_seed: Add the global rank to the seed, so that each process draws different numbers.
        rank: The global rank. None reads it from ``torch.distributed``; it is 0 without a process group.

    Raises:
        ConfigValueError: if the seed (including the rank) is out of range, or if it is None and a process group exists,
            since each rank would draw a different seed.
        ConfigTypeError: if the seed is not an integer.
    """
    if seed is None:
        seed = _draw_seed()
    check_seed(seed)
    if diff_rank_seed:
        seed += _global_rank() if rank is None else rank
        check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # Transforms from other libraries use the global generator.
    torch.manual_seed(seed)
    if deterministic:
        _be_deterministic()
    return seed


def check_seed(seed: int) -> None:
    """Check that the random number generators accept a seed.

    Raises:
        ConfigValueError: if the seed is out of range.
        ConfigTypeError: if the seed is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigTypeError(f"The seed must be an integer or None, got {seed!r} ({type(seed).__name__}).")
    if not 0 <= seed < _SEED_LIMIT:
        raise ConfigValueError(
            f"The seed (including the rank if diff_rank_seed=True) is {seed}; it must be between 0 and 2**32 - 1."
        )


def generator_state() -> dict[str, Any]:
    """Return the states of the global generators: Python, NumPy, and torch on the CPU and on this process's accelerator.

    The state consists of tensors, lists, numbers and strings, so it can be stored without pickle.

    Raises:
        StateError: if NumPy's global generator is not MT19937.
    """
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator_state(),
    }


def restore_generator_state(state: Mapping[str, Any]) -> list[str]:
    """Restore the states of the global generators that ``generator_state`` returned.

    The state of an accelerator is restored on the device that this process uses, whatever its index was when it was saved.

    Returns:
        The types of accelerators, such as ``cuda``, that exist only in the state or only on this machine, and whose generators
        are therefore not changed.

    Raises:
        CheckpointMismatchError: if ``generator_state`` did not create the state.
    """
    try:
        version, internal, next_gauss = state["python"]
        random.setstate((version, tuple(internal), next_gauss))
        _restore_numpy(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        return _restore_accelerator(state["accelerator"])
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f"The state of the random number generators cannot be restored ({type(error).__name__}: {error}). It was "
            "written by a different tool or is damaged. Resume without it to seed the generators again."
        ) from error


def _draw_seed() -> int:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigValueError(
            f"No seed was given on rank {dist.get_rank()} of {dist.get_world_size()}: each rank would draw a different "
            "seed. Draw a seed on rank 0, broadcast it, and pass it on all ranks."
        )
    return secrets.randbits(31)  # Use half of the range, so that the sum of the seed and a rank stays in range.


def _global_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def make_cublas_deterministic() -> None:
    """Set the environment variable ``CUBLAS_WORKSPACE_CONFIG``, which deterministic algorithms require on CUDA.

    A value that makes cuBLAS deterministic is kept. If CUDA is already initialized, setting the variable may have no effect, and
    a warning is issued.
    """
    given = os.environ.get(CUBLAS_VARIABLE)
    if given in _DETERMINISTIC_CUBLAS:
        return
    if given is not None:
        warnings.warn(
            f"deterministic=True: {CUBLAS_VARIABLE}={given} is replaced by {_DETERMINISTIC_CUBLAS[0]}, because cuBLAS is not "
            f"deterministic with it. Set it to {' or '.join(_DETERMINISTIC_CUBLAS)}, or unset it.",
            stacklevel=4,
        )
    if torch.cuda.is_initialized():
        warnings.warn(
            f"deterministic=True was requested after CUDA was initialized, so matrix multiplications may not be deterministic: "
            f"cuBLAS reads {CUBLAS_VARIABLE} when it is first used. Start the process with {CUBLAS_VARIABLE}="
            f"{_DETERMINISTIC_CUBLAS[0]}, or build the runner before anything uses CUDA.",
            stacklevel=4,
        )
    os.environ[CUBLAS_VARIABLE] = _DETERMINISTIC_CUBLAS[0]


def _be_deterministic() -> None:
    make_cublas_deterministic()
    if torch.backends.cudnn.benchmark:
        warnings.warn(
            "The cuDNN autotuner (torch.backends.cudnn.benchmark) is disabled because deterministic=True.",
            stacklevel=3,
        )
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def _numpy_state() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise StateError(
            f"NumPy's global generator is {state['bit_generator']}, but only the state of MT19937 can be stored. Do "
            "not replace the global generator. Use numpy.random.Generator objects instead."
        )
    return {
        "key": torch.from_numpy(state["state"]["key"].astype(np.int64)),
        "position": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _restore_numpy(state: Mapping[str, Any]) -> None:
    key = state["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, state["position"], state["has_gauss"], state["gauss"]))


def _restore_accelerator(states: Mapping[str, Tensor]) -> list[str]:
    own = _own_accelerator()
    if own is None:
        return list(states)
    kind, index, module = own
    state = _select_state(states, kind, index)
    if state is None:
        return [*states, kind]
    module.set_rng_state(state.cpu(), index)
    return [name for name in states if name.partition(":")[0] != kind]


def _select_state(states: Mapping[str, Tensor], kind: str, index: int) -> Tensor | None:
    """Return the state of the device that a rank used; None if the states are those of another type of device.

    Earlier versions saved the states of all devices that a rank saw, as ``cuda:0``, ``cuda:1``, and so on. All of them were
    seeded equally, but the rank drew random numbers only on its own device, so that one has the largest offset.
    """
    if kind in states:
        return states[kind]
    indexed = {name: each for name, each in states.items() if name.partition(":")[0] == kind}
    if not indexed:
        return None
    offsets = {name: _philox_offset(each) for name, each in indexed.items()}
    used = [name for name in indexed if offsets[name] == max(offsets.values())]
    here = f"{kind}:{index}"
    return indexed[here if here in used else used[0]]


def _philox_offset(state: Tensor) -> int:
    """Return how far a CUDA generator has advanced; 0 for generators of other types. The state is a seed and an offset."""
    data = state.cpu().contiguous().view(torch.uint8)
    return int.from_bytes(bytes(data[8:].tolist()), sys.byteorder) if data.numel() == 16 else 0


def _own_accelerator() -> tuple[str, int, ModuleType] | None:
    """Return the type and the index of this process's accelerator, and torch's module for it; None without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    return device.type, torch.accelerator.current_device_index(), torch.get_device_module(device)


def _accelerator_state() -> dict[str, Tensor]:
    """Return the generator state of this process's accelerator, without its index, which may differ when the run resumes."""
    own = _own_accelerator()
    if own is None:
        return {}
    kind, index, module = own
    return {kind: module.get_rng_state(index)}
