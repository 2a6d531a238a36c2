"""Check integer options of hooks."""

from __future__ import annotations

from typing import Any

from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["require_integer"]


def require_integer(owner: str, name: str, value: Any, *, least: int = 1, otherwise: str = "") -> None:
    """Require that an option is an integer of at least ``least``.

    Args:
        owner: the class that has the option.
        name: the name of the option.
        value: the value.
        least: the smallest valid value.
        otherwise: a special value that is also valid, for error messages.

    Raises:
        ConfigTypeError: if the value is not an integer.
        ConfigValueError: if the value is too small.
    """
    special = f", or {otherwise}" if otherwise else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigTypeError(f"{owner}: expected {name} to be an integer >= {least}{special}, got {value!r}.")
    if value < least:
        raise ConfigValueError(f"{owner}: expected {name} >= {least}{special}, got {value}.")
