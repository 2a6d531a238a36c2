"""Information about the current process."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stratagem.dist import World, pick_device


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


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (3, 3), (5, 1)])
def test_local_ranks_are_assigned_to_accelerators(monkeypatch: pytest.MonkeyPatch, local_rank: int, index: int) -> None:
    """Local ranks use different accelerators; with more ranks than devices, the devices are reused."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert pick_device(local_rank) == torch.device("cuda", index)
