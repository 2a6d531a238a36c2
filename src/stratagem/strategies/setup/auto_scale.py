"""Learning rates for another batch size than the one they were chosen for: ``auto_scale_lr`` parsed once."""

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
    """How learning rates follow the batch size.

    Attributes:
        base_batch: the samples of an update that the learning rates were chosen for.
        rule: see :func:`~stratagem.strategies.setup.building.scale_lr`.
    """

    base_batch: int
    rule: ScalingRule = "linear"

    @classmethod
    def parse(cls, auto_scale_lr: Mapping[str, Any] | None) -> Self | None:
        """Read ``auto_scale_lr``; None where learning rates stay as they are.

        Raises:
            ConfigTypeError: if it is no mapping.
            ConfigKeyError: if a key is unknown.
            ConfigValueError: if it is enabled without a batch size, or the rule is not known.
        """
        if auto_scale_lr is None:
            return None
        if not isinstance(auto_scale_lr, Mapping):
            raise ConfigTypeError(
                f"auto_scale_lr is {auto_scale_lr!r}; a mapping such as dict(enable=True, base_batch_size=256) is due."
            )
        refuse_unknown(auto_scale_lr, _KEYS, "auto_scale_lr")
        rule = auto_scale_lr.get("rule", "linear")
        if rule not in _RULES:
            raise ConfigValueError(f"auto_scale_lr: rule={rule!r} is not known. {did_you_mean(str(rule), _RULES)}")
        if not auto_scale_lr.get("enable", False):
            return None
        base = auto_scale_lr.get("base_batch_size")
        if isinstance(base, bool) or not isinstance(base, int) or base <= 0:
            raise ConfigValueError(
                f"auto_scale_lr: base_batch_size is {base!r}; the batch size that the learning rates were chosen for is "
                "due."
            )
        return cls(base_batch=base, rule=cast("ScalingRule", rule))

    def apply(self, optim: AnyOptim, *, world_size: int, micro_batch: int) -> list[str]:
        """Multiply every learning rate in place; return what was done to each optimizer, as sentences for the log."""
        done = []
        for name, wrapper in optim.each().items():
            accumulated = wrapper.accumulative_counts
            real = world_size * micro_batch * accumulated
            factor = scale_lr(wrapper, base_batch=self.base_batch, real_batch=real, rule=self.rule)
            whose = f" of {name}" if name else ""
            root = " (square root)" if self.rule == "sqrt" else ""
            done.append(
                f"Learning rates{whose} multiplied by {factor:.4g}{root}: the real batch is {real} = {world_size} ranks x "
                f"{micro_batch} samples x {accumulated} accumulated, they were chosen for {self.base_batch}."
            )
        return done
