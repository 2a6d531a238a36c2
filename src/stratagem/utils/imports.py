"""Import objects by name, so that nothing heavy loads before it is used."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from stratagem.errors import ConfigKeyError, MissingDependencyError
from stratagem.utils.names import did_you_mean

__all__ = ["drop_working_directory", "import_module", "import_object", "without_working_directory"]

# Where libraries and this package come from, even if one of these folders is the working directory.
_INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
_INSTALLED.add(Path(__file__).resolve().parents[2])


def drop_working_directory() -> None:
    """Import nothing from the working directory from now on.

    ``python -m`` and ``python -c`` put it first on ``sys.path``, where a file could replace any library.
    """
    try:
        here = Path.cwd().resolve()
    except OSError:  # it was removed, so nothing can be imported from it
        return
    if here not in _INSTALLED:
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]


@contextmanager
def without_working_directory() -> Iterator[None]:
    """Import nothing from the working directory inside of the block; see ``drop_working_directory``."""
    before = list(sys.path)
    drop_working_directory()
    kept = list(sys.path)
    try:
        yield
    finally:
        # At their places again, beside whatever the imports added.
        for index, entry in enumerate(before):
            if entry not in kept:
                sys.path.insert(index, entry)


def import_module(name: str, *, extra: str | None = None) -> ModuleType:
    """Import a module, or raise an error that says how to install its package.

    Args:
        name: The module.
        extra: The extra of Stratagem that installs it. Such a library is never imported from the working directory.

    Raises:
        MissingDependencyError: if the package, or something that it needs, is missing.
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
