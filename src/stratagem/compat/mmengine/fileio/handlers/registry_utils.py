"""The formats by the extension of file names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratagem.compat.mmengine.fileio.handlers.base import BaseFileHandler
from stratagem.compat.mmengine.fileio.handlers.json_handler import JsonHandler
from stratagem.compat.mmengine.fileio.handlers.pickle_handler import PickleHandler
from stratagem.compat.mmengine.fileio.handlers.yaml_handler import YamlHandler
from stratagem.compat.mmengine.utils.misc import is_list_of
from stratagem.errors import ConfigTypeError

__all__ = ["file_handlers", "register_handler"]

file_handlers: dict[str, BaseFileHandler] = {
    "json": JsonHandler(),
    "yaml": YamlHandler(),
    "yml": YamlHandler(),
    "pickle": PickleHandler(),
    "pkl": PickleHandler(),
}


def register_handler(file_formats: str | list[str], **kwargs: Any) -> Callable[[type[Any]], type[Any]]:
    """Return a decorator that registers a class for one or several extensions.

    Args:
        file_formats: the extensions, without the dot.
        kwargs: the arguments of the class.

    The decorator raises a ``TypeError`` if the class is not a ``BaseFileHandler``, or an extension is not a string.
    """

    def decorate(cls: type[Any]) -> type[Any]:
        handler = cls(**kwargs)
        formats = [file_formats] if isinstance(file_formats, str) else file_formats
        if not isinstance(handler, BaseFileHandler):
            raise ConfigTypeError(f"handler must be a child of BaseFileHandler, not {type(handler)}")
        if not is_list_of(formats, str):
            raise ConfigTypeError(f"file_formats must be a str or a list of str, got {file_formats!r}")
        file_handlers.update(dict.fromkeys(formats, handler))
        return cls

    return decorate
