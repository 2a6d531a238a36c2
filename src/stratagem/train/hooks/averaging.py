"""Average the weights as the run goes on, and evaluate the average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from stratagem.checkpoint import AVERAGE_PART, weights_to_cpu
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
    """Average the weights over the optimizer's updates; validation and test see the average.

    After each iteration in which the optimizer updated the weights, they enter the average; an iteration whose update
    was skipped, or is yet to come, changes nothing. Checkpoints keep the weights that train in ``state_dict``, and the
    average in ``average``, under the same names. A run that is resumed goes on averaging; ``load_from`` begins a new
    average when it trains, and evaluates that of the checkpoint, where there is one, when it does not.

    Args:
        ema_type: ``"ExponentialMovingAverage"``, ``"MomentumAnnealingEMA"`` or ``"StochasticWeightAverage"``, or a
            mapping with its name as ``type`` and its arguments.
        momentum: the share of the present weights; by default that of ``ema_type``. Likewise ``gamma``.
        gamma: for ``MomentumAnnealingEMA``.
        interval: how many updates (or epochs) lie between two that are averaged.
        device: where the average lies; by default with each weight.
        update_buffers: average floating-point buffers too.
        begin_iter: the iteration, counted from 1, with which averaging begins.
        begin_epoch: the epoch, counted from 1, with which averaging begins.
        by_epoch: take the weights at the end of each epoch, rather than after each update.
        strict_load: whether resuming from a checkpoint without an average is an error; else a new one begins there.

    Raises:
        ConfigValueError: if both ``begin_iter`` and ``begin_epoch`` are given, or one is negative.
        PlacementError: when the run begins, if the strategy keeps the weights elsewhere than in the model.
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
            raise ConfigValueError(f"EMAHook: begin_iter={begin_iter}, begin_epoch={begin_epoch}; both are from 0.")
        if begin_iter and begin_epoch:
            raise ConfigValueError(f"EMAHook: begin_iter={begin_iter} and begin_epoch={begin_epoch}: give one of them.")
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
        self._lacks_average = False

    def get_triggered_stages(self) -> list[str]:
        events = ["after_load_checkpoint", "before_run", "before_train", "before_save_checkpoint"]
        return [*events, "after_train_epoch" if self._by_epoch else "after_train_iter"]

    @property
    def average(self) -> AveragedModel:
        """The average, once the run began.

        Raises:
            StateError: before that.
        """
        if self._built is None:
            raise StateError("There is no average before the run began: it needs the model where it was placed.")
        return self._built

    def after_load_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        # There may be no average yet to load it into.
        self._saved = checkpoint.get(AVERAGE_PART)
        self._lacks_average = self._saved is None

    def before_run(self, run: Run) -> None:
        if sum(isinstance(hook, EMAHook) for hook in run.events.hooks) > 1:
            raise ConfigValueError(
                "There are two EMAHooks, and a validation can see but one average. Give one of them."
            )
        if not run.strategy.params_are_master_weights:
            raise PlacementError(
                f"EMAHook averages the weights that lie in the model, and under {type(run.strategy).__name__} with these "
                "options they lie elsewhere, or are rounded there. Use FSDPStrategy, or ZeRO stage 0, 1 or 2 in float32."
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
        elif self._lacks_average:
            self._accept_lack(run)
        self._lacks_average = False

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
        # What has not begun is nobody's average.
        averages = weights_to_cpu(average.averages) if average.steps else {}
        checkpoint[AVERAGE_PART] = {"steps": average.steps, "averages": averages, "updates": self._updates}
        if average.is_applied:
            checkpoint["state_dict"].update(weights_to_cpu(average.own_weights()))

    def _build(self, model: nn.Module) -> AveragedModel:
        built = MODELS.build(self._average_cfg, default_args={"model": model})
        if not isinstance(built, AveragedModel):
            raise ConfigTypeError(
                f"EMAHook: ema_type={self._average_cfg['type']!r} made a {type(built).__name__}, which is no AveragedModel."
            )
        return built

    def _load(self, saved: Mapping[str, Any]) -> None:
        if saved["steps"]:
            averages = saved["averages"]
            if not self._strict_load:
                # Weights that the saved average lacks are new to the model: their average begins with them.
                averages = {**self.average.averages, **averages}
            self.average.load_state_dict({**saved, "averages": averages})
        else:
            self.average.steps = 0
        self._updates = int(saved["updates"])

    def _accept_lack(self, run: Run) -> None:
        if self._strict_load:
            raise CheckpointMismatchError(
                "The checkpoint holds no average of the weights, so the run cannot go on as it was. Begin a new average "
                "here with EMAHook(strict_load=False)."
            )
        run.logger.warning("The checkpoint holds no average of the weights; a new one begins here.")
        self.average.steps, self._updates = 0, _updates(run.optim_wrapper)

    def _has_begun(self, run: Run) -> bool:
        # The iteration and the epoch that are under way are not counted yet.
        return run.progress.iter + 1 >= self._begin_iter and run.progress.epoch + 1 >= self._begin_epoch


def _updates(optim: AnyOptim) -> int:
    """Return how many updates were taken, by all optimizers."""
    if isinstance(optim, OptimWrapperDict):
        return sum(wrapper.num_steps_applied for wrapper in optim.values())
    return optim.num_steps_applied
