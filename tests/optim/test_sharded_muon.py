"""Muon updates sharded matrices with the same bits as whole matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from stratagem.optim.sharded_muon import orthogonalize
from stratagem.tensors.shard_transport import ShardLayout, assign_owners
from tests.support.given_gradients import Result, by_hand, updated_in_layouts
from tests.support.ranks import Ranks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON = torch.optim.Muon
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (MUON, {}),
    "plain momentum": (
        MUON,
        {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0, "ns_steps": 3},
    ),
    "tensor lr": (MUON, {"lr": torch.tensor(0.03)}),
}


@pytest.mark.parametrize("shape", [(5, 64), (64, 5), (33, 33), (1, 7)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_orthogonalization_has_the_bits_of_torch(shape: tuple[int, int], steps: int) -> None:
    """The Newton-Schulz iteration returns the same values as the private function of torch.optim.Muon."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, steps, 1e-7)
    assert torch.equal(orthogonalize(matrix, COEFFICIENTS, steps, 1e-7), expected)


def test_owners_have_about_equal_work() -> None:
    """The largest matrix is assigned first, and each further one to the rank with the least work."""
    assert assign_owners([1.0, 6.0, 2.0, 3.0, 2.0], 2) == [0, 0, 1, 1, 1]
    assert assign_owners([1.0, 1.0], 4) == [0, 1]
    assert assign_owners([], 2) == []


def test_parts_that_are_stored_twice_are_sent_once() -> None:
    """Only the first of several ranks that store the same part sends it, and parts of rows are not stacked."""
    rows = [((0, 2), (0, 3)), ((2, 3), (0, 3)), ((3, 3), (0, 3))]
    assert ShardLayout.of((3, 3), rows).is_stacked
    assert ShardLayout.of((3, 3), rows).sends == (True, True, False)
    assert ShardLayout.of((3, 3), [rows[0], rows[0], rows[1]]).sends == (True, False, True)
    assert not ShardLayout.of((3, 3), [rows[0], rows[0], rows[1]]).is_stacked
    assert not ShardLayout.of((2, 4), [((0, 2), (0, 2)), ((0, 2), (2, 4))]).is_stacked


@pytest.mark.slow
def test_muon_on_two_ranks_is_bit_equal_to_whole_matrices(ranks: Ranks, tmp_path: Path) -> None:
    """With equal gradients, FSDP, CPU offload and tensor parallelism on two ranks equal torch.optim.Muon on whole matrices."""
    require_bits(ranks.run(updated_in_layouts, str(tmp_path), 2, KINDS))


@pytest.mark.slow
def test_muon_on_four_ranks_is_bit_equal_to_whole_matrices(four: Ranks, tmp_path: Path) -> None:
    """With equal gradients, FSDP, HSDP and FSDP with tensor parallelism on four ranks equal torch.optim.Muon."""
    require_bits(four.run(updated_in_layouts, str(tmp_path), 4, KINDS))


def require_bits(results: list[dict[tuple[str, str, str], Result]]) -> None:
    """Require that the weights and momenta of each rank are those of whole matrices."""
    expected = {name: by_hand(kind, options) for name, (kind, options) in KINDS.items()}
    for found in results:
        for (layout, form, options), (weights, states) in found.items():
            for name, each in expected[options][0].items():
                momentum = expected[options][1][name]["momentum_buffer"]
                assert torch.equal(weights[name], each), (layout, form, options, name)
                assert torch.equal(states[name]["momentum_buffer"], momentum), (layout, form, options, name)
