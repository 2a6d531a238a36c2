"""Let the ranks of a launch find each other."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from stratagem.distributed.rendezvous.interfaces import address_towards, interface_of, is_loopback, is_own, resolve
from stratagem.distributed.rendezvous.launch import Launch
from stratagem.distributed.rendezvous.membership_check import check_membership
from stratagem.distributed.rendezvous.port_discovery import PortAnnouncer, discover_port
from stratagem.errors import LaunchError

__all__ = ["choose_network_interface", "rendezvous"]

# Ranks make their groups in the same order, so the number tells the groups of one process apart. The store lives as long
# as the process: a rank that comes later must not reach the one of a group that has ended.
_groups = itertools.count()
_stores: dict[Launch, Store] = {}


def choose_network_interface(launch: Launch) -> None:
    """Have gloo's pairs listen on loopback, or on the one interface that leads to rank 0; a user's choice goes before."""
    if launch.on_one_host:
        names = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
        name = names[0] if names else None
    else:
        address = resolve(launch.master_addr)
        own = address if is_own(address) else address_towards(address)
        name = None if own is None or is_loopback(own) else interface_of(own)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def rendezvous(launch: Launch, limit: timedelta) -> Store:
    """Return the store through which the ranks find each other, once all of them are there. Collective.

    Raises:
        LaunchError: if they cannot meet, or were not started as one world.
    """
    with ExitStack() as until_met:
        if launch not in _stores:
            _stores[launch] = _connect(launch, limit, until_met)
        store = _stores[launch]
        store.set_timeout(limit)
        # Neither a restarted process nor a second group of this one may read what an earlier group left in the store.
        own = PrefixStore(f"stratagem/{_start(launch)}/{next(_groups)}", store)
        check_membership(PrefixStore("roll", own), launch, limit)
    return own


def _start(launch: Launch, environ: Mapping[str, str] = os.environ) -> str:
    """Return what tells a start of torchrun's ranks from the others that used the same store; other launchers have one.

    Ranks that are started again because others came or went have the same count, and another size. Elsewhere the size is
    left out, so that ranks which were told different ones meet, and are refused.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return "0"
    return f"{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{launch.size}"


def _connect(launch: Launch, limit: timedelta, until_met: ExitStack) -> Store:
    address = resolve(launch.master_addr)
    # torchrun's agent usually serves the store already; its workers are all clients then.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank == 0 and not served:
        listener = _listen(launch, address)
        own_port = listener.getsockname()[1]
        # The store takes the descriptor over and closes it.
        store: Store = TCPStore(
            address,
            own_port,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        if launch.master_port is None:
            until_met.callback(PortAnnouncer(launch.job, address, own_port).close)
        return store
    port = launch.master_port
    if port is None:
        port = discover_port(launch.job, address, limit.total_seconds())
    return TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)


def _listen(launch: Launch, address: str) -> socket.socket:
    """Listen where the ranks look for rank 0 and nowhere else: TCPStore itself would listen on every interface."""
    if not is_own(address):
        if launch.master_port is None:
            raise LaunchError(
                f"rank 0 runs here, but is looked for at {launch.master_addr}, which is another machine. "
                "Set MASTER_ADDR, on every rank, to an address of rank 0's host."
            )
        # Such as the address of a service, from which connections are handed on to this machine.
        address = ""
    elif is_loopback(address) and not launch.on_one_host:
        # Debian's /etc/hosts leads a machine's own name to 127.0.1.1, where other hosts do not arrive.
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
            f"port {launch.master_port} is in use by another program, perhaps a rank 0 of an earlier run. Set MASTER_PORT "
            "(torchrun: --master-port) to a free one; without it, srun's and mpirun's ranks find one themselves."
        ) from error
    listener.setblocking(False)
    return listener
