"""Connect the ranks of a launch through a store."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__
from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.distributed.rendezvous.interfaces import address_towards, interface_of, is_loopback, is_own, resolve
from stratagem.distributed.rendezvous.launch import Launch
from stratagem.distributed.rendezvous.membership_check import OwnDevice, check_membership
from stratagem.distributed.rendezvous.port_discovery import PortAnnouncer, discover_port
from stratagem.distributed.world import describe_device, device_identity
from stratagem.errors import LaunchError

__all__ = ["choose_network_interface", "rendezvous"]

# Ranks create their groups in the same order, so this number identifies a group. A store lives as long as its process, so
# a late rank must not read the keys of an earlier group.
_groups = itertools.count()
_stores: dict[Launch, Store] = {}


def choose_network_interface(launch: Launch) -> None:
    """Set gloo's interface to loopback or to the interface that reaches rank 0, unless the user has set an interface."""
    if launch.on_one_host:
        names = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
        name = names[0] if names else None
    else:
        address = resolve(launch.master_addr)
        own = address if is_own(address) else address_towards(address)
        name = None if own is None or is_loopback(own) else interface_of(own)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def rendezvous(launch: Launch, limit: timedelta, device: torch.device) -> Store:
    """Return the store that connects the ranks, once all of them have joined. Collective.

    Args:
        launch: the rank of this process and the address of rank 0.
        limit: the time limit for each rank to join.
        device: the device of this rank.

    Raises:
        LaunchError: if the ranks cannot connect, were started with different world sizes or duplicate ranks, or share a
            device.
    """
    with ExitStack() as until_joined:
        if launch not in _stores:
            _stores[launch] = _connect(launch, limit, until_joined)
        store = _stores[launch]
        store.set_timeout(limit)
        # A restarted process, or a second group in this process, must not read the keys of an earlier group.
        group_store = PrefixStore(f"stratagem/{_start_id(launch)}/{next(_groups)}", store)
        own_device = OwnDevice(device_identity(device), describe_device(device))
        check_membership(PrefixStore("membership", group_store), launch, limit, own_device)
    return group_store


def _start_id(launch: Launch, environ: Mapping[str, str] = os.environ) -> str:
    """Return an identifier that distinguishes this start of torchrun's ranks from others that used the same store.

    After a membership change, torchrun restarts the ranks with the same restart count and a different world size. Other
    launchers start ranks only once. Their identifier does not include the world size, so that ranks with different
    world sizes can connect and report the mismatch.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return "0"
    return f"{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{launch.size}"


def _connect(launch: Launch, limit: timedelta, until_joined: ExitStack) -> Store:
    address = resolve(launch.master_addr)
    # Usually torchrun's launcher process already serves the store, and all its ranks are clients.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank == 0 and not served:
        listener = _listen(launch, address)
        own_port = listener.getsockname()[1]
        # The store takes ownership of the descriptor.
        store: Store = TCPStore(
            address,
            own_port,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        if launch.master_port is None:
            until_joined.callback(PortAnnouncer(launch.job, address, own_port).close)
        return store
    port = launch.master_port
    if port is None:
        port = discover_port(launch.job, address, limit.total_seconds())
    return TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)


def _listen(launch: Launch, address: str) -> socket.socket:
    """Listen only on the address of rank 0, whereas TCPStore would listen on all interfaces."""
    if not is_own(address):
        if launch.master_port is None:
            raise LaunchError(
                f"rank 0 runs on this machine, but its address {launch.master_addr} belongs to another machine. "
                "Set MASTER_ADDR on every rank to an address of the host of rank 0."
            )
        # For example the address of a service that forwards connections to this machine.
        address = ""
    elif is_loopback(address) and not launch.on_one_host:
        # Debian's /etc/hosts maps the machine's own name to 127.0.1.1, which other hosts cannot reach.
        address = ""
    try:
        listener = socket.create_server(
            (address, launch.master_port or 0),
            family=socket.AF_INET6 if ":" in address else socket.AF_INET,
            backlog=max(128, launch.size),
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise LaunchError(
            f"port {launch.master_port} is in use by another program, perhaps rank 0 of an earlier run. Set "
            "MASTER_PORT (torchrun: --master-port) to a free port; with srun and mpirun, a free port is chosen if "
            "MASTER_PORT is not set."
        ) from error
    listener.setblocking(False)
    return listener
