"""Write a configuration as Python, YAML, JSON or TOML."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from stratagem.config.reading.data_languages import DATA_SUFFIXES, language_of
from stratagem.errors import ConfigFileError, ConfigValueError
from stratagem.utils.lazy import LazyObject, MaskedSecret, lazy_name

__all__ = ["python_text", "text_of"]

_WIDTH = 100


def text_of(data: Mapping[str, Any], suffix: str) -> str:
    """Return ``data`` in the language of ``suffix``: ``.py``, ``.yaml``, ``.yml``, ``.json`` or ``.toml``.

    Classes and functions are written as dotted names, and other objects as the string ``str(value)``.

    Raises:
        ConfigFileError: if the suffix is unknown.
        ConfigValueError: if the language cannot represent a value, such as ``None`` in TOML.
    """
    if suffix == ".py":
        return python_text(data)
    if suffix in DATA_SUFFIXES:
        return language_of(suffix).write(_plain(data))
    raise ConfigFileError(f"A configuration cannot be written as {suffix!r}; choose .py, .yaml, .json or .toml.")


def python_text(data: Mapping[str, Any]) -> str:
    """Return Python code that defines ``data``, with one assignment for each top-level key."""
    lines = []
    for key, value in data.items():
        if not key.isidentifier():
            raise ConfigValueError(
                f"The key {key!r} is not a Python identifier. Write this configuration as .yaml or .json."
            )
        lines.append(f"{key} = {_python(value, 0, len(key) + 3)}")
    return "\n".join(lines) + "\n"


def _python(value: Any, indent: int, taken: int) -> str:
    """Return an expression, on one line if it fits after ``taken`` characters, otherwise with one item per line."""
    flat = _python_flat(value)
    if len(flat) + taken <= _WIDTH or not isinstance(value, dict | list | tuple) or not value:
        return flat
    inner = " " * (indent + 4)
    opening, closing = _brackets(value)
    lines = [opening]
    for prefix, item in _labelled(value):
        lines.append(f"{inner}{prefix}{_python(item, indent + 4, len(inner) + len(prefix) + 1)},")
    lines.append(" " * indent + closing)
    return "\n".join(lines)


def _python_flat(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        opening, closing = _brackets(value)
        inner = ", ".join(prefix + _python_flat(item) for prefix, item in _labelled(value))
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"{opening}{inner}{comma}{closing}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}([{', '.join(sorted(map(_python_flat, value)))}])"
    return repr(_name(value))


def _brackets(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> tuple[str, str]:
    if isinstance(value, dict):
        return ("dict(", ")") if _takes_keywords(value) else ("{", "}")
    return ("[", "]") if isinstance(value, list) else ("(", ")")


def _labelled(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        return (("", item) for item in value)
    if _takes_keywords(value):
        return ((f"{key}=", item) for key, item in value.items())
    return ((f"{key!r}: ", item) for key, item in value.items())


def _takes_keywords(value: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key) if isinstance(key, str) else key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value, key=repr)]
    return _name(value)


def _name(value: Any) -> str:
    if isinstance(value, LazyObject):
        return lazy_name(value)
    if isinstance(value, MaskedSecret):
        return value.text
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
