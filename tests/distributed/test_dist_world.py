"""Information about the current process."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stratagem.dist import World, pick_device
from stratagem.errors import LaunchError


@pytest.mark.parametrize(("rank", "is_main"), [(0, True), (5, False)])
def test_rank_0_is_the_main_process(rank: int, is_main: bool) -> None:
    """The main process is rank 0 of the whole run, not of a host."""
    assert World(launcher="slurm", rank=rank, local_rank=0, size=8).is_main is is_main


def test_a_launched_process_is_distributed() -> None:
    """A process that a launcher started is distributed, even with a world size of 1."""
    assert World(launcher="pytorch", size=1).distributed
    assert not World().distributed


def test_world_is_immutable() -> None:
    """The attributes of a World cannot be changed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # type: ignore[misc]


def test_without_an_accelerator_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator, every rank uses the CPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device(3) == torch.device("cpu")


def _have_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (3, 3)])
def test_local_ranks_are_assigned_to_accelerators(monkeypatch: pytest.MonkeyPatch, local_rank: int, index: int) -> None:
    """Each local rank uses the accelerator with its number."""
    _have_devices(monkeypatch, 4)
    assert pick_device(local_rank, 4) == torch.device("cuda", index)


@pytest.mark.parametrize("local_rank", [0, 5])
def test_more_ranks_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    """8 ranks on a host with 4 devices are rejected on every rank, with both numbers and the visible devices."""
    _have_devices(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,7")
    text = (
        r"8 ranks on this host, but torch sees only 4 cuda devices \(CUDA_VISIBLE_DEVICES=0,1,2,7\).* at most 4 ranks"
    )
    with pytest.raises(LaunchError, match=text):
        pick_device(local_rank, 8)


def test_a_rank_uses_the_only_device_that_its_launcher_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that sees a single device uses it, whatever its local rank, since launchers may assign one device to each."""
    _have_devices(monkeypatch, 1)
    assert pick_device(3, 4) == torch.device("cuda", 0)
