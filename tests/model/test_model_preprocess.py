"""Bringing batches to the model's device; the meta device stands for an accelerator."""

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
    """An object of one's own that can be moved."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> Boxes:
        """Return it elsewhere."""
        return Boxes(str(device))


def test_every_tensor_is_moved_and_the_structure_kept() -> None:
    """Mappings, lists, tuples, named tuples and objects that can be moved are followed; all else is kept."""
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
    assert data["list"][0].device.type == "cpu", "the batch itself is not changed"


def test_a_tensor_that_is_there_is_not_copied() -> None:
    """Moving to where it is costs nothing."""
    tensor = torch.ones(1)
    assert to_device(tensor, torch.device("cpu")) is tensor


class Model(nn.Module):
    """A model with a preprocessor somewhere inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 1), BaseDataPreprocessor())

    @property
    def preprocessor(self) -> BaseDataPreprocessor:
        """The preprocessor."""
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
    """Whichever way the model is moved, its batches go after it."""
    model = Model()
    move(model)
    assert model.preprocessor.device == META
    assert model.preprocessor((torch.ones(1), 5))[0].device == META


def test_the_preprocessor_comes_back() -> None:
    """A model that leaves the accelerator takes its preprocessor along."""
    model = Model().to("meta").to_empty(device="cpu")
    assert model.preprocessor.device == torch.device("cpu")


def test_changing_precision_moves_nothing() -> None:
    """A model in half precision is where it was, and its batches keep their precision."""
    model = Model().half()
    assert model.preprocessor.device == torch.device("cpu")
    assert model.preprocessor(torch.ones(1)).dtype == torch.float32


def test_on_the_cpu_a_batch_is_handed_through() -> None:
    """There is nothing to move, so nothing is walked through."""
    batch = {"x": [torch.ones(1)]}
    assert BaseDataPreprocessor()(batch, True) is batch


def test_a_model_built_on_the_meta_device_can_be_moved_into_place() -> None:
    """The preprocessor has no parameters of its own, and works after the model got its memory."""
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    assert model.preprocessor(torch.ones(1)).device.type == "cpu"


def test_hooks_of_a_preprocessor_are_called_where_it_has_nothing_to_do() -> None:
    """It is a module like any other, so a hook may change the batch, on the CPU too."""
    preprocessor = BaseDataPreprocessor()
    preprocessor.register_forward_hook(lambda module, arguments, output: output + 1)
    assert preprocessor(torch.ones(1), True).item() == 2.0


def test_a_preprocessor_of_ones_own_is_called_on_the_cpu() -> None:
    """Whatever it does there, such as stacking or normalising, is done."""

    class Doubled(BaseDataPreprocessor):
        def forward(self, data: Any, training: bool = False) -> Any:
            return 2 * super().forward(data, training)

    assert Doubled()(torch.ones(1), True).item() == 2.0
