"""Import the modules that a Python configuration lists in ``custom_imports``, so that they register their classes."""

from __future__ import annotations

import importlib
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stratagem.config.reading.source import Source
from stratagem.errors import ConfigKeyError, ConfigParsingError, ConfigTypeError, MissingDependencyError
from stratagem.utils import did_you_mean
from stratagem.utils.imports import is_in_unsearched_working_directory

__all__ = ["CUSTOM_IMPORTS", "IMPORT_KEYS", "add_sibling_folders_to_path", "import_custom_modules"]

CUSTOM_IMPORTS = "custom_imports"
IMPORT_KEYS = ("imports", "allow_failed_imports")


def import_custom_modules(layers: tuple[Source, ...], wanted: Mapping[str, Any] | None) -> None:
    """Import the modules listed in ``custom_imports`` of the merged layers.

    The folders of the files with ``custom_imports`` and of the outermost file are put first on ``sys.path``, as Python does
    with the folder of a script. They stay there, because worker processes later unpickle objects from these modules.

    Raises:
        ConfigParsingError: if a module raises an error; the message contains the file and line.
        MissingDependencyError: if a module cannot be imported and ``allow_failed_imports`` is not True.
        ConfigTypeError: if ``wanted`` does not have the form ``dict(imports=[...])``.
        ConfigKeyError: if it has an unknown key.
    """
    if wanted is None:
        return
    modules, forgive = _parse(wanted)
    for layer in layers:
        if CUSTOM_IMPORTS in layer.data or layer is layers[-1]:
            _put_on_path(layer.folder)
    for module in modules:
        if is_in_unsearched_working_directory(module):
            # As with `python -m stratagem`. The console script does not put the working directory on sys.path.
            sys.path.append(str(Path.cwd()))
        try:
            importlib.import_module(module)
        except ImportError as error:
            where = _line_of(error)
            problem = f"{CUSTOM_IMPORTS}: {module!r} cannot be imported{where}: {_explain(error, module)}"
            if not forgive:
                raise MissingDependencyError(problem) from error
            warnings.warn(problem, UserWarning, stacklevel=4)
        except Exception as error:
            raise ConfigParsingError(
                f"{CUSTOM_IMPORTS}: importing {module!r} failed{_line_of(error)}: {type(error).__name__}: {error}"
            ) from error


def _explain(error: ImportError, module: str) -> str:
    """Return the message, with the folders that were searched if the module was not found, or the first cause of the error."""
    message = f"{str(error).rstrip('.')}."
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(f"{error.name}."):
        return f"{message} Searched: {', '.join(sys.path)}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return message if cause is error else f"{message} The cause is {type(cause).__name__}: {cause}"


def _line_of(error: BaseException) -> str:
    """Return the file and line of an error in an imported module; empty if the module itself was not found."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and frame.filename not in (__file__, importlib.__file__)
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def add_sibling_folders_to_path(layers: tuple[Source, ...]) -> None:
    """Add the folders of pure-Python configurations that import modules from their own folder to ``sys.path``."""
    for layer in layers:
        if any((layer.folder / f"{name}.py").is_file() or (layer.folder / name).is_dir() for name in layer.modules):
            _put_on_path(layer.folder)


def _put_on_path(folder: Path) -> None:
    entry = str(folder.resolve())
    if entry not in sys.path:
        sys.path.insert(0, entry)


def _parse(wanted: object) -> tuple[list[str], bool]:
    if not isinstance(wanted, Mapping):
        raise ConfigTypeError(f"{CUSTOM_IMPORTS} must be dict(imports=[...]), got {wanted!r}.")
    for key in wanted:
        if key not in IMPORT_KEYS:
            raise ConfigKeyError(f"{CUSTOM_IMPORTS} has no key {key!r}. {did_you_mean(str(key), IMPORT_KEYS)}")
    modules = wanted.get("imports", [])
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, list | tuple) or not all(isinstance(module, str) for module in modules):
        raise ConfigTypeError(f"{CUSTOM_IMPORTS}.imports must be a list of module names, got {modules!r}.")
    return list(modules), wanted.get("allow_failed_imports", False) is True
