"""The placement of the whole model on one device."""

from __future__ import annotations

import logging
from typing import Any, final

from torch import nn

from stratagem.distributed import World
from stratagem.model.norms import revert_sync_batchnorm
from stratagem.parallel.activation_checkpointing import checkpoint_activations, log_checkpointed, refuse_compiled
from stratagem.parallel.placement import Placed, Placement, Steps

__all__ = ["OnDevice"]


@final
class OnDevice(Placement):
    """Places the model on one device, the CPU or an accelerator, in a single process.

    SyncBatchNorm layers are converted to BatchNorm, since there are no other ranks.

    Args:
        logger: the logger that reports converted layers.
        activation_checkpointing: see :func:`~stratagem.parallel.activation_checkpointing.checkpoint_activations`.
    """

    wraps_train_step = False

    def __init__(self, logger: logging.Logger, *, activation_checkpointing: Any = None) -> None:
        self._logger = logger
        self._activation_checkpointing = activation_checkpointing

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        refuse_compiled(self._activation_checkpointing, steps.compile_options)
        model = steps.init_and_sync(model)
        model, reverted = revert_sync_batchnorm(model)
        if reverted:
            self._logger.info("Converted %d SyncBatchNorm layers to BatchNorm: there is only one device.", reverted)
        model = model.to(world.device)
        log_checkpointed(self._logger, checkpoint_activations(model, self._activation_checkpointing))
        model = steps.compile(model)
        return Placed(model=model, optim=steps.make_optim(model) if steps.make_optim else None)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model
