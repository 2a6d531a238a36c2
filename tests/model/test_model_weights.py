"""Broadcasting the initial weights to every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stratagem.dist import get_rank
from stratagem.model import weights
from stratagem.model.weights import broadcast_weights
from tests.support.ranks import Ranks


class Mixed(nn.Module):
    """A model with parameters and buffers of several types and layouts, filled with one number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.full((2, 3), float(number)).t())
        self.frozen = nn.Parameter(torch.full((2,), float(number)), requires_grad=False)
        self.short = nn.Parameter(torch.full((4,), float(number), dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("count", torch.tensor(number))
        self.register_buffer("flag", torch.tensor([number == 0]))
        self.register_buffer("hidden", torch.tensor([float(number)]), persistent=False)
        self.tied = self.frozen


def broadcasted(bucket_bytes: int) -> dict[str, Any]:
    """Broadcast a model that is filled with the rank number; return its values afterwards."""
    weights._BUCKET_BYTES = bucket_bytes
    model = Mixed(get_rank())
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    broadcast_weights(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    assert model.tied is model.frozen
    assert model.transposed.requires_grad
    assert not model.frozen.requires_grad
    return {name: tensor.tolist() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_every_rank_receives_the_values_of_rank_0(ranks: Ranks) -> None:
    """All data types, layouts and buffers are broadcast in place, in one or several buckets."""
    expected = {
        "transposed": [[0.0, 0.0]] * 3,
        "frozen": [0.0, 0.0],
        "short": [0.0] * 4,
        "empty": [],
        "count": 0,
        "flag": [True],
        "hidden": [0.0],
    }
    for bucket_bytes in (1, 32 * 2**20):
        assert ranks.run(broadcasted, bucket_bytes) == [expected, expected]


def test_a_single_process_keeps_its_weights() -> None:
    """With a single process, the weights are unchanged."""
    model = Mixed(3)
    broadcast_weights(model)
    assert model.frozen.tolist() == [3.0, 3.0]
