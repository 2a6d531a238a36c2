"""Check that all ranks belong to the same world. The ranks are threads that share a store."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from stratagem.dist import Launch
from stratagem.distributed.rendezvous.membership_check import OwnDevice, check_membership
from stratagem.errors import LaunchError


def call(
    ranks: Sequence[tuple[int, int]], seconds: float = 20.0, devices: Sequence[str] = ("", "", "", "")
) -> list[str | None]:
    """Run the check in one thread for each (rank, size), with the device of that rank; return the error message of each."""
    store = HashStore()

    def answer(rank: int, size: int) -> str | None:
        launch = Launch(launcher="pytorch", rank=rank, size=size, local_size=size)
        try:
            device = OwnDevice(devices[rank], f"cuda:{rank} on node")
            check_membership(store, launch, timedelta(seconds=seconds), device)
        except LaunchError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(ranks)) as threads:
        return [future.result() for future in [threads.submit(answer, rank, size) for rank, size in ranks]]


def test_all_ranks_are_present() -> None:
    """Ranks with the same world size pass the check."""
    assert call([(2, 3), (0, 3), (1, 3)]) == [None] * 3


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
def test_different_world_sizes(sizes: tuple[int, int]) -> None:
    """Ranks with different world sizes all get an error with both sizes and the option to set."""
    outcomes = call([(0, sizes[0]), (1, sizes[1])])
    assert outcomes[0] == outcomes[1]
    assert f"Rank 0 was started with world size {sizes[0]}, but rank 1 was started with world size {sizes[1]}" in (
        outcomes[0] or ""
    )
    assert "--nnodes" in (outcomes[0] or "")


def test_two_ranks_on_one_device() -> None:
    """If two ranks use the device with the same UUID, all ranks get an error that names both ranks and the device."""
    outcomes = call([(0, 3), (1, 3), (2, 3)], devices=["GPU-a", "GPU-b", "GPU-b"])
    text = "Two ranks share a device: rank 1 uses cuda:1 on node and rank 2 uses cuda:2 on node"
    assert all(text in (outcome or "") and "UUID GPU-b" in (outcome or "") for outcome in outcomes)


def test_ranks_on_different_devices() -> None:
    """Ranks with different devices pass the check."""
    assert call([(0, 2), (1, 2)], devices=["GPU-a", "GPU-b"]) == [None] * 2


def test_two_processes_with_the_same_rank() -> None:
    """If two processes have the same rank, all ranks get an error."""
    outcomes = call([(0, 3), (1, 3), (1, 3)])
    assert all("Two processes were started as rank 1." in (text or "") for text in outcomes)


@pytest.mark.slow
def test_missing_ranks() -> None:
    """If ranks are missing, the others get an error that lists them."""
    outcomes = call([(0, 4), (2, 4)], seconds=0.5)
    assert "2 of 4 ranks did not join within 0.5 s: 1, 3." in (outcomes[0] or "")


def test_a_missing_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """If rank 0 is missing, the others get an error that names it."""
    monkeypatch.setattr("stratagem.distributed.rendezvous.membership_check._LINGER_S", 0.0)
    (outcomes,) = call([(1, 2)], seconds=0.3)
    assert "rank 0 did not join within 0.3 s" in (outcomes or "")
