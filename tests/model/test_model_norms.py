"""Conversion to and from synchronized batch normalization."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stratagem.errors import ConfigValueError
from stratagem.model import convert_sync_batchnorm, revert_sync_batchnorm


def network() -> nn.Sequential:
    """Return layers of several types with non-default statistics."""
    layers = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1e-3, momentum=0.3), nn.ModuleList([nn.BatchNorm1d(3, affine=False)])
    )
    layers[1](torch.randn(4, 2, 3, 3) + 5)
    nn.init.uniform_(layers[1].weight)
    layers[1].bias.requires_grad_(False)
    return layers


def test_converting_and_reverting_preserves_layers() -> None:
    """Parameters, statistics, settings and the training mode are preserved; the parameters are the same objects."""
    layers = network()
    before = copy.deepcopy(layers.state_dict())
    parameters = dict(layers.named_parameters())
    layers[1].eval()
    converted = convert_sync_batchnorm(layers)
    assert [type(converted[1]), type(converted[2][0])] == [nn.SyncBatchNorm] * 2
    reverted, count = revert_sync_batchnorm(converted)
    assert count == 2
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in reverted.modules())
    after = reverted.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter is parameters[name] for name, parameter in reverted.named_parameters())
    assert (reverted[1].eps, reverted[1].momentum, reverted[2][0].affine) == (1e-3, 0.3, False)
    assert (reverted[1].training, reverted[2][0].training) == (False, True)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2)])
def test_a_reverted_layer_computes_batch_norm(shape: tuple[int, ...]) -> None:
    """A reverted layer normalizes over all dimensions except the channels, for any number of dimensions."""
    layer, count = revert_sync_batchnorm(nn.SyncBatchNorm(3))
    assert count == 1
    x = torch.randn(shape)
    dims = [dim for dim in range(len(shape)) if dim != 1]
    mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, correction=0)
    torch.testing.assert_close(layer(x), (x - mean) / (var + 1e-5).sqrt())


def test_a_reverted_layer_rejects_inputs_without_channels() -> None:
    """An input with one dimension has no channels and is rejected."""
    layer, _ = revert_sync_batchnorm(nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="at least 2D"):
        layer(torch.randn(3))


def test_a_shared_layer_stays_shared() -> None:
    """A layer that occurs several times is converted once and stays shared."""
    shared = nn.SyncBatchNorm(2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared)})
    reverted, count = revert_sync_batchnorm(model)
    assert count == 1
    assert reverted["a"] is reverted["b"] is reverted["c"][0]
    assert not isinstance(reverted["a"], nn.SyncBatchNorm)


def test_a_model_without_sync_batch_norm_is_unchanged() -> None:
    """A model without SyncBatchNorm layers is returned unchanged, with a count of 0."""
    model = nn.Sequential(nn.Linear(1, 1))
    assert revert_sync_batchnorm(model) == (model, 0)


def test_other_implementations_are_rejected() -> None:
    """The error for an unknown implementation refers to the conversion functions of other libraries."""
    with pytest.raises(ConfigValueError, match=r"Unknown sync_bn='mmcv'\..*Convert layers from other libraries"):
        convert_sync_batchnorm(network(), "mmcv")
