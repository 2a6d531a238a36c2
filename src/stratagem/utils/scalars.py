"""Read scalars of any type: Python and NumPy numbers, tensors and arrays with one element."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any, Final

import numpy as np
from torch import Tensor

from stratagem.errors import ConfigTypeError

__all__ = ["as_number", "as_scalar", "is_scalar", "read_metric"]

_NUMERIC_KINDS: Final = "biuf"  # bool, signed, unsigned, float


def is_scalar(value: object) -> bool:
    """Return whether a value is a real number or a bool, or a tensor or array whose only element is one of these."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in _NUMERIC_KINDS
    return isinstance(value, Real | Decimal)


def as_number(value: Any) -> Any:
    """Return a scalar as a Python number of its kind, and None for any other value. Synchronizes with a tensor's device."""
    if not is_scalar(value):
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item()
    return value if isinstance(value, int) else float(value)


def as_scalar(value: Any) -> float | None:
    """Return a scalar as a float, and None for any other value. Synchronizes with the device of a tensor."""
    number = as_number(value)
    return None if number is None else float(number)


def read_metric(name: str, metrics: Mapping[str, Any], *, owner: str) -> float:
    """Return the value of a metric as a float.

    Args:
        name: the name of the metric, which must be in ``metrics``.
        metrics: the results of an evaluation.
        owner: the class that reads the metric, for the error message.

    Raises:
        ConfigTypeError: if the value is not a scalar.
    """
    number = as_scalar(metrics[name])
    if number is None:
        raise ConfigTypeError(
            f"{owner}: the value of the metric {name!r} is {_describe(metrics[name])}; expected a number, or a tensor or "
            "array with one element. Return a scalar from the metric, or monitor a different one."
        )
    return number


def _describe(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {kind}"
