"""Creating and closing the process group."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from stratagem.dist import barrier, close_dist, get_backend, init_dist, is_distributed
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, LaunchError
from tests.support.ranks import Ranks


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make this process look like the only one that torchrun started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    # Restore after the test what init_dist sets.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    yield monkeypatch
    close_dist()


def test_a_group_of_one(alone: pytest.MonkeyPatch) -> None:
    """The launcher is inferred, the default backend supports the CPU, and closing the group is idempotent."""
    assert init_dist().launcher == "pytorch"
    assert is_distributed()
    assert get_backend() == "gloo"
    close_dist()
    close_dist()
    assert not is_distributed()


def test_a_backend_for_each_device(alone: pytest.MonkeyPatch) -> None:
    """A backend can be given per device, in torch's notation."""
    init_dist("pytorch", "cpu:gloo")
    assert is_distributed()


def test_an_existing_group_is_reused(alone: pytest.MonkeyPatch) -> None:
    """A second call keeps the existing group and returns its information."""
    init_dist("pytorch", timeout=timedelta(seconds=7))
    group = torch_dist.group.WORLD
    assert init_dist("pytorch", timeout=9).size == 1
    assert torch_dist.group.WORLD is group


def test_the_device_is_selected_although_a_group_exists(alone: pytest.MonkeyPatch) -> None:
    """If the program has created the process group itself, the device of this rank is still selected."""
    init_dist("pytorch")
    selected: list[torch.device] = []
    alone.setattr(torch.accelerator, "is_available", lambda: True)
    alone.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    alone.setattr(torch.accelerator, "device_count", lambda: 4)
    alone.setattr(torch.accelerator, "set_device_index", selected.append)
    alone.setenv("LOCAL_RANK", "2")
    alone.setenv("LOCAL_WORLD_SIZE", "4")
    init_dist("pytorch")
    assert selected == [torch.device("cuda", 2)]


def test_launcher_none_creates_no_group() -> None:
    """Without a launcher, no process group is created."""
    assert init_dist("none").size == 1
    assert not is_distributed()


def test_a_group_can_use_a_file_store(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a file URL, the rendezvous does not use an address and a port."""
    alone.setenv("MASTER_PORT", "1")  # a privileged port, which would fail
    init_dist("pytorch", init_method=f"file://{tmp_path / 'store'}")
    assert is_distributed()


def test_a_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requesting torchrun's group outside torchrun raises an error that contains the command to use."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LaunchError, match="RANK.* not set. Start it with `torchrun"):
        init_dist("pytorch")


def test_a_port_in_use(alone: pytest.MonkeyPatch) -> None:
    """The error for a port in use names the rank and address, and no process group remains."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        alone.setenv("MASTER_PORT", str(port))
        message = rf"(?s)Rank 0 of 1 could not join .*127\.0\.0\.1:{port}.*port {port} is in use.*Set MASTER_PORT"
        with pytest.raises(LaunchError, match=message):
            init_dist("pytorch", timeout=5)
    assert not is_distributed()


def test_an_unknown_host(alone: pytest.MonkeyPatch) -> None:
    """The error for an unknown host contains its name and the variable to set."""
    alone.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(LaunchError, match=r"'no-such-host.invalid', does not resolve on .*Set MASTER_ADDR"):
        init_dist("pytorch", timeout=5)
    assert not is_distributed()


def test_rank_0_on_a_different_host(alone: pytest.MonkeyPatch) -> None:
    """If rank 0 runs on a host other than the rendezvous address, it raises an error instead of waiting."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "SIZE": 2, "LOCAL_SIZE": 1}.items():
        alone.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    alone.setenv("PMIX_NAMESPACE", "7")
    alone.setenv("MASTER_ADDR", "192.0.2.77")  # from a range that is reserved for documentation
    alone.delenv("MASTER_PORT")
    with pytest.raises(LaunchError, match=r"rank 0 runs on this machine, but its address 192\.0\.2\.77"):
        init_dist("mpi", timeout=5)


def test_an_unknown_backend(alone: pytest.MonkeyPatch) -> None:
    """An unknown backend raises an error with the closest name, before anything is created."""
    with pytest.raises(ConfigValueError, match=r"'cpu:glooo'.*Did you mean 'gloo'"):
        init_dist("pytorch", "cpu:glooo")
    assert not is_distributed()


@pytest.mark.parametrize("timeout", ["30", True, [30]])
def test_a_timeout_of_the_wrong_type(alone: pytest.MonkeyPatch, timeout: Any) -> None:
    """A timeout that is not a number or timedelta raises an error."""
    with pytest.raises(ConfigTypeError, match="timeout must be"):
        init_dist("pytorch", timeout=timeout)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), timedelta(0)])
def test_an_invalid_timeout(alone: pytest.MonkeyPatch, timeout: Any) -> None:
    """A timeout that is not positive and finite raises an error."""
    with pytest.raises(ConfigValueError, match="timeout must be"):
        init_dist("pytorch", timeout=timeout)


def test_an_unknown_argument_suggests_the_closest_name(alone: pytest.MonkeyPatch) -> None:
    """An unknown key in dist_cfg raises an error with the closest name, before the rendezvous."""
    with pytest.raises(ConfigKeyError, match=r"dist_cfg: 'timeuot' is not known. Did you mean 'timeout'"):
        init_dist("pytorch", timeuot=3)
    assert not is_distributed()


def own_listening_addresses() -> list[str]:
    """Run a collective, then return the local addresses (in hexadecimal) on which this process listens."""
    barrier()
    torch_dist.all_reduce(torch.ones(4))
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            # The columns are: number, local address, remote address, state (0A: listening), ... The tenth is the
            # inode.
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.append(fields[1].partition(":")[0])
    barrier()
    return addresses


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's table of sockets")
def test_a_run_on_one_host_listens_only_on_loopback(ranks: Ranks) -> None:
    """If all ranks run on one host, they only listen on the loopback interface."""
    of_rank_0, of_rank_1 = ranks.run(own_listening_addresses)
    # 127.0.0.1 and ::1, in the byte orders of the host and of the network.
    loopback = {"0100007F", "7F000001", "00000000000000000000000001000000", "00000000000000000000000000000001"}
    assert of_rank_0, "rank 0 serves the store"
    assert {*of_rank_0, *of_rank_1} <= loopback
