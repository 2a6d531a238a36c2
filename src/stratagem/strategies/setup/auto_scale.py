"""Scale learning rates with the batch size: ``auto_scale_lr``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast, final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.parallel import AnyOptim
from stratagem.strategies.setup.building import ScalingRule, scale_lr
from stratagem.utils import did_you_mean, refuse_unknown

__all__ = ["AutoScale"]

_KEYS = ("enable", "base_batch_size", "rule")
_RULES = ("linear", "sqrt")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AutoScale:
    """The rule that scales learning rates with the batch size.

    Attributes:
        base_batch: the global batch size that the learning rates were chosen for.
        rule: see :func:`~stratagem.strategies.setup.building.scale_lr`.
    """

    base_batch: int
    rule: ScalingRule = "linear"

    @classmethod
    def parse(cls, auto_scale_lr: Mapping[str, Any] | None) -> Self | None:
        """Parse ``auto_scale_lr``; return None if it is not enabled.

        Raises:
            ConfigTypeError: if ``auto_scale_lr`` is not a mapping.
            ConfigKeyError: if a key is unknown.
            ConfigValueError: if scaling is enabled without a batch size, or the rule is unknown.
        """
        if auto_scale_lr is None:
            return None
        if not isinstance(auto_scale_lr, Mapping):
            raise ConfigTypeError(
                f"auto_scale_lr must be a mapping such as dict(enable=True, base_batch_size=256), got {auto_scale_lr!r}."
            )
        refuse_unknown(auto_scale_lr, _KEYS, "auto_scale_lr")
        rule = auto_scale_lr.get("rule", "linear")
        if rule not in _RULES:
            raise ConfigValueError(f"auto_scale_lr: unknown rule={rule!r}. {did_you_mean(str(rule), _RULES)}")
        if not auto_scale_lr.get("enable", False):
            return None
        base = auto_scale_lr.get("base_batch_size")
        if isinstance(base, bool) or not isinstance(base, int) or base <= 0:
            raise ConfigValueError(
                "auto_scale_lr: base_batch_size must be the batch size that the learning rates were chosen for, got "
                f"{base!r}."
            )
        return cls(base_batch=base, rule=cast("ScalingRule", rule))

    def apply(self, optim: AnyOptim, *, world_size: int, micro_batch: int) -> list[str]:
        """Multiply the learning rates of each optimizer in place; return one log message per optimizer."""
        done = []
        for name, wrapper in optim.each().items():
            accumulated = wrapper.accumulative_counts
            real = world_size * micro_batch * accumulated
            factor = scale_lr(wrapper, base_batch=self.base_batch, real_batch=real, rule=self.rule)
            whose = f" of {name}" if name else ""
            root = " (the square root of the ratio)" if self.rule == "sqrt" else ""
            done.append(
                f"Multiplied the learning rates{whose} by {factor:.4g}{root}: the batch size is {real} = {world_size} ranks x "
                f"{micro_batch} samples x {accumulated} accumulated, and base_batch_size is {self.base_batch}."
            )
        return done
