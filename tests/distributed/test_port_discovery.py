"""Discovering the port of rank 0's store if no port is set."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from stratagem.distributed.rendezvous.port_discovery import PortAnnouncer, discover_port, job_ports
from stratagem.errors import LaunchError

HERE = "127.0.0.1"


@pytest.fixture
def open_things() -> Iterator[ExitStack]:
    """Close everything that is entered here after the test."""
    with ExitStack() as stack:
        yield stack


def announce(stack: ExitStack, job: str, port: int) -> PortAnnouncer:
    """Start a server for port discovery."""
    announcer = PortAnnouncer(job, HERE, port)
    stack.callback(announcer.close)
    return announcer


def test_ranks_discover_the_port(open_things: ExitStack) -> None:
    """Every rank that knows the job name discovers the port."""
    announce(open_things, "job 1", 4711)
    assert [discover_port("job 1", HERE, 5) for _ in range(3)] == [4711] * 3


def test_jobs_with_the_same_candidate_port_do_not_collide(
    open_things: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If two jobs have the same candidate port, the second uses its next one, and their ranks are not mixed up."""
    monkeypatch.setattr("stratagem.distributed.rendezvous.port_discovery.job_ports", lambda job: job_ports("either"))
    first, second = announce(open_things, "job 1", 1111), announce(open_things, "job 12", 2222)
    assert first.port != second.port
    assert discover_port("job 12", HERE, 5) == 2222
    assert discover_port("job 1", HERE, 5) == 1111


def test_other_programs_on_a_port_are_skipped(open_things: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that accepts connections on a candidate port and does not respond is skipped after a timeout."""
    monkeypatch.setattr("stratagem.distributed.rendezvous.port_discovery._PROBE_S", 0.1)
    open_things.enter_context(socket.create_server((HERE, job_ports("job 3")[0])))
    announcer = announce(open_things, "job 3", 3333)
    assert announcer.port == job_ports("job 3")[1]
    assert discover_port("job 3", HERE, 5) == 3333


def test_a_missing_rank_0_is_reported() -> None:
    """The error for a missing rank 0 contains the address and the ports."""
    with pytest.raises(
        LaunchError, match=rf"Rank 0 of job 4 did not respond on {HERE} within 0\.2 s.*{job_ports('job 4')[0]}"
    ):
        discover_port("job 4", HERE, 0.2)


def test_no_free_port(open_things: ExitStack) -> None:
    """The error for occupied ports contains the job and the variable to set."""
    for port in set(job_ports("job 5")):
        open_things.enter_context(socket.create_server((HERE, port)))
    with pytest.raises(LaunchError, match="None of the 16 ports of job 5 is free.*Set MASTER_PORT"):
        PortAnnouncer("job 5", HERE, 5555)


def test_close_releases_the_port() -> None:
    """Closing releases the port and is idempotent."""
    announcer = PortAnnouncer("job 6", HERE, 6666)
    port = announcer.port
    announcer.close()
    announcer.close()
    socket.create_server((HERE, port)).close()


def test_ports_are_valid_and_distinct() -> None:
    """Ports are outside the privileged and ephemeral ranges, and are the same on all ranks."""
    ports = {job_ports(f"job {number}")[0] for number in range(100)}
    assert all(20_000 <= port < 32_000 for port in ports)
    assert len(ports) > 90
    assert job_ports("job 7") == job_ports("job 7")
