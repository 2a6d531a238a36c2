"""Run the current command as several ranks on a Ray cluster."""

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

from stratagem.cli.launch.ray_actor import ActorLocation, RankActor
from stratagem.distributed import RAY_JOB_VARIABLE
from stratagem.errors import LaunchError
from stratagem.utils import import_module
from stratagem.utils.launch_variables import NPROC_VARIABLE

__all__ = ["launch_on_ray", "rank_environments"]

# The time to wait for resources; an autoscaling cluster may have to start hosts first.
_WAIT_FOR_HOSTS_S = 900
# The time that the other ranks have to save and exit after a rank has failed.
_GRACE_S = 600
_POLL_S = 0.5
_PROBE_S = 10.0
_ADVICE = "Start one (`ray start --head`), or set RAY_ADDRESS to a running cluster."
# Environment variables that are forwarded to the ranks. All others come from the rank's host.
_FORWARDED = ("PYTHONPATH", "OMP_NUM_THREADS", "NO_COLOR")


def launch_on_ray(nproc: int, arguments: Sequence[str]) -> None:
    """Run Python with ``arguments`` as ``nproc`` ranks on a running Ray cluster, and wait until all have succeeded.

    Each rank uses one CPU core, and one GPU if the cluster has any. All hosts must have the same files under the same
    paths. SIGINT, SIGTERM and SIGUSR1 are forwarded to the ranks.

    Raises:
        MissingDependencyError: if Ray is not installed.
        LaunchError: if there is no cluster, it has too few resources, or Ray lost a rank.
        typer.Exit: with the exit status of the first rank that failed.
    """
    ray = import_module("ray", extra="ray")
    _require_cluster(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address="auto", log_to_driver=True, logging_level="WARNING")
    except ConnectionError as error:
        raise LaunchError(f"No running Ray cluster found. {_ADVICE}") from error
    try:
        actors = _create_actors(ray, nproc)
        environs = rank_environments(ray.get([actor.location.remote() for actor in actors]), uuid.uuid4().hex)
        forwarded = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
        running = {
            actor.run.remote(list(arguments), {**forwarded, **environ}, str(Path.cwd())): int(environ["RANK"])
            for actor, environ in zip(actors, environs, strict=True)
        }
        with _forwarding_signals(actors):
            status, printed = _wait_for_ranks(ray, running, actors)
    except ray.exceptions.RayActorError as error:
        raise LaunchError(
            f"Ray lost one of the {nproc} ranks: its host or its process died. Use --resume to continue from the last "
            f"checkpoint. {error}"
        ) from error
    finally:
        ray.shutdown()
    typer.echo(printed, nl=False)
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)


def _require_cluster(address: str) -> None:
    """Raise LaunchError if no cluster answers at ``address``; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except OSError as error:
        raise LaunchError(f"No Ray cluster answers at RAY_ADDRESS={address}: {error}. {_ADVICE}") from error


def rank_environments(locations: Sequence[ActorLocation], job: str) -> list[dict[str, str]]:
    """Return the environment variables of each actor's rank, in the order of ``locations``.

    The ranks on one host are consecutive, and rank 0 is on the host of the first actor.
    """
    nodes = [location.node for location in locations]
    order = sorted(range(len(nodes)), key=lambda index: (nodes.index(nodes[index]), index))
    local_size = Counter(nodes)
    first = locations[order[0]]
    environs: list[dict[str, str]] = [{} for _ in locations]
    assigned: Counter[str] = Counter()
    for rank, index in enumerate(order):
        node = nodes[index]
        environs[index] = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(locations)),
            "LOCAL_RANK": str(assigned[node]),
            "LOCAL_WORLD_SIZE": str(local_size[node]),
            "MASTER_ADDR": "127.0.0.1" if len(local_size) == 1 else first.address,
            RAY_JOB_VARIABLE: job,
            NPROC_VARIABLE: str(len(locations)),
        }
        assigned[node] += 1
    return environs


def _create_actors(ray: Any, nproc: int) -> list[Any]:
    """Reserve resources on as few hosts as possible, and return one actor per rank.

    Raises:
        LaunchError: if the resources are not available in time.
    """
    needs: dict[str, float] = {"CPU": 1}
    if ray.cluster_resources().get("GPU", 0):
        needs["GPU"] = 1
    group = ray.util.placement_group([needs] * nproc, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=_WAIT_FOR_HOSTS_S)
    except ray.exceptions.GetTimeoutError as error:
        available = ", ".join(
            f"{amount:g} {name}" for name, amount in sorted(ray.cluster_resources().items()) if name in needs
        )
        raise LaunchError(
            f"--nproc {nproc}: the Ray cluster could not reserve resources for {nproc} ranks within {_WAIT_FOR_HOSTS_S} s. "
            f"Each rank needs {' and '.join(f'1 {name}' for name in needs)}; the cluster has {available}. Use fewer ranks, "
            "or add hosts."
        ) from error
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=group)
    remote = ray.remote(num_cpus=1, num_gpus=needs.get("GPU", 0), max_concurrency=2)(RankActor)
    return [remote.options(scheduling_strategy=strategy).remote() for _ in range(nproc)]


def _wait_for_ranks(ray: Any, running: dict[Any, int], actors: Sequence[Any]) -> tuple[int, str]:
    """Wait for all ranks. Return the first nonzero exit status (or 0) and the output of rank 0.

    If a rank fails, the others receive SIGTERM.
    """
    pending, status, printed = list(running), 0, ""
    deadline = math.inf
    while pending and time.monotonic() < deadline:
        # The timeout is short because Python handles signals only between two waits.
        done, pending = ray.wait(pending, timeout=_POLL_S)
        for reference in done:
            returncode, output = ray.get(reference)
            if running[reference] == 0:
                printed = output
            if returncode and not status:
                status, deadline = returncode, time.monotonic() + _GRACE_S
                for actor in actors:
                    actor.signal.remote(signal.SIGTERM)
    return status, printed


@contextmanager
def _forwarding_signals(actors: Sequence[Any]) -> Iterator[None]:
    def forward(number: int, _: object) -> None:
        for actor in actors:
            actor.signal.remote(number)

    # Windows has no SIGUSR1.
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
