"""Ranks, process groups and devices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stratagem import distributed
from stratagem.compat.mmengine.checks import require
from stratagem.distributed import barrier as barrier
from stratagem.distributed import get_backend as get_backend
from stratagem.distributed import get_dist_info as get_dist_info
from stratagem.distributed import get_rank as get_rank
from stratagem.distributed import get_world_size as get_world_size
from stratagem.distributed import infer_launcher as infer_launcher
from stratagem.distributed import is_distributed as is_distributed
from stratagem.distributed import is_main_process as is_main_process
from stratagem.distributed import master_only as master_only
from stratagem.distributed.collectives import served_devices
from stratagem.errors import ConfigTypeError, ConfigValueError, StateError

__all__ = [
    "barrier",
    "cast_data_device",
    "get_backend",
    "get_comm_device",
    "get_data_device",
    "get_default_group",
    "get_dist_info",
    "get_local_group",
    "get_local_rank",
    "get_local_size",
    "get_rank",
    "get_world_size",
    "infer_launcher",
    "init_dist",
    "init_local_group",
    "is_distributed",
    "is_main_process",
    "master_only",
]

_LAUNCHERS = ("pytorch", "mpi", "slurm")
_BACKENDS = ("torch", "deepspeed", "colossalai")


class NoLocalGroupError(StateError, RuntimeError):
    """The process group of this host is needed, but was not created."""


class _LocalGroup:
    """The process group of the ranks on this host."""

    group: ProcessGroup | None = None


def get_default_group() -> ProcessGroup | None:
    """Return the group of all ranks; None without one."""
    return torch_dist.group.WORLD


def get_local_group() -> ProcessGroup | None:
    """Return the group of the ranks on this host; None in a single process.

    Raises:
        RuntimeError: if :func:`init_local_group` was not called.
    """
    if not is_distributed():
        return None
    if _LocalGroup.group is None:
        raise NoLocalGroupError("The process group of this host does not exist. Call init_local_group() first.")
    return _LocalGroup.group


def init_local_group(node_rank: int, num_gpus_per_node: int) -> None:
    """Create the group of the ranks on this host. Collective over all ranks.

    Args:
        node_rank: the number of this host.
        num_gpus_per_node: the number of ranks on each host.

    Raises:
        AssertionError: if it exists, or the hosts do not have all ranks.
    """
    require(_LocalGroup.group is None, "The process group of this host exists already. Call init_local_group() once.")
    size = get_world_size()
    require(
        size % num_gpus_per_node == 0 and 0 <= node_rank < size // num_gpus_per_node,
        f"{size} ranks do not fill hosts of {num_gpus_per_node} ranks each, or there is no host {node_rank}.",
    )
    # Every rank must take part in the creation of every group, in the same order.
    for first in range(0, size, num_gpus_per_node):
        group = torch_dist.new_group(list(range(first, first + num_gpus_per_node)))
        if first == node_rank * num_gpus_per_node:
            _LocalGroup.group = group


def get_local_size() -> int:
    """Return the number of ranks on this host; 1 in a single process.

    Raises:
        RuntimeError: if :func:`init_local_group` was not called.
    """
    return get_world_size(get_local_group())


def get_local_rank() -> int:
    """Return the number of this rank on its host; 0 in a single process.

    Raises:
        RuntimeError: if :func:`init_local_group` was not called.
    """
    return get_rank(get_local_group())


def init_dist(launcher: str, backend: str = "nccl", init_backend: str = "torch", **kwargs: Any) -> None:
    """Create the process group from the launcher's environment, and select this rank's device. Collective.

    Args:
        launcher: ``"pytorch"``, ``"mpi"`` or ``"slurm"``.
        backend: a backend of ``torch.distributed``. ``"nccl"`` without a CUDA device selects the backend for the device.
        init_backend: ``"torch"``, ``"deepspeed"`` or ``"colossalai"``; all of them use the same process group.
        kwargs: ``timeout`` in seconds, ``port`` of the first rank, and others; see :func:`stratagem.distributed.init_dist`.

    Raises:
        ValueError: if the launcher or a backend is unknown.
        TypeError: if ``timeout`` is not a number.
        LaunchError: if the launcher did not start this process, or the ranks cannot connect.
    """
    if launcher not in _LAUNCHERS:
        raise ConfigValueError(f"Invalid launcher type: {launcher!r}. It must be one of {', '.join(_LAUNCHERS)}.")
    if init_backend not in _BACKENDS:
        raise ConfigValueError(f"init_backend must be one of {', '.join(_BACKENDS)}, got {init_backend!r}.")
    if "port" in kwargs:
        os.environ["MASTER_PORT"] = str(kwargs.pop("port"))
    timeout: float | timedelta | None = kwargs.pop("timeout", None)
    chosen = None if backend == "nccl" and not torch.cuda.is_available() else backend
    distributed.init_dist(launcher, chosen, timeout=timeout, **kwargs)


def get_data_device(data: Any) -> torch.device:
    """Return the device of a tensor, or of the tensors in nested dicts and sequences.

    Raises:
        ValueError: if there is no tensor, or the tensors are on several devices.
        TypeError: if there is something else.
    """
    if isinstance(data, Tensor):
        return data.device
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise ConfigTypeError(f"data should be a Tensor, sequence of tensor or dict, but got {data!r}")
    devices = [get_data_device(item) for item in (data.values() if isinstance(data, Mapping) else data)]
    if not devices:
        raise ConfigValueError("data should not be empty.")
    if any(device != devices[0] for device in devices):
        raise ConfigValueError(f"device type in data should be consistent, but got {', '.join(map(str, devices))}")
    return devices[0]


def get_comm_device(group: ProcessGroup | None = None) -> torch.device:
    """Return a device whose tensors the group can send: the accelerator, if its backend supports it, or the CPU."""
    if not is_distributed():
        return torch.device("cpu")
    device = distributed.current_device()
    return device if device.type in served_devices(group) else torch.device("cpu")


def cast_data_device(data: Any, device: torch.device, out: Any = None) -> Any:
    """Return ``data`` with all tensors on ``device``, in nested dicts and sequences.

    Args:
        data: a tensor, or a dict or sequence of tensors, dicts and sequences.
        device: where to move the tensors.
        out: the same structure, whose tensors are overwritten, too.

    Raises:
        ValueError: if a container is empty, or ``data`` and ``out`` differ in length.
        TypeError: if there is something else than tensors, or ``out`` has another type.
    """
    if out is not None and type(data) is not type(out):
        raise ConfigTypeError(f"out should be the same type with data, but got {type(out)} and {type(data)}")
    if isinstance(out, set):
        raise ConfigTypeError("out should not be a set")
    if isinstance(data, Tensor):
        moved = data.to(device)
        if out is not None:
            out.copy_(moved)
        return moved
    if not isinstance(data, Iterable) or isinstance(data, str | np.ndarray):
        raise ConfigTypeError(f"data should be a Tensor, list of tensor or dict, but got {data!r}")
    items = dict(data) if isinstance(data, Mapping) else dict(enumerate(data))
    if not items:
        raise ConfigValueError("data should not be empty")
    if out is not None and len(out) != len(items):
        raise ConfigValueError(f"length of data and out should be same, but got {len(items)} and {len(out)}")
    cast = {key: cast_data_device(item, device, None if out is None else out[key]) for key, item in items.items()}
    kind: Any = type(data)
    return kind(cast) if isinstance(data, Mapping) else kind(cast.values())
