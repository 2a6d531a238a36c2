"""Build NumPy arrays and scalars from a pickle; only numeric, boolean and string dtypes are supported."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from stratagem.checkpoint.restricted_unpickler.pickled_objects import PickledObject

__all__ = ["array_from_bytes", "array_of", "scalar_of"]

# Object arrays ("O") are excluded, because they contain pickles.
_ALLOWED_DTYPE = re.compile(r"[biufcSU][0-9]{1,9}")


def scalar_of(dtype: Any, data: Any) -> Any:
    """Return a NumPy scalar as a Python number or string."""
    (value,) = np.frombuffer(_as_bytes(data), dtype=_dtype(dtype))
    return value.item()


def array_of(shape: Any, dtype: Any, fortran: Any, data: Any) -> np.ndarray[Any, Any]:
    """Return an array that was pickled together with its data."""
    return array_from_bytes(data, dtype, shape, "F" if fortran else "C")


def array_from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """Return an array with a copy of the data."""
    counts = [count for count in shape if type(count) is int and count >= 0]
    if len(counts) != len(shape) or order not in {"C", "F"}:
        raise ValueError("its shape or memory order is invalid")
    return np.frombuffer(_as_bytes(data), dtype=_dtype(dtype)).reshape(counts, order=order).copy()


def _dtype(node: Any) -> np.dtype[Any]:
    if not isinstance(node, PickledObject) or node.qualified_name != "numpy.dtype" or not node.args:
        raise TypeError("its dtype is not a NumPy dtype")
    code = node.args[0]
    if not isinstance(code, str) or not _ALLOWED_DTYPE.fullmatch(code):
        raise ValueError(f"its dtype {code!r} is not numeric, boolean or string")
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "="
    if order not in {"<", ">", "=", "|"}:
        raise ValueError(f"the byte order of its dtype is {order!r}")
    return np.dtype(order + code)


def _as_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"its data has type {type(data).__name__}; expected bytes")
    return bytes(data)
