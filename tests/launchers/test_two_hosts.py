"""Two ranks on two hosts give the same results, and a network failure stops the run, which can be resumed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.hosts import Host, Hosts, two_hosts
from tests.launchers.jobs import PYTHON, STRATAGEM, Job, Jobs, facts, need, records, train, wait_until

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]

TORCHRUN = (PYTHON, "-m", "torch.distributed.run")
PORT = "29500"  # always free on a new host
TIMEOUT_S = 10


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts that are connected by a virtual cable."""
    with two_hosts() as hosts:
        yield hosts


def start(jobs: Jobs, hosts: Hosts, *more: str) -> list[Job]:
    """Start torchrun with one rank on each host."""
    meet = [f"--master-addr={hosts.first.address}", f"--master-port={PORT}", "--nnodes=2", "--nproc-per-node=1"]
    return [
        jobs.start(host.words([*TORCHRUN, *meet, f"--node-rank={rank}", "-m", *train("run", *more)]))
        for rank, host in enumerate((hosts.first, hosts.second))
    ]


def listening(host: Host, jobs: Jobs) -> set[str]:
    """Return the addresses on which programs of a host listen."""
    lines = jobs.run(["ip", "netns", "exec", host.name, "ss", "-Hltn"]).splitlines()
    return {line.split()[3].rpartition(":")[0] for line in lines}


def test_torchrun_on_two_hosts(jobs: Jobs, hosts: Hosts, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """With torchrun on two hosts, the results are the same as on one machine."""
    for job in start(jobs, hosts):
        job.succeed()
    assert [record["host"] for record in records(tmp_path / "run")] == [hosts.first.name, hosts.second.name]
    assert facts(tmp_path / "run") == two_ranks


def test_ranks_listen_only_on_the_shared_network(jobs: Jobs, hosts: Hosts, tmp_path: Path) -> None:
    """Without a torchrun agent, the store of rank 0 and Gloo listen only on the network that the hosts share."""
    environ = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": PORT}
    environ["MASTER_ADDR"] = hosts.first.address
    words = [*STRATAGEM, *train("run", "--set", "custom_hooks.0.pause_s=0.5")[1:]]
    pair = (hosts.first, hosts.second)
    ranks = [jobs.start(host.words(words), **environ, RANK=str(rank)) for rank, host in enumerate(pair)]
    progress = tmp_path / "run" / "progress_0"
    wait_until(lambda: progress.exists() or any(rank.process.poll() is not None for rank in ranks), "an iteration")
    assert [listening(host, jobs) for host in pair] == [{host.address} for host in pair]
    for rank in ranks:
        rank.succeed()


def test_a_network_failure_stops_the_run(
    jobs: Jobs, hosts: Hosts, tmp_path: Path, two_ranks: list[dict[str, Any]]
) -> None:
    """After a network failure, both ranks fail within the timeout; the resumed run has the same final weights."""
    run = tmp_path / "run"
    settings = (
        "--set",
        f"env_cfg.dist_cfg.timeout={TIMEOUT_S}",
        "--set",
        "default_hooks.checkpoint.interval=4",
        "--resume",
    )
    nodes = start(jobs, hosts, *settings, "--set", "custom_hooks.0.pause_s=0.3")
    progress = run / "progress_1"
    wait_until(lambda: progress.exists() and len(progress.read_text().split()) >= 6, "six iterations")
    hosts.cut()
    pulled = time.monotonic()
    for node in nodes:
        assert node.wait(6 * TIMEOUT_S) != 0, node.output()
    took = time.monotonic() - pulled
    assert took < TIMEOUT_S + 15, f"{took:.0f} s"
    done = len(progress.read_text().split())
    assert 6 <= done < 16
    reported = [node.output() for node in nodes]
    assert any("stratagem (rank 0)" in text for text in reported), reported
    hosts.mend()
    again = start(jobs, hosts, *settings)
    for node in again:
        node.succeed()
    for record, expected in zip(records(run), two_ranks, strict=True):
        assert record["samples"] == expected["samples"][-len(record["samples"]) :]
        assert record["losses"] == expected["losses"][-len(record["losses"]) :]
        assert record["weights"] == expected["weights"]
        assert len(record["losses"]) < 16


def test_mpirun_on_two_hosts(jobs: Jobs, hosts: Hosts, tmp_path: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Open MPI provides the address of the host that runs mpirun, so no rendezvous address must be set."""
    need("mpirun")
    agent = tmp_path / "agent"
    agent.write_text(
        f"#!/bin/sh\nshift\nexec {' '.join(hosts.second.words([])[:6])} "
        f'sh -c \'hostname {hosts.second.name}; exec sh -c "$0"\' "$*"\n'
    )
    agent.chmod(0o700)
    placed = f"{hosts.first.address},{hosts.second.address}"
    launch = ["mpirun", "--allow-run-as-root", "--mca", "plm_rsh_agent", str(agent), "--host", placed, "-np", "2"]
    names = [word for name in ("PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", name)]
    jobs.run(hosts.first.words([*launch, *names, *STRATAGEM, *train("run")[1:]]))
    started = [(record["launcher"], record["host"]) for record in records(tmp_path / "run")]
    assert started == [("mpi", hosts.first.name), ("mpi", hosts.second.name)]
    assert facts(tmp_path / "run") == two_ranks
