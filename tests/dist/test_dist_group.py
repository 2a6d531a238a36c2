"""Making the process group, and what it must not do."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from ranks import Ranks
from stratagem.dist import barrier, close_dist, get_backend, init_dist, is_distributed
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, LaunchError


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let this process look like the only one that torchrun started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    # What init_dist sets is taken back after the test.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    yield monkeypatch
    close_dist()


def test_a_group_of_one(alone: pytest.MonkeyPatch) -> None:
    """The launcher is inferred, the backend fits the CPU; closing ends the group and may be repeated."""
    assert init_dist().launcher == "pytorch"
    assert is_distributed()
    assert get_backend() == "gloo"
    close_dist()
    close_dist()
    assert not is_distributed()


def test_a_backend_for_each_device(alone: pytest.MonkeyPatch) -> None:
    """Backends can be named by device, as torch writes them."""
    init_dist("pytorch", "cpu:gloo")
    assert is_distributed()


def test_a_group_that_exists_is_kept(alone: pytest.MonkeyPatch) -> None:
    """Whoever made the group first decides; a second call only tells the facts."""
    init_dist("pytorch", timeout=timedelta(seconds=7))
    group = torch_dist.group.WORLD
    assert init_dist("pytorch", timeout=9).size == 1
    assert torch_dist.group.WORLD is group


def test_no_launcher_makes_no_group() -> None:
    """One process needs no group."""
    assert init_dist("none").size == 1
    assert not is_distributed()


def test_a_group_can_meet_in_a_file(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A URL of torch's own takes the place of address and port."""
    alone.setenv("MASTER_PORT", "1")  # privileged: it would fail
    init_dist("pytorch", init_method=f"file://{tmp_path / 'store'}")
    assert is_distributed()


def test_a_process_that_no_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for torchrun's group outside of torchrun says how to start."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LaunchError, match="RANK.* not set. Start it with `torchrun"):
        init_dist("pytorch")


def test_a_port_in_use(alone: pytest.MonkeyPatch) -> None:
    """The error names rank and address; no half-made group stays."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        alone.setenv("MASTER_PORT", str(port))
        told = rf"(?s)Rank 0 of 1 could not join .*127\.0\.0\.1:{port}.*port {port} is in use.*Set MASTER_PORT"
        with pytest.raises(LaunchError, match=told):
            init_dist("pytorch", timeout=5)
    assert not is_distributed()


def test_a_host_that_does_not_resolve(alone: pytest.MonkeyPatch) -> None:
    """The error names it and says what to set."""
    alone.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(LaunchError, match=r"'no-such-host.invalid', does not resolve on .*Set MASTER_ADDR"):
        init_dist("pytorch", timeout=5)
    assert not is_distributed()


def test_a_rank_0_that_runs_elsewhere(alone: pytest.MonkeyPatch) -> None:
    """Where mpirun's ranks look for rank 0 on another host, it says so instead of waiting."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "SIZE": 2, "LOCAL_SIZE": 1}.items():
        alone.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    alone.setenv("PMIX_NAMESPACE", "7")
    alone.setenv("MASTER_ADDR", "192.0.2.77")  # of a range that is for documentation
    alone.delenv("MASTER_PORT")
    with pytest.raises(LaunchError, match=r"rank 0 runs here, but is looked for at 192\.0\.2\.77"):
        init_dist("mpi", timeout=5)


def test_an_unknown_backend(alone: pytest.MonkeyPatch) -> None:
    """A backend that torch does not have is answered with the nearest, before anything is made."""
    with pytest.raises(ConfigValueError, match=r"'cpu:glooo'.*Did you mean 'gloo'"):
        init_dist("pytorch", "cpu:glooo")
    assert not is_distributed()


@pytest.mark.parametrize("timeout", ["30", True, [30]])
def test_a_timeout_of_the_wrong_type(alone: pytest.MonkeyPatch, timeout: Any) -> None:
    """Seconds are a number, not its text."""
    with pytest.raises(ConfigTypeError, match="timeout is"):
        init_dist("pytorch", timeout=timeout)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), timedelta(0)])
def test_a_timeout_that_cannot_be(alone: pytest.MonkeyPatch, timeout: Any) -> None:
    """A run that could not wait at all, or for ever, is refused before it meets anybody."""
    with pytest.raises(ConfigValueError, match="timeout is"):
        init_dist("pytorch", timeout=timeout)


def test_an_unknown_argument_is_answered_with_the_nearest(alone: pytest.MonkeyPatch) -> None:
    """A typo in dist_cfg is found before the ranks meet."""
    with pytest.raises(ConfigKeyError, match=r"dist_cfg: 'timeuot' is not known. Did you mean 'timeout'"):
        init_dist("pytorch", timeuot=3)
    assert not is_distributed()


def own_listening_addresses() -> list[str]:
    """Exchange something, then return the local addresses (in hexadecimal) on which this process listens."""
    barrier()
    torch_dist.all_reduce(torch.ones(4))
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            # The columns: number, local address, remote address, state (0A: listening) ... and the tenth, the inode.
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.append(fields[1].partition(":")[0])
    barrier()
    return addresses


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's table of sockets")
def test_a_run_on_one_host_listens_on_loopback_alone(ranks: Ranks) -> None:
    """Nobody outside of the machine can connect to a run that has all its ranks there."""
    of_rank_0, of_rank_1 = ranks.run(own_listening_addresses)
    # 127.0.0.1 and ::1, in the byte order of the machine and in that of the network.
    loopback = {"0100007F", "7F000001", "00000000000000000000000001000000", "00000000000000000000000000000001"}
    assert of_rank_0, "rank 0 serves the store"
    assert {*of_rank_0, *of_rank_1} <= loopback
