"""Optimizers that are not elementwise update sharded parameters with the same bits as whole parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from stratagem.optim.probe import Dependence, dependence_of
from stratagem.tensors.dtensor import full_tensor
from tests.support.given_gradients import Result, by_hand, make_strategy, network, set_gradients, updated_in_layouts
from tests.support.ranks import Ranks


class Whitening(Optimizer):
    """Multiplies the gradient of a matrix by sums of products of its rows and of its columns, like Shampoo without roots.

    Until the third update, it is SGD. The state contains a list of matrices and a number, and a group counts the updates.
    """

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for group in self.param_groups:
            group["updates"] = group.get("updates", 0) + 1
            for parameter in group["params"]:
                gradient = parameter.grad.reshape(parameter.shape[0], -1)
                state = self.state[parameter]
                if not state:
                    state["factors"] = [torch.eye(size) for size in gradient.shape]
                    state["count"] = 0
                state["count"] += 1
                rows, columns = state["factors"]
                rows += gradient @ gradient.T
                columns += gradient.T @ gradient
                if state["count"] > 2:
                    gradient = rows @ gradient @ columns / (rows.norm() * columns.norm())
                parameter.sub_(gradient.view(parameter.shape), alpha=group["lr"])


class GlobalNorm(Optimizer):
    """Divides all gradients by the norm of all gradients; the momentum has the shape of the parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        parameters = [each for group in self.param_groups for each in group["params"] if each.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
        for parameter in parameters:
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad / norm, 0.5)
            parameter.sub_(momentum, alpha=self.param_groups[0]["lr"])


