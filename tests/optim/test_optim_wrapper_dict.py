"""Several optimizers in one run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import OptimWrapper, OptimWrapperDict


def several() -> tuple[nn.Parameter, nn.Parameter, OptimWrapperDict]:
    """Return two parameters and wrappers that train them with rates 1 and 0.1."""
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    wrappers = OptimWrapperDict(a=OptimWrapper(SGD([first], lr=1.0)), b=OptimWrapper(SGD([second], lr=0.1)))
    return first, second, wrappers


def test_each_optimizer_is_used_by_its_name() -> None:
    """An update of one optimizer does not affect the parameters and counts of the other."""
    first, second, wrappers = several()
    wrappers["a"].update_params(first.sum())
    assert (first.item(), second.item()) == (-1.0, 0.0)
    assert (wrappers["a"].num_steps_applied, wrappers["b"].num_steps_applied) == (1, 0)


@pytest.mark.parametrize("method", ["update_params", "backward", "step", "optim_context"])
def test_methods_of_a_single_optimizer_are_rejected(method: str) -> None:
    """The error for a method that needs one optimizer shows how to select one."""
    _, _, wrappers = several()
    with pytest.raises(NotImplementedError, match=rf'optim_wrapper\["a"\]\.{method}'):
        getattr(wrappers, method)(torch.zeros(()))


def test_all_gradients_can_be_cleared_at_once() -> None:
    """``zero_grad`` clears the gradients of all optimizers."""
    first, second, wrappers = several()
    (first + second).sum().backward()
    wrappers.zero_grad()
    assert first.grad is None
    assert second.grad is None


def test_rates_and_momenta_are_returned_by_name() -> None:
    """Learning rates and momenta are returned as ``name.lr`` and ``name.momentum``."""
    _, _, wrappers = several()
    assert wrappers.get_lr() == {"a.lr": [1.0], "b.lr": [0.1]}
    assert wrappers.get_momentum() == {"a.momentum": [0], "b.momentum": [0]}
    assert set(wrappers.param_groups) == {"a", "b"}


def test_it_is_a_mapping() -> None:
    """OptimWrapperDict implements the mapping interface."""
    _, _, wrappers = several()
    assert list(wrappers) == list(wrappers.keys()) == ["a", "b"]
    assert dict(wrappers.items()) == {"a": wrappers["a"], "b": wrappers["b"]}
    assert len(wrappers) == len(wrappers.values()) == 2
    assert "a" in wrappers
    assert "c" not in wrappers
    with pytest.raises(ConfigKeyError, match="'c'"):
        wrappers["c"]


def test_state_round_trips_by_name() -> None:
    """The state of each wrapper is restored by name."""
    first, _, wrappers = several()
    wrappers["a"].update_params(first.sum())
    _, _, others = several()
    others.load_state_dict(wrappers.state_dict())
    assert (others["a"].num_steps_applied, others["b"].num_steps_applied) == (1, 0)
    with pytest.raises(CheckpointMismatchError, match=r"\['a'\]"):
        others.load_state_dict({"a": wrappers["a"].state_dict()})


def test_pending_micro_batches_are_discarded_together() -> None:
    """Discarding returns the number of pending micro-batches of all wrappers."""
    weight = nn.Parameter(torch.zeros(1))
    wrappers = OptimWrapperDict(a=OptimWrapper(SGD([weight], lr=1.0), accumulative_counts=4))
    wrappers.initialize_count_status(nn.Identity(), 0, 8)
    wrappers["a"].update_params(weight.sum())
    assert wrappers.discard_accumulation() == 1


def test_only_wrappers_are_accepted() -> None:
    """An item that is not a wrapper, or an empty dict, raises an error."""
    with pytest.raises(ConfigTypeError, match="a="):
        OptimWrapperDict(a=dict(type="OptimWrapper"))  # type: ignore[arg-type]
    with pytest.raises(ConfigValueError, match="at least one"):
        OptimWrapperDict()
