"""Muon updates sharded matrices with the same bits as whole matrices."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from stratagem.model import SupervisedModel
from stratagem.optim.sharded_muon import orthogonalize
from stratagem.strategies import FSDPStrategy
from stratagem.tensors.dtensor import full_tensor, shard_like
from stratagem.tensors.shard_transport import ShardLayout, assign_owners
from tests.support.ranks import Ranks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 3
# Sizes that the ranks divide evenly, unevenly, and into fewer parts than there are ranks.
SIZES = (24, 36, 7, 3, 40)
PLAN = {"network.0": "colwise", "network.1": "rowwise"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP x2": (2, {}),
    "FSDP x2 with CPU offload": (2, {"cpu_offload": True}),
    "TP x2": (2, {"tp": 2, "tp_plan": PLAN}),
    "FSDP x4": (4, {}),
    "HSDP 2x2": (4, {"replicate": 2}),
    "FSDP x2 x TP x2": (4, {"tp": 2, "tp_plan": PLAN}),
}
FORMS = ("owned", "gathered")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain momentum": {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0, "ns_steps": 3},
    "tensor lr": {"lr": torch.tensor(0.03)},
}


def network() -> SupervisedModel:
    """Return a model with matrices of all sizes."""
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes, bias=False) for sizes in itertools.pairwise(SIZES)]
    return SupervisedModel(nn.Sequential(*layers), nn.MSELoss())


def gradients(step: int) -> dict[str, Tensor]:
    """Return full-rank gradients of all parameters."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(each.shape, generator=generator) for name, each in network().named_parameters()}


def by_hand(options: str, steps: int = STEPS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights and the momenta after some steps of ``torch.optim.Muon`` on whole matrices."""
    model = network()
    optimizer = torch.optim.Muon(model.parameters(), **{"lr": 0.05, **OPTIONS[options]})
    for step in range(steps):
        for name, each in model.named_parameters():
            each.grad = gradients(step)[name]
        optimizer.step()
    named = dict(model.named_parameters())
    momenta = {name: optimizer.state[each]["momentum_buffer"] for name, each in named.items()}
    return {name: each.detach() for name, each in named.items()}, momenta


def updated(folder: str, options: str, steps: int = STEPS, **strategy: Any) -> tuple[dict[str, Tensor], ...]:
    """Return the full weights and momenta after some steps with the given gradients."""
    made = FSDPStrategy(
        work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"}, **strategy
    )
    try:
        optimizer = {"type": "Muon", "lr": 0.05, **OPTIONS[options]}
        _, wrapper = made.prepare(network(), optim_wrapper={"optimizer": optimizer})
        named = dict(made.unwrap_model().named_parameters())
        for step in range(steps):
            for name, each in named.items():
                each.grad = shard_like(gradients(step)[name], each, copy=True)
            wrapper.step()
        state = wrapper.optimizer.state
        momenta = {name: full_tensor(state[each]["momentum_buffer"]) for name, each in named.items()}
        return {name: full_tensor(each.detach()) for name, each in named.items()}, momenta
    finally:
        made.close()


def updated_in_all(folder: str, size: int) -> dict[tuple[str, str, str], tuple[dict[str, Tensor], ...]]:
    """Return the results of all layouts for a number of ranks, forms and options."""
    with warnings.catch_warnings():
        # Gathering a tensor that is sharded twice warns about its speed.
        warnings.simplefilter("ignore")
        return {
            (layout, form, options): updated(folder, options, matrix_updates=form, **arguments)
            for layout, (ranks, arguments) in LAYOUTS.items()
            if ranks == size
            for form in FORMS
            for options in (OPTIONS if layout == f"FSDP x{size}" else ["default"])
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


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    """Four ranks."""
    started = Ranks(4)
    yield started
    started.close()


@pytest.mark.slow
def test_muon_on_two_ranks_is_bit_equal_to_whole_matrices(ranks: Ranks, tmp_path: Path) -> None:
    """With equal gradients, FSDP, CPU offload and tensor parallelism on two ranks equal torch.optim.Muon on whole matrices."""
    require_bits(ranks.run(updated_in_all, str(tmp_path), 2))


@pytest.mark.slow
def test_muon_on_four_ranks_is_bit_equal_to_whole_matrices(four: Ranks, tmp_path: Path) -> None:
    """With equal gradients, FSDP, HSDP and FSDP with tensor parallelism on four ranks equal torch.optim.Muon."""
    require_bits(four.run(updated_in_all, str(tmp_path), 4))


def require_bits(results: list[dict[tuple[str, str, str], tuple[dict[str, Tensor], ...]]]) -> None:
    """Require that the weights and momenta of each rank are those of whole matrices."""
    for found in results:
        for (layout, form, options), (weights, momenta) in found.items():
            expected, expected_momenta = by_hand(options)
            for name, each in expected.items():
                assert torch.equal(weights[name], each), (layout, form, options, name)
                assert torch.equal(momenta[name], expected_momenta[name]), (layout, form, options, name)