class ClippedSGD(Optimizer):
    """SGD that limits the norm of each gradient to 1, which small gradients do not reach."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad / parameter.grad.norm().clamp(min=1.0), alpha=group["lr"])


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adafactor": (torch.optim.Adafactor, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "Whitening": (Whitening, {}),
    "GlobalNorm": (GlobalNorm, {}),
    "ClippedSGD": (ClippedSGD, {}),
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (torch.optim.SGD, Dependence.ELEMENT),
        (torch.optim.AdamW, Dependence.ELEMENT),
        (torch.optim.Adagrad, Dependence.ELEMENT),
        (torch.optim.Rprop, Dependence.ELEMENT),
        (torch.optim.Adafactor, Dependence.TENSOR),
        (torch.optim.Muon, Dependence.TENSOR),
        (ClippedSGD, Dependence.TENSOR),
        (Whitening, Dependence.TENSOR),
        (GlobalNorm, Dependence.ALL),
    ],
)
def test_trial_updates_show_what_an_update_depends_on(kind: Any, expected: Dependence) -> None:
    """Also optimizers that look elementwise for small gradients or in their first updates are recognized."""
    parameters = [torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(6, 4))]
    optimizer = kind(parameters, lr=0.1)
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, 6), (6, 4))]
    assert dependence_of(optimizer, [tensors], lr=0.01) is expected
    assert all(torch.equal(each, torch.ones_like(each)) for each in parameters)


@pytest.mark.slow
def test_optimizers_of_whole_tensors_on_two_ranks_are_bit_equal_to_a_single_process(
    ranks: Ranks, tmp_path: Path
) -> None:
    """With equal gradients, FSDP, CPU offload and tensor parallelism on two ranks equal the same optimizers on whole tensors."""
    require_bits(ranks.run(updated_in_layouts, str(tmp_path), 2, KINDS, bias=True))


@pytest.mark.slow
def test_optimizers_of_whole_tensors_on_four_ranks_are_bit_equal_to_a_single_process(
    four: Ranks, tmp_path: Path
) -> None:
    """With equal gradients, FSDP, HSDP and FSDP with tensor parallelism on four ranks equal the same optimizers."""
    require_bits(four.run(updated_in_layouts, str(tmp_path), 4, KINDS, bias=True))


SPECIAL: dict[str, tuple[Any, str]] = {
    "Muon": (torch.optim.Muon, "Muon orthogonalizes each matrix on one rank"),
    "Adafactor": (torch.optim.Adafactor, "Adafactor updates each whole parameter on one rank"),
    "GlobalNorm": (GlobalNorm, "GlobalNorm updates all whole parameters on every rank"),
}


def with_late_gradients(model: torch.nn.Module, step: Any) -> dict[str, Tensor]:
    """Update three times, the first two times without a gradient of the second matrix; return the full parameters."""
    for index in range(3):
        set_gradients(model, index)
        if index < 2:
            model.get_parameter("network.1.weight").grad = None
        step()
    return {name: full_tensor(each.detach()).clone() for name, each in model.named_parameters()}


def special(folder: str, name: str, dtype: torch.dtype) -> tuple[list[str], dict[str, Tensor]]:
    """Return what the strategy logs, and the parameters after updates without some gradients."""
    strategy = make_strategy(folder)
    logged: list[str] = []
    info = strategy.logger.info
    strategy.logger.info = lambda message, *values: logged.append(message % values if values else message)  # type: ignore[method-assign,assignment]
    try:
        _, wrapper = strategy.prepare(
            network().to(dtype), optim_wrapper={"optimizer": {"type": SPECIAL[name][0], "lr": 0.05}}
        )
        return logged, with_late_gradients(strategy.unwrap_model(), wrapper.step)
    finally:
        strategy.logger.info = info  # type: ignore[method-assign]
        strategy.close()


def all_special(folder: str) -> dict[tuple[str, torch.dtype], tuple[list[str], dict[str, Tensor]]]:
    """Return the results of all optimizers in two dtypes."""
    return {
        (name, dtype): special(folder, name, dtype) for name in SPECIAL for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.slow
def test_parameters_without_gradients_and_with_16_bits_have_the_bits_of_a_single_process(
    ranks: Ranks, tmp_path: Path
) -> None:
    """A parameter that gets its first gradient later starts then, bfloat16 parameters are exact, and the log has the route."""
    for results in ranks.run(all_special, str(tmp_path)):
        for (name, dtype), (logged, weights) in results.items():
            model = network().to(dtype)
            kind, line = SPECIAL[name]
            for key, each in with_late_gradients(model, kind(model.parameters(), lr=0.05).step).items():
                assert torch.equal(weights[key], each), (name, dtype, key)
            if (name, dtype) == ("Muon", torch.bfloat16):
                line = "Muon updates each whole parameter on one rank"
            assert sum(each.startswith(line) for each in logged) == 1, (name, dtype)


def require_bits(results: list[dict[tuple[str, str, str], Result]]) -> None:
    """Require that parameters and states equal those of a single process, and that owned states are on one rank only."""
    expected = {name: by_hand(kind, options, bias=True) for name, (kind, options) in KINDS.items()}
    for layout, form, kind in results[0]:
        weights, states = expected[kind]
        found = [rank[layout, form, kind] for rank in results]
        for rank, (own_weights, own_states) in enumerate(found):
            for name, each in weights.items():
                assert torch.equal(own_weights[name], each), (layout, form, kind, name, rank)
            for name, state in own_states.items():
                assert are_equal(state, states[name]), (layout, form, kind, name, rank)
        if kind in ("Adafactor", "Whitening") and layout in ("FSDP x2", "FSDP x4") and form == "owned":
            owners = {name: sum(name in own_states for _, own_states in found) for name in weights}
            assert owners == dict.fromkeys(weights, 1), (layout, kind)


def are_equal(this: Any, that: Any) -> bool:
    """Return whether two states are bitwise equal."""
    if isinstance(this, Tensor):
        return torch.equal(this, that)
    if isinstance(this, dict):
        return this.keys() == that.keys() and all(are_equal(value, that[key]) for key, value in this.items())
    if isinstance(this, list):
        return len(this) == len(that) and all(map(are_equal, this, that))
    return bool(this == that)
