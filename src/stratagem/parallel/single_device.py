"""The whole model on one device."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import final

from torch import nn

from stratagem.distributed import World
from stratagem.model.norms import revert_sync_batchnorm
from stratagem.parallel.placement import NO_CONTEXT, Placed, Placement, Steps

__all__ = ["OnDevice"]


@final
class OnDevice(Placement):
    """One device, one process: the CPU or an accelerator.

    SyncBatchNorm layers become plain BatchNorm, since there is nobody to exchange statistics with.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        model = steps.init_and_sync(model)
        model, reverted = revert_sync_batchnorm(model)
        if reverted:
            self._logger.info("Turned %d SyncBatchNorm layers into BatchNorm: there is one device.", reverted)
        model = steps.compile(model.to(world.device))
        return Placed(model=model, optim=steps.make_optim(model) if steps.make_optim else None)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        return NO_CONTEXT
