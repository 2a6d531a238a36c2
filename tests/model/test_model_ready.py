"""Training plain modules that have no base class of this package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model import ModelWithLoss, SupervisedModel
from stratagem.optim import OptimWrapper


def linear(weight: float = 2.0) -> nn.Linear:
    """Return a layer that computes ``weight * x``."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


INPUTS, TARGETS = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]])


def difference(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean error."""
    return (predictions - targets).mean()


@pytest.mark.parametrize("loss", [nn.MSELoss(), {"type": "MSELoss"}, nn.functional.mse_loss])
def test_a_plain_network_is_trained_with_a_loss(loss: Any) -> None:
    """The loss is a module, its configuration or a function: ((2 - 0)^2 + (4 - 5)^2) / 2 = 2.5."""
    model = SupervisedModel(linear(), loss)
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5))
    assert model.train_step((INPUTS, TARGETS), optim)["loss"].item() == 2.5
    # d/dw = mean(2 * (w x - t) * x) = (2 * 2 * 1 + 2 * (-1) * 2) / 2 = 0 at w = 2.
    assert model.network.weight.item() == 2.0
    optim.optimizer.param_groups[0]["params"][0].data.fill_(3.0)
    model.train_step((INPUTS, TARGETS), optim)
    # (2 * 3 * 1 + 2 * 1 * 2) / 2 = 5 at w = 3.
    assert model.network.weight.item() == 3.0 - 0.5 * 5.0


def test_the_loss_receives_predictions_first() -> None:
    """The loss is called with the predictions first, like torch's losses: (2 - 0 + 4 - 5) / 2 = 0.5."""
    model = SupervisedModel(linear(), difference)
    assert model(INPUTS, TARGETS, mode="loss")["loss"].item() == 0.5


def test_validation_returns_the_inputs_of_metrics() -> None:
    """Validation returns ``preds`` and ``target`` for metrics; the default mode returns the network's output."""
    model = SupervisedModel(linear(), difference)
    outputs = model.val_step([INPUTS, TARGETS])
    assert outputs["preds"].flatten().tolist() == [2.0, 4.0]
    assert outputs["target"] is TARGETS
    assert model(INPUTS).flatten().tolist() == [2.0, 4.0]


def test_a_network_can_be_a_configuration_or_a_list_of_layers() -> None:
    """A mapping builds one module, and a list builds a sequence of modules."""
    layer = {"type": "Linear", "in_features": 1, "out_features": 1}
    assert isinstance(SupervisedModel(layer, difference).network, nn.Linear)
    layers = SupervisedModel([layer, {"type": "ReLU"}], difference).network
    assert [type(part) for part in layers] == [nn.Linear, nn.ReLU]


@pytest.mark.parametrize("network", [3, "Linear", nn.Linear, None])
def test_a_network_that_is_not_a_module_is_rejected(network: Any) -> None:
    """A network that is not a module raises an error, such as a class instead of an instance."""
    for make in (lambda: SupervisedModel(network, difference), lambda: ModelWithLoss(network)):
        with pytest.raises(ConfigTypeError, match="network must be a module or its configuration"):
            make()


def test_a_loss_that_is_not_callable_is_rejected() -> None:
    """The error for a loss that is not callable shows its value."""
    with pytest.raises(ConfigTypeError, match=r"loss must be a module, its configuration or a function, got 'mse'"):
        SupervisedModel(linear(), "mse")  # type: ignore[arg-type]


def test_a_list_of_inputs_suggests_how_to_stack_them() -> None:
    """The error for a list of inputs, which is usually an unstacked batch, explains how to stack samples."""
    model = SupervisedModel(linear(), difference)
    with pytest.raises(TrainingError, match="stacks samples that are tensors or arrays"):
        model.val_step([[INPUTS[0], INPUTS[1]], [0, 1]])


class OwnLoss(nn.Module):
    """A network that computes its loss and returns it as an attribute or under a key."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.layer = linear()
        self.kind = kind

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        """Return logits, and a loss if there are labels."""
        logits = self.layer(ids)
        return self.kind(logits=logits, loss=None if labels is None else difference(logits, labels))


@pytest.mark.parametrize("kind", [SimpleNamespace, dict])
def test_a_network_with_its_own_loss(kind: type) -> None:
    """The loss is read from an attribute or a key of the output; batches are passed by name or by position."""
    model = ModelWithLoss(OwnLoss(kind))
    batch = {"ids": INPUTS, "labels": TARGETS}
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    assert model.train_step(batch, optim)["loss"].item() == 0.5
    # d/dw = mean(x) = 1.5
    assert model.network.layer.weight.item() == 0.5
    model.train_step((INPUTS, TARGETS), optim)
    assert model.network.layer.weight.item() == -1.0


def test_prediction_and_target_keys_can_be_chosen() -> None:
    """``target_key`` and ``prediction_key`` select the inputs of metrics."""
    model = ModelWithLoss(OwnLoss(dict), target_key="ids", prediction_key="loss")
    outputs = model.val_step({"ids": INPUTS, "labels": TARGETS})
    assert outputs["preds"].item() == 0.5
    assert outputs["target"] is INPUTS
    outputs = ModelWithLoss(OwnLoss(SimpleNamespace)).val_step({"ids": INPUTS})
    assert outputs["preds"].flatten().tolist() == [2.0, 4.0]
    assert outputs["target"] is None


def test_a_network_that_returns_no_loss_is_reported() -> None:
    """A network that returns no loss raises an error that mentions missing targets."""
    model = ModelWithLoss(OwnLoss(dict))
    with pytest.raises(TrainingError, match=r"OwnLoss returned a dict with loss=None.*targets in the batch"):
        model.train_step({"ids": INPUTS}, OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0)))
    with pytest.raises(TrainingError, match="Linear returned a Tensor with loss=None"):
        ModelWithLoss(linear())(INPUTS, mode="loss")
