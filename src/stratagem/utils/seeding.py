"""Seed the generators of Python, NumPy and torch, and carry their exact state across a restart."""

from __future__ import annotations

import random
import secrets
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError

__all__ = ["generator_state", "restore_generator_state", "set_random_seed"]

_SEED_LIMIT = 2**32  # what numpy.random.seed accepts


def set_random_seed(
    seed: int | None = None, *, deterministic: bool = False, diff_rank_seed: bool = False, rank: int | None = None
) -> int:
    """Seed the generators of Python, NumPy and torch (every device), and return the seed that was used.

    Args:
        seed: From 0 to 2**32 - 1; drawn from the operating system where it is None.
        deterministic: Let PyTorch refuse operations that have no deterministic form, and switch the cuDNN autotuner
            off. On CUDA, PyTorch then asks for ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` in the environment.
        diff_rank_seed: Add the global rank, so that each process draws something else.
        rank: The global rank; read from ``torch.distributed`` where it is None, and 0 without a process group.

    Raises:
        ConfigValueError: if the seed (with the rank added) is out of range, or if it is None in a process of a group,
            where each rank would draw its own.
        ConfigTypeError: if the seed is not an integer.
    """
    if seed is None:
        seed = _draw_seed()
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigTypeError(f"The seed must be an integer or None, not {seed!r} ({type(seed).__name__}).")
    if diff_rank_seed:
        seed += _global_rank() if rank is None else rank
    if not 0 <= seed < _SEED_LIMIT:
        raise ConfigValueError(f"The seed (with the rank added where asked) is {seed}; it must be from 0 to 2**32 - 1.")
    random.seed(seed)
    np.random.seed(seed)  # transforms of other packages draw from the global generator
    torch.manual_seed(seed)
    if deterministic:
        _be_deterministic()
    return seed


def generator_state() -> dict[str, Any]:
    """Return the state of the global generators: Python, NumPy, torch on the CPU and on every accelerator device.

    The state is made of tensors, lists, numbers and text only, so that it can be stored without pickle.

    Raises:
        StateError: if NumPy's global generator was replaced by another kind than MT19937.
    """
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "accelerator": {name: module.get_rng_state(index) for name, module, index in _accelerator_generators()},
    }


def restore_generator_state(state: Mapping[str, Any]) -> list[str]:
    """Put the global generators into the state that ``generator_state`` returned.

    Returns:
        The accelerator devices, such as ``cuda:1``, that the state and this machine do not share; their generators
        were left alone.

    Raises:
        CheckpointMismatchError: if the state is not one that ``generator_state`` made.
    """
    try:
        version, internal, next_gauss = state["python"]
        random.setstate((version, tuple(internal), next_gauss))
        _restore_numpy(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        return _restore_accelerators(state["accelerator"])
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f"The state of the random generators cannot be restored ({type(error).__name__}: {error}). "
            "It was written by another tool or is damaged; resume without it to go on with freshly seeded generators."
        ) from error


def _draw_seed() -> int:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigValueError(
            f"No seed was given on rank {dist.get_rank()} of {dist.get_world_size()}: each rank would draw its own. "
            "Draw one on rank 0, broadcast it, and give it to every rank."
        )
    return secrets.randbits(31)  # half of the range, so that adding a rank stays inside


def _global_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _be_deterministic() -> None:
    if torch.backends.cudnn.benchmark:
        warnings.warn(
            "The cuDNN autotuner (torch.backends.cudnn.benchmark) is switched off, because deterministic=True.",
            stacklevel=3,
        )
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def _numpy_state() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise StateError(
            f"NumPy's global generator is {state['bit_generator']}, and only the state of MT19937 can be stored. "
            "Leave numpy.random's generator as it is, and keep others in numpy.random.Generator objects of your own."
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


def _restore_accelerators(states: Mapping[str, Tensor]) -> list[str]:
    skipped = dict.fromkeys(states)
    for name, module, index in _accelerator_generators():
        if name in states:
            module.set_rng_state(states[name].cpu(), index)
            del skipped[name]
        else:
            skipped[name] = None
    return list(skipped)


def _accelerator_generators() -> Iterator[tuple[str, ModuleType, int]]:
    """Yield the name, the module and the index of every accelerator device."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return
    module = torch.get_device_module(device)
    for index in range(torch.accelerator.device_count()):
        yield f"{device.type}:{index}", module, index
