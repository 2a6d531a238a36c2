"""Collectives of the layer on two ranks, where they do more than the engine's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stratagem.compat.mmengine  # noqa: F401
from stratagem.compat.mmengine import dist
from stratagem.compat.mmengine.dist.utils import _LocalGroup
from tests.support.ranks import Ranks


def reduce_on_rank() -> dict[str, Any]:
    """Return the results of the collectives on this rank."""
    rank = dist.get_rank()
    values = {"b": torch.tensor([1, 2]) + rank, "a": torch.tensor([0.5]) * (rank + 1)}
    dist.all_reduce_dict(values, "mean")
    params = [torch.ones(3) * rank, torch.ones(2, dtype=torch.int64) * rank, torch.ones(300_000) * rank]
    dist.all_reduce_params(iter(params), bucket_size_mb=1)
    dist.init_local_group(0, 2)
    try:
        local = (dist.get_local_rank(), dist.get_local_size())
    finally:
        _LocalGroup.group = None
    return {
        "dict": {name: value.tolist() for name, value in values.items()},
        "params": [value.unique().tolist() for value in params],
        "local": local,
        "collected": dist.collect_results([rank, None], 3),
    }


@pytest.mark.slow
def test_collectives_on_two_ranks(ranks: Ranks) -> None:
    """Integers stay integers (their mean is rounded towards zero), and results that are None are not lost."""
    first, second = ranks.run(reduce_on_rank)
    for result in (first, second):
        assert result["dict"] == {"a": [0.75], "b": [1, 2]}
        assert result["params"] == [[1.0], [1], [1.0]]
    assert (first["local"], second["local"]) == ((0, 2), (1, 2))
    assert (first["collected"], second["collected"]) == ([0, 1, None], None)
