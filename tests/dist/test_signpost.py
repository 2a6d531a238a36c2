"""How ranks find rank 0's store where no port was given."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from stratagem.distributed.rendezvous.port_discovery import Signpost, follow_signpost, job_ports
from stratagem.errors import LaunchError

HERE = "127.0.0.1"


@pytest.fixture
def open_things() -> Iterator[ExitStack]:
    """What is entered here is closed in the end."""
    with ExitStack() as stack:
        yield stack


def post(stack: ExitStack, job: str, port: int) -> Signpost:
    """Put up a signpost."""
    signpost = Signpost(job, HERE, port)
    stack.callback(signpost.close)
    return signpost


def test_ranks_are_led_to_the_store(open_things: ExitStack) -> None:
    """Whoever knows the name of the job learns the port, however many ask."""
    post(open_things, "job 1", 4711)
    assert [follow_signpost("job 1", HERE, 5) for _ in range(3)] == [4711] * 3


def test_jobs_that_want_the_same_port_do_not_collide(open_things: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job takes its next port, and neither one's ranks are led to the other."""
    monkeypatch.setattr("stratagem.distributed.rendezvous.port_discovery.job_ports", lambda job: job_ports("either"))
    first, second = post(open_things, "job 1", 1111), post(open_things, "job 12", 2222)
    assert first.port != second.port
    assert follow_signpost("job 12", HERE, 5) == 2222
    assert follow_signpost("job 1", HERE, 5) == 1111


def test_a_stranger_on_the_port_is_passed_by(open_things: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that accepts and says nothing costs a moment, not the run."""
    monkeypatch.setattr("stratagem.distributed.rendezvous.port_discovery._PROBE_S", 0.1)
    open_things.enter_context(socket.create_server((HERE, job_ports("job 3")[0])))
    signpost = post(open_things, "job 3", 3333)
    assert signpost.port == job_ports("job 3")[1]
    assert follow_signpost("job 3", HERE, 5) == 3333


def test_a_rank_0_that_does_not_come_is_named() -> None:
    """With the address and the ports at which it was looked for."""
    with pytest.raises(LaunchError, match=rf"Rank 0 of job 4 did not appear on {HERE} within 0\.2 s.*{job_ports('job 4')[0]}"):
        follow_signpost("job 4", HERE, 0.2)


def test_no_free_port_at_all(open_things: ExitStack) -> None:
    """The error names them and says what to set."""
    for port in set(job_ports("job 5")):
        open_things.enter_context(socket.create_server((HERE, port)))
    with pytest.raises(LaunchError, match="None of the 16 ports of job 5 is free.*Set MASTER_PORT"):
        Signpost("job 5", HERE, 5555)


def test_a_closed_signpost_gives_its_port_back() -> None:
    """Closing may be repeated."""
    signpost = Signpost("job 6", HERE, 6666)
    port = signpost.port
    signpost.close()
    signpost.close()
    socket.create_server((HERE, port)).close()


def test_ports_are_usable_and_differ() -> None:
    """They are neither privileged nor among those that systems hand out, and each rank computes the same."""
    ports = {job_ports(f"job {number}")[0] for number in range(100)}
    assert all(20_000 <= port < 32_000 for port in ports)
    assert len(ports) > 90
    assert job_ports("job 7") == job_ports("job 7")
