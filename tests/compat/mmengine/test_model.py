"""Tests of the models of the MMEngine layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.compat.mmengine.model import (
    BaseDataPreprocessor,
    BaseModel,
    BaseModule,
    BaseTTAModel,
    ExponentialMovingAverage,
    ImgDataPreprocessor,
    Sequential,
    initialize,
    revert_sync_batchnorm,
    stack_batch,
)
from stratagem.compat.mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from stratagem.compat.mmengine.optim import OptimWrapper
from stratagem.errors import TrainingError


class Regression(BaseModel):
    """Predicts ``weight * x``; the loss is the distance to ``y``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        predicted = self.layer(inputs)
        if mode == "loss":
            return {"loss_a": predicted - data_samples, "loss_b": [predicted, predicted], "accuracy": torch.ones(2)}
        return predicted


def test_train_step_adds_all_losses_and_updates() -> None:
    """The loss is the sum of the entries whose names contain "loss", and one SGD step subtracts its gradient."""
    model = Regression()
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    log = model.train_step({"inputs": torch.tensor([[2.0]]), "data_samples": torch.tensor([[1.0]])}, optim)
    assert list(log) == ["loss", "loss_a", "loss_b", "accuracy"]
    assert [value.item() for value in log.values()] == [5.0, 1.0, 4.0, 1.0]
    # The gradient of 3 * weight * 2 - 1 is 6.
    assert model.layer.weight.item() == pytest.approx(0.4)


def test_a_model_without_a_loss_is_reported() -> None:
    """If no name contains "loss", the error lists the names."""
    with pytest.raises(TrainingError, match="accuracy"):
        Regression().parse_losses({"accuracy": torch.ones(1)})


def test_init_cfg_initializes_matching_layers_and_overrides() -> None:
    """An initializer applies to the layers it names, and an override to the submodule it names."""
    model = Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    model.head = nn.Linear(2, 2)
    override = {"name": "head", "type": "Constant", "val": 3.0, "bias": 4.0}
    initialize(model, {"type": "Constant", "val": 1.0, "bias": 2.0, "layer": "Linear", "override": override})
    assert model[0].weight.unique().item() == 1.0
    assert model[0].bias.unique().item() == 2.0
    assert model.head.bias.unique().item() == 4.0
    assert model[1].weight.unique().numel() > 1


def test_init_weights_initializes_parents_before_children() -> None:
    """A child's own init_cfg takes precedence over its parent's, because it is applied later."""

    class Parent(BaseModule):
        def __init__(self) -> None:
            super().__init__({"type": "Constant", "val": 1.0, "layer": "Linear"})
            self.child = Sequential(nn.Linear(1, 1), init_cfg={"type": "Constant", "val": 2.0, "layer": "Linear"})
            self.own = nn.Linear(1, 1)

    parent = Parent()
    parent.init_weights()
    assert parent.own.weight.item() == 1.0
    assert parent.child[0].weight.item() == 2.0
    assert parent.is_init
    assert not hasattr(parent.child, "_params_init_info")


def test_stack_batch_pads_the_end() -> None:
    """Tensors of different sizes are padded at the end to a multiple of the divisor."""
    stacked = stack_batch([torch.ones(1, 2, 3), torch.ones(1, 1, 1)], pad_size_divisor=4, pad_value=7)
    assert stacked.shape == (2, 1, 4, 4)
    assert stacked[1, 0, 0].tolist() == [1.0, 7.0, 7.0, 7.0]


def test_images_are_reversed_normalized_and_padded() -> None:
    """Channels are reversed before they are normalized, and the padding has the given value."""
    preprocess = ImgDataPreprocessor(mean=[1, 2, 3], std=[1, 1, 2], pad_size_divisor=2, pad_value=9, bgr_to_rgb=True)
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1)
    batch = preprocess({"inputs": [image]})
    assert batch["inputs"][0, :, 0, 0].tolist() == [29.0, 18.0, 3.5]
    assert batch["inputs"][0, :, 1, 1].tolist() == [9.0, 9.0, 9.0]
    assert batch["data_samples"] is None


def test_the_preprocessor_follows_the_model() -> None:
    """Moving the model moves the batches of its preprocessor, which keep their structure."""
    model = Regression(data_preprocessor={"type": "BaseDataPreprocessor"})
    model.to("meta")
    assert isinstance(model.data_preprocessor, BaseDataPreprocessor)
    batch = model.data_preprocessor({"a": [torch.ones(1), "text"], "b": (torch.ones(1), None)})
    assert batch["a"][0].is_meta
    assert batch["a"][1] == "text"
    assert batch["b"][0].is_meta


def test_the_average_follows_the_weights() -> None:
    """The first update copies the weights, and the second one moves the average by the momentum."""
    model = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(model, momentum=0.25)
    nn.init.constant_(model.weight, 1.0)
    average.update_parameters(model)
    nn.init.constant_(model.weight, 5.0)
    average.update_parameters(model)
    assert average.module.weight.item() == 2.0
    assert average.state_dict()["steps"].item() == 2


def test_predictions_of_all_versions_are_merged() -> None:
    """A test-time augmentation model passes each sample's predictions for all versions to merge_preds."""

    class Sum(BaseTTAModel):
        def merge_preds(self, data_samples_list: list[Any]) -> list[Any]:
            return [sum(each) for each in data_samples_list]

    model = Sum(Regression())
    merged = model.test_step({"inputs": [torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])]})
    assert [each.item() for each in merged] == [11.0, 22.0]


def test_sync_batchnorm_is_reverted() -> None:
    """Reverted layers are not SyncBatchNorm, and keep their state."""
    model = nn.Sequential(nn.SyncBatchNorm(2))
    nn.init.constant_(model[0].weight, 3.0)
    reverted = revert_sync_batchnorm(model)
    assert not isinstance(reverted[0], nn.SyncBatchNorm)
    assert reverted[0].weight.unique().item() == 3.0


def test_a_convolution_and_its_batchnorm_are_one_convolution_in_eval_mode() -> None:
    """The combined layers compute the same outputs as the two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    inputs = torch.randn(4, 2, 5, 5)
    model(inputs)
    expected = model.eval()(inputs)
    holder = nn.ModuleDict({"block": model})
    turn_on_efficient_conv_bn_eval(holder, "block")
    torch.testing.assert_close(holder["block"](inputs), expected)
