"""Average the weights during training, and use the average for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from stratagem.checkpoint import AVERAGE_PART, weights_to_cpu, with_known_names
from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, PlacementError, StateError
from stratagem.model import AveragedModel
from stratagem.optim import OptimWrapperDict
from stratagem.parallel import AnyOptim
from stratagem.registry import MODELS
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["EMAHook"]


@final
class EMAHook(Hook):
    """Average the weights over the optimizer steps, and use the average for validation and testing.

    The average is updated after each iteration in which the optimizer updated the weights, but not if the step was skipped
    or the accumulation window is incomplete. Checkpoints contain the trained weights in ``state_dict`` and the average in
    ``average``, with the same names. A resumed run continues the average. With ``load_from``, training starts a new average,
    and evaluation uses the average in the checkpoint, if there is one.

    Args:
        ema_type: ``"ExponentialMovingAverage"``, ``"MomentumAnnealingEMA"`` or ``"StochasticWeightAverage"``, or a
            mapping with the name as ``type`` and its arguments.
        momentum: the weight of the current weights in the average; by default, the value of ``ema_type``.
        gamma: an argument of ``MomentumAnnealingEMA``.
        interval: update the average every ``interval`` steps (or epochs).
        device: the device of the average; by default, the device of each weight.
        update_buffers: also average floating-point buffers.
        begin_iter: the first iteration, counted from 1, after which the average is updated.
        begin_epoch: the first epoch, counted from 1, in which the average is updated.
        by_epoch: update the average at the end of each epoch instead of after each step.
        strict_load: whether resuming from a checkpoint without an average is an error; otherwise a new average is started.

    Raises:
        ConfigValueError: if both ``begin_iter`` and ``begin_epoch`` are given, or one of them is negative.
        PlacementError: at the start of the run, if the parameters of the model are not the master weights.
    """

    priority = Priority.NORMAL

    def __init__(
        self,
        ema_type: str | Mapping[str, Any] = "ExponentialMovingAverage",
        *,
        momentum: float | None = None,
        gamma: int | None = None,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        by_epoch: bool = False,
        strict_load: bool = True,
    ) -> None:
        if begin_iter < 0 or begin_epoch < 0:
            raise ConfigValueError(
                f"EMAHook: expected begin_iter >= 0 and begin_epoch >= 0, got {begin_iter} and {begin_epoch}."
            )
        if begin_iter and begin_epoch:
            raise ConfigValueError(
                f"EMAHook: begin_iter={begin_iter} and begin_epoch={begin_epoch} are both set; set only one."
            )
        given = {"momentum": momentum, "gamma": gamma, "device": device}
        self._average_cfg: dict[str, Any] = {
            "interval": interval,
            "update_buffers": update_buffers,
            **{key: value for key, value in given.items() if value is not None},
            **({"type": ema_type} if isinstance(ema_type, str) else ema_type),
        }
        self._begin_iter = begin_iter
        self._begin_epoch = begin_epoch
        self._by_epoch = by_epoch
        self._strict_load = strict_load
        self._model: nn.Module | None = None
        self._built: AveragedModel | None = None
        self._updates = 0
        self._saved: Mapping[str, Any] | None = None
        self._average_missing = False

    def get_triggered_stages(self) -> list[str]:
        events = ["after_load_checkpoint", "before_run", "before_train", "before_save_checkpoint"]
        return [*events, "after_train_epoch" if self._by_epoch else "after_train_iter"]

    @property
    def average(self) -> AveragedModel:
        """The averaged model; available once the run has started.

        Raises:
            StateError: if the run has not started.
        """
        if self._built is None:
            raise StateError(
                "The averaged model is not available until the run starts: it is created after the model is placed."
            )
        return self._built

    def after_load_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        # Store the state, because the average may not exist yet.
        self._saved = checkpoint.get(AVERAGE_PART)
        self._average_missing = self._saved is None

    def before_run(self, run: Run) -> None:
        if sum(isinstance(hook, EMAHook) for hook in run.events.hooks) > 1:
            raise ConfigValueError(
                "There are several EMAHooks, but an evaluation can only use one average. Keep one of them."
            )
        if not run.strategy.params_are_master_weights:
            raise PlacementError(
                f"EMAHook needs the master weights in the model, but {type(run.strategy).__name__} with these options "
                "stores them elsewhere. Use FSDPStrategy, or ZeRO stage 0, 1 or 2 in float32."
            )
        model = run.strategy.unwrap_model()
        if model is not self._model:
            self._model, self._built = model, self._build(model)
            run.evaluation_contexts.append(self._built.applied)
        if self._saved is not None:
            self._load(self._saved)
            self._saved = None

    def before_train(self, run: Run) -> None:
        if run.max_epochs is None and (self._begin_epoch or self._by_epoch):
            what = "begin_epoch" if self._begin_epoch else "by_epoch"
            raise ConfigValueError(
                f"EMAHook: {what} counts epochs, but this run counts iterations. Use begin_iter and interval."
            )
        if run.iter == 0:
            self.average.steps = self._updates = 0
        elif self._average_missing:
            self._start_without_saved(run)
        self._average_missing = False

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        updates = _updates(run.optim_wrapper)
        if updates != self._updates:
            self._updates = updates
            if self._has_begun(run):
                self.average.update()

    def after_train_epoch(self, run: Run) -> None:
        updates = _updates(run.optim_wrapper)
        if updates != self._updates and self._has_begun(run):
            self._updates = updates
            self.average.update()

    def before_save_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        average = self.average
        # An average without updates is empty.
        averages = weights_to_cpu(average.averages) if average.steps else {}
        checkpoint[AVERAGE_PART] = {"steps": average.steps, "averages": averages, "updates": self._updates}
        if average.is_applied:
            checkpoint["state_dict"].update(weights_to_cpu(average.own_weights()))

    def _build(self, model: nn.Module) -> AveragedModel:
        built = MODELS.build(self._average_cfg, default_args={"model": model})
        if not isinstance(built, AveragedModel):
            raise ConfigTypeError(
                f"EMAHook: ema_type={self._average_cfg['type']!r} made a {type(built).__name__}, which is not an AveragedModel."
            )
        return built

    def _load(self, saved: Mapping[str, Any]) -> None:
        if saved["steps"]:
            # Earlier versions saved names with the wrappers inside the model.
            averages = with_known_names(saved["averages"], self.average.averages)
            if not self._strict_load:
                # Weights missing from the saved average are new to the model; their average starts at their current values.
                averages = {**self.average.averages, **averages}
            self.average.load_state_dict({**saved, "averages": averages})
        else:
            self.average.steps = 0
        self._updates = int(saved["updates"])

    def _start_without_saved(self, run: Run) -> None:
        if self._strict_load:
            raise CheckpointMismatchError(
                "The checkpoint contains no averaged weights, so the average cannot be resumed. Set "
                "EMAHook(strict_load=False) to start a new average."
            )
        run.logger.warning("No averaged weights in the checkpoint; starting a new average.")
        self.average.steps, self._updates = 0, _updates(run.optim_wrapper)

    def _has_begun(self, run: Run) -> bool:
        # The counters do not include the current iteration and epoch.
        return run.progress.iter + 1 >= self._begin_iter and run.progress.epoch + 1 >= self._begin_epoch


def _updates(optim: AnyOptim) -> int:
    """Return the total number of applied steps of all optimizers."""
    if isinstance(optim, OptimWrapperDict):
        return sum(wrapper.num_steps_applied for wrapper in optim.values())
    return optim.num_steps_applied
