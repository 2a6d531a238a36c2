"""Import modules and objects by name, so that libraries are loaded on first use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from stratagem.errors import ConfigKeyError, MissingDependencyError
from stratagem.utils.names import did_you_mean

__all__ = [
    "drop_working_directory",
    "import_module",
    "import_object",
    "is_in_unsearched_working_directory",
    "without_working_directory",
]

# The folders that contain libraries or this package; they stay importable even if one of them is the working directory.
_INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
_INSTALLED.add(Path(__file__).resolve().parents[2])


def drop_working_directory() -> None:
    """Remove the working directory from ``sys.path``.

    ``python -m`` and ``python -c`` put it first, so that a file in it could shadow any library.
    """
    try:
        here = Path.cwd().resolve()
    except OSError:  # The folder no longer exists, so it cannot contain modules.
        return
    if here not in _INSTALLED:
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]


def is_in_unsearched_working_directory(module: str) -> bool:
    """Return whether a package exists in the working directory but cannot be found, because the directory is not searched.

    The console script does not put the working directory on ``sys.path``, unlike ``python -m``.
    """
    top = module.partition(".")[0]
    try:
        here = Path.cwd()
        return importlib.util.find_spec(top) is None and ((here / top).is_dir() or (here / f"{top}.py").is_file())
    except (OSError, ValueError):  # The folder no longer exists, or the name is not a module name.
        return False


@contextmanager
def without_working_directory() -> Iterator[None]:
    """Remove the working directory from ``sys.path`` inside the block; see :func:`drop_working_directory`."""
    before = list(sys.path)
    drop_working_directory()
    kept = list(sys.path)
    try:
        yield
    finally:
        # Restore the removed entries and keep the entries that imports have added.
        for index, entry in enumerate(before):
            if entry not in kept:
                sys.path.insert(index, entry)


def import_module(name: str, *, extra: str | None = None) -> ModuleType:
    """Import a module; if its package is missing, the error states how to install it.

    Args:
        name: The module.
        extra: The ``pip`` extra that installs the package, as in ``pip install stratagem[<extra>]``. If given, the package
            is never imported from the working directory.

    Raises:
        MissingDependencyError: if the package or one of its dependencies is not installed.
    """
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded
    try:
        with without_working_directory() if extra else nullcontext():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        what = f"stratagem[{extra}]" if extra else (error.name or name).partition(".")[0]
        raise MissingDependencyError(
            f"{name} cannot be imported because {error.name!r} is not installed. Install it: pip install {what}"
        ) from error


def import_object(target: str) -> Any:
    """Import ``"package.module:Name"`` and return the object; ``Name`` may be dotted.

    Raises:
        MissingDependencyError: if the module is not installed.
        ConfigKeyError: if the module does not have this name.
    """
    module_name, _, path = target.partition(":")
    found: Any = import_module(module_name)
    for part in path.split(".") if path else ():
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigKeyError(
                f"module {module_name} has no attribute {path!r}. {did_you_mean(part, dir(found))}"
            ) from error
    return found
