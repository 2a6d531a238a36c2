"""Stop training when a metric no longer improves."""

from __future__ import annotations

import warnings
from math import inf, isfinite
from typing import Any, ClassVar

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.hooks.hook import Hook
from stratagem.compat.mmengine.hooks.metric_rules import GREATER_KEYS, LESS_KEYS, RULES, infer_rule
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.errors import ConfigValueError, StratagemError

__all__ = ["EarlyStoppingHook"]


class MissingMetricError(StratagemError, RuntimeError):
    """A validation did not return the monitored metric."""


@HOOKS.register_module()
class EarlyStoppingHook(Hook):
    """Stop training if a metric has not improved by more than ``min_delta`` in ``patience`` validations in a row.

    The best value and the number of validations since then are in the message hub, so a run that resumes continues to count.

    Args:
        monitor: the name of the metric in the results of the validation.
        rule: whether ``"greater"`` or ``"less"`` values are better; by default inferred from the name.
        min_delta: how much better than the best value a new value must be to count as an improvement.
        strict: raise an error if the validation does not return the metric; by default a warning.
        check_finite: stop immediately if the value is NaN or Inf.
        patience: the number of validations in a row without an improvement after which training stops.
        stopping_threshold: stop immediately if the value is better than this.

    Raises:
        ValueError: if the rule is unknown or cannot be inferred.
    """

    priority = "LOWEST"
    rule_map = RULES
    _default_greater_keys: ClassVar[list[str]] = list(GREATER_KEYS)
    _default_less_keys: ClassVar[list[str]] = list(LESS_KEYS)

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
        if rule is not None and rule not in RULES:
            raise ConfigValueError(f'`rule` should be either "greater" or "less", but got {rule}')
        self.monitor = monitor
        self.rule = rule or infer_rule(monitor, self._default_greater_keys, self._default_less_keys)
        self.min_delta = min_delta if self.rule == "greater" else -min_delta
        self.strict = strict
        self.check_finite = check_finite
        self.patience = patience
        self.stopping_threshold = stopping_threshold
        self.wait_count = 0
        self.best_score = -inf if self.rule == "greater" else inf

    def before_run(self, runner: Any) -> None:
        require(
            hasattr(runner.train_loop, "stop_training"),
            f"EarlyStoppingHook needs a training loop with the attribute `stop_training`; {type(runner.train_loop).__name__} "
            "has none. Add it, and end the loop when it is true.",
        )

    def before_train(self, runner: Any) -> None:
        state = runner.message_hub.get_info(self._state_name)
        if isinstance(state, dict):
            self.best_score, self.wait_count = state["best_score"], state["wait_count"]

    @property
    def _state_name(self) -> str:
        return f"early_stopping_{self.monitor}"

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        metrics = metrics or {}
        if self.monitor not in metrics:
            self._warn_missing(metrics)
            return
        stop, message = self._check_stop_condition(metrics[self.monitor])
        state = {"best_score": float(self.best_score), "wait_count": self.wait_count}
        runner.message_hub.update_info(self._state_name, state)
        if stop:
            runner.train_loop.stop_training = True
            runner.logger.info(message)

    def _warn_missing(self, metrics: dict[str, float]) -> None:
        what = f"EarlyStoppingHook monitors {self.monitor!r}, but the validation returned {sorted(metrics)}."
        if self.strict:
            raise MissingMetricError(f"{what} Set `monitor` to one of these, or `strict=False`.")
        warnings.warn(f"{what} Skip early stopping.", stacklevel=2)

    def _check_stop_condition(self, current_score: float) -> tuple[bool, str]:
        """Update the state with a value; return whether to stop, and why."""
        is_better = RULES[self.rule]
        if self.check_finite and not isfinite(current_score):
            return True, (
                f"Monitored metric {self.monitor} = {current_score} is infinite or NaN. The best value was {self.best_score:.3f}."
            )
        if self.stopping_threshold is not None and is_better(current_score, self.stopping_threshold):
            self.best_score = current_score
            return True, (
                f"Stopping threshold reached: `{self.monitor}` = {current_score} is {self.rule} than {self.stopping_threshold}."
            )
        if is_better(self.best_score + self.min_delta, current_score):
            self.wait_count += 1
            return self.wait_count >= self.patience, (
                f"The monitored metric {self.monitor} did not improve in the last {self.wait_count} validations. "
                f"The best value was {self.best_score:.3f}."
            )
        self.best_score = current_score
        self.wait_count = 0
        return False, ""
