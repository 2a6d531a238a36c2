"""Training steps and the outputs of a model in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model import BaseDataPreprocessor, BaseModel, Trainable, parse_losses
from stratagem.optim import OptimWrapper


class Line(BaseModel):
    """A model with a trainable ``scale`` in ``scale * x`` that records its calls."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Any = None, target: Any = 0.0, mode: str = "tensor") -> Any:
        self.calls.append((x, target, mode))
        predicted = self.scale * x
        return {"loss": (predicted - target) ** 2} if mode == "loss" else predicted


class Doubling(nn.Module):
    """A data preprocessor that doubles its input in training and adds 100 otherwise."""

    def forward(self, data: Tensor, training: bool) -> Tensor:
        """Return the modified data."""
        return data * 2 if training else data + 100


def sgd(model: nn.Module, lr: float = 0.25) -> OptimWrapper:
    """Return a wrapper for plain gradient descent."""
    return OptimWrapper(torch.optim.SGD(model.parameters(), lr=lr))


def test_a_step_updates_the_parameters() -> None:
    """A step computes the loss, its gradient and an update: d/ds (2s - 1)^2 at s = 2 is 12, and 2 - 0.25 * 12 = -1."""
    model = Line()
    logged = model.train_step((torch.tensor(2.0), torch.tensor(1.0)), sgd(model))
    assert logged["loss"].item() == 9.0
    assert model.scale.item() == -1.0
    assert model.scale.grad is None, "gradients must be cleared for the next step"
    assert isinstance(model, Trainable)


@pytest.mark.parametrize(
    ("batch", "call"),
    [
        ({"x": 3.0, "target": 1.0}, (3.0, 1.0)),
        ((3.0, 1.0), (3.0, 1.0)),
        ([3.0, 1.0], (3.0, 1.0)),
        (3.0, (3.0, 0.0)),
    ],
)
def test_batches_are_unpacked_into_arguments(batch: Any, call: tuple[float, float]) -> None:
    """A mapping is passed by name, a tuple or list by position, and anything else as the only argument."""
    model = Line()
    model.train_step(batch, sgd(model))
    model.val_step(batch)
    assert model.calls == [(*call, "loss"), (*call, "predict")]


def test_validation_and_test_predict() -> None:
    """``val_step`` and ``test_step`` call the model with ``mode="predict"``."""
    model = Line()
    assert model.val_step(torch.tensor(3.0)).item() == 6.0
    assert model.test_step(torch.tensor(3.0)).item() == 6.0


def test_a_data_preprocessor_processes_every_batch() -> None:
    """The preprocessor receives every batch and the training flag, and can be given as a configuration."""
    for preprocessor in (Doubling(), {"type": Doubling}):
        model = Line(data_preprocessor=preprocessor)
        model.train_step(torch.tensor(3.0), sgd(model))
        model.val_step(torch.tensor(3.0))
        assert [float(call[0]) for call in model.calls] == [6.0, 103.0]


def test_the_default_preprocessor_is_a_submodule() -> None:
    """The default preprocessor is a submodule without state."""
    model = Line()
    assert isinstance(model.data_preprocessor, BaseDataPreprocessor)
    assert list(model.state_dict()) == ["scale"]


@pytest.mark.parametrize("preprocessor", [3, "norm", print])
def test_an_invalid_preprocessor_is_rejected(preprocessor: Any) -> None:
    """A preprocessor that is not a module raises an error."""
    with pytest.raises(ConfigTypeError, match="data_preprocessor must be a module or its configuration"):
        Line(data_preprocessor=preprocessor)


def test_the_base_cannot_be_built() -> None:
    """BaseModel is abstract: a subclass must define ``forward``."""
    with pytest.raises(TypeError, match="forward"):
        BaseModel()  # type: ignore[abstract]


