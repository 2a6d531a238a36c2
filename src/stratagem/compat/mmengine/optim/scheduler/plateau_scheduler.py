"""The schedule that depends on a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.optim.scheduler.base_scheduler import INF, OptimizerType, _ParamScheduler
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError

__all__ = ["ReduceOnPlateauParamScheduler"]


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauParamScheduler(_ParamScheduler):
    """Reduce the value when a metric stops improving.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        monitor: the name of the metric.
        rule: whether ``"less"`` or ``"greater"`` is better.
        factor: the factor of each reduction.
        patience: the number of validations without improvement that are tolerated.
        threshold: the minimum improvement.
        threshold_rule: whether ``threshold`` is relative (``"rel"``) or absolute (``"abs"``).
        cooldown: the number of validations to ignore after a reduction.
        min_value: the lower bound, or a list with the bound of each group.
        eps: smaller reductions are skipped.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: must be True.
        verbose: see ``_ParamScheduler``.
    """

    need_val_args = True
    best: Any
    cooldown_counter: int

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        monitor: str = "loss",
        rule: str = "less",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_rule: str = "rel",
        cooldown: int = 0,
        min_value: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        name = type(self).__name__
        require(by_epoch, f"{name} advances after each validation, so by_epoch must be True.")
        self._set_range(optimizer, param_name, begin, end, last_step, by_epoch, verbose)
        if factor >= 1.0:
            raise ConfigValueError(f"{name}: factor must be smaller than 1, got {factor!r}.")
        self._global_step = 0
        self.factor = factor
        self.min_values = self._minimum_of_groups(min_value)
        self.patience = patience
        self.cooldown = cooldown
        self.eps = eps
        self.monitor = monitor
        self._init_is_better(rule, threshold, threshold_rule)
        self._reset()
        self._last_value = self._values()

    def _minimum_of_groups(self, min_value: float | Sequence[float]) -> list[float]:
        groups = len(self.optimizer.param_groups)
        if not isinstance(min_value, list | tuple):
            return [min_value] * groups  # type: ignore[list-item]
        minima = list(min_value)
        # The last group of a wrapper may be the additional one, which has the minimum of the group before it.
        if getattr(self.optimizer, "base_param_settings", None) is not None:
            minima.append(minima[-1])
        if len(minima) != groups:
            raise ConfigValueError(
                f"{type(self).__name__}: min_value={min_value!r} must have a value for each of the parameter groups."
            )
        return minima

    def step(self, metrics: Mapping[str, Any] | None = None) -> None:  # type: ignore[override]
        """Advance by one validation with its metrics; without metrics, only count an epoch.

        Raises:
            ConfigTypeError: if the metrics are not a dict.
            ConfigKeyError: if they do not contain the monitored metric.
        """
        if metrics is None:
            self._global_step += 1
            return
        if not isinstance(metrics, dict):
            raise ConfigTypeError(f"metrics must be a dict, got {type(metrics).__name__}.")
        if self.begin <= self._global_step < self.end:
            self.last_step += 1
            if metrics.get(self.monitor) is None:
                raise ConfigKeyError(f"The metrics {list(metrics)} do not contain {self.monitor!r}.")
            self._update(metrics[self.monitor])
        self._last_value = self._values()

    def _update(self, metric: Any) -> None:
        if self._is_better(metric, self.best):
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self._in_cooldown():
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0

    def _reduce(self) -> None:
        values = zip(self.optimizer.param_groups, self._get_value(), strict=True)
        for number, (group, value) in enumerate(values):
            if group[self.param_name] - value > self.eps:
                group[self.param_name] = value
                self.print_value(self.verbose, number, value)

    def _get_value(self) -> list[float]:
        reduced = (float(value) * self.factor for value in self._values())
        return [max(value, low) for value, low in zip(reduced, self.min_values, strict=True)]

    def _in_cooldown(self) -> bool:
        return self.cooldown_counter > 0

    def _is_better(self, a: Any, best: Any) -> bool:
        change = -self.threshold if self.rule == "less" else self.threshold
        bound = best * (1.0 + change) if self.threshold_rule == "rel" else best + change
        return bool(a < bound if self.rule == "less" else a > bound)

    def _init_is_better(self, rule: str, threshold: float, threshold_rule: str) -> None:
        name = type(self).__name__
        if threshold < 0:
            raise ConfigValueError(f"{name}: threshold must not be negative, got {threshold!r}.")
        if rule not in ("less", "greater"):
            raise ConfigValueError(f'{name}: rule must be "less" or "greater", got {rule!r}.')
        if threshold_rule not in ("rel", "abs"):
            raise ConfigValueError(f'{name}: threshold_rule must be "rel" or "abs", got {threshold_rule!r}.')
        self.rule = rule
        self.threshold = threshold
        self.threshold_rule = threshold_rule
        self.rule_worse = INF if rule == "less" else -INF

    def _reset(self) -> None:
        """Forget the best metric."""
        self.best = self.rule_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0
