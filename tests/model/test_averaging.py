"""Averages of model weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError
from stratagem.model.averaging import (
    AveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)


def set_to(model: nn.Module, value: float) -> None:
    """Fill every parameter with one value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def averages(average: AveragedModel, model: nn.Module, values: list[float]) -> list[float]:
    """Set the weights to each value in turn and return the average after each update."""
    seen = []
    for value in values:
        set_to(model, value)
        average.update()
        seen.append(average.averages["weight"][0, 0].item())
    return seen


def model() -> nn.Linear:
    """Return a model with two parameters."""
    return nn.Linear(2, 1)


def test_exponential_average() -> None:
    """The average starts with the first weights and adds later ones with a factor of 0.25."""
    net = model()
    assert averages(ExponentialMovingAverage(net, momentum=0.25), net, [4.0, 8.0, 0.0]) == [4.0, 5.0, 3.75]


def test_an_annealed_average_starts_with_large_factors() -> None:
    """The factor is max(0.3, 1 / (1 + steps)): 1, 1/2, 1/3, then 0.3."""
    net = model()
    average = MomentumAnnealingEMA(net, momentum=0.3, gamma=1)
    expected = [6.0, 3.0, 4.0, 4.0 * 0.7 + 0.3 * 10.0]
    assert averages(average, net, [6.0, 0.0, 6.0, 10.0]) == pytest.approx(expected)


def test_a_stochastic_average_is_the_mean() -> None:
    """A stochastic weight average is the mean of the weights at all updates."""
    net = model()
    assert averages(StochasticWeightAverage(net), net, [3.0, 5.0, 10.0]) == pytest.approx([3.0, 4.0, 6.0])


def test_an_interval_skips_updates() -> None:
    """With ``interval=2``, only the weights at updates 0, 2 and 4 are averaged."""
    net = model()
    average = StochasticWeightAverage(net, interval=2)
    assert averages(average, net, [3.0, 100.0, 5.0, 100.0, 10.0]) == pytest.approx([3.0, 3.0, 4.0, 4.0, 6.0])


def test_an_average_does_not_include_weights_before_its_first_update() -> None:
    """The average starts with the weights at the first update, not with those at construction."""
    net = model()
    set_to(net, 100.0)
    average = ExponentialMovingAverage(net, momentum=0.5)
    assert averages(average, net, [2.0, 4.0]) == [2.0, 3.0]


def test_an_average_without_updates_does_not_change_the_model() -> None:
    """Before the first update, ``applied`` leaves the weights of the model unchanged."""
    net = model()
    average = ExponentialMovingAverage(net)
    set_to(net, 7.0)
    with average.applied():
        assert net.weight[0, 0].item() == 7.0


def test_the_average_can_be_swapped_in() -> None:
    """The model has the averaged weights within ``applied`` and its own weights afterwards."""
    net = model()
    average = ExponentialMovingAverage(net, momentum=0.5)
    averages(average, net, [2.0, 4.0])
    with average.applied():
        assert net.weight[0, 0].item() == 3.0
        assert average.own_weights()["weight"][0, 0].item() == 4.0
        with pytest.raises(StateError, match="restore"):
            average.update()
    assert net.weight[0, 0].item() == 4.0
    assert average.own_weights()["weight"][0, 0].item() == 4.0


def test_the_weights_are_restored_after_an_error() -> None:
    """The weights are restored if an exception is raised within ``applied``."""
    net = model()
    average = ExponentialMovingAverage(net, momentum=0.5)
    averages(average, net, [2.0, 4.0])
    with pytest.raises(ZeroDivisionError), average.applied():
        raise ZeroDivisionError
    assert net.weight[0, 0].item() == 4.0


def test_averages_have_the_names_of_the_weights() -> None:
    """The state contains each average under the name of its parameter."""
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    assert set(ExponentialMovingAverage(net).state_dict()["averages"]) == {name for name, _ in net.named_parameters()}


def test_state_round_trips() -> None:
    """A resumed average continues like an uninterrupted one, and loading does not modify the state."""
    one, other = model(), model()
    first = MomentumAnnealingEMA(one, gamma=3)
    averages(first, one, [1.0, 2.0, 3.0])
    state = copy.deepcopy(first.state_dict())
    second = MomentumAnnealingEMA(other, gamma=3)
    second.load_state_dict(state)
    assert averages(first, one, [4.0, 5.0]) == averages(second, other, [4.0, 5.0])
    assert state["steps"] == 3
    assert state["averages"]["weight"][0, 0].item() != second.averages["weight"][0, 0].item()


