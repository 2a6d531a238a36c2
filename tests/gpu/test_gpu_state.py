"""Resuming, random states and asynchronous saves on GPUs, and the initial weights of two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from stratagem.checkpoint.staging import Staging
from stratagem.dist import get_rank
from stratagem.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from stratagem.tensors.dtensor import full_tensor
from stratagem.utils import generator_state, restore_generator_state
from tests.gpu.devices import ON_CPU, require_torch
from tests.support.ranks import Ranks

WIDTH, LAYERS = 1024, 16


def large_model() -> nn.Module:
    """Return a model of 64 MiB with equally large layers."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def adamw_strategy(folder: Path) -> SingleDeviceStrategy:
    """Return a strategy that is prepared with the large model and AdamW."""
    made = SingleDeviceStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    made.prepare(large_model(), optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-3, "fused": True}})
    return made


def update(made: Any) -> None:
    """Make one update."""
    made.optim_wrapper.update_params(made.model(torch.ones(2, WIDTH, device=made.world.device)).square().sum())


def test_resuming_needs_the_memory_of_training(cuda: torch.device, tmp_path: Path) -> None:
    """Resuming AdamW holds at most three models (weights and moments) and one more tensor on the GPU."""
    made = adamw_strategy(tmp_path)
    update(made)
    made.save_checkpoint(tmp_path / "saved")
    expected = [each.detach().cpu() for each in made.model.parameters()]
    made.close()
    del made
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(cuda)
    made = adamw_strategy(tmp_path)
    torch.cuda.reset_peak_memory_stats(cuda)
    made.resume(tmp_path / "saved")
    weights = sum(each.nbytes for each in made.model.parameters())
    peak = torch.cuda.max_memory_allocated(cuda) - before
    assert peak <= 3 * weights + 2 * weights / LAYERS
    for parameter, value in zip(made.model.parameters(), expected, strict=True):
        assert torch.equal(parameter.cpu(), value)
    made.close()


def test_random_numbers_of_a_gpu_continue(cuda: torch.device) -> None:
    """The saved state has no index, and restoring it repeats the random numbers of the GPU."""
    torch.rand(3, device=cuda)
    state = generator_state()
    assert list(state["accelerator"]) == ["cuda"]
    expected = torch.rand(5, device=cuda)
    assert restore_generator_state(state) == []
    assert torch.equal(torch.rand(5, device=cuda), expected)


def test_the_advanced_generator_of_an_old_checkpoint_is_restored(cuda: torch.device) -> None:
    """Of the states of all GPUs in a checkpoint of an earlier version, the one that has advanced is restored."""
    torch.cuda.manual_seed_all(11)
    unused = torch.cuda.get_rng_state(cuda)
    torch.rand(3, device=cuda)
    state, used = generator_state(), torch.cuda.get_rng_state(cuda)
    expected = torch.rand(5, device=cuda)
    old = {**state, "accelerator": {"cuda:0": unused, "cuda:1": unused, "cuda:2": used, "cuda:3": unused}}
    assert restore_generator_state(old) == []
    assert torch.equal(torch.rand(5, device=cuda), expected)


@pytest.fixture(autouse=True)
def _generators_as_before() -> Any:
    state = generator_state()
    yield
    restore_generator_state(state)


def _initial_weights(kind: str, folder: str) -> tuple[list[str], list[float]]:
    """Prepare a model whose weights differ between ranks; return the devices of all broadcasts, and the sums of the weights."""
    used: list[str] = []
    original = torch_dist.broadcast

    def recorded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() >= 4 * WIDTH:
            used.append(tensor.device.type)
        return original(tensor, *args, **kwargs)

    torch_dist.broadcast = recorded
    try:
        made = {"ddp": DDPStrategy, "fsdp": FSDPStrategy}[kind](work_dir=folder, log_kwargs={"log_level": "ERROR"})
        torch.manual_seed(get_rank())
        made.prepare(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2))))
        sums = [full_tensor(each).sum().item() for each in made.model.parameters()]
        made.close()
    finally:
        torch_dist.broadcast = original
    return used, sums


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_initial_weights_are_broadcast_by_nccl(two_gpus: Ranks, kind: str, tmp_path: Path) -> None:
    """The weights of rank 0 reach the other GPU without passing through CPU memory."""
    if kind == "fsdp":
        require_torch(2, 13)
    (used, sums), (_, sums_of_other) = two_gpus.run(_initial_weights, kind, str(tmp_path))
    assert sums == sums_of_other
    assert used
    assert set(used) == {"cpu" if ON_CPU else "cuda"}


def test_asynchronous_saves_page_lock_exactly_what_they_need(cuda: torch.device) -> None:
    """The buffer of asynchronous saves is page-locked with its exact size, and freed with its last copy."""
    tensors = [torch.full((3 * 2**20,), 7.0, device=cuda), torch.ones(5, dtype=torch.int8, device=cuda)]
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    staging = Staging()
    copies = staging.copy(tensors)
    assert staging.nbytes == 12 * 2**20 + 64
    assert all(each.is_pinned() for each in copies)
    assert torch.equal(copies[0], tensors[0].cpu())
    # None of it comes from torch's allocator, which would take 16 MiB and keep them.
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before
    address = copies[0].data_ptr()
    assert next(each.data_ptr() for each in staging.copy(tensors)) == address
    del copies
    staging.copy([torch.ones(2**23, device=cuda)])
    assert staging.nbytes == 4 * 2**23
