"""The whole model on one device. The meta device is used in place of an accelerator."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from stratagem.dist import World
from stratagem.optim import OptimWrapper
from stratagem.parallel import OnDevice, Steps

LOGGER = logging.getLogger("stratagem.test")


class Recorder:
    """Build steps that record when they are called and the state of the model at that time."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []

    def steps(self, *, optim: bool = True) -> Steps:
        """Return the steps."""
        return Steps(
            init_and_sync=lambda model: self._record("init", model),
            init_local=lambda model: model,
            compile=lambda model: self._record("compile", model),
            make_optim=self._make_optim if optim else None,
        )

    def _record(self, name: str, model: nn.Module) -> nn.Module:
        kinds = ",".join(type(child).__name__ for child in model.children())
        self.calls.append((name, next(model.parameters()).device.type, kinds))
        return model

    def _make_optim(self, model: nn.Module) -> OptimWrapper:
        self._record("optim", model)
        return OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))


def network() -> nn.Sequential:
    """Return a network with a layer that synchronizes statistics."""
    return nn.Sequential(nn.Linear(1, 2), nn.SyncBatchNorm(2))


def test_a_model_is_initialized_moved_compiled_and_then_optimized() -> None:
    """The model is compiled and optimized on its device, after SyncBatchNorm was replaced."""
    recorder, model = Recorder(), network()
    placed = OnDevice(LOGGER).place(model, recorder.steps(), World(device=torch.device("meta")))
    assert recorder.calls == [
        ("init", "cpu", "Linear,SyncBatchNorm"),
        ("compile", "meta", "Linear,_AnyBatchNorm"),
        ("optim", "meta", "Linear,_AnyBatchNorm"),
    ]
    assert placed.model is model
    assert isinstance(placed.optim, OptimWrapper)


def test_replacing_layers_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Replacing SyncBatchNorm is logged."""
    caplog.set_level(logging.INFO, LOGGER.name)
    OnDevice(LOGGER).place(network(), Recorder().steps(), World())
    assert [record.getMessage() for record in caplog.records] == [
        "Converted 1 SyncBatchNorm layers to BatchNorm: there is only one device."
    ]


def test_a_single_layer_can_be_the_whole_model() -> None:
    """If the whole model is a SyncBatchNorm layer, it is replaced."""
    placed = OnDevice(LOGGER).place(nn.SyncBatchNorm(2), Recorder().steps(optim=False), World())
    assert not isinstance(placed.model, nn.SyncBatchNorm)
    assert placed.optim is None


def test_the_model_is_not_wrapped() -> None:
    """The model is not wrapped, and there is no gradient synchronization to skip."""
    placement, model = OnDevice(LOGGER), network()
    assert placement.unwrap(model) is model
    for sync in (True, False):
        with placement.gradient_policy(model, accumulates=True).sync_context(model, sync):
            pass