def test_the_state_of_a_different_model_is_rejected() -> None:
    """The error for a mismatched state names a different parameter."""
    with pytest.raises(CheckpointMismatchError, match="such as bias"):
        ExponentialMovingAverage(model()).load_state_dict(
            ExponentialMovingAverage(nn.Linear(2, 1, bias=False)).state_dict()
        )
    with pytest.raises(CheckpointMismatchError, match="such as weight"):
        ExponentialMovingAverage(model()).load_state_dict(ExponentialMovingAverage(nn.Linear(3, 1)).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_low_precision_weights_are_updated(dtype: torch.dtype) -> None:
    """Averages are stored as float32, because bfloat16 cannot represent the change of 0.0002 to a weight of 100."""
    net = model().to(dtype)
    average = ExponentialMovingAverage(net, momentum=0.0002)
    seen = averages(average, net, [100.0, 101.0])
    assert seen == pytest.approx([100.0, 100.0002], rel=1e-7)
    with average.applied():
        assert net.weight.dtype is dtype
    assert average.averages["weight"][0, 0].item() == pytest.approx(100.0002, rel=1e-7)


def test_buffers_are_averaged_on_request() -> None:
    """Running statistics are averaged with ``update_buffers=True``; counters are never averaged."""
    net = nn.BatchNorm1d(1)
    assert "running_mean" not in ExponentialMovingAverage(net).averages
    average = ExponentialMovingAverage(net, momentum=0.5, update_buffers=True)
    assert "num_batches_tracked" not in average.averages
    average.update()
    assert isinstance(net.running_mean, Tensor)
    net.running_mean.fill_(4.0)
    average.update()
    assert average.averages["running_mean"].item() == 2.0


def test_tied_weights_are_averaged_once() -> None:
    """A shared weight has one average, under its first name."""
    net = nn.ModuleDict(dict(a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 1, bias=False)))
    net["b"].weight = net["a"].weight
    assert list(ExponentialMovingAverage(net).averages) == ["a.weight"]


@pytest.mark.parametrize(
    ("options", "text"),
    [(dict(momentum=0.0), "momentum"), (dict(momentum=1.0), "momentum"), (dict(interval=0), "interval")],
)
def test_invalid_settings_are_rejected(options: dict[str, float], text: str) -> None:
    """A momentum outside (0, 1) and an interval of zero are rejected."""
    with pytest.raises(ConfigValueError, match=text):
        ExponentialMovingAverage(model(), **options)
    with pytest.raises(ConfigTypeError, match=r"torch\.nn\.Module"):
        ExponentialMovingAverage({})  # type: ignore[arg-type]


class Quantized(nn.Module):
    """An integer, a bool and a float8 weight that are frozen, and a trainable low-rank factor."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
        self.base = nn.Parameter(torch.full((2,), 5.0, dtype=torch.bfloat16), requires_grad=False)
        self.factor = nn.Parameter(torch.zeros(2))


def test_weights_of_a_quantized_model_are_not_averaged() -> None:
    """Integer, bool and float8 weights keep the values of the model; the trainable factor is averaged."""
    net = Quantized()
    average = ExponentialMovingAverage(net, momentum=0.5)
    for value in (2.0, 4.0, 8.0):
        with torch.no_grad():
            net.factor.fill_(value)
        average.update()
    assert average.not_averaged() == ["codes", "mask", "scale"]
    with torch.no_grad():
        net.codes.fill_(7)
    with average.applied():
        assert net.factor.tolist() == [5.5, 5.5]
        assert net.codes.tolist() == [7, 7, 7, 7]
        assert net.base.tolist() == [5.0, 5.0]
    assert net.factor.tolist() == [8.0, 8.0]
    resumed = ExponentialMovingAverage(net, momentum=0.5)
    resumed.load_state_dict(average.state_dict())
    assert resumed.averages["factor"].tolist() == [5.5, 5.5]


def test_a_model_without_trainable_weights_can_be_averaged() -> None:
    """If no weight can be averaged, updates do nothing."""
    net = nn.Module()
    net.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    average = StochasticWeightAverage(net)
    average.update()
    average.update()
    with average.applied():
        assert net.codes.tolist() == [0, 1, 2, 3]


def test_frozen_weights_are_copied() -> None:
    """A frozen weight that the model itself changes, such as that of a teacher, is used as it is, also in the state."""
    net = model()
    net.bias.requires_grad_(False)
    average = ExponentialMovingAverage(net, momentum=0.5)
    averages(average, net, [2.0, 4.0, 6.0])
    with average.applied():
        assert net.bias.item() == 6.0
        assert net.weight[0, 0].item() == 4.5
    assert average.state_dict()["averages"]["bias"].item() == 6.0
    assert average.state_dict()["copied"] == ["bias"]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_weight_that_is_unfrozen_is_averaged_from_its_frozen_value(resumed: bool) -> None:
    """Gradual unfreezing gives the average of a weight that was constant before, and refreezing keeps averaging."""
    net = model()
    net.bias.requires_grad_(False)
    average = ExponentialMovingAverage(net, momentum=0.5)
    with torch.no_grad():
        net.bias.fill_(8.0)
    average.update()
    average.update()
    if resumed:
        state = copy.deepcopy(average.state_dict())
        average = ExponentialMovingAverage(net, momentum=0.5)
        average.load_state_dict(state)
    net.bias.requires_grad_(True)
    with torch.no_grad():
        net.bias.fill_(4.0)
    average.update()
    assert average.averages["bias"].item() == 6.0
    net.bias.requires_grad_(False)
    average.update()
    assert average.averages["bias"].item() == 5.0
    assert "copied" not in average.state_dict()


def test_an_average_of_another_type_is_not_continued() -> None:
    """The type is part of the state, and differing options are reported."""
    net = model()
    average = ExponentialMovingAverage(net, momentum=0.25)
    average.update()
    state = average.state_dict()
    with pytest.raises(
        CheckpointMismatchError, match="is of type ExponentialMovingAverage, but this run uses Stochastic"
    ):
        StochasticWeightAverage(net).load_state_dict(state)
    other = ExponentialMovingAverage(net, momentum=0.5, interval=2)
    assert other.differences(state) == ["interval=2 (saved: 1)", "momentum=0.5 (saved: 0.25)"]
    assert average.differences(state) == []
    # A state of an earlier version has no settings.
    old = {key: value for key, value in state.items() if key != "settings"}
    StochasticWeightAverage(net).load_state_dict(old)
