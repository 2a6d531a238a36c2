"""Give samplers the number of the epoch."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.hooks.hook import Hook
from stratagem.compat.mmengine.registry import HOOKS

__all__ = ["DistSamplerSeedHook"]


@HOOKS.register_module()
class DistSamplerSeedHook(Hook):
    """Call ``set_epoch`` of the sampler, or of the batch sampler's sampler, before each training epoch."""

    priority = "NORMAL"

    def before_train_epoch(self, runner: Any) -> None:
        loader = runner.train_loop.dataloader
        for sampler in (
            getattr(loader, "sampler", None),
            getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        ):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(runner.epoch)
                return
