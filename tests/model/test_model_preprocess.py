"""Moving batches to the model's device. The meta device is used in place of an accelerator."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from stratagem.model import BaseDataPreprocessor, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    """A batch with named fields."""

    image: Any
    label: Any


class Boxes:
    """A user-defined object with a ``to`` method."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> Boxes:
        """Return a copy on ``device``."""
        return Boxes(str(device))


def test_every_tensor_is_moved_and_the_structure_is_kept() -> None:
    """Tensors in mappings, lists, tuples, named tuples and objects with ``to`` are moved; other values are kept."""
    data = {
        "list": [torch.ones(1), "text"],
        "tuple": (torch.ones(1), 3),
        "pair": Pair(torch.ones(1), None),
        "ordered": OrderedDict(x=torch.ones(1)),
        "boxes": Boxes(),
    }
    moved = to_device(data, META)
    tensors = (moved["list"][0], moved["tuple"][0], moved["pair"].image, moved["ordered"]["x"])
    assert all(tensor.device == META for tensor in tensors)
    assert moved["boxes"].device == META
    assert (moved["list"][1], moved["tuple"][1], moved["pair"].label) == ("text", 3, None)
    assert [type(part) for part in moved.values()] == [list, tuple, Pair, OrderedDict, Boxes]
    assert data["list"][0].device.type == "cpu", "the batch must not be modified"


def test_a_tensor_on_the_device_is_not_copied() -> None:
    """A tensor that is already on the device is not copied."""
    tensor = torch.ones(1)
    assert to_device(tensor, torch.device("cpu")) is tensor


class Model(nn.Module):
    """A model with a nested preprocessor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 1), BaseDataPreprocessor())

    @property
    def preprocessor(self) -> BaseDataPreprocessor:
        """The nested preprocessor."""
        return self.inner[1]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("meta"),
        lambda model: model.to(META, torch.float64),
        lambda model: model.to_empty(device="meta"),
    ],
)
def test_the_preprocessor_follows_the_model(move: Any) -> None:
    """However the model is moved, its batches are moved to the same device."""
    model = Model()
    move(model)
    assert model.preprocessor.device == META
    assert model.preprocessor((torch.ones(1), 5))[0].device == META


def test_the_preprocessor_returns_to_the_cpu() -> None:
    """The preprocessor follows the model back to the CPU."""
    model = Model().to("meta").to_empty(device="cpu")
    assert model.preprocessor.device == torch.device("cpu")


def test_changing_the_precision_does_not_move_batches() -> None:
    """Changing the precision of a model changes neither the device nor the precision of its batches."""
    model = Model().half()
    assert model.preprocessor.device == torch.device("cpu")
    assert model.preprocessor(torch.ones(1)).dtype == torch.float32


def test_a_batch_on_the_cpu_is_returned_unchanged() -> None:
    """On the CPU, the batch is returned as it is, without visiting its elements."""
    batch = {"x": [torch.ones(1)]}
    assert BaseDataPreprocessor()(batch, True) is batch


def test_a_model_built_on_the_meta_device_can_be_materialized() -> None:
    """The preprocessor works after a model on the meta device is materialized."""
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    assert model.preprocessor(torch.ones(1)).device.type == "cpu"


def test_hooks_of_the_preprocessor_are_called_on_the_cpu() -> None:
    """Forward hooks of the preprocessor are called even if no data is moved."""
    preprocessor = BaseDataPreprocessor()
    preprocessor.register_forward_hook(lambda module, arguments, output: output + 1)
    assert preprocessor(torch.ones(1), True).item() == 2.0


def test_a_custom_preprocessor_is_called_on_the_cpu() -> None:
    """A user-defined preprocessor is called on the CPU."""

    class Doubled(BaseDataPreprocessor):
        def forward(self, data: Any, training: bool = False) -> Any:
            return 2 * super().forward(data, training)

    assert Doubled()(torch.ones(1), True).item() == 2.0
