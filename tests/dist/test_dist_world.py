"""The facts of one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stratagem.dist import World, pick_device


@pytest.mark.parametrize(("rank", "is_main"), [(0, True), (5, False)])
def test_rank_0_is_the_main_one(rank: int, is_main: bool) -> None:
    """The main process is that of rank 0, of the whole run and not of a host."""
    assert World(launcher="slurm", rank=rank, local_rank=0, size=8).is_main is is_main


def test_a_launched_process_is_distributed_even_if_alone() -> None:
    """Whether a launcher started it decides, not the number of processes."""
    assert World(launcher="pytorch", size=1).distributed
    assert not World().distributed


def test_the_facts_never_change() -> None:
    """What is true of a process is resolved once."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # type: ignore[misc]


def test_without_an_accelerator_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop trains on its CPU, on any rank."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device(3) == torch.device("cpu")


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (3, 3), (5, 1)])
def test_local_ranks_share_out_the_accelerators(monkeypatch: pytest.MonkeyPatch, local_rank: int, index: int) -> None:
    """Each local rank has its own device; more ranks than devices begin again with the first."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert pick_device(local_rank) == torch.device("cuda", index)
