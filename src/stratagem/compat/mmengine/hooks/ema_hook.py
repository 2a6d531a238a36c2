"""Keep a moving average of the weights, and validate, test and save it."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stratagem.compat.mmengine.checks import NotSupportedError, require
from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.model import is_model_wrapper
from stratagem.compat.mmengine.registry import HOOKS, MODELS
from stratagem.utils import import_module

__all__ = ["EMAHook"]

_PREFIX = "module."


@HOOKS.register_module()
class EMAHook(Hook):
    """Keep an average of the weights in ``ema_model``, and use it in validations, tests and checkpoints.

    The ``state_dict`` of a checkpoint contains the averaged weights, and ``ema_state_dict`` the trained ones, so that whoever
    loads a checkpoint without this hook gets the average. They are swapped back when a run resumes.

    Args:
        ema_type: the class of the average, a subclass of ``BaseAveragedModel``.
        strict_load: whether the keys of a checkpoint must match those of the average.
        begin_iter: the first iteration, counted from 1, whose weights are averaged; until then the average is a copy.
        begin_epoch: the first such epoch. Only one of the two may be set.
        **kwargs: further arguments of the average.

    Raises:
        AssertionError: if both are set, or one is negative.
    """

    priority = "NORMAL"
    src_model: nn.Module
    ema_model: Any
    # Whether the model has the averaged weights and `ema_model` the trained ones, as during a validation.
    _is_swapped = False

    def __init__(
        self,
        ema_type: str = "ExponentialMovingAverage",
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        **kwargs: Any,
    ) -> None:
        require(not (begin_iter and begin_epoch), "`begin_iter` and `begin_epoch` cannot both be set; set one of them.")
        require(begin_iter >= 0, f"`begin_iter` must be at least 0, got {begin_iter}.")
        require(begin_epoch >= 0, f"`begin_epoch` must be at least 0, got {begin_epoch}.")
        self.strict_load = strict_load
        self.ema_cfg = dict(type=ema_type, **kwargs)
        self.begin_iter = begin_iter
        self.begin_epoch = begin_epoch
        self.enabled_by_epoch = begin_epoch > 0

    def before_run(self, runner: Any) -> None:
        model = runner.model
        self.src_model = model.module if is_model_wrapper(model) else model
        if any(isinstance(module, FSDPModule) for module in self.src_model.modules()):
            raise NotSupportedError(
                "EMAHook cannot copy a model that FSDP has sharded. Train with DDPStrategy (remove `strategy` from the config), "
                "or remove EMAHook."
            )
        self.ema_model = MODELS.build(self.ema_cfg, default_args={"model": self.src_model})

    def before_train(self, runner: Any) -> None:
        name = "epoch" if self.enabled_by_epoch else "iter"
        begin, most = getattr(self, f"begin_{name}"), getattr(runner, f"max_{name}s")
        require(
            begin <= most,
            f"self.begin_{name} is {begin}, but the training ends before, since runner.max_{name}s is {most}. Begin earlier, or "
            "remove EMAHook.",
        )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self._ema_started(runner):
            self.ema_model.update_parameters(self.src_model)
            return
        trained = self.src_model.state_dict()
        for name, value in self.ema_model.module.state_dict().items():
            value.data.copy_(trained[name].data)

    def before_val_epoch(self, runner: Any) -> None:
        self._swap_ema_parameters()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._swap_ema_parameters()

    def before_test_epoch(self, runner: Any) -> None:
        self._swap_ema_parameters()

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._swap_ema_parameters()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema_state_dict"] = self.ema_model.state_dict()
        # During a validation, the model has the averaged weights, as the checkpoint does.
        self._swap_ema_state_dict(checkpoint, self._not_averaged() if self._is_swapped else None)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if "ema_state_dict" in checkpoint and runner._resume:
            self._swap_ema_state_dict(checkpoint)
            self.ema_model.load_state_dict(checkpoint["ema_state_dict"], strict=self.strict_load)
            return
        if runner._resume:
            print_log(
                "There is no `ema_state_dict` in the checkpoint. EMAHook starts with a copy of its `state_dict`.",
                "current",
                logging.WARNING,
            )
        # The runner imports the hooks.
        load_state_dict = import_module("stratagem.compat.mmengine.runner.checkpoint").load_state_dict
        load_state_dict(self.ema_model.module, copy.deepcopy(checkpoint["state_dict"]), strict=self.strict_load)

    @torch.no_grad()
    def _swap_ema_parameters(self) -> None:
        """Swap the averaged weights with those of the model, in place."""
        self._is_swapped = not self._is_swapped
        for averaged, trained in zip(
            self._averaged_tensors(self.ema_model.module), self._averaged_tensors(self.src_model), strict=False
        ):
            kept = averaged.data.clone()
            averaged.data.copy_(trained.data)
            trained.data.copy_(kept)

    def _averaged_tensors(self, model: nn.Module) -> Iterator[torch.Tensor]:
        buffers = model.buffers() if self.ema_model.update_buffers else ()
        return itertools.chain(model.parameters(), buffers)

    def _not_averaged(self) -> set[str]:
        """Return the names of the values that are copied to the averaged model instead of being averaged."""
        return set() if self.ema_model.update_buffers else {name for name, _ in self.src_model.named_buffers()}

    def _swap_ema_state_dict(self, checkpoint: dict[str, Any], names: Collection[str] | None = None) -> None:
        """Swap the averaged weights of a checkpoint with those of the model: all of them, or those with the given names."""
        model_state, ema_state = checkpoint["state_dict"], checkpoint["ema_state_dict"]
        for name in ema_state:
            if name.startswith(_PREFIX):
                plain = name[len(_PREFIX) :]
                if names is not None and plain not in names:
                    continue
                ema_state[name], model_state[plain] = model_state[plain], ema_state[name]

    def _ema_started(self, runner: Any) -> bool:
        """Return whether weights are averaged at the current iteration or epoch."""
        if self.enabled_by_epoch:
            return bool(runner.epoch + 1 >= self.begin_epoch)
        return bool(runner.iter + 1 >= self.begin_iter)
