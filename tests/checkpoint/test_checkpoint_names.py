"""Parameter names without wrappers, and optimizer state keyed by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.checkpoint import optimizer_by_index, optimizer_by_name, parameter_names, unwrapped_name
from stratagem.errors import CheckpointMismatchError


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("weight", "weight"),
        ("module.weight", "weight"),
        ("module.module.weight", "weight"),
        ("_orig_mod.weight", "weight"),
        ("module._orig_mod.layer.0.weight", "layer.0.weight"),
        ("_orig_mod.module.weight", "weight"),
        ("layer._fsdp_wrapped_module.weight", "layer.weight"),
        ("layer._checkpoint_wrapped_module.0._orig_mod.weight", "layer.0.weight"),
        ("head.module.weight", "head.module.weight"),
        ("module", "module"),
        ("modules_list.0.weight", "modules_list.0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_wrapper_prefixes_are_removed(name: str, bare: str) -> None:
    """Prefixes of DDP, torch.compile and FSDP are removed, but not similar components."""
    assert unwrapped_name(name) == bare


def model() -> nn.Sequential:
    """Return a model with four parameters."""
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def trained(net: nn.Module, groups: list[list[str]], **options: Any) -> torch.optim.Adam:
    """Return an optimizer of the named parameters after one step with a different gradient for each."""
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.Adam([{"params": [parameters[name] for name in group]} for group in groups], **options)
    for number, parameter in enumerate(parameters.values(), start=1):
        parameter.grad = torch.full_like(parameter, float(number))
    optimizer.step()
    return optimizer


def moments(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, float]:
    """Return an element of Adam's first moment for each parameter: a tenth of its gradient after one step."""
    return {
        name: round(float(optimizer.state[parameter]["exp_avg"].flatten()[0]), 4)
        for name, parameter in net.named_parameters()
    }


MOMENTS = {"0.weight": 0.1, "0.bias": 0.2, "1.weight": 0.3, "1.bias": 0.4}
ALL = [list(MOMENTS)]


def test_parameters_are_named_group_by_group() -> None:
    """Each group's parameters have the model's names in the group's order; other parameters are named by position."""
    net = model()
    stranger = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [net[1].bias, net[0].weight]}, {"params": [stranger, net[0].bias]}], lr=1)
    assert parameter_names(optimizer, net) == [["1.bias", "0.weight"], ["unnamed.1.0", "0.bias"]]


def test_state_is_stored_by_name() -> None:
    """State is keyed by name instead of torch's indices, without options of the implementation."""
    net = model()
    optimizer = trained(net, [["1.weight"], ["0.bias", "0.weight", "1.bias"]], lr=0.5, foreach=True)
    state = optimizer_by_name(optimizer.state_dict(), parameter_names(optimizer, net))
    assert [group["params"] for group in state["param_groups"]] == [["1.weight"], ["0.bias", "0.weight", "1.bias"]]
    assert {name: round(float(slots["exp_avg"].flatten()[0]), 4) for name, slots in state["state"].items()} == MOMENTS
    assert [group["lr"] for group in state["param_groups"]] == [0.5, 0.5]
    assert not {"foreach", "fused", "param_names"} & set(state["param_groups"][0])


def test_the_order_of_parameters_does_not_matter() -> None:
    """Each parameter gets its own moments, even if a group lists the parameters in another order."""
    net, other = model(), model()
    saved = trained(net, ALL, lr=0.5)
    state = optimizer_by_name(saved.state_dict(), parameter_names(saved, net))
    fresh = torch.optim.Adam(list(other.parameters())[::-1], lr=0.1)
    names = parameter_names(fresh, other)
    fresh.load_state_dict(optimizer_by_index(state, names, fresh.param_groups))
    assert moments(fresh, other) == MOMENTS
    assert fresh.param_groups[0]["lr"] == 0.5
    assert names == [list(MOMENTS)[::-1]]


def test_conversion_does_not_change_its_arguments() -> None:
    """Neither direction changes its arguments."""
    net = model()
    optimizer = trained(net, ALL)
    names = parameter_names(optimizer, net)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    by_name = optimizer_by_name(state, names)
    named_before = copy.deepcopy(by_name)
    optimizer_by_index(by_name, names, optimizer.param_groups)
    assert str(state) == str(before)
    assert str(by_name) == str(named_before)


@pytest.mark.parametrize("by_name", [True, False])
def test_the_implementation_of_this_run_is_kept(by_name: bool) -> None:
    """The implementation (fused or foreach) of the current run is kept, regardless of the one in the checkpoint."""
    net = model()
    saved = trained(net, ALL, foreach=True)
    state: dict[str, Any] = saved.state_dict()
    if by_name:
        state = optimizer_by_name(state, parameter_names(saved, net))
    fresh = torch.optim.Adam(net.parameters(), fused=True)
    fresh.load_state_dict(optimizer_by_index(state, parameter_names(fresh, net), fresh.param_groups))
    assert fresh.param_groups[0]["fused"] is True
    assert not fresh.param_groups[0]["foreach"]
    assert moments(fresh, net) == MOMENTS


def test_state_of_torch_is_loaded_by_index() -> None:
    """A state dict saved by torch's optimizer is loaded by index."""
    net = model()
    saved = trained(net, ALL, lr=0.5)
    fresh = torch.optim.Adam(net.parameters(), lr=0.1)
    fresh.load_state_dict(optimizer_by_index(saved.state_dict(), parameter_names(fresh, net), fresh.param_groups))
    assert moments(fresh, net) == MOMENTS
    assert fresh.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("by_name", [True, False])
def test_a_different_number_of_groups_is_reported(by_name: bool) -> None:
    """A different number of groups raises an error with both numbers and a suggestion."""
    net = model()
    saved = trained(net, [["0.weight"], ["0.bias", "1.weight", "1.bias"]])
    state: dict[str, Any] = saved.state_dict()
    if by_name:
        state = optimizer_by_name(state, parameter_names(saved, net))
    fresh = torch.optim.Adam(net.parameters())
    with pytest.raises(
        CheckpointMismatchError, match=r"has 2 parameter groups, but this run's has 1.*resume_optimizer=False"
    ):
        optimizer_by_index(state, parameter_names(fresh, net), fresh.param_groups)


def test_other_parameters_in_a_group_are_named() -> None:
    """A group with different parameters raises an error that lists those of each side."""
    net = model()
    saved = trained(net, [["0.weight"], ["0.bias", "1.weight", "1.bias"]])
    state = optimizer_by_name(saved.state_dict(), parameter_names(saved, net))
    fresh = torch.optim.Adam([{"params": [net[0].weight]}, {"params": [net[0].bias, net[1].weight]}])
    with pytest.raises(
        CheckpointMismatchError, match=r"group 1 .*only in the checkpoint \['1.bias'\], only in this run \[\]"
    ):
        optimizer_by_index(state, parameter_names(fresh, net), fresh.param_groups)


def test_a_different_number_of_parameters_is_reported() -> None:
    """Without names, the sizes of the groups are compared."""
    net = model()
    saved = trained(net, ALL)
    fresh = torch.optim.Adam([net[0].weight])
    with pytest.raises(CheckpointMismatchError, match=r"group 0 .* has 4 parameters, but this run's has 1"):
        optimizer_by_index(saved.state_dict(), parameter_names(fresh, net), fresh.param_groups)
