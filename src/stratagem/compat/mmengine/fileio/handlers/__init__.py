"""Formats of files: JSON, YAML and pickle."""

from stratagem.compat.mmengine.fileio.handlers.base import BaseFileHandler
from stratagem.compat.mmengine.fileio.handlers.json_handler import JsonHandler
from stratagem.compat.mmengine.fileio.handlers.pickle_handler import PickleHandler
from stratagem.compat.mmengine.fileio.handlers.registry_utils import file_handlers, register_handler
from stratagem.compat.mmengine.fileio.handlers.yaml_handler import YamlHandler

__all__ = [
    "BaseFileHandler",
    "JsonHandler",
    "PickleHandler",
    "YamlHandler",
    "file_handlers",
    "register_handler",
]
