"""The prepared update of sharded parameters updates the local shards, and equals torch's own step to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.optim import SGD, AdamW, Optimizer

from stratagem.model import SupervisedModel
from stratagem.optim.prepared import PreparedUpdate
from stratagem.strategies import FSDPStrategy
from tests.support.ranks import Ranks, seed_generators

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.1},
    "SGD": {"type": "SGD", "lr": 0.1},
    "SGD with momentum": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}


def trained(folder: str, optimizer: dict[str, Any], *, prepared: bool) -> tuple[list[Any], list[bool]]:
    """Train a network with uneven shards; return weights and state, and whether each update was the prepared one."""
    applied: list[bool] = []
    apply = PreparedUpdate.apply

    def recorded(self: PreparedUpdate, optimizer: Optimizer) -> bool:
        applied.append(apply(self, optimizer))
        return applied[-1]

    strategy = FSDPStrategy(
        wrap_policy="Linear",
        work_dir=folder,
        log_kwargs={"log_level": "ERROR"},
        env_kwargs={"launcher": "pytorch"},
    )
    seed_generators(3)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    wrapper = {"optimizer": optimizer, "prepared": prepared, "clip_grad": {"max_norm": 0.5}}
    model, optim = strategy.prepare(SupervisedModel(network, nn.MSELoss()), optim_wrapper=wrapper)
    with mock.patch.object(PreparedUpdate, "apply", recorded):
        for number in range(5):
            generator = torch.Generator().manual_seed(10 * number + get_rank())
            batch = torch.randn(4, 5, generator=generator), torch.randn(4, 1, generator=generator)
            model.train_step(batch, optim)
    values = [*model.parameters(), *(value for state in optim.optimizer.state.values() for value in state.values())]
    strategy.close()
    return [value.to_local().tolist() if isinstance(value, DTensor) else value.tolist() for value in values], applied


def of_both_kinds(folder: str, optimizer: dict[str, Any]) -> tuple[Any, Any]:
    """Train with the prepared update and without it."""
    return trained(folder, optimizer, prepared=True), trained(folder, optimizer, prepared=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_step_of_torch_under_fsdp(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Weights and moments have the same bits; on the second rank, the shard of a parameter is empty."""
    for prepared, by_torch in ranks.run(of_both_kinds, str(tmp_path), OPTIMIZERS[name]):
        assert prepared[0] == by_torch[0]
        # Torch makes the first step, which creates the moments, if there are any.
        assert prepared[1] == [name == "SGD", True, True, True, True]
        assert by_torch[1] == []


def shard(values: Tensor, placement: Any = None) -> DTensor:
    """Return a tensor that is sharded along its first dimension."""
    return distribute_tensor(values, init_device_mesh("cpu", (2,)), [placement or Shard(0)])


def started(kind: Callable[[list[nn.Parameter]], Optimizer]) -> tuple[Optimizer, PreparedUpdate, nn.Parameter]:
    """Return an optimizer of a sharded parameter after its first step."""
    parameter = nn.Parameter(shard(torch.arange(6.0).view(3, 2)))
    optimizer = kind([parameter])
    parameter.grad = shard(torch.ones(3, 2))
    optimizer.step()
    prepared = PreparedUpdate.of(optimizer)
    assert prepared is not None
    return optimizer, prepared, parameter


def replaced_shards() -> list[list[Any]]:
    """Replace shards between updates; return the values after each update."""
    results = []
    for kind in (
        lambda each: SGD(each, 0.5, momentum=0.5, foreach=True),
        lambda each: AdamW(each, 0.5, fused=True),
    ):
        for prepared_update in (True, False):
            optimizer, prepared, parameter = started(kind)
            for step in range(4):
                parameter.grad = shard(torch.full((3, 2), step + 1.0))
                if step == 1:
                    parameter.data = parameter.data * 2  # other storage
                if step == 2:
                    state = optimizer.state[parameter]
                    name = next(key for key, value in state.items() if isinstance(value, DTensor))
                    state[name] = state[name] + 1
                if prepared_update:
                    assert prepared.apply(optimizer)
                else:
                    optimizer.step()
            results.append(parameter.full_tensor().tolist())
    return results


def test_replaced_shards_are_found(ranks: Ranks) -> None:
    """After a parameter or a moment received another local tensor, that tensor is used, as in torch's step."""
    for sgd, sgd_by_torch, adam, adam_by_torch in ranks.run(replaced_shards):
        assert sgd == sgd_by_torch
        assert adam == adam_by_torch


def other_gradients() -> list[bool]:
    """Return whether gradients that are not sharded like their parameter are updated by the prepared update."""
    found = []
    for gradient in (shard(torch.ones(3, 2), Replicate()), shard(torch.ones(3, 2), Shard(1)), None):
        optimizer, prepared, parameter = started(lambda each: SGD(each, 0.5, foreach=True))
        before = parameter.full_tensor().tolist()
        parameter.grad = gradient
        found.append(prepared.apply(optimizer))
        assert parameter.full_tensor().tolist() == before
    return found


def test_gradients_that_are_sharded_otherwise_are_left_to_torch(ranks: Ranks) -> None:
    """A replicated gradient, one with another sharded dimension, and a missing one have no effect here."""
    for found in ranks.run(other_gradients):
        assert found == [False, False, False]


def collected() -> int:
    """Return how often the lists of tensors are collected in five updates."""
    optimizer, prepared, parameter = started(lambda each: SGD(each, 0.5, momentum=0.5, foreach=True))
    with mock.patch.object(PreparedUpdate, "_prepare", autospec=True, side_effect=PreparedUpdate._prepare) as prepare:
        for _ in range(5):
            parameter.grad = shard(torch.ones(3, 2))
            assert prepared.apply(optimizer)
    return prepare.call_count


def test_the_lists_of_shards_are_collected_once(ranks: Ranks) -> None:
    """As long as nothing is replaced, later updates use the same lists."""
    assert ranks.run(collected) == [1, 1]
