"""Make and end the process group."""

from __future__ import annotations

import ipaddress
import itertools
import math
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.dist.launch import Launch, infer_launcher, read_launch
from stratagem.dist.world import pick_device
from stratagem.errors import ConfigTypeError, ConfigValueError, LaunchError
from stratagem.utils.names import did_you_mean, refuse_unknown

__all__ = ["close_dist", "init_dist"]

_DEFAULT_TIMEOUT_S = 600.0
# The other arguments of torch.distributed.init_process_group are decided here.
_PASSED_ON = ("group_name", "pg_options", "device_id")
_OWN = ("backend", "timeout", "init_method")
# Ranks make their groups in the same order, so the number tells the groups of one process apart. The store lives as long
# as the process: a rank that comes later must not reach the one of a group that has ended.
_groups = itertools.count()
_stores: dict[tuple[str, int], Store] = {}


def init_dist(
    launcher: str | None = None,
    backend: str | None = None,
    *,
    timeout: float | timedelta | None = None,
    init_method: str | None = None,
    **kwargs: Any,
) -> Launch:
    """Create the process group, as the launcher's environment says, and select this rank's device.

    Collective: every rank calls it. A no-op where a group exists already or the launcher is ``"none"``.

    Args:
        launcher: one of :data:`~stratagem.dist.launch.LAUNCHERS`; inferred from the environment where not given.
        backend: of ``torch.distributed``; by default the one that fits the device, with gloo beside it for tensors on
            the CPU.
        timeout: seconds after which a collective that does not complete is an error; 600 by default.
        init_method: a URL for ``torch.distributed.init_process_group`` in place of the launcher's address and port.
        kwargs: ``group_name``, ``pg_options`` and ``device_id`` of ``torch.distributed.init_process_group``.

    Raises:
        LaunchError: if the launcher did not start this process, or the ranks cannot meet.
        ConfigTypeError: if ``timeout`` is neither a number nor a ``timedelta``.
        ConfigValueError: if ``timeout`` is not positive, or torch has no such backend.
        ConfigKeyError: if there is no such argument.
    """
    refuse_unknown(kwargs, (*_OWN, *_PASSED_ON), "dist_cfg")
    _check_backend(backend)
    limit = _as_timedelta(timeout)
    if launcher is None:
        launcher = infer_launcher()
    launch = read_launch(launcher)
    if launcher == "none" or torch_dist.is_initialized():
        return launch
    device = pick_device(launch.local_rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
        kwargs.setdefault("device_id", device)
    where: dict[str, Any] = {"rank": launch.rank, "world_size": launch.size}
    if launch.on_one_host:
        _stay_on_loopback()
    try:
        if init_method is not None:
            where["init_method"] = init_method
        else:
            where["store"] = _meet(launch, limit)
        torch_dist.init_process_group(backend or _default_backend(device), timeout=limit, **where, **kwargs)
    except (torch_dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"Rank {launch.rank} of {launch.size} could not join the process group at "
            f"{init_method or f'{launch.master_addr}:{launch.master_port}'} (launcher {launcher!r}): {error}"
        ) from error
    return launch


def close_dist() -> None:
    """End the process group if there is one. Idempotent."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def _check_backend(backend: str | None) -> None:
    # Such as "gloo", or "cpu:gloo,cuda:nccl". Torch takes unknown names for libraries that are not loaded yet.
    for pair in backend.split(",") if backend else ():
        name = pair.rpartition(":")[2].lower()
        if name not in torch_dist.Backend.backend_list:
            known = did_you_mean(name, torch_dist.Backend.backend_list)
            raise ConfigValueError(f"dist_cfg: backend={backend!r}, and torch has no backend {name!r}. {known}")


def _as_timedelta(timeout: float | timedelta | None) -> timedelta:
    if timeout is None:
        return timedelta(seconds=_DEFAULT_TIMEOUT_S)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | timedelta):
        raise ConfigTypeError(f"dist_cfg: timeout is {timeout!r}; seconds or a timedelta are due.")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not 0 < seconds < math.inf:
        raise ConfigValueError(f"dist_cfg: timeout is {timeout!r}; a positive, finite time is due.")
    return timedelta(seconds=seconds)


def _default_backend(device: torch.device) -> str:
    own = torch_dist.get_default_backend_for_device(device)
    return own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}"


def _meet(launch: Launch, limit: timedelta) -> Store:
    """Return the store through which the ranks find each other."""
    place = (launch.master_addr, launch.master_port)
    if place not in _stores:
        _stores[place] = _connect(launch, limit)
    store = _stores[place]
    store.set_timeout(limit)
    # Neither a restarted process nor a second group of this one may read what an earlier group left in the store. Ranks
    # that are started again because others came or went have the same count, and another size.
    start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{launch.size}"
    return PrefixStore(f"stratagem/{start}/{next(_groups)}", store)


def _connect(launch: Launch, limit: timedelta) -> Store:
    # torchrun's agent usually serves the store already; its workers are all clients then.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = launch.rank == 0 and not served
    listener = _loopback_listener(launch) if serve and _is_loopback(launch.master_addr) else None
    store: Store = TCPStore(
        launch.master_addr,
        launch.master_port,
        world_size=None if served else launch.size,
        is_master=serve,
        timeout=limit,
        multi_tenant=listener is None,
        # The store takes the descriptor over and closes it.
        master_listen_fd=None if listener is None else listener.detach(),
    )
    return store


def _loopback_listener(launch: Launch) -> socket.socket:
    """Listen on loopback alone: given a port, TCPStore would listen on every interface of the machine."""
    listener = socket.create_server((launch.master_addr, launch.master_port), backlog=max(128, launch.size))
    listener.setblocking(False)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback and ":" not in host
    except ValueError:
        return host == "localhost"


def _stay_on_loopback() -> None:
    """Have gloo's pairs listen on the loopback interface, unless the user chose one."""
    names = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
