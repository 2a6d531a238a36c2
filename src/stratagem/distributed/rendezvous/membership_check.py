"""Check that every rank has joined exactly once, and that all ranks have the same world size."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import NamedTuple, final

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from stratagem.distributed.rendezvous.launch import Launch
from stratagem.errors import LaunchError

__all__ = ["OwnDevice", "check_membership"]

_PAUSE_S = 0.02
# The time for which rank 0, which may serve the store, waits for the other ranks to read the error before it exits.
_LINGER_S = 5.0
_MAX_LISTED = 8


@final
class OwnDevice(NamedTuple):
    """The device of a rank: an identity that no other device has, or an empty string, and its name for messages."""

    identity: str = ""
    name: str = ""


_UNKNOWN = OwnDevice()


def check_membership(store: Store, launch: Launch, limit: timedelta, device: OwnDevice = _UNKNOWN) -> None:
    """Check that all ranks have the same world size, that no rank was started twice, and that no ranks share a device.

    Collective. Rank 0 checks the others in order of rank, so a mismatch is found as soon as that rank has joined.

    Raises:
        LaunchError: on every rank that has joined, if the check fails or a rank does not join within ``limit``.
    """
    if store.add(f"claims/{launch.rank}", 1) > 1:
        outcome = _claimed_twice(launch.rank)
        store.set("outcome", outcome)
        raise LaunchError(outcome)
    store.set(f"size/{launch.rank}", json.dumps([launch.size, *device]))
    if launch.rank == 0:
        outcome = _check(store, launch, limit.total_seconds())
        store.set("outcome", outcome)
        if outcome:
            _wait_for_readers(store, launch)
    else:
        outcome = _await_outcome(store, limit)
    if outcome:
        raise LaunchError(outcome)


def _check(store: Store, launch: Launch, limit_s: float) -> str:
    """Return the error, or an empty string if every rank has joined."""
    deadline = time.monotonic() + limit_s
    _, identity, name = json.loads(store.get("size/0"))
    users = {identity: (0, name)}
    for rank in range(1, launch.size):
        while not store.check([f"size/{rank}"]):
            if store.check(["outcome"]):
                return store.get("outcome").decode()
            if time.monotonic() > deadline:
                return _absent(store, launch, limit_s)
            time.sleep(_PAUSE_S)
        size, identity, name = json.loads(store.get(f"size/{rank}"))
        if size != launch.size:
            return (
                f"Rank 0 was started with world size {launch.size}, but rank {rank} was started with world size "
                f"{size}. Use the same --nnodes and --nproc-per-node for each torchrun, or the same WORLD_SIZE for "
                "each process."
            )
        other, name_of_other = users.setdefault(identity, (rank, name))
        if identity and other != rank:
            return _shared_device((other, name_of_other), (rank, name), identity)
    return store.get("outcome").decode() if store.check(["outcome"]) else ""


def _await_outcome(store: Store, limit: timedelta) -> str:
    try:
        # If rank 0 joins later than this rank, its time limit ends later.
        store.wait(["outcome"], limit + timedelta(seconds=_LINGER_S))
    except DistError as error:
        raise LaunchError(
            f"rank 0 did not join within {limit.total_seconds():g} s, or exited before all ranks had joined. Check its output. "
            f"({error})"
        ) from error
    outcome: str = store.get("outcome").decode()
    store.add("readers", 1)
    return outcome


def _claimed_twice(rank: int) -> str:
    return (
        f"Two processes were started as rank {rank}. Use a different --node-rank for each torchrun, or a different RANK for each "
        "process. If the other process belongs to an earlier run, end it or set another MASTER_PORT."
    )


def _shared_device(first: tuple[int, str], second: tuple[int, str], identity: str) -> str:
    users = " and ".join(f"rank {rank} uses {name}" for rank, name in (first, second))
    return (
        f"Two ranks share a device: {users}, and both are the device with UUID {identity}. Start only as many ranks on each host "
        "as it has devices, or let the launcher assign a different device to each rank."
    )


def _absent(store: Store, launch: Launch, limit_s: float) -> str:
    absent = [rank for rank in range(1, launch.size) if not store.check([f"size/{rank}"])]
    named = ", ".join(map(str, absent[:_MAX_LISTED])) + (", ..." if len(absent) > _MAX_LISTED else "")
    return (
        f"{len(absent)} of {launch.size} ranks did not join within {limit_s:g} s: {named}. Check why they did not start, or "
        "increase env_cfg.dist_cfg.timeout."
    )


def _wait_for_readers(store: Store, launch: Launch) -> None:
    deadline = time.monotonic() + _LINGER_S
    others = range(1, launch.size)
    while time.monotonic() < deadline:
        joined = sum(store.check([f"size/{rank}"]) for rank in others)
        if store.add("readers", 0) >= joined:
            return
        time.sleep(_PAUSE_S)
