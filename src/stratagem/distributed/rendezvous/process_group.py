"""Create and destroy the process group."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from stratagem.distributed.rendezvous.launch import Launch, infer_launcher, read_launch
from stratagem.distributed.rendezvous.rendezvous import choose_network_interface, rendezvous
from stratagem.distributed.shared_groups import forget_shared_groups
from stratagem.distributed.world import pick_device, select_device
from stratagem.errors import ConfigTypeError, ConfigValueError, LaunchError
from stratagem.utils.names import did_you_mean, refuse_unknown

__all__ = ["check_dist_arguments", "close_dist", "init_dist"]

_DEFAULT_TIMEOUT_S = 600.0
# Other arguments of torch.distributed.init_process_group are set by this module.
_FORWARDED = ("group_name", "pg_options", "device_id")
_OWN = ("backend", "timeout", "init_method")


def init_dist(
    launcher: str | None = None,
    backend: str | None = None,
    *,
    timeout: float | timedelta | None = None,
    init_method: str | None = None,
    **kwargs: Any,
) -> Launch:
    """Create the process group from the launcher's environment, and select this rank's device.

    Collective. If a process group exists, only selects the device. Does nothing if the launcher is ``"none"``.

    Args:
        launcher: one of :data:`~stratagem.distributed.LAUNCHERS`; inferred from the environment by default.
        backend: a ``torch.distributed`` backend; by default the backend for the device, and gloo for CPU tensors.
        timeout: the timeout of collectives in seconds or as a ``timedelta``; 600 seconds by default.
        init_method: a URL for ``torch.distributed.init_process_group`` instead of the launcher's address and port.
        kwargs: ``group_name``, ``pg_options`` and ``device_id`` of ``torch.distributed.init_process_group``.

    Raises:
        LaunchError: if the launcher did not start this process, the ranks cannot connect, or ranks would share a device.
        ConfigTypeError: if ``timeout`` is neither a number nor a ``timedelta``.
        ConfigValueError: if ``timeout`` is not positive and finite, or the backend is unknown.
        ConfigKeyError: if an argument is unknown.
    """
    limit = check_dist_arguments(backend=backend, timeout=timeout, **kwargs)
    if launcher is None:
        launcher = infer_launcher()
    launch = read_launch(launcher)
    if launcher == "none":
        return launch
    device = pick_device(launch.local_rank, launch.local_size)
    select_device(device)
    if torch_dist.is_initialized():
        return launch
    if device.type != "cpu":
        kwargs.setdefault("device_id", device)
    connection: dict[str, Any] = {"rank": launch.rank, "world_size": launch.size}
    try:
        if init_method is not None:
            connection["init_method"] = init_method
        else:
            choose_network_interface(launch)
            connection["store"] = rendezvous(launch, limit, device)
        torch_dist.init_process_group(backend or _default_backend(device), timeout=limit, **connection, **kwargs)
    except (torch_dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"Rank {launch.rank} of {launch.size} could not join the process group at "
            f"{init_method or launch.address} (launcher {launcher!r}): {error}"
        ) from error
    return launch


def check_dist_arguments(
    backend: str | None = None, timeout: float | timedelta | None = None, **kwargs: Any
) -> timedelta:
    """Check arguments of :func:`init_dist` without creating a process group; return the timeout of collectives.

    Raises:
        ConfigTypeError: if ``timeout`` is neither a number nor a ``timedelta``, or ``backend`` is not a name.
        ConfigValueError: if ``timeout`` is not positive and finite, or the backend is unknown.
        ConfigKeyError: if an argument is unknown.
    """
    refuse_unknown(kwargs, (*_OWN, *_FORWARDED), "dist_cfg")
    _check_backend(backend)
    return _as_timedelta(timeout)


def close_dist() -> None:
    """Destroy the process group if there is one. Idempotent."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        forget_shared_groups()


def _check_backend(backend: str | None) -> None:
    if backend is not None and not isinstance(backend, str):
        raise ConfigTypeError(f"dist_cfg: backend must be a name such as 'gloo', got {backend!r}.")
    # For example "gloo" or "cpu:gloo,cuda:nccl". Torch treats unknown names as libraries that are not loaded yet.
    for pair in backend.split(",") if backend else ():
        name = pair.rpartition(":")[2].lower()
        if name not in torch_dist.Backend.backend_list:
            known = did_you_mean(name, torch_dist.Backend.backend_list)
            raise ConfigValueError(f"dist_cfg: backend={backend!r}, but torch has no backend {name!r}. {known}")


def _as_timedelta(timeout: float | timedelta | None) -> timedelta:
    if timeout is None:
        return timedelta(seconds=_DEFAULT_TIMEOUT_S)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | timedelta):
        raise ConfigTypeError(f"dist_cfg: timeout must be a number of seconds or a timedelta, got {timeout!r}.")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not 0 < seconds < math.inf:
        raise ConfigValueError(f"dist_cfg: timeout must be positive and finite, got {timeout!r}.")
    return timedelta(seconds=seconds)


def _default_backend(device: torch.device) -> str:
    backend = torch_dist.get_default_backend_for_device(device)
    return backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}"
