"""The dotted paths in a configuration that may be imported."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from stratagem.errors import ConfigError, ConfigValueError
from stratagem.utils import nearest_names
from stratagem.utils.data_names import DataName, is_dotted_name

__all__ = [
    "TargetImportError",
    "allow_packages",
    "allowed_packages",
    "import_dotted",
    "is_allowed",
    "is_of_allowed_package",
]

_allowed: set[str] = set()
# Objects whose __module__ names the module that defines them. All other objects, such as instances, belong to the module
# that contains them.
_IMPORTABLE = (type, FunctionType, BuiltinFunctionType, MethodType)


class TargetImportError(ConfigError, RuntimeError):
    """A module in a dotted path exists, but importing it failed."""


def allow_packages(*names: str) -> None:
    """Allow data files (YAML, JSON, TOML) to name any callable in these packages or modules by its dotted path.

    Call this once when the program starts; a configuration file cannot call it. The authors of data files can then call
    every function that these packages define, or list in ``__all__``, with any arguments. Objects that the modules only
    import from elsewhere remain inaccessible.

    Raises:
        ConfigValueError: if a name is not a valid package name.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigValueError(f"{name!r} is not a valid package name.")
    _allowed.update(names)


def allowed_packages() -> frozenset[str]:
    """Return the packages whose contents data files may name."""
    return frozenset(_allowed)


def is_allowed(key: str) -> bool:
    """Return whether ``key`` may be imported: it does not come from a data file, or its package is allowed."""
    return not isinstance(key, DataName) or is_of_allowed_package(key)


def is_of_allowed_package(key: str) -> bool:
    """Return whether ``key`` names an allowed package or an object in an allowed package."""
    return any(key == package or key.startswith((f"{package}.", f"{package}:")) for package in _allowed)


def import_dotted(key: str, known: Callable[[], Iterable[str]]) -> Callable[..., Any] | None:
    """Import the class or function with the dotted path ``key``; return None if there is none.

    ``known`` returns the names to suggest in error messages.

    Raises:
        ConfigValueError: if ``key`` comes from a data file and its package is not allowed, or it names an object that its
            module only imports.
        TargetImportError: if the module exists but importing it fails.
    """
    if not is_dotted_name(key):
        return None
    if not is_allowed(key):
        near = nearest_names(key, known(), most=1)
        raise ConfigValueError(
            f"A data file names {str(key)!r}, which is not a registered name, and data files cannot choose "
            f"what is imported. Register it, write the configuration in Python, or call "
            f"allow_packages({key.partition('.')[0]!r}) in the program."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    parts = _parts(key)
    for end in range(len(parts) - 1, 0, -1):
        found = _import_if_there(".".join(parts[:end]))
        if found is None:
            continue
        if isinstance(key, DataName):
            _refuse_reexported(key, found, parts[end:])
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found if callable(found) else None
    return None


def _parts(key: str) -> list[str]:
    return key.replace(":", ".").split(".")


def _refuse_reexported(key: str, module: Any, path: list[str]) -> None:
    """Reject a name in a data file if it refers to an object outside the allowed packages.

    Raises:
        ConfigValueError: if a component of the name is private, or refers to an object that the module merely imports.
    """
    reason = (
        "which has a part that starts with an underscore" if any(part.startswith("_") for part in _parts(key)) else None
    )
    for part in path:
        if not isinstance(module, ModuleType):
            break
        found = getattr(module, part, None)
        if not _is_defined_in_allowed(found, part, module):
            reason = reason or f"in which {module.__name__} only imports {part!r} from {_defining_module(found)}"
        module = found
    if reason:
        raise ConfigValueError(
            f"A data file names {str(key)!r}, {reason}. A data file can name what the modules of an allowed package define "
            "or list in __all__. Add it to __all__, or write this part of the configuration in Python."
        )


def _is_defined_in_allowed(found: Any, name: str, module: ModuleType) -> bool:
    if isinstance(found, ModuleType):
        return is_of_allowed_package(found.__name__)
    if name in getattr(module, "__all__", ()) or not isinstance(found, _IMPORTABLE):
        return True
    return is_of_allowed_package(_defining_module(found))


def _defining_module(found: Any) -> str:
    return str(found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None) or "builtins")


def _import_if_there(module: str) -> Any:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):  # a parent is missing, or is not a package
        return None
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise TargetImportError(f"Importing {module} failed with {type(error).__name__}: {error}") from error
