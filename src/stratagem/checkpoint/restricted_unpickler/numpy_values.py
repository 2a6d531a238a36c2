"""Arrays and numbers of NumPy out of what a pickle says; only types that hold numbers, truth values or text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from stratagem.checkpoint.restricted_unpickler.pickled_objects import PickledObject

__all__ = ["array_from_bytes", "array_of", "scalar_of"]

# Not "O": such an array holds pickles.
_PLAIN = re.compile(r"[biufcSU][0-9]{1,9}")


def scalar_of(dtype: Any, data: Any) -> Any:
    """Return one number or text as Python's own."""
    (value,) = np.frombuffer(_octets(data), dtype=_dtype(dtype))
    return value.item()


def array_of(shape: Any, dtype: Any, fortran: Any, data: Any) -> np.ndarray[Any, Any]:
    """Return an array that was pickled with its bytes inside."""
    return array_from_bytes(data, dtype, shape, "F" if fortran else "C")


def array_from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """Return an array over a copy of the bytes."""
    counts = [count for count in shape if type(count) is int and count >= 0]
    if len(counts) != len(shape) or order not in {"C", "F"}:
        raise ValueError("its shape or order is not that of an array")
    return np.frombuffer(_octets(data), dtype=_dtype(dtype)).reshape(counts, order=order).copy()


def _dtype(node: Any) -> np.dtype[Any]:
    if not isinstance(node, PickledObject) or node.kind != "numpy.dtype" or not node.args:
        raise TypeError("its type is none of NumPy's")
    code = node.args[0]
    if not isinstance(code, str) or not _PLAIN.fullmatch(code):
        raise ValueError(f"its type {code!r} is none of numbers or text")
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "="
    if order not in {"<", ">", "=", "|"}:
        raise ValueError(f"the byte order of its type is {order!r}")
    return np.dtype(order + code)


def _octets(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"its content is {type(data).__name__}, not bytes")
    return bytes(data)
