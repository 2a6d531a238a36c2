"""The placement of the whole model on one device."""

from __future__ import annotations

import logging
from typing import final

from torch import nn

from stratagem.distributed import World
from stratagem.model.norms import revert_sync_batchnorm
from stratagem.parallel.placement import Placed, Placement, Steps

__all__ = ["OnDevice"]


@final
class OnDevice(Placement):
    """Places the model on one device, the CPU or an accelerator, in a single process.

    SyncBatchNorm layers are converted to BatchNorm, since there are no other ranks.
    """

    wraps_train_step = False

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        model = steps.init_and_sync(model)
        model, reverted = revert_sync_batchnorm(model)
        if reverted:
            self._logger.info("Converted %d SyncBatchNorm layers to BatchNorm: there is only one device.", reverted)
        model = steps.compile(model.to(world.device))
        return Placed(model=model, optim=steps.make_optim(model) if steps.make_optim else None)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model
