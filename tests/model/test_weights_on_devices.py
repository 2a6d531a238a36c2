"""On which device the initial weights are broadcast. The meta device stands in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from stratagem.distributed import World
from stratagem.model.weights import broadcast_weights
from stratagem.parallel.deferred_init import materialize
from stratagem.strategies import SingleDeviceStrategy
from tests.support.device_memory import META


@pytest.fixture
def strategy(tmp_path: Path) -> Iterator[SingleDeviceStrategy]:
    """A strategy of one process."""
    made = SingleDeviceStrategy(work_dir=tmp_path)
    yield made
    made.close()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that would be broadcast on two ranks with a backend for the CPU and one for the stand-in of a GPU."""
    tensors: list[Tensor] = []
    monkeypatch.setattr("stratagem.distributed.collectives.get_world_size", lambda _=None: 2)
    monkeypatch.setattr("stratagem.model.weights.get_world_size", lambda: 2)
    monkeypatch.setattr(torch_dist, "get_backend_config", lambda _=None: "cpu:gloo,meta:nccl")
    monkeypatch.setattr(torch_dist, "broadcast", lambda tensor, **_: tensors.append(tensor))
    return tensors


def devices(tensors: list[Tensor]) -> set[str]:
    """Return the types of the devices of tensors."""
    return {each.device.type for each in tensors}


def test_the_weights_of_a_model_on_a_gpu_are_broadcast_there(sent: list[Tensor]) -> None:
    """The weights of a model on the GPU are broadcast there as bytes, since NCCL does not support all dtypes."""
    model = nn.Linear(4, 4, device=META)
    model.register_buffer("small", torch.zeros(3, dtype=torch.int16, device=META))
    broadcast_weights(model)
    assert devices(sent) == {"meta"}
    assert {each.dtype for each in sent} == {torch.uint8}
    assert sum(each.numel() for each in sent) == 4 * 20 + 2 * 3


def test_the_model_is_moved_before_its_weights_are_broadcast(
    strategy: SingleDeviceStrategy, sent: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy moves a model that was built on the CPU to its GPU before it broadcasts the weights."""
    monkeypatch.setattr(SingleDeviceStrategy, "world", World(size=2, device=META))
    model = strategy._init_model_weights(nn.Linear(4, 4))
    assert devices(list(model.parameters())) == devices(sent) == {"meta"}


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("offloaded", [True, False])
def test_the_pieces_of_a_sharded_model_are_broadcast_on_the_gpu(
    sent: list[Tensor], is_main: bool, offloaded: bool
) -> None:
    """Under FSDP, rank 0 moves each piece that it has drawn on the CPU to the GPU, even if the shards are in CPU memory."""
    target = torch.empty(6, 4, device="cpu" if offloaded else META)
    with suppress(NotImplementedError):  # the stand-in has no values that could be copied to the CPU
        materialize._receive(target, torch.ones(6, 4) if is_main else None, META)
    assert devices(sent) == {"meta"}
    assert sum(each.numel() for each in sent) == 4 * 24
