"""Empty stand-ins for packages that ColossalAI imports whether or not what needs them is used.

ColossalAI 0.5.0 imports peft, bitsandbytes and galore_torch when its booster is imported, and transformers where it
saves. None of them does anything for the plugins offered here.
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
    """Let ColossalAI import what is not installed for the length of a block; packages that are installed win.

    Other code finds neither the stand-ins nor a trace of them afterwards, whether it imports a package or asks where it
    is. What the library warns of while it is imported (optional packages, deprecated calls) is not the user's to mend.
    """
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


@final
class _Finder(MetaPathFinder, Loader):
    """Serves modules to ColossalAI alone; it stands last, so it is asked for what nobody else has."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in _PACKAGES and _importer().partition(".")[0] == _LIBRARY:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@final
class _Empty(ModuleType):
    """A module in which every name is a class of its own without contents, of which nothing is an instance."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def _importer() -> str:
    """Return the name of the module whose import statement is being served."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("importlib", "_frozen_importlib")
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))
