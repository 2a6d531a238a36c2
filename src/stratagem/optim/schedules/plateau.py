"""Reduce an option when a metric stops improving."""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.schedules.bound import BoundScheduler
from stratagem.optim.schedules.curves import PerGroup, value_of
from stratagem.utils.names import did_you_mean
from stratagem.utils.scalars import read_metric

__all__ = ["Plateau", "PlateauScheduler"]

_LOGGER = logging.getLogger(__name__)
_STATE: Final = ("best", "num_bad_epochs", "cooldown_counter", "reductions")


@final
@dataclass(frozen=True)
class Plateau:
    """The settings of a plateau scheduler.

    Attributes:
        monitor: the name of the validation metric.
        rule: whether ``"less"`` or ``"greater"`` is better.
        factor: the factor by which the value is multiplied in a reduction.
        patience: the number of validations without improvement that are tolerated before a reduction.
        threshold: the minimum improvement.
        threshold_rule: whether ``threshold`` is relative to the best metric (``"rel"``) or absolute (``"abs"``).
        cooldown: the number of validations to ignore after a reduction.
        min_value: the lower bound of the value, multiplied by the ratio of each group; or a list with the bound of each group.
        eps: the minimum change; smaller reductions are skipped. It is multiplied by the ratio of each group.
    """

    per_group: ClassVar[tuple[str, ...]] = ("min_value",)

    monitor: str = "loss"
    rule: Literal["less", "greater"] = "less"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_rule: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_value: PerGroup = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if isinstance(self.min_value, list):
            object.__setattr__(self, "min_value", tuple(self.min_value))
        if not self.factor < 1.0:
            raise ConfigValueError(f"factor must be smaller than 1, got {self.factor!r}.")
        if self.rule not in ("less", "greater"):
            raise ConfigValueError(f'Unknown rule={self.rule!r}. Use "less" or "greater".')
        if self.threshold_rule not in ("rel", "abs"):
            raise ConfigValueError(f'Unknown threshold_rule={self.threshold_rule!r}. Use "rel" or "abs".')

    def is_better(self, metric: float, best: float | None) -> bool:
        """Return whether a metric is better than the best value so far, which is initially None."""
        if best is None:
            return True
        sign = 1.0 if self.rule == "greater" else -1.0
        if self.threshold_rule == "rel":
            return sign * metric > sign * best * (1.0 + sign * self.threshold)
        return sign * metric > sign * best + self.threshold

    def reduced(self, value: float, times: int, ratio: float, number: int) -> float:
        """Return the value of a group after the given number of reductions; see ``Curve.apply`` for ``ratio`` and ``number``."""
        lowest, eps = value_of(self.min_value, ratio, number), self.eps * ratio
        for _ in range(times):
            smaller = max(value * self.factor, lowest)
            if value - smaller <= eps:
                break
            value = smaller
        return value


class PlateauScheduler(BoundScheduler, ABC):
    """A scheduler that is stepped with the metrics of each validation; its positions count validations."""

    need_val_args = True
    settings: Plateau

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.best: float | None = None
        self._returned = False  # whether a validation has returned the metric
        self.num_bad_epochs = 0
        self.cooldown_counter = 0
        self.reductions = 0
        super().__init__(*args, **kwargs)
        if self.unit != "epoch":
            raise ConfigValueError(f"{type(self).__name__} advances after each validation, so it must be epoch-based.")

    def transform(self, value: float, initial: float) -> float:
        return self.settings.reduced(value, self.reductions, 1.0, 0)

    def transform_group(self, value: float, initial: float, ratio: float, number: int) -> float:
        return self.settings.reduced(value, self.reductions, ratio, number)

    def step(self, metrics: Mapping[str, Any] | None = None) -> None:  # type: ignore[override]  # as in MMEngine and torch
        """Advance by one validation with its metrics; if ``metrics`` is None or lacks the metric, only the position advances.

        Raises:
            ConfigTypeError: if the metrics are not a mapping, or the value is not a number.
            ConfigKeyError: if ``metrics`` contains metrics, but not the monitored metric, and no earlier validation returned it.
        """
        self._move_to(self.position + 1)
        if metrics is None:
            return
        if not isinstance(metrics, Mapping):
            raise ConfigTypeError(f"{type(self).__name__}: metrics must be a mapping, got {metrics!r}.")
        name = self.settings.monitor
        if name not in metrics:
            if metrics and not self._returned and self.best is None:
                raise ConfigKeyError(f"{type(self).__name__}: unknown metric {name!r}. {did_you_mean(name, metrics)}")
            _LOGGER.warning(
                "%s: validation %d returned no value for %r and is not counted.",
                type(self).__name__, self.position, name,
            )  # fmt: skip
            return
        self._returned = True
        value = read_metric(name, metrics, owner=type(self).__name__)
        if self.begin <= self.position < self.end:
            self._update(value)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        missing = [name for name in _STATE if name not in state_dict]
        if missing:
            raise CheckpointMismatchError(
                f"{type(self).__name__}: the saved state has no {', '.join(missing)}. "
                "It may be the state of a different scheduler."
            )
        for name in _STATE:
            setattr(self, name, state_dict[name])
        super().load_state_dict(state_dict)

    def _update(self, metric: float) -> None:
        if self.settings.is_better(metric, self.best):
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.settings.patience:
            self.cooldown_counter = self.settings.cooldown
            self.num_bad_epochs = 0
            self.reductions += 1
            self._chain.apply()

    def _update_shape(self) -> bool:
        return False
