"""Makes ``mmengine`` and its submodules refer to the modules of this package."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import final

from stratagem.errors import StateError

__all__ = ["extend_python_path", "install"]

_NAME = "mmengine"
_PACKAGE = "stratagem.compat.mmengine"
# Contains a package called ``mmengine`` that imports this one. Processes that multiprocessing spawns inherit ``sys.path``, and
# import the main script before anything else.
_FOR_SPAWNED = Path(__file__).parent / "for_spawned"


@final
class _AliasLoader(Loader):
    """Load a module of this package under the name of MMEngine's module."""

    _spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_PACKAGE + spec.name.removeprefix(_NAME))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has replaced the specification, on which relative imports in the module depend.
        module.__spec__ = self._spec
        # A finder that comes before this one, such as pytest's, must not load the loaded submodules again.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(f"{module.__name__}."):
                sys.modules.setdefault(_NAME + name.removeprefix(_PACKAGE), loaded)


@final
class _AliasFinder(MetaPathFinder):
    """Find ``mmengine`` and its submodules in this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME and not fullname.startswith(f"{_NAME}."):
            return None
        if importlib.util.find_spec(_PACKAGE + fullname.removeprefix(_NAME)) is None:
            return None
        return spec_from_loader(fullname, _AliasLoader())


def install() -> None:
    """Make ``mmengine`` refer to this package, in this process and in processes that it spawns. Idempotent.

    Raises:
        StateError: if another ``mmengine`` was imported before.
    """
    own = sys.modules[_PACKAGE]
    loaded = sys.modules.get(_NAME)
    folder = os.fspath(_FOR_SPAWNED)
    if loaded is not None and loaded is not own and not _is_for_spawned(loaded):
        raise StateError(
            f"stratagem.compat.mmengine was imported after mmengine ({loaded.__file__}). Make it the first import of the script, "
            "or start the script with `stratagem run-mmengine`."
        )
    sys.modules[_NAME] = own
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())
    if folder not in sys.path:
        # After the folder of the main script, and before installed packages, of which MMEngine may be one.
        sys.path.insert(1, folder)


def extend_python_path() -> None:
    """Make ``mmengine`` refer to this package in all Python programs that this process starts. Idempotent."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folder = os.fspath(_FOR_SPAWNED)
    if folder not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, folders)])


def _is_for_spawned(module: ModuleType) -> bool:
    return module.__file__ is not None and Path(module.__file__).parent.parent == _FOR_SPAWNED
