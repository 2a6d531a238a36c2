"""Which of two values of a metric is the better one."""

from __future__ import annotations

from typing import Final, Literal, cast

from stratagem.errors import ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["Rule", "is_better", "rule_of"]

Rule = Literal["greater", "less"]

# What configurations of this kind call their metrics.
_GREATER: Final = ("acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc")
_LESS: Final = ("loss",)


def rule_of(monitor: str, rule: str | None, *, who: str) -> Rule:
    """Return whether greater or less values of a metric are better: as given, or as its name tells.

    A name tells it where it is one of those known (in any case), or else where it contains one.

    Raises:
        ConfigValueError: if it does not tell, or ``rule`` is something else.
    """
    if rule is not None:
        if rule not in ("greater", "less"):
            raise ConfigValueError(f"{who}: rule={rule!r} is not known. {did_you_mean(rule, ('greater', 'less'))}")
        return cast("Rule", rule)
    name = monitor.lower()
    greater, less = ([key.lower() for key in keys] for keys in (_GREATER, _LESS))
    if name in greater or (name not in less and any(key in name for key in greater)):
        return "greater"
    if name in less or any(key in name for key in less):
        return "less"
    raise ConfigValueError(
        f"{who}: the name {monitor!r} does not tell which values are better. Give rule='greater' or 'less'."
    )


def is_better(value: float, than: float, rule: Rule, *, by: float = 0.0) -> bool:
    """Tell whether a value is better than another by more than ``by``; NaN is not better than anything."""
    return value > than + by if rule == "greater" else value < than - by
