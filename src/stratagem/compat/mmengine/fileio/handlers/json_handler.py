"""JSON."""

from __future__ import annotations

import json
from typing import IO, Any

import numpy as np

from stratagem.compat.mmengine.fileio.handlers.base import BaseFileHandler
from stratagem.errors import ConfigTypeError

__all__ = ["JsonHandler"]


class JsonHandler(BaseFileHandler):
    """Read and write JSON. Sets, ranges and NumPy arrays are written as lists, and NumPy numbers as numbers."""

    def load_from_fileobj(self, file: IO[Any], **kwargs: Any) -> Any:
        return json.load(file, **kwargs)

    def dump_to_fileobj(self, obj: Any, file: IO[Any], **kwargs: Any) -> None:
        json.dump(obj, file, **{"default": set_default, **kwargs})

    def dump_to_str(self, obj: Any, **kwargs: Any) -> str:
        return json.dumps(obj, **{"default": set_default, **kwargs})


def set_default(obj: Any) -> Any:
    """Return a value that JSON has for a set, a range, or a NumPy array or number.

    Raises:
        TypeError: for other values.
    """
    if isinstance(obj, set | range):
        return list(obj)
    if isinstance(obj, np.ndarray):
        return obj.tolist()
    if isinstance(obj, np.generic):
        return obj.item()
    raise ConfigTypeError(f"JSON cannot represent {obj!r} ({type(obj).__name__}).")
