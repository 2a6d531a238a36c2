"""Whole families of ready names, found in the libraries that define them, which are imported when first asked."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, final

from stratagem.utils import import_module, import_object

__all__ = ["Constructors", "Family", "Members"]


class Family(ABC):
    """Names that a registry knows without listing them."""

    @abstractmethod
    def find(self, name: str) -> Callable[..., Any] | None:
        """Return what ``name`` stands for, or None where it is no name of this family."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the names to choose from in suggestions; may import the library, if it is installed."""


@final
class Members(Family):
    """Every subclass of ``base`` in ``module``, by its name and by its dotted path.

    Args:
        module: Where to look, such as ``"torch.optim"``.
        base: What to accept, as ``"module:Class"``.
        spelled: Further names, each with the name in ``module`` that it stands for.
    """

    def __init__(self, module: str, base: str, spelled: Mapping[str, str] = MappingProxyType({})) -> None:
        self._module = module
        self._base = base
        self._spelled = dict(spelled)

    def find(self, name: str) -> Callable[..., Any] | None:
        short = name.removeprefix(f"{self._module}.")
        if not short.isidentifier() or short.startswith("_"):
            return None
        found = getattr(import_module(self._module), self._spelled.get(short, short), None)
        return found if self._accepts(found) else None

    def names(self) -> Iterable[str]:
        members = inspect.getmembers(import_module(self._module), self._accepts)
        return [name for name, _ in members if not name.startswith("_")] + list(self._spelled)

    def _accepts(self, found: object) -> bool:
        return isinstance(found, type) and issubclass(found, import_object(self._base))


@final
class Constructors(Family):
    """Models that a library makes from a name: ``timm.resnet18`` is ``timm.create_model("resnet18", ...)``.

    Args:
        prefix: What stands before the library's own name, with the dot.
        maker: The function that takes the name first, as ``"module:function"``.
        lister: The function that returns all names.
    """

    def __init__(self, prefix: str, maker: str, lister: str) -> None:
        self._prefix = prefix
        self._maker = maker
        self._lister = lister

    def find(self, name: str) -> Callable[..., Any] | None:
        if not name.startswith(self._prefix):
            return None
        return partial(import_object(self._maker), name.removeprefix(self._prefix))

    def names(self) -> Iterable[str]:
        return [f"{self._prefix}{name}" for name in import_object(self._lister)()]
