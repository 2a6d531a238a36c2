"""Import the modules that a Python configuration names, so that what they register is known."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from stratagem.config.source import DATA_SUFFIXES, Source
from stratagem.errors import ConfigKeyError, ConfigParsingError, ConfigTypeError, MissingDependencyError
from stratagem.utils import did_you_mean

__all__ = ["CUSTOM_IMPORTS", "import_custom_modules"]

CUSTOM_IMPORTS = "custom_imports"
_KEYS = ("imports", "allow_failed_imports")


def import_custom_modules(layers: tuple[Source, ...], wanted: Mapping[str, Any] | None) -> None:
    """Import what ``custom_imports`` of the merged layers lists.

    The folders of the Python files that say ``custom_imports`` and of the outermost file go to the front of
    ``sys.path``, as Python does with the folder of a script, and stay there: worker processes unpickle objects of
    these modules later.

    Raises:
        ConfigParsingError: if a data file asks for imports.
        MissingDependencyError: if a module cannot be imported and ``allow_failed_imports`` is not True.
    """
    asking = [layer for layer in layers if CUSTOM_IMPORTS in layer.data]
    for layer in asking:
        if layer.suffix in DATA_SUFFIXES:
            raise ConfigParsingError(
                f"{layer.name} is data and cannot import modules: remove {CUSTOM_IMPORTS}, or say it in a .py file."
            )
    if wanted is None:
        return
    modules, forgive = _parse(wanted)
    for layer in (*asking, layers[-1]):
        folder = str(layer.folder.resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            problem = f"{CUSTOM_IMPORTS}: {module!r} cannot be imported: {error}. Searched: {', '.join(sys.path)}"
            if not forgive:
                raise MissingDependencyError(problem) from error
            warnings.warn(problem, UserWarning, stacklevel=4)


def _parse(wanted: object) -> tuple[list[str], bool]:
    if not isinstance(wanted, Mapping):
        raise ConfigTypeError(f"{CUSTOM_IMPORTS} must be dict(imports=[...]), not {wanted!r}.")
    for key in wanted:
        if key not in _KEYS:
            raise ConfigKeyError(f"{CUSTOM_IMPORTS} has no key {key!r}. {did_you_mean(str(key), _KEYS)}")
    modules = wanted.get("imports", [])
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, list | tuple) or not all(isinstance(module, str) for module in modules):
        raise ConfigTypeError(f"{CUSTOM_IMPORTS}.imports must be a list of module names, not {modules!r}.")
    return list(modules), wanted.get("allow_failed_imports", False) is True
