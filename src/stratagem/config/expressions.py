"""Represent values as Python expressions or as plain data, from which equal values are loaded."""

from __future__ import annotations

import datetime as dt
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from math import isfinite
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final
from uuid import UUID

from stratagem.utils.lazy import LazyObject, MaskedSecret, lazy_name

__all__ = ["as_builtin", "as_expression", "as_name", "describe"]

_DATES: Final = (dt.date, dt.time, dt.timedelta, dt.timezone)
_TORCH_CONSTANTS: Final = frozenset({"dtype", "layout", "memory_format"})


def as_builtin(value: Any) -> Any:
    """Convert an instance of a number or string subclass, such as an enum member, to the built-in type.

    Other values are returned unchanged. NumPy scalars become Python numbers with the same value.
    """
    if type(value).__module__ == "numpy" and hasattr(value, "item") and hasattr(value, "dtype") and value.shape == ():
        item = value.item() if hasattr(value, "tobytes") and type(value).__name__ != "ndarray" else value
        return item if type(item).__module__ == "builtins" else value
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__add__(value, -0.0)
    if isinstance(value, str):
        return str.__str__(value)
    if type(value) is not bytes and isinstance(value, bytes):
        return bytes(value)
    return value


def as_name(value: Any) -> str | None:
    """Return the dotted name of an importable class or function, or the text of a lazy or masked value; otherwise None."""
    if isinstance(value, LazyObject):
        return lazy_name(value)
    if isinstance(value, MaskedSecret):
        return value.text
    if isinstance(value, MethodType):
        owner = value.__self__
        parent = as_name(owner) if isinstance(owner, type) else None
        return None if parent is None else f"{parent}.{value.__name__}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType) and _is_importable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return None


def _is_importable(value: Any) -> bool:
    """Return whether looking up a class or function by its qualified name yields the same object."""
    found: Any = sys.modules.get(value.__module__ or "")
    if found is None or value.__module__ == "__main__":
        return False
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value or (isinstance(value, BuiltinFunctionType) and found == value)


def as_expression(value: Any) -> str | None:
    """Return a Python expression for a value that is not a container; None if no expression yields an equal value."""
    value = as_builtin(value)
    if isinstance(value, float) and not isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    name = as_name(value)
    if name is not None:
        return repr(name)
    found = next((write(value) for kinds, write in _WRITERS if isinstance(value, kinds)), None)
    if found is None and type(value).__module__ in ("torch", "numpy"):
        found = _of_torch_or_numpy(value)
    return found


def _complex(value: complex) -> str:
    return f"complex({as_expression(value.real)}, {as_expression(value.imag)})"


def _slice(value: slice) -> str | None:
    parts = [as_expression(part) for part in (value.start, value.stop, value.step)]
    return None if None in parts else f"slice({', '.join(map(str, parts))})"


def _path(value: PurePath) -> str | None:
    kind = type(value)
    if kind.__module__.partition(".")[0] != "pathlib":
        return None
    # Write PosixPath and WindowsPath as Path, so that the file does not depend on the operating system.
    name = {"PosixPath": "Path", "WindowsPath": "Path"}.get(kind.__name__, kind.__name__)
    return f"__import__('pathlib').{name}({str(value)!r})"


def _date(value: Any) -> str | None:
    text = re.sub(r"\bdatetime\.(?=[a-z])", "__import__('datetime').", repr(value))
    # The repr of a named time zone or of a date subclass is not a valid expression here.
    return text if type(value).__module__ == "datetime" and "zoneinfo" not in text else None


def _member(value: Enum) -> str | None:
    kind = type(value)
    if not _is_importable(kind) or value.name is None or getattr(kind, value.name, None) is not value:
        return None
    return f"__import__({kind.__module__!r}, fromlist=['_']).{kind.__qualname__}.{value.name}"


def _number(value: Decimal | Fraction | UUID) -> str | None:
    kind = type(value)
    return f"__import__({kind.__module__!r}).{value!r}" if kind in (Decimal, Fraction, UUID) else None


_WRITERS: Final[tuple[tuple[Any, Callable[[Any], str | None]], ...]] = (
    (Enum, _member),
    (complex, _complex),
    (range, repr),
    (slice, _slice),
    (bytearray, repr),
    (PurePath, _path),
    (_DATES, _date),
    ((Decimal, Fraction, UUID), _number),
)


def _of_torch_or_numpy(value: Any) -> str | None:
    """Return an expression for a torch constant, such as ``torch.float16``, for a device, or for a NumPy dtype."""
    kind, text = type(value).__name__, repr(value)
    if type(value).__module__ == "numpy":
        return None
    if kind in _TORCH_CONSTANTS:
        return f"__import__('torch').{text.removeprefix('torch.')}"
    return f"__import__('torch').{text}" if kind == "device" else None


def describe(value: Any) -> str:
    """Return a short description of a value that cannot be written. It contains no memory address."""
    kind = type(value)
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodType | type):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__qualname__}"
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a value of type {name}"
