"""Import objects by name, so that nothing heavy loads before it is used."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from stratagem.errors import ConfigKeyError, MissingDependencyError
from stratagem.utils.names import did_you_mean

__all__ = ["import_module", "import_object"]


def import_module(name: str, *, extra: str | None = None) -> ModuleType:
    """Import a module; where its package is not installed, say how to get it.

    Raises:
        MissingDependencyError: if the package, or something that it needs, is missing. ``extra`` names the extra
            of Stratagem that installs it.
    """
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        what = f"stratagem[{extra}]" if extra else (error.name or name).partition(".")[0]
        raise MissingDependencyError(
            f"{name} cannot be imported because {error.name!r} is not installed. Install it: pip install {what}"
        ) from error


def import_object(target: str) -> Any:
    """Return what ``"package.module:Name"`` stands for; ``Name`` may be dotted.

    Raises:
        MissingDependencyError: if the module is not installed.
        ConfigKeyError: if the module has no such name.
    """
    module_name, _, path = target.partition(":")
    found: Any = import_module(module_name)
    for part in path.split(".") if path else ():
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigKeyError(f"{module_name} has no {path!r}. {did_you_mean(part, dir(found))}") from error
    return found
