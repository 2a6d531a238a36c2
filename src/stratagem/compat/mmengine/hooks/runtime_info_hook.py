"""Put the state of a run into the message hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.utils import get_git_hash
from stratagem.compat.mmengine.version import __version__

__all__ = ["RuntimeInfoHook"]


@HOOKS.register_module()
class RuntimeInfoHook(Hook):
    """Put the position of the training, learning rates, losses and metrics into the message hub.

    Losses are those of this rank, as in MMEngine: calling a hook must not be a collective operation.
    """

    priority = "VERY_HIGH"
    last_loop_stage: str | None = None

    def before_run(self, runner: Any) -> None:
        runner.message_hub.update_info_dict(
            {
                "cfg": runner.cfg.pretty_text,
                "seed": runner.seed,
                "experiment_name": runner.experiment_name,
                "mmengine_version": __version__ + get_git_hash(),
            }
        )
        self.last_loop_stage = None

    def before_train(self, runner: Any) -> None:
        hub = runner.message_hub
        hub.update_info("loop_stage", "train")
        for name in ("epoch", "iter", "max_epochs", "max_iters"):
            hub.update_info(name, getattr(runner, name))
        dataset = runner.train_dataloader.dataset
        if hasattr(dataset, "metainfo"):
            hub.update_info("dataset_meta", dataset.metainfo)

    def after_train(self, runner: Any) -> None:
        runner.message_hub.pop_info("loop_stage")

    def before_train_epoch(self, runner: Any) -> None:
        runner.message_hub.update_info("epoch", runner.epoch)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None) -> None:
        runner.message_hub.update_info("iter", runner.iter)
        learning_rates = runner.optim_wrapper.get_lr()
        require(
            isinstance(learning_rates, dict),
            f"runner.optim_wrapper.get_lr() must return a dict, got {type(learning_rates).__name__}. Return an OptimWrapper or "
            "an OptimWrapperDict from the constructor of the optimizer wrapper.",
        )
        for name, values in learning_rates.items():
            runner.message_hub.update_scalar(f"train/{name}", values[0])

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            runner.message_hub.update_scalar(f"train/{name}", value)

    def before_val(self, runner: Any) -> None:
        self.last_loop_stage = runner.message_hub.get_info("loop_stage")
        runner.message_hub.update_info("loop_stage", "val")

    def after_val(self, runner: Any) -> None:
        # A validation can be part of a training.
        if self.last_loop_stage == "train":
            runner.message_hub.update_info("loop_stage", self.last_loop_stage)
            self.last_loop_stage = None
        else:
            runner.message_hub.pop_info("loop_stage")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        _update(runner.message_hub, "val", metrics)

    def before_test(self, runner: Any) -> None:
        runner.message_hub.update_info("loop_stage", "test")

    def after_test(self, runner: Any) -> None:
        runner.message_hub.pop_info("loop_stage")

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        _update(runner.message_hub, "test", metrics)


def _update(message_hub: Any, mode: str, metrics: Mapping[str, Any] | None) -> None:
    for name, value in (metrics or {}).items():
        update = message_hub.update_scalar if _is_scalar(value) else message_hub.update_info
        update(f"{mode}/{name}", value)


def _is_scalar(value: Any) -> bool:
    """Return whether a value is a number, or an array or tensor with one element."""
    if isinstance(value, np.ndarray):
        return value.size == 1
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float | np.number)