def test_the_total_is_the_sum_of_all_losses() -> None:
    """The total is the sum of the means of all values with "loss" in their name: 3 + (2 + 5) = 10."""
    losses = {
        "loss_cls": torch.tensor([2.0, 4.0]),
        "aux_losses": [torch.tensor(2.0), torch.tensor([4.0, 6.0])],
        "acc": torch.tensor([50.0, 100.0]),
    }
    total, weight, logged = parse_losses(losses)
    assert total.item() == 10.0
    assert weight is None
    assert {name: value.item() for name, value in logged.items()} == {
        "loss": 10.0,
        "loss_cls": 3.0,
        "aux_losses": 7.0,
        "acc": 75.0,
    }
    assert next(iter(logged)) == "loss"


def test_the_logged_loss_is_the_total() -> None:
    """The logged "loss" is the total, even if one of several losses has this name."""
    total, _, logged = parse_losses({"aux_loss": torch.tensor(2.0), "loss": torch.tensor(1.0)})
    assert total.item() == logged["loss"].item() == 3.0
    assert list(logged) == ["loss", "aux_loss"]


def test_a_weight_is_not_a_loss() -> None:
    """A "weight" in the outputs is returned separately, and is neither a loss nor logged."""
    tokens = torch.tensor(7)
    total, weight, logged = parse_losses({"loss": torch.tensor(2.0), "weight": tokens})
    assert weight is tokens
    assert list(logged) == ["loss"]
    assert total.item() == 2.0


def test_logged_values_are_detached() -> None:
    """Logged values are detached from the graph; the total is not."""
    source = torch.tensor([1.0, 2.0], requires_grad=True)
    total, _, logged = parse_losses({"loss": source * 2, "norm": [source * 3]})
    assert total.requires_grad
    assert not any(value.requires_grad for value in logged.values())


def test_values_without_gradients_are_logged_without_another_tensor() -> None:
    """A value that does not require gradients is logged as it is, because another tensor per value takes a microsecond."""
    value, weight = torch.tensor(3.0), torch.tensor(2.0, requires_grad=True)
    _, _, logged = parse_losses({"loss": weight * 2, "value": value, "norm": weight * 3})
    assert logged["value"] is value
    assert not logged["norm"].requires_grad


def test_integer_tensors_can_be_logged() -> None:
    """Integer tensors are averaged and logged, although torch cannot compute their mean directly."""
    _, _, logged = parse_losses({"loss": torch.tensor(1.0), "found": torch.tensor([1, 2]), "all": torch.tensor(4)})
    assert (logged["found"].item(), logged["all"].item()) == (1.5, 4)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (torch.tensor(1.0), "returned a Tensor. Return a mapping"),
        (None, "returned a NoneType. Return a mapping"),
        ({}, "returned an empty mapping, but none of the names contains 'loss'"),
        ({"acc": torch.tensor(1.0)}, "returned 'acc', but none of the names contains 'loss'"),
        ({"loss": 1.0}, "The loss 'loss' must be a tensor or a list of tensors, got 1.0"),
        ({"loss": []}, r"The loss 'loss' must be a tensor or a list of tensors, got \[\]"),
        ({"loss": [torch.tensor(1.0), 2.0]}, "a tensor or a list of tensors"),
    ],
)
def test_invalid_losses_are_reported(losses: Any, message: str) -> None:
    """The error for invalid losses shows the model's output."""
    with pytest.raises(TrainingError, match=message):
        parse_losses(losses)


class Weighted(Line):
    """A model that returns the loss of a batch with its number of samples."""

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:  # type: ignore[override]
        """Return the mean of ``scale * x`` over the samples."""
        return {"loss": (self.scale * x).mean(), "weight": len(x)}


def test_micro_batches_are_weighted_by_their_samples() -> None:
    """Micro-batches of 1 and 3 samples give the gradient of the mean over all 4: (8 + 1 + 1 + 2) / 4 = 3."""
    model = Weighted()
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=2)
    model.train_step({"x": torch.tensor([8.0])}, optim)
    model.train_step({"x": torch.tensor([1.0, 1.0, 2.0])}, optim)
    assert model.scale.item() == 2.0 - 3.0
