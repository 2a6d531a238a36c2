"""Average the buffers of a model over all ranks."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.dist import all_reduce_params, is_distributed
from stratagem.compat.mmengine.hooks.hook import Hook
from stratagem.compat.mmengine.registry import HOOKS

__all__ = ["SyncBuffersHook"]


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Average buffers, such as the running statistics of batch normalization, over all ranks after each epoch.

    If no epoch has ended since the last validation, they are averaged before the validation. Collective.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self.distributed = is_distributed()
        self.called_in_train = False

    def before_val_epoch(self, runner: Any) -> None:
        if self.distributed and not self.called_in_train:
            all_reduce_params(runner.model.buffers(), op="mean")
        self.called_in_train = False

    def after_train_epoch(self, runner: Any) -> None:
        if self.distributed:
            all_reduce_params(runner.model.buffers(), op="mean")
            self.called_in_train = True
