"""Whether greater or smaller values of a metric are better."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

from stratagem.errors import ConfigValueError

__all__ = ["GREATER_KEYS", "LESS_KEYS", "RULES", "infer_rule"]

RULES: Final[dict[str, Callable[[Any, Any], bool]]] = {"greater": operator.gt, "less": operator.lt}
GREATER_KEYS: Final = ("acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc")
LESS_KEYS: Final = ("loss",)


def infer_rule(metric: str, greater_keys: Sequence[str], less_keys: Sequence[str]) -> str:
    """Return ``"greater"`` or ``"less"`` by the name of a metric, case-insensitively.

    A key that equals the name takes precedence over a key that is contained in it, and greater over less. The engine's own
    hooks consider the last part of a name with ``/`` first; here the rule is MMEngine's.

    Raises:
        ValueError: if no key matches.
    """
    name = metric.lower()
    greater, less = [key.lower() for key in greater_keys], [key.lower() for key in less_keys]
    if name in greater:
        return "greater"
    if name in less:
        return "less"
    if any(key in name for key in greater):
        return "greater"
    if any(key in name for key in less):
        return "less"
    raise ConfigValueError(
        f"Cannot infer the rule for {metric}: none of the known names is part of it. Set rule='greater' or rule='less'."
    )
