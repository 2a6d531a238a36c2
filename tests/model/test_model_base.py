"""One step of training, and what a model may return from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model import BaseDataPreprocessor, BaseModel, Trainable, parse_losses
from stratagem.optim import OptimWrapper


class Line(BaseModel):
    """Learns ``scale`` in ``scale * x``; remembers how it was called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Any = None, target: Any = 0.0, mode: str = "tensor") -> Any:
        self.calls.append((x, target, mode))
        predicted = self.scale * x
        return {"loss": (predicted - target) ** 2} if mode == "loss" else predicted


class Doubling(nn.Module):
    """A data preprocessor that doubles in training and adds 100 elsewhere."""

    def forward(self, data: Tensor, training: bool) -> Tensor:
        """Return other data."""
        return data * 2 if training else data + 100


def sgd(model: nn.Module, lr: float = 0.25) -> OptimWrapper:
    """Return plain gradient descent."""
    return OptimWrapper(torch.optim.SGD(model.parameters(), lr=lr))


def test_a_step_learns() -> None:
    """A step computes losses, differentiates and updates: d/ds (2s - 1)^2 at s = 2 is 12, and 2 - 0.25 * 12 = -1."""
    model = Line()
    logged = model.train_step((torch.tensor(2.0), torch.tensor(1.0)), sgd(model))
    assert logged["loss"].item() == 9.0
    assert model.scale.item() == -1.0
    assert model.scale.grad is None, "cleared for the next step"
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
def test_batches_become_arguments(batch: Any, call: tuple[float, float]) -> None:
    """Mappings arrive by name, tuples and lists by position, all else as the only argument."""
    model = Line()
    model.train_step(batch, sgd(model))
    model.val_step(batch)
    assert model.calls == [(*call, "loss"), (*call, "predict")]


def test_validation_and_test_predict() -> None:
    """Both return what ``mode="predict"`` gives."""
    model = Line()
    assert model.val_step(torch.tensor(3.0)).item() == 6.0
    assert model.test_step(torch.tensor(3.0)).item() == 6.0


def test_a_data_preprocessor_sees_every_batch() -> None:
    """It is told whether the batch is from training, and may come as a configuration."""
    for preprocessor in (Doubling(), {"type": Doubling}):
        model = Line(data_preprocessor=preprocessor)
        model.train_step(torch.tensor(3.0), sgd(model))
        model.val_step(torch.tensor(3.0))
        assert [float(call[0]) for call in model.calls] == [6.0, 103.0]


def test_the_default_preprocessor_is_a_part_of_the_model() -> None:
    """It follows the model to its device, and has no state to save."""
    model = Line()
    assert isinstance(model.data_preprocessor, BaseDataPreprocessor)
    assert list(model.state_dict()) == ["scale"]


@pytest.mark.parametrize("preprocessor", [3, "norm", print])
def test_a_preprocessor_of_the_wrong_type_is_refused(preprocessor: Any) -> None:
    """A function or a name is no module."""
    with pytest.raises(ConfigTypeError, match="data_preprocessor must be a module or a mapping"):
        Line(data_preprocessor=preprocessor)


def test_the_base_cannot_be_built() -> None:
    """A model says what its forward pass is."""
    with pytest.raises(TypeError, match="forward"):
        BaseModel()  # type: ignore[abstract]


def test_the_total_is_the_sum_of_what_is_called_loss() -> None:
    """Tensors are averaged, lists averaged and summed; 3 + (2 + 5) = 10, and the accuracy is no loss."""
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


def test_the_logged_loss_is_what_is_learned_from() -> None:
    """Where one of several losses is called "loss", the log still shows the total."""
    total, _, logged = parse_losses({"aux_loss": torch.tensor(2.0), "loss": torch.tensor(1.0)})
    assert total.item() == logged["loss"].item() == 3.0
    assert list(logged) == ["loss", "aux_loss"]


def test_a_weight_is_no_loss() -> None:
    """How many samples or tokens a micro-batch has is handed on, and not logged."""
    tokens = torch.tensor(7)
    total, weight, logged = parse_losses({"loss": torch.tensor(2.0), "weight": tokens})
    assert weight is tokens
    assert list(logged) == ["loss"]
    assert total.item() == 2.0


def test_logged_values_are_detached() -> None:
    """What is logged does not keep the graph; what is learned from does."""
    source = torch.tensor([1.0, 2.0], requires_grad=True)
    total, _, logged = parse_losses({"loss": source * 2, "norm": [source * 3]})
    assert total.requires_grad
    assert not any(value.requires_grad for value in logged.values())


def test_counts_can_be_logged() -> None:
    """Integers have a mean too, if not one that torch takes."""
    _, _, logged = parse_losses({"loss": torch.tensor(1.0), "found": torch.tensor([1, 2]), "all": torch.tensor(4)})
    assert (logged["found"].item(), logged["all"].item()) == (1.5, 4)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (torch.tensor(1.0), "returned a Tensor; a mapping"),
        (None, "returned a NoneType; a mapping"),
        ({}, "returned nothing, and no name contains 'loss'"),
        ({"acc": torch.tensor(1.0)}, "returned 'acc', and no name contains 'loss'"),
        ({"loss": 1.0}, "The loss 'loss' is 1.0; a tensor"),
        ({"loss": []}, r"The loss 'loss' is \[\]; a tensor"),
        ({"loss": [torch.tensor(1.0), 2.0]}, "a tensor or a list of tensors"),
    ],
)
def test_losses_that_cannot_be_learned_from_are_shown(losses: Any, message: str) -> None:
    """The error shows what came back from the model."""
    with pytest.raises(TrainingError, match=message):
        parse_losses(losses)


class Weighted(Line):
    """The loss of a batch, with its number of samples."""

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:  # type: ignore[override]
        """Return the mean of ``scale * x`` over the samples."""
        return {"loss": (self.scale * x).mean(), "weight": len(x)}


def test_micro_batches_of_different_size_count_by_their_samples() -> None:
    """Two micro-batches of 1 and 3 samples give the gradient of the mean over all 4: (8 + 1 + 1 + 2) / 4 = 3."""
    model = Weighted()
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=2)
    model.train_step({"x": torch.tensor([8.0])}, optim)
    model.train_step({"x": torch.tensor([1.0, 1.0, 2.0])}, optim)
    assert model.scale.item() == 2.0 - 3.0
