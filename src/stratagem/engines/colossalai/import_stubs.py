"""Stubs for packages that ColossalAI imports but that the supported plugins do not use.

ColossalAI 0.5.0 imports peft, bitsandbytes and galore_torch with its booster, and transformers when it saves a
checkpoint.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final, final

__all__ = ["import_stubs"]

_LIBRARY: Final = "colossalai"
_PACKAGES: Final = frozenset({"peft", "bitsandbytes", "galore_torch", "transformers"})


@contextmanager
def import_stubs() -> Iterator[None]:
    """Inside the ``with`` block, let ColossalAI import stubs for packages that are not installed.

    Other code cannot find the stubs, and they are removed when the block ends. The library's import-time warnings about
    optional packages and deprecated calls are suppressed, because users cannot act on them.
    """
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.created:
            sys.modules.pop(name, None)


@final
class _Finder(MetaPathFinder, Loader):
    """Find stubs for ColossalAI's imports. It is the last finder, so it is asked only for modules that are not installed."""

    def __init__(self) -> None:
        self.created: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in _PACKAGES and _importer().partition(".")[0] == _LIBRARY:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.created.append(spec.name)
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, since a stub has no code."""


@final
class _Stub(ModuleType):
    """A module whose attributes are empty classes, created on access. ``isinstance`` checks with them return False."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        created = type(name, (), {})
        setattr(self, name, created)
        return created


def _importer() -> str:
    """Return the name of the module that contains the current import statement."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("importlib", "_frozen_importlib")
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))
