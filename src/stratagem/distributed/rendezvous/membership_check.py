"""Before the ranks work together: is every one of them there, once, and do they agree how many they are."""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from stratagem.distributed.rendezvous.launch import Launch
from stratagem.errors import LaunchError

__all__ = ["check_membership"]

_PAUSE_S = 0.02
# How long rank 0, which serves the store, stays for the others to read why it ends.
_LINGER_S = 5.0
_NAMED = 8


def check_membership(store: Store, launch: Launch, limit: timedelta) -> None:
    """Let no rank go on where they were started as worlds of different sizes, or two of them as the same rank.

    Collective. Rank 0 looks at the others in their order, so a difference is found as soon as that rank has come.

    Raises:
        LaunchError: on every rank that came, if they differ, or if a rank does not come within ``limit``.
    """
    if store.add(f"claims/{launch.rank}", 1) > 1:
        verdict = _claimed_twice(launch.rank)
        store.set("verdict", verdict)
        raise LaunchError(verdict)
    store.set(f"size/{launch.rank}", str(launch.size))
    if launch.rank == 0:
        verdict = _judge(store, launch, limit.total_seconds())
        store.set("verdict", verdict)
        if verdict:
            _wait_for_readers(store, launch)
    else:
        verdict = _await_verdict(store, limit)
    if verdict:
        raise LaunchError(verdict)


def _judge(store: Store, launch: Launch, limit_s: float) -> str:
    """Return what is wrong with the ranks that came, or an empty text."""
    deadline = time.monotonic() + limit_s
    for rank in range(1, launch.size):
        while not store.check([f"size/{rank}"]):
            if store.check(["verdict"]):
                return store.get("verdict").decode()
            if time.monotonic() > deadline:
                return _absent(store, launch, limit_s)
            time.sleep(_PAUSE_S)
        size = int(store.get(f"size/{rank}"))
        if size != launch.size:
            return (
                f"Rank 0 was started as one of {launch.size}, rank {rank} as one of {size}. Give every rank the same "
                "world size: equal --nnodes and --nproc-per-node for each torchrun, or the same WORLD_SIZE."
            )
    return store.get("verdict").decode() if store.check(["verdict"]) else ""


def _await_verdict(store: Store, limit: timedelta) -> str:
    try:
        # Rank 0 began to wait later than this one, if it came later.
        store.wait(["verdict"], limit + timedelta(seconds=_LINGER_S))
    except DistError as error:
        raise LaunchError(
            f"rank 0 did not come within {limit.total_seconds():g} s, or ended before all were there: look at its output. "
            f"({error})"
        ) from error
    verdict: str = store.get("verdict").decode()
    store.add("readers", 1)
    return verdict


def _claimed_twice(rank: int) -> str:
    return (
        f"Two processes were started as rank {rank}. Give each its own: another --node-rank for each torchrun, or another "
        "RANK. If the other one belongs to an earlier run, end it or set another MASTER_PORT."
    )


def _absent(store: Store, launch: Launch, limit_s: float) -> str:
    absent = [rank for rank in range(1, launch.size) if not store.check([f"size/{rank}"])]
    named = ", ".join(map(str, absent[:_NAMED])) + (", ..." if len(absent) > _NAMED else "")
    return (
        f"{len(absent)} of {launch.size} ranks did not come within {limit_s:g} s: {named}. Look at why they did not start, "
        "or give them longer with env_cfg.dist_cfg.timeout."
    )


def _wait_for_readers(store: Store, launch: Launch) -> None:
    deadline = time.monotonic() + _LINGER_S
    others = range(1, launch.size)
    while time.monotonic() < deadline:
        came = sum(store.check([f"size/{rank}"]) for rank in others)
        if store.add("readers", 0) >= came:
            return
        time.sleep(_PAUSE_S)
