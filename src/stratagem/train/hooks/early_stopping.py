"""Stop when a metric gets no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.metric_rule import is_better, rule_of
from stratagem.train.run.context import Run
from stratagem.utils import did_you_mean

__all__ = ["EarlyStoppingHook"]


@final
class EarlyStoppingHook(Hook):
    """End the training after a validation whose metric is no better than the best by more than ``min_delta``, so often.

    What it has seen is kept in checkpoints: a run that is resumed stops where it would have stopped.

    Args:
        monitor: the name of the metric, as the validation gives it.
        rule: whether ``"greater"`` or ``"less"`` values are better; by default as the name tells.
        min_delta: by how much more than that a value has to be better to count.
        strict: whether a validation without the metric is an error; else it is warned of and does not count.
        check_finite: whether a value that is not finite ends the training at once.
        patience: after how many validations in a row without a better value the training ends.
        stopping_threshold: a value that is as good as this ends the training at once.

    Raises:
        ConfigValueError: if ``patience`` is below 1, ``min_delta`` is negative, or which values are better is not known.
    """

    # Before CheckpointHook, whose best checkpoint is saved after the same validation and must know of it.
    priority = Priority.LOW

    def __init__(
        self,
        monitor: str,
        rule: str | None = None,
        min_delta: float = 0.1,
        strict: bool = False,
        check_finite: bool = True,
        patience: int = 5,
        stopping_threshold: float | None = None,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigValueError(f"EarlyStoppingHook: patience is {patience!r}; a whole number of at least 1 is due.")
        if not min_delta >= 0:
            raise ConfigValueError(f"EarlyStoppingHook: min_delta is {min_delta!r}; it cannot be negative.")
        self._monitor = monitor
        self._rule = rule_of(monitor, rule, who="EarlyStoppingHook")
        self._min_delta = min_delta
        self._strict = strict
        self._check_finite = check_finite
        self._patience = patience
        self._threshold = stopping_threshold
        self._best: float | None = None
        self._waited = 0

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self._monitor, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # Another metric's best says nothing of this one.
        if state_dict["monitor"] == self._monitor:
            self._best, self._waited = state_dict["best"], int(state_dict["waited"])

    def before_train(self, run: Run) -> None:
        if run.iter == 0:
            self._best, self._waited = None, 0

    def after_val_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        value = self._value(run, metrics or {})
        if value is None:
            return
        reason = self._reason(value)
        if reason is not None:
            run.progress.stop_training = True
            run.logger.info("Early stop after epoch %d, iteration %d: %s", run.epoch, run.iter, reason)

    def _reason(self, value: float) -> str | None:
        """Take in a value; return why the training ends here, or None."""
        if self._check_finite and not math.isfinite(value):
            return f"{self._monitor} is {value}."
        if self._threshold is not None and not is_better(self._threshold, value, self._rule):
            return f"{self._monitor} is {value:g}, as good as stopping_threshold={self._threshold:g}."
        if self._gains(value):
            self._best, self._waited = value, 0
            return None
        self._waited += 1
        if self._waited < self._patience:
            return None
        best = "NaN" if self._best is None else f"{self._best:g}"
        return (
            f"{self._monitor} was not better than {best} by more than {self._min_delta:g} in {self._waited} "
            "validations."
        )

    def _gains(self, value: float) -> bool:
        if self._best is None:
            return not math.isnan(value)
        return is_better(value, self._best, self._rule, by=self._min_delta)

    def _value(self, run: Run, metrics: dict[str, Any]) -> float | None:
        value = metrics.get(self._monitor)
        if isinstance(value, int | float):
            return float(value)
        what = "is no number" if self._monitor in metrics else f"is not there. {did_you_mean(self._monitor, metrics)}"
        message = f"EarlyStoppingHook: the metric {self._monitor!r} {what}"
        if self._strict:
            raise TrainingError(message)
        run.logger.warning(message)
        return None
