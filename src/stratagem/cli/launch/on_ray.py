"""Start the same command in several processes on the hosts of a Ray cluster."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from stratagem.cli.launch.child_status import NPROC_VARIABLE
from stratagem.cli.launch.ray_actor import RankActor, Seat
from stratagem.distributed import RAY_JOB_VARIABLE
from stratagem.errors import LaunchError
from stratagem.utils import import_module

__all__ = ["launch_on_ray", "rank_environments"]

# A cloud may have to start hosts first.
_WAIT_FOR_HOSTS_S = 900
# How long ranks may take to save a checkpoint after a signal before they are killed.
_GRACE_S = 600
_POLL_S = 0.5
_PROBE_S = 10.0
_HOW = "Start one (`ray start --head`), or set RAY_ADDRESS to one that runs."
# What of the environment goes along to the other hosts; the rest is theirs.
_PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "NO_COLOR")


def launch_on_ray(nproc: int, arguments: Sequence[str]) -> None:
    """Run Python with ``arguments`` as ``nproc`` ranks on the Ray cluster that is there; return when all have ended well.

    Each rank takes an accelerator where the cluster has any, and a core. The hosts have the same files under the same
    paths. A signal is handed on to the ranks, which save and end.

    Raises:
        MissingDependencyError: if Ray is not installed.
        LaunchError: if there is no cluster, or it has no room for the ranks.
        typer.Exit: with the exit status of the first rank that failed.
    """
    ray = import_module("ray", extra="ray")
    _require_cluster(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address="auto", log_to_driver=True, logging_level="WARNING")
    except ConnectionError as error:
        raise LaunchError(f"There is no Ray cluster here. {_HOW}") from error
    try:
        actors = _place(ray, nproc)
        environs = rank_environments(ray.get([actor.seat.remote() for actor in actors]), uuid.uuid4().hex)
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        running = {
            actor.run.remote(list(arguments), {**passed_on, **environ}, str(Path.cwd())): int(environ["RANK"])
            for actor, environ in zip(actors, environs, strict=True)
        }
        with _handing_signals_on(actors):
            status, printed = _await(ray, running, actors)
    except ray.exceptions.RayActorError as error:
        raise LaunchError(
            f"Ray lost one of the {nproc} ranks, with its host or its process; --resume goes on from the last checkpoint. "
            f"{error}"
        ) from error
    finally:
        ray.shutdown()
    typer.echo(printed, nl=False)
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)


def _require_cluster(address: str) -> None:
    """Refuse the address of a cluster that is not there: Ray itself would look for it for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except OSError as error:
        raise LaunchError(f"There is no Ray cluster at RAY_ADDRESS={address}: {error}. {_HOW}") from error


def rank_environments(seats: Sequence[Seat], job: str) -> list[dict[str, str]]:
    """Return what tells each actor's rank who it is, in the order of ``seats``; ranks of one host follow each other."""
    order = sorted(range(len(seats)), key=lambda place: ([seat.node for seat in seats].index(seats[place].node), place))
    on_host = Counter(seat.node for seat in seats)
    first = seats[order[0]]
    environs: list[dict[str, str]] = [{} for _ in seats]
    begun: Counter[str] = Counter()
    for rank, place in enumerate(order):
        node = seats[place].node
        environs[place] = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str(begun[node]),
            "LOCAL_WORLD_SIZE": str(on_host[node]),
            "MASTER_ADDR": "127.0.0.1" if len(on_host) == 1 else first.address,
            RAY_JOB_VARIABLE: job,
            NPROC_VARIABLE: str(len(seats)),
        }
        begun[node] += 1
    return environs


def _place(ray: Any, nproc: int) -> list[Any]:
    """Let Ray find room for the ranks, as close together as it can; return their actors."""
    needs: dict[str, float] = {"CPU": 1}
    if ray.cluster_resources().get("GPU", 0):
        needs["GPU"] = 1
    group = ray.util.placement_group([needs] * nproc, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=_WAIT_FOR_HOSTS_S)
    except ray.exceptions.GetTimeoutError as error:
        has = ", ".join(
            f"{amount:g} {name}" for name, amount in sorted(ray.cluster_resources().items()) if name in needs
        )
        raise LaunchError(
            f"--nproc {nproc}: the Ray cluster found no room for {nproc} ranks within {_WAIT_FOR_HOSTS_S} s. Each takes "
            f"{' and '.join(f'1 {name}' for name in needs)}, and it has {has}. Ask for fewer, or add hosts."
        ) from error
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=group)
    remote = ray.remote(num_cpus=1, num_gpus=needs.get("GPU", 0), max_concurrency=2)(RankActor)
    return [remote.options(scheduling_strategy=strategy).remote() for _ in range(nproc)]


def _await(ray: Any, running: dict[Any, int], actors: Sequence[Any]) -> tuple[int, str]:
    """Return the first bad status, or 0, and what rank 0 printed; when one rank fails, the others are told to end."""
    left, status, printed = list(running), 0, ""
    give_up = math.inf
    while left and time.monotonic() < give_up:
        # Not for longer at once: Python handles a signal only between two waits.
        done, left = ray.wait(left, timeout=_POLL_S)
        for reference in done:
            ended, said = ray.get(reference)
            if running[reference] == 0:
                printed = said
            if ended and not status:
                status, give_up = ended, time.monotonic() + _GRACE_S
                for actor in actors:
                    actor.signal.remote(signal.SIGTERM)
    return status, printed


@contextmanager
def _handing_signals_on(actors: Sequence[Any]) -> Iterator[None]:
    def hand_on(number: int, _: object) -> None:
        for actor in actors:
            actor.signal.remote(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
