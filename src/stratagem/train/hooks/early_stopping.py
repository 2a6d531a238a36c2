"""Stop training when a metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, final

from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.best_scores import RULES, Rule, infer_rule, is_better
from stratagem.train.run.context import Run
from stratagem.utils import did_you_mean
from stratagem.utils.scalars import read_metric

__all__ = ["EarlyStoppingHook"]


@final
class EarlyStoppingHook(Hook):
    """Stop training if a metric has not improved by more than ``min_delta`` in ``patience`` validations in a row.

    The state is saved in checkpoints, so a resumed run stops at the same point as an uninterrupted one.

    Args:
        monitor: the name of the metric in the validation results; ``"<set>/<metric>"`` if the validation sets are named.
        rule: whether ``"greater"`` or ``"less"`` values are better; by default inferred from the name.
        min_delta: how much better than the best value a new value must be to count as an improvement. By default, any
            improvement counts; the default of MMEngine is 0.1, which is 10 percentage points of an accuracy.
        strict: raise an error if the validation does not return the metric; by default a warning is logged.
        check_finite: stop immediately if the value is NaN or Inf.
        patience: the number of validations in a row without an improvement after which training stops.
        stopping_threshold: stop immediately if the value is at least as good as this.

    Raises:
        ConfigValueError: if ``patience`` is below 1, ``min_delta`` is negative, or the rule is unknown or cannot be
            inferred.
    """

    # Run before CheckpointHook, so that the checkpoint of the best score contains the state after the same validation.
    priority = Priority.LOW

    def __init__(
        self,
        monitor: str,
        rule: str | None = None,
        min_delta: float = 0.0,
        strict: bool = False,
        check_finite: bool = True,
        patience: int = 5,
        stopping_threshold: float | None = None,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigValueError(f"EarlyStoppingHook: expected patience to be an integer >= 1, got {patience!r}.")
        if not min_delta >= 0:
            raise ConfigValueError(f"EarlyStoppingHook: expected min_delta >= 0, got {min_delta!r}.")
        self._monitor = self.state_key = monitor
        self._rule = _rule(monitor, rule)
        self._min_delta = min_delta
        self._strict = strict
        self._check_finite = check_finite
        self._patience = patience
        self._threshold = stopping_threshold
        self._best: float | None = None
        self._waited = 0

    @property
    def monitored(self) -> tuple[tuple[str, str], ...]:
        """Pairs of an option and a metric that it names."""
        return (("EarlyStoppingHook: monitor", self._monitor),)

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self._monitor, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # The best value of a different metric is not comparable.
        if state_dict["monitor"] == self._monitor:
            self._best, self._waited = state_dict["best"], int(state_dict["waited"])

    def recognizes_state(self, state_dict: Mapping[str, Any]) -> bool:
        return bool(state_dict.get("monitor") == self._monitor)

    def before_train(self, run: Run) -> None:
        if run.iter == 0:
            self._best, self._waited = None, 0

    def after_val_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        value = self._value(run, metrics or {})
        if value is None:
            return
        reason = self._update(value)
        if reason is not None:
            run.progress.stop_training = True
            run.logger.info("Early stopping after epoch %d, iteration %d: %s", run.epoch, run.iter, reason)

    def _update(self, value: float) -> str | None:
        """Update the state with a value; return the reason for stopping, or None to continue."""
        if self._check_finite and not math.isfinite(value):
            return f"{self._monitor} is {value}."
        if self._threshold is not None and not is_better(self._threshold, value, self._rule):
            return f"{self._monitor} is {value:g}, as good as stopping_threshold={self._threshold:g}."
        if self._is_improvement(value):
            self._best, self._waited = value, 0
            return None
        self._waited += 1
        if self._waited < self._patience:
            return None
        best = "NaN" if self._best is None else f"{self._best:g}"
        return (
            f"{self._monitor} did not improve on {best} by more than {self._min_delta:g} in {self._waited} validations."
        )

    def _is_improvement(self, value: float) -> bool:
        if self._best is None:
            return not math.isnan(value)
        return is_better(value, self._best, self._rule, by=self._min_delta)

    def _value(self, run: Run, metrics: dict[str, Any]) -> float | None:
        if self._monitor in metrics:
            return read_metric(self._monitor, metrics, owner="EarlyStoppingHook")
        hint = (
            did_you_mean(self._monitor, metrics)
            if metrics
            else f"The validation after iteration {run.iter} returned no metrics."
        )
        message = f"EarlyStoppingHook: the metric {self._monitor!r} is missing. {hint}"
        if self._strict:
            raise TrainingError(message)
        run.logger.warning(message)
        return None


def _rule(monitor: str, rule: str | None) -> Rule:
    if rule is None:
        return infer_rule(monitor, owner="EarlyStoppingHook")
    if rule not in RULES:
        raise ConfigValueError(f"EarlyStoppingHook: unknown rule={rule!r}. {did_you_mean(rule, RULES)}")
    return cast("Rule", rule)
