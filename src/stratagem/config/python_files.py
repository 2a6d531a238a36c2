"""Run a Python configuration and take its top-level names. Only ``.py`` files come here."""

from __future__ import annotations

import traceback
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from stratagem.errors import ConfigParsingError, StratagemError

__all__ = ["parse_python"]

_NOT_KEYS = (FunctionType, BuiltinFunctionType, ModuleType, type)


def parse_python(text: str, name: str) -> dict[str, Any]:
    """Execute ``text`` and return its public names that hold values, and ``_base_`` where given.

    Raises:
        ConfigParsingError: if it is not valid Python, or fails when it is executed; with the line.
    """
    namespace: dict[str, Any] = {"__file__": name, "__name__": "stratagem_config"}
    try:
        code = compile(text, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigParsingError(f"{name}{line} is not valid Python: {error}.") from error
    try:
        exec(code, namespace)  # noqa: S102 -- a .py configuration is a program, and documented as one
    except StratagemError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        where = f"{name}:{lines[-1]}" if lines else name
        raise ConfigParsingError(f"{where} failed with {type(error).__name__}: {error}") from error
    return {
        key: value
        for key, value in namespace.items()
        if key == "_base_" or not (key.startswith("_") or isinstance(value, _NOT_KEYS))
    }
