"""Step the parameter schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stratagem.compat.mmengine.checks import InvalidArgumentError
from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.optim import _ParamScheduler
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.utils import is_list_of
from stratagem.errors import ConfigTypeError

__all__ = ["ParamSchedulerHook"]


@HOOKS.register_module()
class ParamSchedulerHook(Hook):
    """Step schedulers with ``by_epoch=False`` after each iteration, the others after each epoch, plateau ones after validations.

    With gradient accumulation, schedulers are stepped once per iteration and not once per update of the optimizer, as in
    MMEngine, so that a config means the same in both.
    """

    priority = "LOW"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for schedulers in _lists(runner.param_schedulers):
            if not isinstance(schedulers, list):
                raise InvalidArgumentError(f"The schedulers must be a list, got {schedulers!r}.")
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()

    def after_train_epoch(self, runner: Any) -> None:
        for schedulers in _lists(runner.param_schedulers):
            if not isinstance(schedulers, list):
                raise InvalidArgumentError(f"The schedulers must be a list, got {schedulers!r}.")
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        # During a validation without training, schedulers are configurations.
        if metrics is None:
            return
        for schedulers in _lists(runner.param_schedulers):
            if is_list_of(schedulers, _ParamScheduler):
                for scheduler in schedulers:
                    if scheduler.by_epoch and getattr(scheduler, "need_val_args", False):
                        scheduler.step(metrics)


def _lists(schedulers: Any) -> Iterator[Any]:
    """Yield the schedulers of each optimizer."""
    if schedulers is None:
        return
    if isinstance(schedulers, list):
        yield schedulers
    elif isinstance(schedulers, dict):
        yield from schedulers.values()
    else:
        raise ConfigTypeError(
            f"runner.param_schedulers must be a list of schedulers, or a dict with one list per optimizer, got {schedulers!r} "
            f"({type(schedulers).__name__})."
        )
